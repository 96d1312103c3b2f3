"""An experiment as frozen dataclasses: from a Python file, with typed overrides, to JSON.

A configuration is a Python file with ``get_config() -> Experiment``. It imports what it uses, so there is no registry:
``aggregation=FedAdam(server_lr=1e-2)``.
"""

import dataclasses
import math
import re
import runpy
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeVar

from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.data.hpo import HpoFlashcards
from fedjax_llm.data.splits import Fractions
from fedjax_llm.errors import UserError, nearest
from fedjax_llm.evaluation.evaluate import Evaluation
from fedjax_llm.federation.plan import Execution, Federation
from fedjax_llm.lora import Lora
from fedjax_llm.models.loading import BaseType, Quantise
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.privacy.mechanism import Regime
from fedjax_llm.runs.output import Output
from fedjax_llm.secure import refusals as secure_refusals
from fedjax_llm.secure.sec_agg import SecAgg
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.types import Aggregation, Setting, Sum

T = TypeVar("T")


@dataclass(frozen=True)
class Model:
    """The base model.

    Attributes:
      name: a built-in name, a hub id, a folder, or a ``.gguf`` file.
      dtype: of the frozen weights and the activations.
      quantise: how the matrices within layers are stored (``docs/quantised.md``).
    """

    name: str = "smollm2-135m-instruct"
    dtype: BaseType = "float32"
    quantise: Quantise = dataclasses.field(default="none", metadata={"unsaid": True})  # hashes stay


@dataclass(frozen=True)
class Data:
    """The text, the sites, and how records become tokens.

    Attributes:
      source: a dataclass with ``.load() -> Dataset`` (``data/hpo.py``, ``site_files.py``, ``hub.py``, or your own).
      partition: deals the records out to simulated sites (``data/partition.py``); ``None``: the source's own sites.
      fractions: of the records (of their owners) that are held out.
      test_every_site: refuse a site without a test record; otherwise it is left out of the evaluation.
      max_length: tokens of an example at most.
      too_long: whether longer examples lose the end of their answer or are left out. They are counted.
      system: a system message for examples without one; ``None``: the chat template's own default.
    """

    source: Any = HpoFlashcards()
    partition: Any = None
    fractions: Fractions = Fractions()
    test_every_site: bool = True
    max_length: int = 128
    too_long: Literal["truncate", "drop"] = "truncate"
    system: str | None = None

    def __post_init__(self) -> None:
        """Refuses impossible values."""
        if self.max_length < 8:
            raise UserError(f"data.max_length is {self.max_length}; it must be at least 8")


@dataclass(frozen=True)
class Experiment:
    """Everything that decides a run's results, and how it is executed.

    Attributes:
      model: the base model.
      lora: the adapters.
      start_from: a folder in PEFT's format with adapters to start from; ``None``: fresh ones.
      data: text and sites.
      training: what clients do in a round.
      federation: rounds and cohorts.
      aggregation: the server's algorithm: a dataclass with ``.make()`` (``aggregation/``).
      compression: of what clients send: a dataclass with ``.make()`` (``compression/``); ``None``: as it is.
      attack: what malicious clients do: a dataclass with ``.make()`` (``adversaries/``); ``None``: all are honest.
      malicious: the share of the sites that are malicious, drawn by the seed and rounded down.
      secure: how messages are aggregated so that the server sees their sum only (``secure/sec_agg.py``); ``None``: it
        sees them all.
      privacy: whether and how differential privacy is guaranteed, and to whom.
      evaluation: of held-out records.
      execution: layout of the computation; never changes a result.
      output: of the run.
      setting: federated, or one of the baselines with everything else equal.
      seed: of everything random.
    """

    model: Model = Model()
    lora: Lora = Lora()
    start_from: str | None = None
    data: Data = Data()
    training: LocalTraining = LocalTraining()
    federation: Federation = Federation()
    aggregation: Any = FedAvg()
    compression: Any = None
    attack: Any = None
    malicious: float = 0.0
    secure: SecAgg | None = None
    privacy: Privacy = Privacy()
    evaluation: Evaluation = Evaluation()
    execution: Execution = Execution()
    output: Output = Output()
    setting: Setting = "federated"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses impossible values, and what does not go together."""
        if isinstance(self.seed, int) and not 0 <= self.seed < 2**31:
            raise UserError(f"seed is {self.seed}; it must be at least 0 and below 2**31 (larger ones would collide)")
        if self.output.select == "best" and not self.evaluation.validation_every:
            raise UserError(
                "output.select is 'best', but evaluation.validation_every is 0: without validation no round is the best"
            )
        if not 0 <= self.malicious < 1:
            raise UserError(f"malicious is {self.malicious}; it must be at least 0 and below 1, a share of the sites")
        if (self.attack is None) != (self.malicious == 0):
            raise UserError(
                f"attack is {self.attack} and malicious is {self.malicious}: set both (how, and how many), or neither"
            )
        if self.setting == "federated":
            self._check_algorithm()
        if self.lora.ranks and self.compression is not None:
            raise UserError("lora.ranks and compression do not go together; set one of them to () or None")
        if self.privacy.mechanism is not None and self.setting != "base":
            self.privacy.check(regime_of(self))

    @property
    def secured(self) -> SecAgg | None:
        """``secure``, where there is a server to hide messages from."""
        return self.secure if self.setting == "federated" else None

    def _check_algorithm(self) -> None:
        """Refuses what the aggregation cannot be combined with."""
        algorithm, name = self.aggregation.make(), type(self.aggregation).__name__
        plain = Aggregation(algorithm.init, algorithm.update, algorithm.view, ranks=algorithm.ranks)
        if self.federation.asynchronous is not None and algorithm != plain:
            raise UserError(
                "federation.asynchronous takes updates that began with older adapters, and "
                f"{name} does more with its clients than average deltas. Choose an "
                "aggregation of deltas (such as FedAvg, FedAvgM or FedAdam), or set it to None"
            )
        corrupts = self.attack is not None and self.attack.make().corrupt is not None
        if self.secure is not None:
            secure_refusals.check(
                aggregation=name,
                needs_stack=algorithm.view is not Sum,
                compressed=self.compression is not None,
                attacked=corrupts,
                asynchronous=self.federation.asynchronous is not None,
                client_metrics=self.output.client_metrics,
            )
        if algorithm.whole and algorithm.client.report is not None and (corrupts or self.compression is not None):
            raise UserError(
                f"the clients of {name} send whole factors, not deltas: attacks on messages and compression are made "
                "for deltas (minus both factors is the same product). Choose an aggregation of deltas, or leave "
                "them out"
            )
        if self.federation.finetune_rounds and (algorithm.own is not None or self.lora.ranks):
            what = "lora.ranks" if self.lora.ranks else f"{name}, whose clients have adapters of their own already"
            raise UserError(f"federation.finetune_rounds does not go together with {what}; set it to 0")
        if self.lora.ranks and not algorithm.ranks:
            raise UserError(
                f"lora.ranks is {self.lora.ranks}, but {name} cannot aggregate adapters of "
                "different ranks; choose FlexLora, HetLora, FLora or FedAvg, or set lora.ranks to ()"
            )
        if algorithm.whole and (self.lora.train != "both" or self.lora.dora):
            kind = f"lora.train is {self.lora.train!r}" if self.lora.train != "both" else "lora.dora is True"
            raise UserError(
                f"{name} works on products of both factors, but {kind}: train plain "
                "LoRA (lora.train='both', lora.dora=False), or choose FedAvg"
            )


def regime_of(experiment: Experiment) -> Regime:
    """What a privacy mechanism must know of an experiment."""
    local, federation = experiment.training, experiment.federation
    flat = experiment.setting == "centralised"  # plain training: no cohort
    federated = experiment.setting == "federated"
    algorithm = (experiment.aggregation if federated else FedAvg()).make()
    attack = experiment.attack.make() if federated and experiment.attack is not None else None
    return Regime(
        setting=experiment.setting,
        unit=experiment.privacy.unit,
        rounds=federation.rounds,
        cohort=None if flat else federation.cohort,
        weighting=federation.weighting,
        batch_size=local.batch_size,
        local_steps=local.local_steps,
        local_epochs=local.local_epochs,
        normalise=local.normalise,
        optimizer=local.optimizer.name + (f" with {dict(local.optimizer.options)}" if local.optimizer.options else ""),
        learning_rate=local.optimizer.learning_rate,
        constant_rate=local.round_schedule.shape == local.local_schedule.shape == "constant",
        proximal=local.proximal,
        adapter_dtype=experiment.lora.dtype,
        server_view="Sum" if algorithm.view is Sum else "Stack",
        messages="deltas" if algorithm.client.report is None else "other",
        probes=algorithm.client.probe,
        ranks=federated and bool(experiment.lora.ranks),
        own=algorithm.own is not None,
        personal=algorithm.personal is not None,
        compressed=federated and experiment.compression is not None,
        attacked=attack is not None and attack.corrupt is not None,
        poisoned=attack is not None and attack.poison is not None,
        asynchronous=federated and federation.asynchronous is not None,
        finetunes=federated and federation.finetune_rounds > 0,
        unreliable=federated and federation.availability is not None,
        over_selection=1.0 if federation.availability is None else federation.availability.over_selection,
        secure=experiment.secured is not None,
        colluders=0 if experiment.secured is None else experiment.secured.colluders,
    )


MAY_CHANGE = (
    "execution.*",
    "output.keep_last",
    "output.bandwidth_mbps",
    "output.client_metrics",
    "output.encryption*",
    "output.tracking*",
)
"""What may differ when a run is resumed: nothing that decides a result."""


def load(path: str | Path) -> Experiment:
    """The experiment of a configuration file.

    Raises:
      UserError: no such file, no ``get_config``, a field that does not exist (near names are listed), or a value that
        is impossible.
    """
    return from_file(path, "get_config", Experiment)


def from_file(path: str | Path, function: str, kind: type[T]) -> T:
    """What a function of a Python file gives, checked.

    Args:
      path: of the file.
      function: its name; it takes no arguments.
      kind: the dataclass that it must give.

    Raises:
      UserError: as for :func:`load`.
    """
    file = Path(path)
    if not file.is_file():
        near = nearest(file.name, [other.name for other in file.parent.glob("*.py")]) if file.parent.is_dir() else ""
        raise UserError(f"there is no configuration file {file}{near}")
    try:
        namespace = runpy.run_path(str(file))
        if not callable(namespace.get(function)):
            raise UserError(f"{file} has no function {function}() -> {kind.__name__}")
        found = namespace[function]()
    except TypeError as error:
        told = re.sub(r"\. Did you mean .*$", "", str(error))  # Python 3.13 guesses too
        raise UserError(f"{file}: {told}{_near_fields(error)}") from error
    except (ImportError, AttributeError, NameError, SyntaxError) as error:
        raise UserError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(found, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise UserError(f"{file}: {function}() gave a {type(found).__name__}, not {article} {kind.__name__}")
    if dataclasses.is_dataclass(found):
        check(found)
    return found


def _near_fields(error: TypeError) -> str:
    """For an unexpected keyword of a dataclass: the nearest fields that it has."""
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    trace: TracebackType | None = error.__traceback__
    if match is None or trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    seen = trace.tb_frame.f_globals
    modules = [vars(value) for value in seen.values() if isinstance(value, types.ModuleType)]
    for space in (seen, *modules):
        found = space.get(match[1])
        if dataclasses.is_dataclass(found):
            return nearest(match[2], [field.name for field in dataclasses.fields(found)])
    return ""


def check(value: Any, path: str = "") -> None:
    """Compares the fields of nested dataclasses with their types, which Python itself does not.

    Raises:
      UserError: naming the field, its value, and what it may be.
    """
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        inner, place = getattr(value, field.name), f"{path}.{field.name}" if path else field.name
        _check_type(inner, hints[field.name], place)
        if dataclasses.is_dataclass(inner):
            check(inner, place)


def _check_type(value: Any, kind: Any, place: str) -> None:
    """One field against its annotation: literals, numbers, text, dataclasses, and what is made of these."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        allowed = typing.get_args(kind)
        if value not in allowed:
            raise UserError(f"{place} is {value!r}{nearest(str(value), map(str, allowed))}")
    elif origin in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return
        rest = [option for option in options if option is not type(None)]
        if len(rest) == 1:
            _check_type(value, rest[0], place)
    elif origin is tuple:
        if not isinstance(value, tuple):
            raise UserError(f"{place} is {value!r}, a {type(value).__name__}; it must be a tuple, such as (1,)")
        for number, inner in enumerate(value):
            _check_type(inner, typing.get_args(kind)[0], f"{place}[{number}]")
            if dataclasses.is_dataclass(inner):
                check(inner, f"{place}[{number}]")
    elif origin is Mapping:
        if not isinstance(value, Mapping):
            raise UserError(f"{place} is {value!r}, a {type(value).__name__}; it must be a dictionary")
        for key, inner in value.items():
            _check_type(inner, typing.get_args(kind)[1], f"{place}[{key!r}]")
    elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, kind):
            raise UserError(f"{place} is {value!r}, a {type(value).__name__}; it must be a {kind.__name__}(...)")
    elif kind in (int, float, str, bool):
        numeric = kind is float and isinstance(value, int) and not isinstance(value, bool)
        wrong = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
        if wrong and not numeric:
            raise UserError(f"{place} is {value!r}, a {type(value).__name__}; it must be of type {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{place} is {value}; it must be a finite number")


def in_words(value: Any) -> str:
    """A part of a configuration as it is written, with what differs from its defaults: ``FedAdam(server_lr=0.1)``."""
    given = [field for field in dataclasses.fields(value) if getattr(value, field.name) != field.default]
    inside = [(field.name, getattr(value, field.name)) for field in given]
    texts = [f"{name}={in_words(one) if dataclasses.is_dataclass(one) else repr(one)}" for name, one in inside]
    return type(value).__name__ + (f"({', '.join(texts)})" if texts else "")


def to_json(value: Any) -> Any:
    """Nested dictionaries with their classes' names, for ``config.json``; ``unsaid`` fields only off their default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
        told = {at.name: to_json(one) for at, one in given if "unsaid" not in at.metadata or one != at.default}
        return {"class": type(value).__name__} | told
    if isinstance(value, Mapping):
        return {str(key): to_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(inner) for inner in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise UserError(f"a configuration holds {value!r}, which has no place in config.json; use plain values")
