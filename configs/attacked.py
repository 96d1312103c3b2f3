"""Two of the eight clinics are malicious: they send the negative of what they have trained, five times as large.

    python -m experiments.run --config=configs/attacked.py
    python -m experiments.run --config=configs/all_layers.py --federation.cohort=8       # nobody attacks

The server cuts the two largest and the two smallest values of each coordinate before it takes the mean (the trimmed
mean), so the tuned model should come near to that of the run without an attack, a little behind it: the cut takes
honest values too, and the two clinics' flashcards are lost. With ``FedAvg()`` here instead, the two outweigh the other
six, and the tuned model should come out worse than the untouched base.

All eight take part in each round: in a smaller cohort the two could be more than the share that is cut. About twice
the work of ``configs/all_layers.py``.
"""

from dataclasses import replace

from configs.all_layers import get_config as all_layers
from fedjax_llm.adversaries.sign_flip import SignFlip
from fedjax_llm.aggregation.trimmed_mean import TrimmedMean
from fedjax_llm.config import Experiment


def get_config() -> Experiment:
    """The experiment described above."""
    plain = all_layers()
    return replace(
        plain,
        federation=replace(plain.federation, cohort=None),
        aggregation=TrimmedMean(trim=0.25),
        attack=SignFlip(scale=5.0),
        malicious=0.25,
    )
