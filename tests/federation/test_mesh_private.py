"""Private and secure rounds on eight virtual devices: the same bounds, and the same noise, drawn once."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from toy_mesh import CUBE, ROUNDING, Played, apart, assert_told_alike, everywhere_the_same, on_mesh, play_from
from toy_mesh import states_apart as states_apart
from toy_private import CLIP, distance, fedavg, private_plan, toy_base

from fedjax_llm import mesh as meshes
from fedjax_llm.federation import release
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.privacy import noise
from fedjax_llm.privacy.correlated import BandedToeplitz
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.local_dp import LocalDp
from fedjax_llm.privacy.mechanism import AdaptiveClip
from fedjax_llm.training import client_update
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer
