"""One model on the same planted data, trained in several ways at equal tokens: what each is worth, and what it leaks.

Every training is an ordinary run in a folder of its own, and every model meets the same ground (``ground.py``).
"""

import functools
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from fedjax_llm import config, peft
from fedjax_llm.config import Experiment, to_json
from fedjax_llm.data.planted import PlantedSecrets
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.attacked_run import LEAKAGE, claim_of, keep, verdict
from fedjax_llm.experiment.course_report import course_sections, course_tables
from fedjax_llm.experiment.ground import Attacks, Ground, ground_of, trunk_of
from fedjax_llm.experiment.measures import (
    Shadows,
    Tuned,
    candidate_scores,
    measure,
    shadow_statistics,
    text_audit,
    untuned,
)
from fedjax_llm.experiment.memorisation import RESULT, Memorisation, run_memorisation
from fedjax_llm.experiment.memory import set_up_process
from fedjax_llm.experiment.prepare import Load, Trunks
from fedjax_llm.experiment.sweep import (
    INTERRUPTED,
    Changes,
    changed,
    check_paths,
    check_settings,
    finished,
    folder_name,
    run_quietly,
)
from fedjax_llm.leakage.audit import CONTRADICTED
from fedjax_llm.leakage.token_scores import TokenScores
from fedjax_llm.lora import Lora
from fedjax_llm.models.causal_lm import lowest_adapted
from fedjax_llm.models.loading import BaseModel, load
from fedjax_llm.runs import directory, encryption, environment, leak_page
from fedjax_llm.runs.progress import RunProgress
from fedjax_llm.training.trunk import TrunkCache
from fedjax_llm.types import Adapters

BASE = "base model"
_FULL = "full-fine-tuning"


@dataclass(frozen=True)
class Course:
    """Ways to train one model on one dataset with planted secrets, each with several seeds.

    Attributes:
      experiment: what all ways have in common; its source plants secrets.
      ways: what each changes, by name (dotted paths to fields of the experiment). None may change the data.
      seeds: of training: adapters, order, cohorts, noise. The planted secrets are the same for all.
      attacks: that every model is put through.
      memorisation: full fine-tuning beside LoRA, at the end; ``None``: left out.
    """

    experiment: Experiment
    ways: Mapping[str, Changes]
    seeds: tuple[int, ...] = (0, 1, 2)
    attacks: Attacks = Attacks()
    memorisation: Memorisation | None = None

    def __post_init__(self) -> None:
        """Refuses an empty course, data that differ, and what no adapters of all sites come from."""
        if not self.ways or not self.seeds:
            raise UserError("a course needs at least one way and one seed")
        source = self.experiment.data.source
        if not (isinstance(source, PlantedSecrets) and source.repetitions and source.per_repetition):
            raise UserError("a course needs secrets planted without coins: set repetitions and per_repetition")
        if BASE in self.ways:
            raise UserError(f"no way can be called {BASE!r}: that is the model before training")
        shared = [name for name, count in Counter(map(folder_name, self.ways)).items() if count > 1]
        if shared:
            raise UserError(f"two ways would share the folder {shared[0]!r}; choose names that differ more")
        for name, changes in self.ways.items():
            check_paths(self.experiment, changes, f"way {name!r}")
            experiment = changed(self.experiment, changes)
            if experiment.data != self.experiment.data or experiment.model != self.experiment.model:
                raise UserError(f"way {name!r} changes data or model: the ways would meet different ground")
            if experiment.setting not in ("federated", "centralised"):
                raise UserError(
                    f"way {name!r} has the setting {experiment.setting}, which gives no adapters of all sites"
                )


class Cell(NamedTuple):
    """One training: its way, its seed, its folder, its experiment."""

    way: str
    seed: int
    folder: Path
    experiment: Experiment


class _Field(NamedTuple):
    """What all attacks of a course share; ``trunks`` by the number of layers below the adapters."""

    ground: Ground
    trunks: dict[int, TrunkCache | None]
    base_scores: list[TokenScores]
    base_coins: dict[int, float]
    shadows: Shadows | None


def run_course(course: Course, folder: Path, console: Console, load_model: Load = load) -> int:
    """Trains and attacks what is left, and writes ``course.json``, ``leakage.html`` and ``leakage.md``.

    Args:
      course: what to do.
      folder: of the course; that of a run is ``<way>/seed-<n>`` in it.
      console: where to show progress.
      load_model: gives the base model, once.

    Returns:
      0; ``CONTRADICTED`` if an audit shows more than a run claims; 130 if Ctrl-C ended it.

    Raises:
      UserError: a run in the folder has other settings, or a run fails.
    """
    set_up_process()
    folder = directory.made(folder, "course")
    cells = cells_of(course, folder)
    check_settings((cell.folder, cell.experiment) for cell in cells)
    once = functools.lru_cache(maxsize=1)(load_model)
    with directory.locked(folder), RunProgress(1, console) as progress:
        _check_attacks(course.attacks, folder)
        if _train_all(cells, once, progress) == INTERRUPTED:
            progress.say("Stopped. Finished runs are kept; the same command goes on with the others.")
            return INTERRUPTED
        _attack_all(course, folder, cells, once, progress)
        found = _write(course, folder, cells)
        if course.memorisation is not None:
            run_memorisation(course.memorisation, folder / _FULL, console, once)
            found = _write(course, folder, cells)
    for table in course_tables(found):
        console.print(table)
    console.print(f"Figures: {folder / 'course.json'}   Report: {folder / 'leakage.html'}", soft_wrap=True)
    statuses = [verdict(one, console) for one in found["runs"]]
    return CONTRADICTED if any(statuses) else 0


def _write(course: Course, folder: Path, cells: tuple[Cell, ...]) -> dict[str, Any]:
    """Writes the figures and the page from what there is."""
    path = folder / _FULL / RESULT
    more = directory.read_json(path) if path.exists() else None
    whole = more is not None and len(more["trainings"]) == 2  # one training alone compares with nothing
    found = gathered(course, folder, cells, more if whole else None)
    directory.write_json(folder / "course.json", found)
    title = "Centralised, federated, federated and private: what each gives away"
    leak_page.write(folder, title, *course_sections(found))
    return found


def _train_all(cells: tuple[Cell, ...], load_once: Load, progress: RunProgress) -> int:
    """Trains what is left; 0, or the status of a run that Ctrl-C has ended."""
    trunks: Trunks = {}
    with progress.phase("Training", len(cells), "runs") as advance:
        for cell in cells:
            if not finished(cell.folder):
                progress.say(f"{cell.way}, seed {cell.seed}: training ...")
                if run_quietly(cell.experiment, cell.folder, load_once, trunks) == INTERRUPTED:
                    return INTERRUPTED
            advance(1)
    return 0


def cells_of(course: Course, folder: Path) -> tuple[Cell, ...]:
    """All trainings, seed by seed."""
    found = []
    for seed in course.seeds:
        for name, changes in course.ways.items():
            experiment = changed(course.experiment, {**changes, "seed": seed})
            config.check(experiment)
            found.append(Cell(name, seed, folder / folder_name(name) / f"seed-{seed}", experiment))
    return tuple(found)


def _check_attacks(attacks: Attacks, folder: Path) -> None:
    """Refuses a folder whose figures are of other attacks; a new one learns which they are."""
    path, settings = folder / "attacks.json", to_json(attacks)
    if path.exists():
        what = f"the models in {folder} were attacked with"
        advice = "take the settings back, or choose another folder with --out"
        directory.check_same(directory.read_json(path), settings, what, advice)
    directory.write_json(path, settings)


def _attack_all(course: Course, folder: Path, cells: tuple[Cell, ...], load_once: Load, progress: RunProgress) -> None:
    """Attacks the base model and every run that has not been attacked."""
    left = [cell for cell in cells if not (cell.folder / LEAKAGE).exists()]
    if not left and (folder / "base.json").exists():
        return
    model = course.experiment.model
    base = load_once(model.name, model.dtype, model.quantise)
    with progress.phase("Laying out the attacks"):
        ground = ground_of(course.experiment, course.attacks, base)
    field: _Field | None = None
    for cell in left or cells[:1]:
        lora, adapters = peft.read_adapter_for(cell.folder / "adapter", base.model, encryption.read)
        if field is None:
            field = _field(course, folder, ground, lora, adapters, progress)
        if cell in left:
            progress.say(f"{cell.way}, seed {cell.seed}: attacks ...")
            _attack(course, cell, field, lora, adapters, base, progress)


def _tuned(
    course: Course, ground: Ground, trunks: dict[int, TrunkCache | None], lora: Lora, adapters: Adapters
) -> Tuned:
    """A model, with the trunk that it shares with the others."""
    layers = lowest_adapted(adapters)
    if layers not in trunks:
        trunks[layers] = trunk_of(ground, course.attacks, layers)
    return Tuned(lora, adapters, trunks[layers])


def _field(
    course: Course, folder: Path, ground: Ground, lora: Lora, adapters: Adapters, progress: RunProgress
) -> _Field:
    """The base model's figures, which it also writes, and the shadows, which it keeps."""
    trunks: dict[int, TrunkCache | None] = {}
    plain = untuned(ground, _tuned(course, ground, trunks, lora, adapters))
    scores = candidate_scores(ground, plain, progress.phase)
    shadows = _shadows(course, folder, ground, plain, progress) if course.attacks.shadows else None
    if not (folder / "base.json").exists():
        progress.say(f"{BASE}: attacks ...")
        found = measure(ground, plain, course.attacks, progress.phase, base_scores=scores, shadows_of=shadows)
        directory.write_json(folder / "base.json", found)
    return _Field(ground, trunks, scores, _coins(directory.read_json(folder / "base.json")), shadows)


def _coins(plain: Mapping[str, Any]) -> dict[int, float]:
    """The base model's log-likelihoods of secrets that were planted by coins."""
    return {one["number"]: one["log_probability"] for one in plain["secrets"] if one["coin"]}


def _shadows(course: Course, folder: Path, ground: Ground, tuned: Tuned, progress: RunProgress) -> Shadows:
    """The shadows' figures: those that are kept, or new ones."""
    path = folder / "shadows.npz"
    if path.exists():
        with np.load(path) as kept:
            return Shadows(*(kept[name] for name in Shadows._fields))
    found = shadow_statistics(ground, tuned, course.attacks, progress.phase)
    out = io.BytesIO()
    np.savez(out, **found._asdict())
    directory.write_bytes(path, out.getvalue())
    return found


def _attack(
    course: Course, cell: Cell, field: _Field, lora: Lora, adapters: Adapters, base: BaseModel, progress: RunProgress
) -> None:
    """Attacks one run and writes its ``leakage.json``."""
    claim = claim_of(cell.folder)
    tuned = _tuned(course, field.ground, field.trunks, lora, adapters)
    known = {"base_scores": field.base_scores, "base_coins": field.base_coins, "shadows_of": field.shadows}
    figures = measure(field.ground, tuned, course.attacks, progress.phase, claim=claim, **known)
    keep(cell.folder, figures, course.attacks, claim, base, adapters, None)


def gathered(course: Course, folder: Path, cells: tuple[Cell, ...], more: Any) -> dict[str, Any]:
    """What ``course.json`` holds: utility and leaks of every model, without curves (these stay with the runs)."""
    read, plain = [], directory.read_json(folder / "base.json")
    for cell in cells:
        summary, leaks = directory.read_json(cell.folder / "summary.json"), directory.read_json(cell.folder / LEAKAGE)
        read.append(
            {
                "way": cell.way,
                "seed": cell.seed,
                "folder": str(cell.folder.relative_to(folder)),
                "base": _utility(summary["base"]),
                "final": _utility(summary["final"]),
                "difference": summary["difference"]["macro"],
                "tokens_trained": summary["tokens_trained"],
                "train_seconds": summary["train_seconds"],
                "claim": leaks["claim"],
                "membership": leaks["membership"],
                "secrets": leaks["secrets"],
                "audit": text_audit(leaks["secrets"], _coins(plain), course.attacks.significance, leaks["claim"]),
            }
        )
    return {
        "config": to_json(course.experiment),
        "ways": list(course.ways),
        "seeds": list(course.seeds),
        "attacks": to_json(course.attacks),
        "environment": environment.describe(),
        "base": plain,
        "runs": read,
        "memorisation": more,
    }


def _utility(figures: Mapping[str, Any]) -> dict[str, float]:
    """Loss and next-token accuracy on held-out records, with intervals."""
    return {name: figures[name] for name in ("nll", "nll_low", "nll_high", "token_accuracy")}
