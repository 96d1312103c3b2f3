"""``configs/all_layers.py`` with adapters of a tenth of a percent: rank 2 on q and v.

    python -m experiments.run --config=configs/tenth_percent.py

Trains 115,200 of 134,515,008 parameters (0.086%); an update is 0.46 MB.
"""

import dataclasses

from configs import all_layers
from fedjax_llm.config import Experiment
from fedjax_llm.lora import Lora


def get_config() -> Experiment:
    """The experiment described above."""
    return dataclasses.replace(all_layers.get_config(), lora=Lora(rank=2, alpha=4, targets=("q_proj", "v_proj")))
