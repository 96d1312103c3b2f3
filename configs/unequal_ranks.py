"""Clinics with adapters of different ranks, joined by FlexLoRA's singular value decomposition.

    python -m experiments.run --config=configs/unequal_ranks.py

The sites train 8, 4 or 2 components of adapters of rank 8, dealt out in turn; what travels is in proportion. Each
round's aggregation error says what cutting the clients' mean down to rank 8 loses.
"""

from dataclasses import replace

from configs.all_layers import get_config as all_layers
from fedjax_llm.aggregation.flexlora import FlexLora
from fedjax_llm.config import Experiment


def get_config() -> Experiment:
    """The experiment described above."""
    plain = all_layers()
    return replace(plain, lora=replace(plain.lora, ranks=(8, 4, 2)), aggregation=FlexLora())
