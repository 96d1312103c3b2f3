"""What a curious server reads from the updates of clients: attacks on the project's own local training.

A victim trains as in a federated round (``training/client_update.py``); the server knows the base model, the adapters
that the victim started from and the update, and attacks it (``leakage/span_check.py``, ``leakage/inversion.py``).
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from fedjax_llm import lora as low_rank
from fedjax_llm import trees
from fedjax_llm.config import to_json
from fedjax_llm.data.chat import encode_records
from fedjax_llm.data.hpo import HpoFlashcards
from fedjax_llm.data.packing import choose_shapes, pack
from fedjax_llm.data.records import Dataset, EncodedExample
from fedjax_llm.errors import UserError
from fedjax_llm.leakage import inversion as inverting
from fedjax_llm.leakage import recovery, span_check
from fedjax_llm.leakage.inversion import Inversion
from fedjax_llm.lora import Lora
from fedjax_llm.models.loading import BaseModel, load
from fedjax_llm.models.truncation import truncated
from fedjax_llm.privacy.clipping import Clip
from fedjax_llm.runs import curious_server_figures as figures
from fedjax_llm.runs.directory import check_same, locked, made, read_json, write_json, write_text
from fedjax_llm.runs.progress import RunProgress
from fedjax_llm.training import client_update
from fedjax_llm.training.client_update import Secrets, Trainer
from fedjax_llm.training.optimizers import Optimizer
from fedjax_llm.types import Adapters

RESULTS = "curious_server.json"
_SCALING = 2.0
"""Alpha / rank of all victims."""


@dataclass(frozen=True)
class Case:
    """One victim and the attack on it.

    Attributes:
      group: what it is compared with: a panel of the figure.
      rank: of the adapters, on q and v of layers 0 and 1.
      examples: in the batch of each client.
      steps: local steps, each on the same batch.
      optimizer: of the client.
      clients: in the secure sum that the server sees.
      clip_norm: of each example's gradient; ``None``: not clipped.
      noise_multiplier: deviation of the noise on each client's summed gradients, over the clip norm.
      later_round: whether the adapters were trained before on other text; else ``b`` is zero.
      train: which factors are trained.
      attack: the span check, or the search by optimisation.
      seed: of adapters, text and noise.
    """

    group: str
    rank: int
    examples: int = 1
    steps: int = 1
    optimizer: Literal["sgd", "adam"] = "sgd"
    clients: int = 1
    clip_norm: float | None = None
    noise_multiplier: float = 0.0
    later_round: bool = True
    train: Literal["both", "b"] = "both"
    attack: Literal["span", "inversion"] = "span"
    seed: int = 0


@dataclass(frozen=True)
class CuriousServer:
    """Attacks over ranks, batches, local steps, optimisers, secure sums and noise.

    Attributes:
      model: name of the base model.
      data: whose records the victims hold, of all sites together: anything with ``load() -> Dataset``.
      system: the system message of every example.
      max_length: tokens of an example at most; longer ones are left out.
      depth: layers of the model that are kept, the lowest; ``None``: all.
      ranks: of the adapters.
      examples: in the batch, against every rank.
      rank: of the cases that vary something else, with one example a client.
      steps: local steps.
      clients: in the secure sum.
      clip_norm: of the cases with clipping.
      noise_multipliers: with the clip norm; 0 is clipping alone.
      learning_rates: of SGD and of Adam.
      warm_steps: steps of AdamW on other text, before a case of a later round.
      inversion: the search by optimisation; ``None``: none.
      inversion_tokens: of the sequence that it seeks, the beginning of an answer.
      inversion_depth: layers of the model that it attacks.
      inversion_rank: of the adapters.
      seeds: every case is run for each.
    """

    model: str = "smollm2-135m-instruct"
    data: Any = HpoFlashcards(sites=("eye",))
    system: str | None = "You are a medical dictionary."
    max_length: int = 64
    depth: int | None = None
    ranks: tuple[int, ...] = (4, 8, 32, 128, 192)
    examples: tuple[int, ...] = (1, 4, 16)
    rank: int = 128
    steps: tuple[int, ...] = (1, 4, 16)
    clients: tuple[int, ...] = (1, 4, 16)
    clip_norm: float = 0.3
    noise_multipliers: tuple[float, ...] = (0.0, 0.01, 0.5)
    learning_rates: tuple[float, float] = (0.1, 1e-3)
    warm_steps: int = 4
    inversion: Inversion | None = Inversion()
    inversion_tokens: int = 6
    inversion_depth: int = 2
    inversion_rank: int = 8
    seeds: tuple[int, ...] = (0, 1)

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        for name in ("ranks", "examples", "steps", "clients", "seeds"):
            if not getattr(self, name) or min(getattr(self, name)) < (name != "seeds"):
                raise UserError(f"attack.{name} is {getattr(self, name)}; it needs at least one value, each at least 1")
        if self.depth is not None and self.depth < 2:
            raise UserError(f"attack.depth is {self.depth}; the order of tokens is read from layer 1, so at least 2")
        if self.inversion is not None and (self.inversion_depth < 1 or self.inversion_tokens < 2):
            raise UserError("attack.inversion_depth must be at least 1, and attack.inversion_tokens at least 2")
        if not 0 < self.clip_norm < float("inf") or min(self.noise_multipliers, default=0.0) < 0:
            raise UserError("attack.clip_norm must be positive, and attack.noise_multipliers not negative")

    def cases(self) -> Iterator[Case]:
        """Every case once."""
        clipped = {"rank": self.rank, "clip_norm": self.clip_norm}
        for seed in self.seeds:
            for rank in self.ranks:
                for examples in self.examples:
                    yield Case("rank", rank, examples, seed=seed)
            for steps in self.steps:
                yield Case("steps", self.rank, steps=steps, seed=seed)
            yield Case("adam", self.rank, optimizer="adam", seed=seed)
            for clients in self.clients:
                yield Case("clients", self.rank, clients=clients, seed=seed)
            for noise in self.noise_multipliers:
                yield Case("noise", **clipped, noise_multiplier=noise, seed=seed)
            for train in ("both", "b"):
                yield Case("first round", self.rank, later_round=False, train=train, seed=seed)
            if self.inversion is not None:
                later = Case("inversion", self.inversion_rank, attack="inversion", seed=seed)
                yield later
                yield dataclasses.replace(later, later_round=False, train="b")
                for noise in filter(None, self.noise_multipliers):
                    yield dataclasses.replace(later, clip_norm=self.clip_norm, noise_multiplier=noise)


class Text(NamedTuple):
    """What the victims may hold.

    Attributes:
      examples: of all sites.
      public: tokens that every example holds, as of the template: the server knows them beforehand.
    """

    examples: tuple[EncodedExample, ...]
    public: frozenset[int]


class Victims(NamedTuple):
    """What the server sees, and the truth.

    Attributes:
      before: what the clients started from, all factors.
      update: the mean over the clients of the trained factors' changes.
      examples: of all clients.
    """

    before: Adapters
    update: Adapters
    examples: tuple[EncodedExample, ...]


def run_curious_server(
    attack: CuriousServer, folder: Path, console: Console, load_model: Callable[[str], BaseModel] = load
) -> int:
    """Runs the cases that are not finished yet, and writes ``curious_server.json``, ``.md`` and ``.svg``.

    Args:
      attack: what to run.
      folder: made if absent; with results of the same settings, their cases are kept.
      console: for the progress and the table.
      load_model: gives the base model of a name.

    Returns:
      0.

    Raises:
      UserError: the folder holds results of other settings, or cannot be written; the model or the data cannot be had,
        or the span check does not serve the model.
    """
    folder = made(folder, "attack")
    settings = {name: value for name, value in to_json(attack).items() if name not in _GRID}
    with locked(folder):
        done = _finished(folder / RESULTS, settings)
        cases = list(attack.cases())
        todo = [case for case in cases if _name(case) not in done]
        if todo:
            base = load_model(attack.model)
            span_check.check_served(base.model)
            dataset = attack.data.load()
            text = read_text(dataset, base, attack)
            settings |= {"layers": base.model.config.layers, "version": dataset.version, "kept": len(text.examples)}
            with RunProgress(0, console) as progress, progress.phase("Attacking", len(todo), "cases") as advance:
                for case in todo:
                    done[_name(case)] = {**dataclasses.asdict(case), **attacked(case, attack, base, text)}
                    write_json(folder / RESULTS, {"settings": settings, "cases": list(done.values())})
                    advance(1)
        found = [done[_name(case)] for case in cases]
        write_text(folder / "curious_server.md", figures.table(found))
        write_text(folder / "curious_server.svg", figures.drawn(found))
    console.print(figures.table(found), markup=False)
    return 0


_GRID = ("ranks", "examples", "steps", "clients", "noise_multipliers", "seeds")
"""What only says which cases there are: more of them can be asked for in the same folder."""


def _finished(path: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The finished cases by name.

    Raises:
      UserError: they were run with other settings.
    """
    if not path.exists():
        return {}
    before = read_json(path)
    kept = {name: value for name, value in before["settings"].items() if name in settings}
    check_same(kept, settings, f"{path} holds results of", "choose another folder")
    fields = [field.name for field in dataclasses.fields(Case)]
    return {_name(Case(**{name: one[name] for name in fields})): one for one in before["cases"]}


def _name(case: Case) -> str:
    return repr(case)


def read_text(dataset: Dataset, base: BaseModel, attack: CuriousServer) -> Text:
    """The encoded examples of all sites, and the tokens common to them.

    Raises:
      UserError: too few examples are short enough.
    """
    records = [record for site in dataset.sites for record in site.records]
    examples, _ = encode_records(records, base.tokenizer, attack.max_length, "drop", attack.system)
    wanted = max(max(attack.examples), max(attack.clients)) + attack.warm_steps
    if len(examples) < wanted:
        raise UserError(
            f"{len(examples)} examples have at most {attack.max_length} tokens, but {wanted} are needed; "
            "raise attack.max_length, or choose more data"
        )
    return Text(examples, frozenset(set.intersection(*(set(example.tokens.tolist()) for example in examples))))


def attacked(case: Case, attack: CuriousServer, base: BaseModel, text: Text) -> dict[str, Any]:
    """Makes the update of a case, attacks it, and compares with the truth.

    Returns:
      JSON-able: ``recall`` and ``precision`` of the tokens that are not public, ``ranked`` (the share of these tokens
      among as many nearest ones), ``rouge1`` and ``rouge2`` of the sequences, and what the check could say.
    """
    start = time.monotonic()
    depth = attack.inversion_depth if case.attack == "inversion" else attack.depth
    base = base if depth is None else truncated(base, depth)
    if case.attack == "inversion":
        openings = tuple(_opening(example, attack.inversion_tokens) for example in text.examples)
        text = text._replace(examples=tuple(one for one in openings if len(one.tokens) == attack.inversion_tokens))
    victims = victims_of(case, attack, base, text)
    found = (_inverted if case.attack == "inversion" else _checked)(case, attack, base, text, victims)
    return found | {"seconds": round(time.monotonic() - start, 1)}


def _opening(example: EncodedExample, tokens: int) -> EncodedExample:
    """The first tokens of an answer as a text of its own."""
    answer = example.tokens[example.prompt_length :][:tokens]
    return EncodedExample(example.record_id, answer, 1, example.owner)


def victims_of(case: Case, attack: CuriousServer, base: BaseModel, text: Text) -> Victims:
    """Local training of the case's clients, by the code that trains in a run."""
    layers = tuple(range(min(2, base.model.config.layers)))
    how = Lora(
        rank=case.rank, alpha=_SCALING * case.rank, targets=("q_proj", "v_proj"), layers=layers, train=case.train
    )
    adapters = low_rank.init(jax.random.key(case.seed), how, base.model)
    order = np.random.default_rng(case.seed).permutation(len(text.examples))
    if case.later_round:
        other = [[[text.examples[i]] for i in order[-attack.warm_steps :]]]
        trainer = Trainer(base.model, how.scaling, Optimizer("adamw", learning_rate=1e-3).make())
        warm = _trained(trainer, base, how, adapters, other, case, text)
        adapters = jax.tree.map(lambda leaf: leaf[0], warm)
    mine = [text.examples[i] for i in order[: case.examples * case.clients]]
    work = [[mine[c :: case.clients]] * case.steps for c in range(case.clients)]
    rate = attack.learning_rates[case.optimizer == "adam"]
    clip = None if case.clip_norm is None else Clip(case.clip_norm)
    optimizer = Optimizer(case.optimizer, learning_rate=rate).make()
    trainer = Trainer(base.model, how.scaling, optimizer, clip=clip, noisy=case.noise_multiplier > 0)
    after = _trained(trainer, base, how, adapters, work, case, text)
    before = low_rank.split(adapters, case.train)[0]
    update = jax.tree.map(lambda end, begun: jnp.mean(end - begun, axis=0), after, before)
    return Victims(adapters, update, tuple(mine))


def _trained(
    trainer: Trainer,
    base: BaseModel,
    how: Lora,
    adapters: Adapters,
    work: Sequence[Sequence[Sequence[EncodedExample]]],
    case: Case,
    text: Text,
) -> Adapters:
    """The trained factors [C, ...] of every client after its steps."""
    clients = len(work)
    trained, frozen = low_rank.split(adapters, how.train)
    state = client_update.start(trainer, trees.repeat(trained, clients))
    shapes = choose_shapes(text.examples, tokens_per_microbatch=128, buckets=1)
    keys = jax.random.split(jax.random.key(case.seed + 1), clients)
    deviation = case.noise_multiplier * (case.clip_norm or 0.0)
    secrets = Secrets(keys, jnp.full(clients, deviation, jnp.float32)) if trainer.noisy else None
    batches = pack(work, shapes, clients=clients)
    rates = np.ones((clients, len(work[0])))
    return client_update.run(trainer, base.params, state, batches, keys, rates, frozen, secrets).adapters


def _checked(case: Case, attack: CuriousServer, base: BaseModel, text: Text, victims: Victims) -> dict[str, Any]:
    """The span check, and the order of the tokens where it is conclusive."""
    found = span_check.recover_tokens(base.model, base.params, victims.before, victims.update)
    # The last token of an example is only ever a target: it leaves no trace in the inputs.
    inputs = [tuple(example.tokens[:-1].tolist()) for example in victims.examples]
    true = {token for row in inputs for token in row}
    private = true - text.public
    unknown = np.setdiff1d(np.arange(len(found.residuals)), list(text.public))
    nearest = unknown[np.argsort(found.residuals[unknown], kind="stable")[: len(private)]]
    ranked = 0.0 if found.verdict == "silent" else recovery.token_recovery(nearest, private).recall
    tokens = recovery.token_recovery(found.tokens, true, text.public)
    sequences = span_check.recover_sentences(
        base.model, base.params, victims.before, _SCALING, victims.update, found.tokens,
        length=attack.max_length, beam=2 * len(inputs) + 6,
    )  # fmt: skip
    return {
        "verdict": found.verdict,
        "tokens": len(true),
        "private": len(private),
        "seen_rank": found.rank,
        "columns": sum(victims.before[path]["a"].shape[1] for path in victims.update if path.startswith("layers.0.")),
        "recall": tokens.recall,
        "precision": tokens.precision,
        "ranked": ranked,
        "rouge1": recovery.matched_rouge(sequences, inputs, 1),
        "rouge2": recovery.matched_rouge(sequences, inputs, 2),
    }


def _inverted(case: Case, attack: CuriousServer, base: BaseModel, text: Text, victims: Victims) -> dict[str, Any]:
    """The search by optimisation, on the gradient that a step of SGD was made with."""
    assert attack.inversion is not None, "cases of the inversion come from its settings"
    seen = jax.tree.map(lambda leaf: -leaf / attack.learning_rates[0], victims.update)
    true = [tuple(example.tokens.tolist()) for example in victims.examples]
    batch = inverting.Batch(tuple(map(len, true)), (1,) * len(true))
    key = jax.random.key(case.seed + 2)
    found = inverting.invert(attack.inversion, base.model, base.params, _SCALING, victims.before, seen, batch, key)
    tokens = recovery.token_recovery({t for row in found.sequences for t in row}, {t for row in true for t in row})
    return {
        "verdict": "searched",
        "tokens": len({t for row in true for t in row}),
        "distance": found.distance,
        "recall": tokens.recall,
        "precision": tokens.precision,
        "rouge1": recovery.matched_rouge(found.sequences, true, 1),
        "rouge2": recovery.matched_rouge(found.sequences, true, 2),
    }
