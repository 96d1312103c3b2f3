"""Full fine-tuning beside LoRA on the same planted data: what each has memorised when both are as good.

Bossy et al. 2025 (arXiv 2502.05087) report that LoRA memorises up to ten times less in federated fine-tuning. Here both
train in one place on the same batches, and are compared where their validation losses are equal.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from fedjax_llm import lora as low_rank
from fedjax_llm.config import Experiment, to_json
from fedjax_llm.data.packing import Shape, choose_shapes
from fedjax_llm.data.planted import PlantedSecrets
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.errors import UserError
from fedjax_llm.evaluation.heldout import score
from fedjax_llm.experiment.ground import Attacks, Ground, ground_of
from fedjax_llm.experiment.measures import Tuned, planted_figures
from fedjax_llm.experiment.memorisation_report import OFTEN, memorisation_section
from fedjax_llm.experiment.memory import set_up_process
from fedjax_llm.experiment.prepare import Load, encode, load_dataset, split_sites
from fedjax_llm.lora import Lora
from fedjax_llm.models.loading import BaseModel, load
from fedjax_llm.models.truncation import truncated
from fedjax_llm.runs import directory, environment, leak_page
from fedjax_llm.runs.progress import RunProgress
from fedjax_llm.training import whole
from fedjax_llm.training.optimizers import Optimizer

RESULT = "memorisation.json"


@dataclass(frozen=True)
class Memorisation:
    """Both trainings.

    Attributes:
      experiment: model and data; its source plants secrets.
      layers: of the model that are kept; ``None``: all.
      lora: the adapters.
      learning_rates: of AdamW, for all weights and for the adapters.
      batch_size: examples a step.
      steps: of each training.
      checks: how often validation loss and secrets are looked at on the way.
      validation: records of all sites together, at most.
      references: values that each secret is ranked among at every check.
      seed: of adapters and order.
    """

    experiment: Experiment
    layers: int | None = None
    lora: Lora = Lora(rank=8, alpha=16, targets=("*_proj",))
    learning_rates: tuple[float, float] = (5e-5, 1e-3)
    batch_size: int = 16
    steps: int = 120
    checks: int = 8
    validation: int = 80
    references: int = 23
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        for name in ("batch_size", "steps", "checks", "validation", "references"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.checks > self.steps:
            raise UserError(f"checks is {self.checks}, but there are only {self.steps} steps")
        if len(self.learning_rates) != 2:
            raise UserError("learning_rates holds two numbers: for all weights, and for the adapters")
        source = self.experiment.data.source
        stated = source.repetitions if isinstance(source, PlantedSecrets) and source.per_repetition else ()
        if max(stated, default=0) < OFTEN:
            raise UserError(f"nothing could be compared: choose a source that plants secrets {OFTEN} times or more")


class _Bench(NamedTuple):
    """What both trainings share; ``shapes`` are of validation's microbatches."""

    base: BaseModel
    attacks: Attacks
    ground: Ground
    train: tuple[EncodedExample, ...]
    validation: tuple[EncodedExample, ...]
    shapes: tuple[Shape, ...]


def run_memorisation(attack: Memorisation, folder: Path, console: Console, load_model: Load = load) -> int:
    """Trains both, and writes ``memorisation.json``; a training that is there already is not repeated.

    Args:
      attack: what to do.
      folder: for the results.
      console: where to show progress.
      load_model: gives the model.

    Returns:
      0.

    Raises:
      UserError: the folder's results are of other settings.
    """
    set_up_process()
    folder = directory.made(folder, "comparison")
    path, settings = folder / RESULT, to_json(attack)
    found: dict[str, Any] = {"attack": settings, "environment": environment.describe(), "trainings": {}}
    if path.exists():
        found = directory.read_json(path)
        advice = "take them back, or choose another folder with --out"
        directory.check_same(found["attack"], settings, f"{path} is of", advice)
    kinds: tuple[tuple[str, whole.Trained], ...] = (("full fine-tuning", "weights"), ("LoRA", "adapters"))
    left = [(name, trained) for name, trained in kinds if name not in found["trainings"]]
    with RunProgress(1, console) as progress:
        bench = _bench(attack, progress, load_model) if left else None
        for name, trained in left:
            assert bench is not None
            found["model"] = bench.base.name
            with progress.phase(f"Training, {name}", attack.steps, "steps") as advance:
                found["trainings"][name] = _train(attack, bench, trained, advance)
            directory.write_json(path, found)
        section = memorisation_section(found)
        leak_page.write(folder, "Full fine-tuning and LoRA at equal validation loss", section.paragraphs[0], [section])
    console.print(section.paragraphs[0])
    return 0


def _bench(attack: Memorisation, progress: RunProgress, load_model: Load) -> _Bench:
    """Model, texts and secrets."""
    experiment = attack.experiment
    with progress.phase("Loading model and text"):
        base = load_model(experiment.model.name, experiment.model.dtype, experiment.model.quantise)
        base = base if attack.layers is None else truncated(base, attack.layers)
        attacks = Attacks(references=attack.references, beams=0, seed=attack.seed)
        sites = split_sites(experiment, load_dataset(experiment))
        ground = ground_of(experiment, attacks, base, sites)
        ground = ground._replace(planted=tuple(one for one in ground.planted if not one.secret.coin))
        train, _ = encode(experiment, base)([record for site in sites for record in site.train])
    validation = tuple(one for record in ground.non_members[: attack.validation] for one in record.examples)
    shapes = choose_shapes(validation, tokens_per_microbatch=1024, buckets=2)
    return _Bench(base, attacks, ground, train, validation, shapes)


def _train(
    attack: Memorisation, bench: _Bench, trained: whole.Trained, advance: Callable[[int], None]
) -> list[dict[str, Any]]:
    """One training; what every check found, the first before any step."""
    base = bench.base
    rate = attack.learning_rates[trained == "adapters"]
    optimizer = Optimizer("adamw", rate).make()
    adapters = low_rank.init(jax.random.key(attack.seed), attack.lora, base.model) if trained == "adapters" else {}
    state = whole.start(optimizer, base.params, adapters, trained)
    due = {round(attack.steps * check / attack.checks) for check in range(1, attack.checks + 1)}
    found = [_check(attack, bench, state, 0)]
    rng = np.random.default_rng([attack.seed, 17])
    for number, batch in enumerate(whole.batches(bench.train, attack.batch_size, attack.steps, rng), 1):
        state, loss = whole.step(base.model, attack.lora.scaling, optimizer, trained, state, whole.arrays_of(batch))
        # Each step that waited for this one would hold weights and moments of its own.
        jax.block_until_ready(loss)
        advance(1)
        if number in due:
            found.append(_check(attack, bench, state, number))
    return found


def _check(attack: Memorisation, bench: _Bench, state: whole.Whole, number: int) -> dict[str, Any]:
    """Validation loss, and what the model gives away."""
    base = replace(bench.base, params=state.params)
    tuned = Tuned(attack.lora, state.adapters, None)
    scores = score(
        base.model, attack.lora.scaling, base.params, state.adapters, bench.validation,
        shapes=bench.shapes, advance=lambda count: None,
    )  # fmt: skip
    silent = RunProgress(1, Console(quiet=True)).phase
    secrets = planted_figures(bench.ground._replace(base=base), tuned, bench.attacks, silent)
    return {"step": number, "nll": float(scores.nll.sum() / scores.tokens.sum()), "secrets": secrets}
