"""Known ground: a tiny model that is trained until it knows one secret by heart gives that one away, and no other."""

from typing import NamedTuple

import jax
import numpy as np
import pytest
from tiny import tiny_base

from fedjax_llm import lora
from fedjax_llm.data.chat import encode_prompt, encode_records
from fedjax_llm.data.packing import Shape, pack
from fedjax_llm.data.planted import PlantedSecrets, records_of
from fedjax_llm.data.secrets import question
from fedjax_llm.leakage.exposure import answer_example, candidate_rows, exposures
from fedjax_llm.leakage.extraction import greedy_prefix, tries
from fedjax_llm.leakage.token_scores import token_scores
from fedjax_llm.lora import Lora
from fedjax_llm.models.beam import beam_search
from fedjax_llm.models.decoding import generate
from fedjax_llm.training.client_update import Trainer, run, start
from fedjax_llm.training.optimizers import Optimizer

LORA = Lora(rank=8, alpha=16.0, targets=("*_proj",))
STEPS, COPIES, REFERENCES = 60, 4, 60
SHAPES = (Shape(4, 128, 64),)


class Known(NamedTuple):
    """A model, the adapters that were trained, a secret that they were trained on, and one that they never met."""

    base: object
    adapters: object
    secret: object
    control: object


@pytest.fixture(scope="module")
def known():
    """Trained on four copies of a secret, by Adam."""
    base = tiny_base(width=128)  # fewer numbers of unit size leave no token of random weights nearly certain
    secret, control = PlantedSecrets(None, (COPIES,), 1, kinds=("patient number",), seed=5).secrets(["clinic"])
    encoded, _ = encode_records(records_of([secret]), base.tokenizer, 128, "drop")
    fresh = lora.init(jax.random.key(0), LORA, base.model)
    adapters = jax.tree.map(lambda leaf: leaf[None], fresh)
    trainer = Trainer(base.model, LORA.scaling, Optimizer("adamw", 1e-2).make())
    work = pack([[list(encoded)] * STEPS], SHAPES, clients=1)
    keys = jax.random.split(jax.random.key(1), 1)
    trained = run(trainer, base.params, start(trainer, adapters), work, keys, np.ones((1, STEPS)))
    return Known(base, jax.tree.map(lambda leaf: leaf[0], trained.adapters), secret, control)


def quiet(count):
    """Takes progress and shows nothing."""


def scored(known, secret):
    example = answer_example(secret, question(secret), known.base.tokenizer, None)
    base = known.base
    given = (base.model, LORA.scaling, base.params, known.adapters, [example])
    (found,) = token_scores(*given, shapes=SHAPES, advance=quiet)
    return found


def exposed(known, adapters):
    secrets = [known.secret, known.control]
    rows = candidate_rows(secrets, known.base.tokenizer, None, count=REFERENCES, seed=2)
    return exposures(known.base, LORA.scaling, adapters, rows, tokens_per_microbatch=2048, advance=quiet)


def answers(known, decode, secret, **fields):
    """What decoding makes of the secret's question, as texts."""
    base, scaled = known.base, lora.scaled(known.adapters, LORA.scaling)
    prompt = encode_prompt(question(secret), base.tokenizer)
    settings = {"max_new_tokens": 12, "end_ids": base.tokenizer.end_ids, "pad_id": base.tokenizer.pad_id}
    (made,) = decode(base.model, base.params, scaled, [prompt], **settings, **fields)
    return made


def test_a_memorised_secret_has_all_the_exposure_there_is(known):
    secret, control = exposed(known, known.adapters)
    assert secret.rank == 1
    assert secret.bits == pytest.approx(np.log2(REFERENCES + 1))
    assert secret.extrapolated > 20
    assert control.rank > 1
    before, _ = exposed(known, lora.silent(known.adapters, known.base.params))
    assert before.rank > 1


def test_greedy_decoding_gives_it_away_and_the_scores_say_so(known):
    decode = known.base.tokenizer.decode
    assert decode(answers(known, generate, known.secret)) == known.secret.value
    found = scored(known, known.secret)
    assert greedy_prefix(found) == len(found.log_prob)
    assert tries(float(found.log_prob.sum()), 0.5) == 1
    made = decode(answers(known, generate, known.control))
    assert made != known.control.value
    control = scored(known, known.control)
    assert greedy_prefix(control) < len(control.log_prob)
    assert tries(float(control.log_prob.sum()), 0.5) > 1000


def test_the_first_beam_is_the_secret_and_no_beam_is_the_control(known):
    decode = known.base.tokenizer.decode
    beams = answers(known, beam_search, known.secret, beams=4)
    assert decode(beams[0][0]) == known.secret.value
    assert beams[0][1] == pytest.approx(scored(known, known.secret).log_prob.sum(), abs=1e-3)
    others = [decode(tokens) for tokens, _ in answers(known, beam_search, known.control, beams=4)]
    assert known.control.value not in others


def test_an_untrained_model_gives_nothing_away(known):
    untrained = known._replace(adapters=lora.silent(known.adapters, known.base.params))
    found = scored(untrained, known.secret)
    assert greedy_prefix(found) == 0
    assert tries(float(found.log_prob.sum()), 0.5) > 1e6
    assert known.base.tokenizer.decode(answers(untrained, generate, known.secret)) != known.secret.value
