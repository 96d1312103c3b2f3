"""Runs in MLflow (https://mlflow.org/docs): scalars by round, the configuration, the summary."""

import importlib.util
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from fedjax_llm.errors import UserError
from fedjax_llm.runs.tracking import Run, Tracked

T = TypeVar("T")
_DEFAULT = "sqlite:///runs/mlflow.db"
_MOST = 100  # parameters that one request may hold
_LONGEST = 6000  # characters of a parameter


@dataclass(frozen=True)
class MLflow:
    """Tracks a run in MLflow.

    Attributes:
      uri: of the store: a database's (``sqlite:///runs/mlflow.db``) or a server's; ``None``: what
        ``MLFLOW_TRACKING_URI`` says, else that database.
      experiment: what MLflow calls the group of runs; made if absent.
      sites: whether figures of single sites are kept as well, as far as ``metrics.jsonl`` has them
        (``output.client_metrics``). No guarantee of differential privacy covers them.
    """

    uri: str | None = None
    experiment: str = "fedjax_llm"
    sites: bool = False

    def check(self) -> None:
        """Refuses missing packages, and folders, which MLflow no longer writes."""
        if any(importlib.util.find_spec(name) is None for name in ("mlflow", "sqlalchemy")):
            raise UserError("output.tracking has MLflow, which needs packages: pip install 'fedjax_llm[mlflow]'")
        if "://" not in self._store() and not self._store().startswith("sqlite:"):
            raise UserError(
                f"output.tracking has MLflow(uri={self._store()!r}), which is a folder; MLflow no longer writes "
                f"folders: name a database, such as {_DEFAULT}, or a server"
            )

    def begin(self, run: Run) -> Tracked:
        """Begins a run in the store, or goes on with that of the known id."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would tell its makers of its use
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # else its lines break the display
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        store = self._store()
        if store == _DEFAULT:
            Path("runs").mkdir(exist_ok=True)
        client = MlflowClient(store)
        if run.known is None:
            found = client.get_experiment_by_name(self.experiment)
            group = found.experiment_id if found is not None else client.create_experiment(self.experiment)
            key = client.create_run(group, run_name=run.name).info.run_id
            parameters = [Param(_key(name), text[:_LONGEST]) for name, text in _flat(run.config)]
            for part in _parts(parameters, _MOST):
                client.log_batch(key, params=part)
        else:
            key = run.known
            client.update_run(key, status="RUNNING")

        def scalars(step: int, numbers: Mapping[str, float]) -> None:
            now = int(1000 * time.time())
            for part in _parts([Metric(_key(name), value, now, step) for name, value in numbers.items()], 1000):
                client.log_batch(key, metrics=part)

        def finish(summary: Mapping[str, float | str] | None) -> None:
            numbers = {f"summary/{name}": one for name, one in (summary or {}).items() if not isinstance(one, str)}
            scalars(0, numbers)
            for name, text in (summary or {}).items():
                if isinstance(text, str):
                    client.set_tag(key, _key(f"summary/{name}"), text)
            client.set_terminated(key, "KILLED" if summary is None else "FINISHED")

        return Tracked(key, scalars, finish)

    def _store(self) -> str:
        """Where the runs go."""
        return self.uri or os.environ.get("MLFLOW_TRACKING_URI") or _DEFAULT


def _key(name: str) -> str:
    """A name with what MLflow takes in names; others (of sites, say) become underscores."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)[:250]


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path and text of every leaf of a configuration."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(inner, Mapping) for inner in value):
        for place, inner in enumerate(value):
            yield from _flat(inner, f"{path}.{place}")
    else:
        yield path, str(value)


def _parts(values: Iterable[T], most: int) -> Iterator[list[T]]:
    """The values in lists of at most so many."""
    rest = iter(values)
    while part := list(islice(rest, most)):
        yield part
