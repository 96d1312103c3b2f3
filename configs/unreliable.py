"""Clinics that drop out or are late, and send a twentieth of their update in eight bits.

    python -m experiments.run --config=configs/unreliable.py

In every round 1.5 times the cohort is selected; one in ten never answers, and the round closes when a cohort has. What
was sent in vain is counted. Of each update the twentieth of largest magnitude travels, in 8 bits a value; the rest is
remembered and sent later (error feedback).
"""

from dataclasses import replace

from configs.all_layers import get_config as all_layers
from fedjax_llm.compression.quantise import Quantise
from fedjax_llm.compression.top_k import TopK
from fedjax_llm.config import Experiment
from fedjax_llm.federation.availability import Availability


def get_config() -> Experiment:
    """The experiment described above."""
    plain = all_layers()
    availability = Availability(dropout=0.1, spread=0.5, jitter=0.3, over_selection=1.5)
    federation = replace(plain.federation, availability=availability)
    return replace(plain, federation=federation, compression=TopK(0.05, values=Quantise(8)))
