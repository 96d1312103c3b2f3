"""What a run is said to take, against what its rounds report, and what is learned from it."""

import io
import json
from dataclasses import replace

import jax
import pytest
from rich.console import Console
from small_private import private
from small_run import changed, go, write_small

from fedjax_llm import config
from fedjax_llm.data.packing import Shape
from fedjax_llm.experiment import cost_constants, cost_model, prediction
from fedjax_llm.experiment.cost_model import Constants, Work
from fedjax_llm.experiment.expectation import expect
from fedjax_llm.experiment.prepare import prepare
from fedjax_llm.federation.rounds import initial_state, run_round
from fedjax_llm.runs.progress import RunProgress

pytestmark = pytest.mark.usefixtures("short_reports")

ROUGH = cost_model.rough_constants(1e11)
UPPER = {"lora__layers": (-1,)}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return config.load(write_small(tmp_path_factory.mktemp("small") / "files"))


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Constants of a test are its own."""
    monkeypatch.setattr(cost_constants, "cache_dir", lambda: tmp_path / "cache")


def ready(experiment):
    with RunProgress(1, Console(file=io.StringIO())) as progress:
        return prepare(experiment, progress)


def reports(prepared):
    """What the rounds say."""
    plan, state, found = prepared.plan, initial_state(prepared.plan, prepared.adapters), []
    for _ in range(plan.federation.rounds):
        state, report = run_round(plan, prepared.base.params, state)
        found.append(report)
    return found


@pytest.mark.parametrize("fields", [{}, {"training__local_epochs": 1}, UPPER, {"execution__clients_per_chunk": 1}])
def test_the_drawn_rounds_are_those_that_are_run(experiment, fields):
    prepared = ready(changed(experiment, **fields))
    size = cost_model.size_of(prepared.base, prepared.adapters, prepared.frozen)
    drawn = prediction.draw_rounds(prepared.plan, size)
    done = reports(prepared)
    assert [one.tokens for one in drawn] == [one.tokens for one in done]
    assert [one.padded_tokens for one in drawn] == [one.padded_tokens for one in done]
    told = prediction.predict(prepared, prediction.workload(prepared), ROUGH, 0)
    assert (told.rounds, told.tokens) == (3, sum(one.tokens for one in done))


def test_more_rounds_than_are_drawn_are_taken_to_be_like_them(experiment):
    few = prediction.workload(ready(changed(experiment, federation__rounds=16)))
    many = prediction.workload(ready(changed(experiment, federation__rounds=160)))
    assert (len(few.drawn), len(many.drawn), many.rounds) == (16, 16, 160)
    assert many.training.operations == pytest.approx(10 * few.training.operations)
    assert many.evaluation == few.evaluation


def test_a_secret_key_changes_no_forecast(experiment):
    prepared = ready(private(experiment))
    other = replace(prepared, plan=prepared.plan._replace(secret_key=jax.random.key(12345)))
    nothing = replace(prepared, plan=prepared.plan._replace(secret_key=None))
    found = prediction.workload(prepared)
    assert found == prediction.workload(other) == prediction.workload(nothing)
    assert found.training.training > 0


def test_a_trunk_is_filled_once(experiment):
    kept = prediction.workload(ready(changed(experiment, **UPPER, federation__rounds=16)))
    fields = {**UPPER, "federation__rounds": 16, "execution__trunk_megabytes": 0}
    without = prediction.workload(ready(changed(experiment, **fields)))
    assert kept.training.training == without.training.training
    assert 0 < kept.training.forward < without.training.forward
    assert kept.drawn[-1].work.forward == 0 < kept.drawn[0].work.forward
    assert kept.evaluation.forward < without.evaluation.forward


def test_what_else_a_run_does_takes_more(experiment):
    plain = prediction.workload(ready(experiment))
    validated = prediction.workload(ready(changed(experiment, evaluation__validation_every=2)))
    assert plain.validation == Work()
    assert validated.validation.forward > 0
    tuned = prediction.workload(ready(changed(experiment, federation__finetune_rounds=2)))
    assert plain.finetuning == Work()
    assert tuned.finetuning.training > 0
    assert tuned.evaluation.microbatches > plain.evaluation.microbatches  # a pass a site
    base = prediction.workload(ready(changed(experiment, setting="base")))
    assert (base.drawn, base.training) == ((), Work())
    assert 0 < base.evaluation.operations < plain.evaluation.operations


def test_a_prediction_is_proportional_to_the_constants(experiment):
    prepared = ready(experiment)
    work = prediction.workload(prepared)
    slow = ROUGH._replace(seconds={kind: 3 * value for kind, value in ROUGH.seconds.items()})
    one, other = (prediction.predict(prepared, work, constants, 0) for constants in (ROUGH, slow))
    assert other.seconds == pytest.approx(3 * one.seconds)
    assert one.training_seconds + one.evaluation_seconds == pytest.approx(one.seconds)


def test_constants_are_kept_by_model_and_type(experiment):
    base = ready(experiment).base
    measured = Constants(dict(ROUGH.seconds), 2.5)
    assert cost_constants.stored(base) is None
    cost_constants.store(base, measured)
    assert cost_constants.known(base) == measured
    assert cost_constants.stored(replace(base, fingerprint="another")) is None


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"seconds": {"forward": 1}, "memory": 1}'])
def test_damaged_constants_are_not_believed(experiment, damage):
    base = ready(experiment).base
    cost_constants.store(base, ROUGH)
    cost_constants.place_of(base).write_text(damage)
    assert cost_constants.stored(base) is None


def test_constants_that_are_no_times_are_not_believed(experiment):
    base = ready(experiment).base
    for wrong in (float("nan"), -1.0):
        cost_constants.store(base, Constants({**ROUGH.seconds, "forward": wrong}, 1.0))
        assert cost_constants.stored(base) is None


def test_a_run_says_what_it_will_take_and_learns_how_it_went(experiment, tmp_path):
    status, seen = go(experiment, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    cost = found["cost"]
    assert status == 0
    assert seen.index("This run: roughly") < seen.index("Settings")
    assert cost["measured"]["padded_tokens"] == found["padded_tokens"] == cost["predicted"]["padded_tokens"]
    assert cost["measured"]["training_seconds"] == pytest.approx(found["train_seconds"] - found["compile_seconds"])
    prepared = ready(experiment)
    learned = expect(prepared)
    assert not learned.prediction.rough
    took = cost["measured"]["training_seconds"] + cost["measured"]["finishing_seconds"]
    assert learned.prediction.seconds == pytest.approx(took, rel=0.5)


def test_calibration_times_every_kind_that_a_step_and_a_score_have(experiment):
    prepared = ready(experiment)
    shape, base, lora = Shape(2, 16, 10), prepared.base, prepared.lora
    found = [
        cost_constants.training_step(base, replace(lora, layers=(-1,)), shape),
        cost_constants.scored(base, lora, shape),
        cost_constants.answered(base, lora, 2, 16, 3),
    ]
    assert all(seconds > 0 for _, seconds in found)
    assert {kind for kind in cost_model.KINDS if any(getattr(work, kind) for work, _ in found)} == {
        *cost_model.KINDS
    } - {"chunks", "reports"}
