"""``configs/many_sites.py`` without differential privacy, everything else equal: what privacy costs.

python -m experiments.run --config=configs/many_sites_not_private.py
"""

import dataclasses

from configs import many_sites
from fedjax_llm.config import Experiment
from fedjax_llm.privacy.guarantee import Privacy


def get_config() -> Experiment:
    """The experiment described above."""
    return dataclasses.replace(many_sites.get_config(), privacy=Privacy())
