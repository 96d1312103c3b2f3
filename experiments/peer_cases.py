"""What a user would pick instead, in turns with this project: cases of ``experiments.bench --suite peers``.

The peers (``make peers``) run as processes of their own, on the same weights, the same token ids, which both sides read
from one file, and the same adapters: rank 8 on q and v, AdamW. A pair is one run of the peer and one of ours right
after or before it; the figures of a case are medians over pairs, in real tokens a second.

    dense       4 clients x 4 examples x 64 random tokens x 2 steps
    cards       flashcards of uneven length, loss on the answers: 8 clinics x 8 cards, one step
    singles     the same cards at 64 clients, one each
    upper       adapters in the upper third of the layers; ours computes what lies below once a run, before the rounds
    generate    greedy continuation of the cards' questions
"""

import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fedjax_llm.data.chat import encode_records
from fedjax_llm.data.hpo import HpoFlashcards
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.synthetic import local_training, plan_on, random_sites
from fedjax_llm.experiment.timing import Work, once, spread
from fedjax_llm.federation.plan import Execution, RoundPlan
from fedjax_llm.federation.rounds import run_round
from fedjax_llm.lora import Lora
from fedjax_llm.models.decoding import generate
from fedjax_llm.models.loading import BaseModel, converted_folder
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.types import RoundState

ADAPTERS = Lora(rank=8, alpha=16, targets=("q_proj", "v_proj"))
MECHANISM = DpSgd(clip_norm=1.0, noise_multiplier=1.0)
CLINICS = ("blood", "cardiovascular", "digestive", "ear", "endocrine", "eye", "immune", "respiratory")
SYSTEM = "You are a medical dictionary."
CARDS = 8
LONGEST = 112
NEW_TOKENS = 64
CARDS_LAYOUT = Execution(clients_per_chunk=64, tokens_per_microbatch=384, buckets=6)
"""Of ours: 3,432 tokens with padding for the cards' 3,035, where the longest of each clinic's batch makes it 4,488."""
SHARED_LAYOUT = Execution(clients_per_chunk=64, tokens_per_microbatch=384, buckets=3, shared_row=192)
"""Of ours, where no example needs a gradient of its own: 2,528 tokens, since what cards begin with is computed once."""
LAYOUTS = {
    "dense": Execution(tokens_per_microbatch=1024, buckets=1),
    "cards": SHARED_LAYOUT,
    "singles": CARDS_LAYOUT,
}

Sites = Sequence[tuple[str, tuple[EncodedExample, ...]]]


class Case(NamedTuple):
    """Rounds of ours against a peer's.

    Attributes:
      name: of the case.
      target: what the ratio of speeds, ours over the peer's, should be at least.
      text: what both train on.
      options: for ``benchmarks/peft_peer.py``.
      steps: local steps a round.
      part: of the peer's figures: whole rounds, or training alone.
      rounds: of the peer in a turn; the first is its warm-up.
      private: DP-SGD at the clients, Opacus at the peer's.
      upper: adapters in the upper third of the layers only.
    """

    name: str
    target: float
    text: Literal["dense", "cards", "singles"]
    options: tuple[str, ...] = ()
    steps: int = 1
    part: Literal["round_s", "train_s"] = "round_s"
    rounds: int = 3
    private: bool = False
    upper: bool = False


CASES = (
    Case("dense", 1.3, "dense", steps=2),
    Case("dense-training", 1.15, "dense", ("--no-flower",), steps=2, part="train_s"),
    Case("dense-private", 1.7, "dense", steps=2, private=True),
    Case("cards", 2.0, "cards"),
    Case("cards-private", 2.5, "cards", private=True),
    Case("singles", 4.0, "singles", rounds=2),
    Case("singles-cached", 2.2, "singles", ("--cache-model",), rounds=2),
    Case("upper", 4.0, "cards", upper=True),
)
"""Against Flower + PEFT as it ships, which loads the model in each call of a client, unless options say otherwise."""
GENERATE = {1: "generate-1", 8: "generate-8"}
"""Names of the cases of generation by prompts at a time."""
GENERATE_TARGET = 1.3
NAMES = (*(case.name for case in CASES), *GENERATE.values())


class Setup(NamedTuple):
    """What all cases share.

    Attributes:
      base: the model.
      folder: where the peers find its weights.
      python: the interpreter of the peers' environment.
      turns: pairs.
      texts: by name.
    """

    base: BaseModel
    folder: Path
    python: Path
    turns: int
    texts: dict[str, Sites]


def peer_cases(
    base: BaseModel, model: str, python: Path, turns: int, only: Sequence[str], dense: tuple[int, int, int]
) -> Iterator[dict[str, Any]]:
    """Ours and each peer in turns.

    Args:
      base: the model.
      model: its name; a folder, where it is no built-in one.
      python: the interpreter of the peers' environment.
      turns: pairs of runs.
      only: names of cases.
      dense: clients, examples of each, and tokens of an example, of the random tokens.

    Raises:
      UserError: the peers' environment is not there, or a peer failed.
    """
    if not python.exists():
        raise UserError(f"{python} does not exist; `make peers` creates the peers' environment")
    converted = converted_folder(base.fingerprint)
    cards = flashcards(base)
    singles = [(f"{name}-{n}", (card,)) for name, examples in cards for n, card in enumerate(examples)]
    texts: dict[str, Sites] = {"dense": random_sites(base, *dense), "cards": cards, "singles": singles}
    setup = Setup(base, converted if converted.exists() else Path(model), python, turns, texts)
    for case in CASES:
        if case.name in only:
            yield round_case(setup, case)
    for batch, name in GENERATE.items():
        if name in only:
            yield generate_case(setup, name, batch)


def flashcards(base: BaseModel) -> list[tuple[str, tuple[EncodedExample, ...]]]:
    """The first cards of eight clinics as tokens, as they come."""
    found = []
    for site in HpoFlashcards(sites=CLINICS).load().sites:
        examples, _ = encode_records(site.records[: 4 * CARDS], base.tokenizer, LONGEST, "truncate", SYSTEM)
        found.append((site.name, examples[:CARDS]))
    return found


def write_examples(path: Path, sites: Sites) -> None:
    """JSON lines ``{"client": c, "tokens": [...], "prompt_length": n}``, as the peers read them."""
    lines = [
        json.dumps({"client": c, "tokens": example.tokens.tolist(), "prompt_length": example.prompt_length})
        for c, (_, examples) in enumerate(sites)
        for example in examples
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def round_case(setup: Setup, case: Case) -> dict[str, Any]:
    """Ours and the peer's in turns, on the same tokens."""
    base, sites = setup.base, setup.texts[case.text]
    layers = upper_third(base.model.config.layers) if case.upper else ()
    lora = Lora(ADAPTERS.rank, ADAPTERS.alpha, ADAPTERS.targets, layers)
    layout = CARDS_LAYOUT if case.private and case.text == "cards" else LAYOUTS[case.text]
    mechanism = MECHANISM if case.private else None
    plan, state = plan_on(base, lora, sites, steps=case.steps, mechanism=mechanism, execution=layout)
    every = [example for _, examples in sites for example in examples]
    extra: dict[str, Any] = {}
    if plan.trunk is not None:
        trunk = plan.trunk
        extra = {"fill_seconds": round(once(lambda: trunk.fill(every, advance=lambda count: None)), 3)}
    options = [*case.options, "--steps", str(case.steps), "--rounds", str(case.rounds)]
    options += ["--private"] if case.private else []
    options += ["--layers", *map(str, layers)] if layers else []
    work = round_work(base, plan, state) if case.part == "round_s" else training_work(base, plan, state)
    with tempfile.TemporaryDirectory() as folder:
        write_examples(Path(folder) / "examples.jsonl", sites)
        peer = functools.partial(run_peer, setup, "peft_peer.py", Path(folder) / "examples.jsonl", options, case.part)
        pairs = in_turns(work, peer, setup.turns, case.rounds - 1)
    tokens = case.steps * sum(len(example.tokens) for example in every)
    return figures(case.name, tokens, pairs, case.target) | extra


def upper_third(layers: int) -> tuple[int, ...]:
    """The numbers of the upper third of so many layers."""
    return tuple(range(layers - max(1, layers // 3), layers))


def round_work(base: BaseModel, plan: RoundPlan, state: RoundState) -> Work:
    """A whole round: sampling, packing, local training, aggregation."""
    return lambda: run_round(plan, base.params, state)[0].adapters


def training_work(base: BaseModel, plan: RoundPlan, state: RoundState) -> Work:
    """The clients' training alone: packing, gradients, steps."""
    packed, trained = local_training(base, plan, state)
    return lambda: trained(packed()).adapters


def generate_case(setup: Setup, name: str, batch: int) -> dict[str, Any]:
    """Greedy continuation of the cards' questions: a fixed number of tokens, whatever they are."""
    base, sites = setup.base, setup.texts["cards"]
    every = [example for _, examples in sites for example in examples]
    prompts = [example.tokens[: example.prompt_length].tolist() for example in every[:batch]]
    count = {"max_new_tokens": NEW_TOKENS, "end_ids": (), "pad_id": base.tokenizer.pad_id}
    options = ["--batch", str(batch), "--new", str(NEW_TOKENS)]
    with tempfile.TemporaryDirectory() as folder:
        write_examples(Path(folder) / "examples.jsonl", sites)
        examples = Path(folder) / "examples.jsonl"
        peer = functools.partial(run_peer, setup, "generate_peer.py", examples, options, "round_s")
        work = functools.partial(generate, base.model, base.params, {}, prompts, **count)
        pairs = in_turns(work, peer, setup.turns, 2)
    return figures(name, batch * NEW_TOKENS, pairs, GENERATE_TARGET)


def in_turns(work: Work, peer: Callable[[], float], turns: int, repeats: int) -> list[tuple[float, float]]:
    """Seconds of ours (the median of repeats) and the peer's in each turn, taking turns at going first."""
    once(work)

    def ours() -> float:
        return statistics.median(once(work) for _ in range(repeats))

    pairs = []
    for turn in range(turns):
        if turn % 2:
            mine = ours()
            pairs.append((mine, peer()))
        else:
            theirs = peer()
            pairs.append((ours(), theirs))
    return pairs


def figures(name: str, tokens: int, pairs: Sequence[tuple[float, float]], target: float) -> dict[str, Any]:
    """A case as a JSON object: real tokens a second of both, and the ratio of ours to the peer's over the pairs."""
    ours, theirs = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    return {
        "case": name,
        "ours": round(tokens / ours, 1),
        "peer": round(tokens / theirs, 1),
        **spread(peer / own for own, peer in pairs),
        "target": f"at least {target}",
    }


def run_peer(setup: Setup, script: str, examples: Path, options: Sequence[str], part: str) -> float:
    """Seconds of a peer's rounds, the median without its warm-up.

    Raises:
      UserError: it failed, or said too little.
    """
    command = [str(setup.python), f"benchmarks/{script}", "--model", str(setup.folder), "--examples", str(examples)]
    command += options
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(lines) < 2:
        raise UserError(f"the peer {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return statistics.median(line[part] for line in lines[1:])


def start_case(turns: int) -> dict[str, Any]:
    """Seconds from the command to the first round with warm caches; the first of the runs warms them."""
    seconds = statistics.median([seconds_to_first_round() for _ in range(turns + 1)][1:])
    return {"case": "command-to-first-round", "value": round(seconds, 2), "target": "at most 8"}


def seconds_to_first_round(config: str = "configs/all_layers.py", limit: float = 600.0) -> float:
    """Starts a run, and stops it after its first round, whose own seconds stand in its line of metrics.

    Raises:
      UserError: the run ended before, or took longer than the limit.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, said = Path(folder) / "run", Path(folder) / "said"
        command = [sys.executable, "-m", "experiments.run", f"--config={config}", f"--out={out}"]
        began = time.perf_counter()
        with said.open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
            try:
                while not (line := _first_line(out / "metrics.jsonl")):
                    if process.poll() is not None or time.perf_counter() - began > limit:
                        raise UserError(f"{' '.join(command)} did no round:\n{said.read_text()[-2000:]}")
                    time.sleep(0.01)
                return time.perf_counter() - began - json.loads(line)["timing"]["seconds"]
            finally:
                process.kill()


def _first_line(path: Path) -> str:
    """A file's first line, once it is complete; else nothing."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text.partition("\n")[0] if "\n" in text else ""
