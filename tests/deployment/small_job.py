"""A job between three sites in miniature: a tiny model, invented records, and workers in this process."""

import dataclasses
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from small_run import SITES, write_sites
from tiny import tiny_base

from fedjax_llm.data.site_files import SiteFiles
from fedjax_llm.deployment.certificates import make_signing_key
from fedjax_llm.deployment.desk import Rules
from fedjax_llm.deployment.in_memory import InMemory
from fedjax_llm.deployment.job import load_job
from fedjax_llm.deployment.messages import Said, Transport, from_bytes, to_bytes
from fedjax_llm.deployment.serve import serve, simulate
from fedjax_llm.deployment.site import Budget, Site
from fedjax_llm.deployment.worker import Worker
from fedjax_llm.peft import read_adapter
from fedjax_llm.runs import metrics

NAMES = tuple(SITES)
JOB = '''"""A miniature job."""

from fedjax_llm.aggregation.{module} import {algorithm}
from fedjax_llm.config import Data, Experiment, Model
from fedjax_llm.data.splits import Fractions
from fedjax_llm.data.at_sites import AtSites
from fedjax_llm.evaluation.evaluate import Evaluation
from fedjax_llm.federation.plan import Execution, Federation
from fedjax_llm.lora import Lora
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.secure.sec_agg import SecAgg
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer


def get_config():
    return Experiment(
        model=Model(name="tiny"),
        lora={lora},
        data=Data(AtSites(("coast", "hill", "town")), fractions=Fractions(0.2, 0.2), max_length=96),
        training={training},
        federation=Federation(rounds={rounds}, weighting="uniform"),
        aggregation={algorithm}(),
        privacy={privacy},
        secure={secure},
        evaluation=Evaluation(generations=0, bootstrap_resamples=50, validation_every=2),
        execution=Execution(tokens_per_microbatch=384, buckets=1, evaluation_buckets=1, clients_per_chunk={chunk}),
    )
'''
PLAIN = "LocalTraining(batch_size=2, local_steps=2, optimizer=Optimizer('adamw', 1e-2))"
ONE_STEP = "LocalTraining(batch_size=2, local_steps=1, optimizer=Optimizer('sgd', 1.0))"
PRIVATE = (
    "Privacy(mechanism=DpFedSgd(clip_norm=0.5, sampling_probability=0.3), unit='record', target_epsilon=8.0, "
    "delta=1e-3, real_data=False)"
)


def write_job(folder: Path, **changes: Any) -> Path:
    """The job's file; ``changes`` fill its places."""
    fields = {"module": "fedavg", "algorithm": "FedAvg", "training": PLAIN, "rounds": 2, "privacy": "Privacy()"}
    fields |= {"secure": None, "chunk": 1, "lora": "Lora(rank=2, alpha=4.0)"} | changes
    path = folder / "job.py"
    path.write_text(JOB.format(**fields))
    return path


def private_job(folder: Path, **changes: Any) -> Path:
    """The same with record-level privacy: sums of clipped gradients, and noise on their sum."""
    return write_job(folder, **{"training": ONE_STEP, "privacy": PRIVATE} | changes)


def sources(folder: Path) -> dict[str, SiteFiles]:
    """Each site's own text."""
    texts = folder / "sites"
    if not texts.exists():
        write_sites(texts)
    return {name: SiteFiles((str(texts / f"{name}.jsonl"),), id_column="id") for name in NAMES}


def tiny(*_: Any) -> Any:
    """The tiny model, whatever is asked for."""
    return tiny_base()


def quiet() -> Console:
    """A console that nobody sees."""
    return Console(file=io.StringIO(), width=120)


def signing(folder: Path) -> dict[str, bytes]:
    """Makes every site's signing key and their directory; gives the public halves."""
    path = folder / "directory.json"
    if not path.exists():
        path.write_text(json.dumps({name: make_signing_key(folder / "keys", name)[1] for name in NAMES}))
    return {name: bytes.fromhex(key) for name, key in json.loads(path.read_text()).items()}


def worker(folder: Path, job: Path, name: str, budget: Budget | None = None, **fields: Any) -> Worker:
    """One site."""
    signing(folder)
    keys = {"signing_key": str(folder / "keys" / f"{name}-signing.pem"), "directory": str(folder / "directory.json")}
    fields = keys | fields
    site = Site(name, sources(folder)[name], str(job), folder=str(folder / f"at-{name}"), budget=budget)
    return Worker(dataclasses.replace(site, **fields), tiny, quiet())


def workers(folder: Path, job: Path, budget: Budget | None = None) -> dict[str, Worker]:
    """All sites."""
    return {name: worker(folder, job, name, budget) for name in NAMES}


def deployed(
    folder: Path, job: Path, transport: Transport | None = None, rules: Rules | None = None, **options: Any
) -> Mapping[str, Any]:
    """Runs the job over its sites; the run is in ``folder/"run"``."""
    over = transport or InMemory(workers(folder, job))
    rules = rules or Rules(pause=0.0)
    options = {"console": quiet(), "signing": signing(folder)} | options
    return serve(load_job(job), folder / "run", over, rules, load_model=tiny, **options)


def simulated(folder: Path, job: Path) -> Mapping[str, Any]:
    """Simulates it in this process; the run is in ``folder/"simulation"``."""
    return simulate(load_job(job), folder / "simulation", sources(folder), console=quiet(), load_model=tiny)


def adapters(run: Path) -> dict[str, np.ndarray]:
    """The adapters of a run, flat."""
    _, found = read_adapter(run / "adapter")
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(found)}


def same_bits(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> bool:
    """Whether two adapters are the same bit for bit."""
    return left.keys() == right.keys() and all(left[name].tobytes() == right[name].tobytes() for name in left)


def events(run: Path) -> list[tuple[int, str, str, str]]:
    """What became of sites: round, site, what, why."""
    path = run / "sites.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(one["round"], one["site"], one["what"], one["why"]) for one in found]


Hand = Callable[[str, Said, Callable[[], Said]], Said | None]


class Disturbed:
    """Carries messages to workers, with a hand in between.

    Args:
      workers: by site.
      hand: (site, request, the way to the site's worker) -> its answer, or ``None`` where none comes in time.
    """

    def __init__(
        self, workers: dict[str, Worker], hand: Callable[[str, Said, Callable[[], Said]], Said | None]
    ) -> None:
        self.workers, self._hand = workers, hand

    def ask(self, requests: Mapping[str, Said], deadline: float | None) -> Mapping[str, Said]:
        """What the hand lets through."""
        found = {}
        for name, request in requests.items():
            told = self._hand(name, request, lambda name=name, request=request: self._reach(name, request))
            if told is not None:
                found[name] = told
        return found

    def _reach(self, name: str, request: Said) -> Said:
        """One site's own answer."""
        return from_bytes(to_bytes(self.workers[name].answer(from_bytes(to_bytes(request)))))


def lines(run: Path) -> list[Mapping[str, Any]]:
    """A run's metrics but for timing."""
    return [metrics.deterministic(line) for line in metrics.read(run / "metrics.jsonl")]
