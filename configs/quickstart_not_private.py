"""``configs/quickstart.py`` without differential privacy, everything else equal: what privacy costs.

    python -m experiments.run --config=configs/quickstart_not_private.py

Every clinic's gradient is the mean over five of its examples, neither clipped nor noised.
"""

import dataclasses

from configs import quickstart
from fedjax_llm.config import Experiment
from fedjax_llm.privacy.guarantee import Privacy


def get_config() -> Experiment:
    """The experiment described above."""
    return dataclasses.replace(quickstart.get_config(), privacy=Privacy())
