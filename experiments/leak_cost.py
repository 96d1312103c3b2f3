"""What scoring costs the attacks, beside a plain forward pass: cases of ``experiments.bench --suite leakage``."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from fedjax_llm import lora as low_rank
from fedjax_llm.data.packing import choose_shapes
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.data.secrets import KINDS, Secret, people
from fedjax_llm.evaluation.heldout import score
from fedjax_llm.leakage.exposure import candidate_rows, exposures
from fedjax_llm.leakage.token_scores import token_scores
from fedjax_llm.lora import Lora
from fedjax_llm.models.loading import BaseModel

_ROWS = 64
_SECRETS, _REFERENCES = 4, 95
TARGET = "at least 0.85"


def leakage_cases(base: BaseModel, lora: Lora, length: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Held-out losses (the forward pass), token scores, and values behind one prompt, in turns; tokens/s and ratios.

    Args:
      base: the model.
      lora: adapters of the model under attack.
      length: L, of the random examples for the first two.
      repeats: timed, after one warm-up.
    """
    adapters = low_rank.init(jax.random.key(0), lora, base.model)
    rng = np.random.default_rng(0)
    rows = rng.integers(3, base.model.config.vocab_size, (_ROWS, length)).astype(np.int32)
    examples = [EncodedExample(str(number), row, length // 2) for number, row in enumerate(rows)]
    shapes = choose_shapes(examples, tokens_per_microbatch=1024, buckets=1)
    given = (base.model, lora.scaling, base.params, adapters)
    names = people(rng, _SECRETS)
    kinds = list(KINDS)[:_SECRETS]
    secrets = [
        Secret(number, name, kind, KINDS[kind](rng), 1, "site")
        for number, (name, kind) in enumerate(zip(names, kinds, strict=True))
    ]
    behind = candidate_rows(secrets, base.tokenizer, "You are a clinic's assistant.", count=_REFERENCES, seed=0)
    held = [row.encoded for own in behind for row in own]
    options = {"shapes": shapes, "advance": lambda count: None}
    works: dict[str, tuple[Callable[[], Any], int]] = {
        "forward": (lambda: score(*given, examples, **options), rows.size),
        "token_scores": (lambda: token_scores(*given, examples, **options), rows.size),
        "exposure": (
            lambda: exposures(
                base, lora.scaling, adapters, behind, tokens_per_microbatch=1024, advance=options["advance"]
            ),
            sum(len(one.tokens) for one in held),
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, (work, _) in works.items():
            began = time.perf_counter()
            work()
            if repeat:  # the first is the warm-up
                seconds[name].append(time.perf_counter() - began)
    for name, (_, tokens) in works.items():
        # Tokens/s over the forward pass's, turn by turn.
        ratios = [
            works["forward"][1] / tokens * own / plain
            for own, plain in zip(seconds[name], seconds["forward"], strict=True)
        ]
        speeds = sorted(1 / ratio for ratio in ratios)
        case = {"case": name, "real_tokens_per_second": round(tokens / statistics.median(seconds[name]), 1)}
        if name != "forward":
            told = {"ratio": statistics.median(speeds), "low": speeds[0], "high": speeds[-1]}
            case |= {key: round(value, 3) for key, value in told.items()} | {"target": TARGET}
        yield case
