"""The quickstart between eight clinics that keep their cards: a server and eight sites over Flower, on this machine.

    python -m experiments.deploy --config=configs/deploy/quickstart.py
    python -m experiments.deploy --config=configs/deploy/quickstart.py --simulate     # the same in one process

Every clinic is a process of its own that reads its own cards alone. Each keeps a budget of its own, which no server can
make it exceed. A real site has a file like ``site.py`` beside this one.
"""

from dataclasses import replace

from configs import quickstart
from fedjax_llm.config import Experiment
from fedjax_llm.data.at_sites import AtSites
from fedjax_llm.data.hpo import HpoFlashcards
from fedjax_llm.deployment.site import Budget, Site

CLINICS = ("blood", "cardiovascular", "digestive", "ear", "endocrine", "eye", "immune", "respiratory")


def get_config() -> Experiment:
    """The experiment described above."""
    experiment = quickstart.get_config()
    return replace(
        experiment,
        data=replace(experiment.data, source=AtSites(CLINICS)),
        evaluation=replace(experiment.evaluation, generations=0),
        execution=replace(experiment.execution, clients_per_chunk=1, buckets=2),
    )


def get_sites() -> tuple[Site, ...]:
    """The clinics of the trial."""
    return tuple(
        Site(name, data=HpoFlashcards(sites=(name,)), job=__file__, budget=Budget(epsilon=8.0, delta=1e-5))
        for name in CLINICS
    )
