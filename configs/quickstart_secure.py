"""The quickstart without a trusted server: clinics mask what they send, and each adds its share of the noise.

    python -m experiments.run --config=configs/quickstart_secure.py
    python -m experiments.privacy --config=configs/quickstart_secure.py       # what it will guarantee

In the quickstart the server sees every clinic's update, adds them up and draws the noise. Here it sees masked integers
and their sum (SecAgg), in which the noise already is: every clinic adds a share (Skellam). The shares are sized so that
those of six of the eight clinics suffice: one clinic may drop out in a round, and one may tell the server all it knows.
If more drop out the round is abandoned and nothing is released. The guarantee now holds against the server too; it
costs noise for the worst case, and Renyi accounting, which is looser than that of the quickstart.
"""

from dataclasses import replace

from configs import quickstart
from fedjax_llm.config import Experiment
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.skellam import Skellam
from fedjax_llm.secure.sec_agg import SecAgg


def get_config() -> Experiment:
    """The experiment described above."""
    experiment = quickstart.get_config()
    mechanism = DpFedSgd(clip_norm=0.15, sampling_probability=0.014, distributed=Skellam())
    return replace(
        experiment,
        secure=SecAgg(threshold=7, colluders=1),
        privacy=replace(experiment.privacy, mechanism=mechanism),
    )
