"""What a curious server reads from the updates of adapters, on the real model and real text.

    python -m experiments.attack --config=configs/attacks/curious_server.py

Minutes on two cores. The model is cut to its 8 lowest layers, for time: the attack reads the updates of layers 0 and 1,
and finds the same behind all 30. The text is medical flashcards, one or more a client; the server knows the chat
template, which counts for nothing.
"""

from fedjax_llm.experiment.curious_server import CuriousServer
from fedjax_llm.leakage.inversion import Inversion


def get_attack() -> CuriousServer:
    """The attack described above."""
    return CuriousServer(
        depth=8,
        inversion=Inversion(steps=60, restarts=1, sweeps=2, candidates=16),
        inversion_tokens=5,
    )
