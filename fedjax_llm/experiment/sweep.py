"""A sweep: algorithms x data skews x seeds, each an ordinary run in a folder of its own, all in one process.

The base model is loaded once. What is compiled for a run serves the next wherever its static arguments are equal
(``training/client_update.py``, ``federation/``): the backward pass and the held-out losses for all cells whose
microbatches have the same shapes, the clients' optimiser step and the algorithm's own update for cells that share them.
"""

import dataclasses
import functools
import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fedjax_llm import config
from fedjax_llm.config import MAY_CHANGE, Experiment, to_json
from fedjax_llm.errors import UserError, nearest
from fedjax_llm.experiment.prepare import Load, Trunks
from fedjax_llm.experiment.run import run
from fedjax_llm.models.loading import load as load_model
from fedjax_llm.runs import directory, environment, sweep_figures, sweep_table
from fedjax_llm.runs.sweep_progress import SweepProgress

Changes = Mapping[str, Any]
"""Fields of an experiment by their dotted paths, with values: ``{"lora.train": "b", "aggregation": FedAdam()}``."""
INTERRUPTED = 130


@dataclass(frozen=True)
class Sweep:
    """A grid of experiments that differ from a common one in algorithm, data and seed.

    Attributes:
      name: of its folder and its table.
      base: what all have in common. It validates, for the curves and the target.
      algorithms: what each changes, by name. The first is what the others are compared with.
      data: what each data skew changes, by name: ``{"dirichlet 0.1": {"data.partition": DirichletByLabel(8, 0.1)}}``.
      seeds: of the runs.
      target: nats per answer token on validation records that count as reached; ``None``: what the first algorithm has
        after its last round, with the same data and seed. Data skews and seeds have other validation records at their
        sites, so that one number would be hard for some and easy for others.
    """

    name: str
    base: Experiment
    algorithms: Mapping[str, Changes]
    data: Mapping[str, Changes]
    seeds: tuple[int, ...] = (0, 1, 2)
    target: float | None = None

    def __post_init__(self) -> None:
        """Refuses an empty grid, names that share a folder, fields that do not exist, and fields changed twice."""
        for what in ("algorithms", "data", "seeds"):
            if not getattr(self, what):
                raise UserError(f"{what} is empty; a sweep needs at least one")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds is {self.seeds}; name each once")
        if self.target is not None and not self.target > 0:
            raise UserError(f"target is {self.target}; it must be a positive loss in nats per answer token, or None")
        if not self.base.evaluation.validation_every:
            raise UserError(
                "base.evaluation.validation_every is 0, but a sweep's curves are of validation; set it to 1 or more"
            )
        folder_name(self.name)
        for what, variants in (("algorithms", self.algorithms), ("data", self.data)):
            shared = [name for name, count in Counter(map(folder_name, variants)).items() if count > 1]
            if shared:
                raise UserError(f"two of {what} would share the folder {shared[0]!r}; choose names that differ more")
        for algorithm, ours in self.algorithms.items():
            for data, theirs in self.data.items():
                check_paths(self.base, {**theirs, **ours}, "a sweep")
                for path in ours:
                    twice = next((other for other in theirs if _within(path, other) or _within(other, path)), None)
                    if twice:
                        raise UserError(f"algorithm {algorithm!r} changes {path}, and data {data!r} changes {twice}")


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a sweep.

    Attributes:
      algorithm: its name in the sweep.
      data: name of the data skew.
      seed: of the run.
      folder: of the run.
      experiment: the run's; or, where there can be no such run,
      refused: why.
    """

    algorithm: str
    data: str
    seed: int
    folder: Path
    experiment: Experiment | None
    refused: str | None = None


def load(path: str | Path) -> Sweep:
    """The sweep of a Python file with ``get_sweep() -> Sweep``.

    Raises:
      UserError: as for ``config.load``.
    """
    return config.from_file(path, "get_sweep", Sweep)


def folder_name(name: str) -> str:
    """A name as a folder: letters, digits and ``._+-``; anything else becomes a hyphen.

    Raises:
      UserError: nothing would be left of it.
    """
    found = re.sub(r"[^\w.+-]+", "-", name).strip("-.")
    if not found:
        raise UserError(f"{name!r} cannot name a folder; use letters or digits")
    return found


def changed(value: Any, changes: Changes) -> Any:
    """A dataclass with fields replaced by their dotted paths, all at once: only the outcome has to be possible.

    Raises:
      UserError: the outcome is impossible, or a path leads to no field.
    """
    heads, inner = _by_head(changes)
    for head, rest in inner.items():
        heads[head] = changed(heads.get(head, getattr(value, head)), rest)
    return replace(value, **heads)


def cells_of(sweep: Sweep, folder: Path) -> tuple[Cell, ...]:
    """All runs, seed by seed and within a seed data skew by data skew: early on there is one of each algorithm.

    Args:
      sweep: the grid.
      folder: of the sweep; that of a run is ``<algorithm>/<data>/seed-<n>`` in it.
    """
    found = []
    for seed in sweep.seeds:
        for data, skew in sweep.data.items():
            for algorithm, changes in sweep.algorithms.items():
                place = folder / folder_name(algorithm) / folder_name(data) / f"seed-{seed}"
                experiment, refused = None, None
                try:
                    experiment = changed(sweep.base, {**skew, **changes, "seed": seed})
                    config.check(experiment)
                except UserError as error:
                    experiment, refused = None, str(error)
                found.append(Cell(algorithm, data, seed, place, experiment, refused))
    return tuple(found)


def run_sweep(sweep: Sweep, folder: Path, *, console: Console) -> int:
    """Runs what is left of a sweep, and writes ``sweep.json``, ``table.md``, ``table.csv`` and the curves.

    A finished run is not run again, and one that was stopped goes on. A run that ends with a ``UserError`` is told with
    its reason; the others go on.

    Args:
      sweep: the grid.
      folder: of the sweep; made if absent.
      console: where to show progress.

    Returns:
      0; 1 if a run failed; 130 if Ctrl-C ended it.

    Raises:
      UserError: the folder holds a run with other settings or another process uses it, or it cannot be written.
    """
    folder = directory.made(folder, "sweep")
    cells = cells_of(sweep, folder)
    with directory.locked(folder):
        check_settings((cell.folder, cell.experiment) for cell in cells if cell.experiment is not None)
        reasons = {cell: cell.refused for cell in cells if cell.refused is not None}
        left = [cell for cell in cells if cell.refused is None and not finished(cell.folder)]
        console.print(f"{len(cells)} runs, {len(cells) - len(left) - len(reasons)} of them finished before.")
        once = functools.lru_cache(maxsize=1)(load_model)  # most sweeps have one model; two would fill the memory
        try:
            with SweepProgress(len(left), console) as progress:
                for cell, reason in reasons.items():
                    progress.refused(_name(cell), reason)
                for cell in left:
                    progress.begin(_name(cell))
                    reason = _run(cell, once)
                    if reason is not None:
                        reasons[cell] = reason
                        progress.failed(_name(cell), reason)
                    else:
                        progress.done(_name(cell), directory.read_json(cell.folder / "summary.json")["final"]["nll"])
                    write_tables(sweep, folder, cells, reasons)
        except KeyboardInterrupt:
            console.print("Stopped. Finished runs are kept; the same command goes on with the others.")
            return INTERRUPTED
        found = write_tables(sweep, folder, cells, reasons)
        write_curves(folder, found["cells"])
    console.print(sweep_table.table(sweep.name, found["rows"]))
    console.print(f"All figures: {folder}", soft_wrap=True)
    return 1 if reasons else 0


def finished(run_folder: Path) -> bool:
    """Whether a run has left all its files; the report is the last."""
    return all((run_folder / name).exists() for name in (directory.CONFIG, "summary.json", "report.html"))


def write_tables(
    sweep: Sweep, folder: Path, cells: Sequence[Cell], reasons: Mapping[Cell, str | None]
) -> dict[str, Any]:
    """Writes ``sweep.json``, ``table.md`` and ``table.csv`` from what the runs have left so far.

    Args:
      sweep: the grid.
      folder: of the sweep.
      cells: its runs.
      reasons: why runs failed.

    Returns:
      What ``sweep.json`` holds.
    """
    read = [_told(cell, folder, reasons.get(cell)) for cell in cells]
    rows = sweep_figures.rows(read, sweep.target)
    found = {
        "name": sweep.name,
        "config": to_json(sweep),
        "seeds": list(sweep.seeds),
        "environment": environment.describe(),
        "cells": read,
        "rows": rows,
    }
    directory.write_json(folder / "sweep.json", found)
    directory.write_text(folder / "table.md", sweep_table.markdown(sweep.name, rows, sweep.target))
    directory.write_text(folder / "table.csv", sweep_table.comma_separated(rows))
    return found


def write_curves(folder: Path, cells: Sequence[Mapping[str, Any]]) -> None:
    """Writes ``loss_by_round.svg``, ``loss_by_bytes.svg`` and ``error_by_round.svg``.

    Args:
      folder: of the sweep.
      cells: as ``sweep.json`` holds them.
    """
    from fedjax_llm.runs import sweep_plots  # matplotlib: a second that the first run need not wait for

    for draw in (sweep_plots.loss_by_round, sweep_plots.loss_by_bytes, sweep_plots.error_by_round):
        directory.write_text(folder / f"{draw.__name__}.svg", draw(cells))


def _told(cell: Cell, folder: Path, reason: str | None) -> dict[str, Any]:
    """A run as ``sweep.json`` holds it."""
    status = "failed" if reason is not None else "finished" if finished(cell.folder) else "unfinished"
    figures = sweep_figures.read_cell(cell.folder) if status == "finished" else {"figures": None, "curve": None}
    return {
        "algorithm": cell.algorithm,
        "data": cell.data,
        "seed": cell.seed,
        "folder": str(cell.folder.relative_to(folder)),
        "status": status,
        "reason": reason,
        **figures,
    }


def _run(cell: Cell, load_once: Load) -> str | None:
    """Runs a cell, or what is left of it; gives why it failed, if it did.

    Raises:
      KeyboardInterrupt: Ctrl-C, which the run has ended in good order after.
    """
    assert cell.experiment is not None
    try:
        status = run_quietly(cell.experiment, cell.folder, load_once)
    except UserError as error:
        return str(error)
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    return None


def run_quietly(experiment: Experiment, folder: Path, load_once: Load, trunks: Trunks | None = None) -> int:
    """One of many runs, or what is left of it, without a display of its own; its exit status.

    Args:
      experiment: of the run.
      folder: of the run.
      load_once: gives the base model.
      trunks: of the runs before in this process.

    Raises:
      UserError: as for ``run``.
    """
    begun = (folder / directory.CONFIG).exists()
    quiet = Console(file=io.StringIO(), quiet=True, force_terminal=False)
    return run(experiment, folder, resume=begun, console=quiet, load_model=load_once, trunks=trunks)


def check_settings(runs: Iterable[tuple[Path, Experiment]]) -> None:
    """Refuses folders with runs of other settings, before hours are spent on the others.

    Args:
      runs: folder and experiment of each.

    Raises:
      UserError: a folder holds a run of another experiment.
    """
    advice = "take the settings back, choose another folder with --out, or remove that run's folder"
    for folder, experiment in runs:
        path = folder / directory.CONFIG
        if path.exists():
            what = f"the run in {folder} was started with"
            directory.check_same(directory.read_json(path), to_json(experiment), what, advice, MAY_CHANGE)


def check_paths(value: Any, changes: Changes, who: str, place: str = "") -> None:
    """Refuses paths that lead to no field, with the nearest ones.

    Args:
      value: what is changed.
      changes: dotted paths to its fields, and their values.
      who: changes it, for the message.
      place: of ``value`` in the experiment.

    Raises:
      UserError: there is such a path, or one is the seed.
    """
    heads, inner = _by_head(changes)
    known = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    for head in (*heads, *inner):
        if head not in known:
            raise UserError(f"{who} changes {place}{head}, which does not exist{nearest(head, known)}")
        if place + head == "seed":
            raise UserError(f"{who} cannot change seed; name the seeds in seeds")
    for head, rest in inner.items():
        check_paths(heads.get(head, getattr(value, head)), rest, who, f"{place}{head}.")


def _by_head(changes: Changes) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Whole fields with their values, and by field what changes within it."""
    heads: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        head, _, rest = path.partition(".")
        if rest:
            inner.setdefault(head, {})[rest] = value
        else:
            heads[head] = value
    return heads, inner


def _within(path: str, other: str) -> bool:
    """Whether a path is another one, or leads into what it names."""
    return path == other or path.startswith(f"{other}.")


def _name(cell: Cell) -> str:
    """A run for people."""
    return f"{cell.algorithm}, {cell.data}, seed {cell.seed}"
