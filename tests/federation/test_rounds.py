"""The vectorised round against plain loops, and what holds whatever the layout, the setting and the data."""

import logging
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import same
from toy_rounds import KEY, LAYOUTS, mean_gradient, play, play_plainly, toy_model, toy_plan, toy_sites, toy_trainer

from fedjax_llm.aggregation.fedadam import FedAdam
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.errors import UserError
from fedjax_llm.federation import rounds
from fedjax_llm.federation.plan import Execution, Federation
from fedjax_llm.federation.rounds import initial_state, run_round
from fedjax_llm.federation.sampling import round_key, sample_cohort
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Schedule
from fedjax_llm.types import Aggregation, Stack, Sum

CASES = {
    "sgd, steps": (
        toy_trainer("sgd", 0.1),
        lambda schedule: optax.sgd(lambda count: 0.1 * schedule(count)),
        LocalTraining(batch_size=3, local_steps=2),
        Federation(rounds=2),
    ),
    "sgd, epochs, proximal, per token, schedules": (
        toy_trainer("sgd", 0.1, proximal=0.5),
        lambda schedule: optax.sgd(lambda count: 0.1 * schedule(count)),
        LocalTraining(
            batch_size=2,
            local_epochs=2,
            normalise="token",
            local_schedule=Schedule("linear", 0.3),
            round_schedule=Schedule("cosine", end=0.1),
        ),
        Federation(rounds=2, weighting="uniform"),
    ),
    "adamw, epochs, kept state": (
        toy_trainer("adamw", 0.01),
        lambda schedule: optax.adamw(0.01),
        LocalTraining(batch_size=3, local_epochs=1, keep_optimizer="yes"),
        Federation(rounds=2),
    ),
    "adamw, steps, per token, schedules": (
        toy_trainer("adamw", 0.01),
        lambda schedule: optax.adamw(lambda count: 0.01 * schedule(count)),
        LocalTraining(batch_size=2, local_steps=3, normalise="token", local_schedule=Schedule("cosine", 0.4)),
        Federation(rounds=2),
    ),
}
STEPS = LocalTraining(batch_size=3, local_steps=2)


@cache
def plainly(case: str):
    trainer, optimizer, local, federation = CASES[case]
    return play_plainly(toy_plan(trainer, local, federation=federation), optimizer)


def distance(one, other) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


def entry(tree, c: int):
    return jax.tree.map(lambda leaf: leaf[c], tree)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_rounds_equal_plain_loops_in_every_layout(case, layout):
    trainer, _, local, federation = CASES[case]
    state, _ = play(toy_plan(trainer, local, federation=federation, layout=layout))
    assert int(state.round) == 2
    assert distance(state.adapters, plainly(case)) < 1e-5
    assert distance(state.adapters, toy_model()[2]) > 1e-3  # it went somewhere


def test_dropout_does_not_depend_on_the_layout():
    trainer = toy_trainer(dropout=0.4)
    together, _ = play(toy_plan(trainer, STEPS))
    other, _ = play(toy_plan(trainer, STEPS, layout="one by one"))
    assert distance(together.adapters, other.adapters) < 1e-5
    undropped, _ = play(toy_plan(toy_trainer(), STEPS))
    assert distance(together.adapters, undropped.adapters) > 1e-3


def test_one_client_and_one_step_of_sgd_is_the_centralised_step():
    _, params, adapters = toy_model()
    site = toy_sites()[3]
    local = LocalTraining(batch_size=len(site[1]), local_steps=1)
    loss, gradient = mean_gradient(params, adapters, site[1], "example")
    expected = jax.tree.map(lambda a, g: a - 0.1 * g, adapters, gradient)
    for setting in ("federated", "centralised"):
        plan = toy_plan(toy_trainer(), local, setting=setting, layout="one by one", cohort=1, sites=(site,))
        state, (report,) = play(plan, rounds=1)
        assert distance(state.adapters, expected) < 1e-6
        assert report.clients[0].loss == pytest.approx(float(loss), rel=1e-5)
        assert report.update_norm == pytest.approx(0.1 * float(optax.tree.norm(gradient)), rel=1e-4)


def test_every_setting_spends_as_many_examples():
    counts = {}
    for setting, layout in (("federated", "together"), ("local", "together"), ("centralised", "one by one")):
        _, reports = play(toy_plan(toy_trainer(), STEPS, setting=setting, layout=layout))
        counts[setting] = [sum(client.examples for client in report.clients) for report in reports]
    assert counts == dict.fromkeys(counts, [3 * 2 * 3] * 2)  # cohort x steps x batch


def test_centralised_pools_the_sites_and_does_the_steps_of_the_cohort():
    plan = toy_plan(toy_trainer(), STEPS, setting="centralised", layout="one by one")
    assert [client.name for client in plan.clients] == ["all"]
    assert plan.local.local_steps == 3 * STEPS.local_steps
    pooled = [example.record_id for _, examples in toy_sites() for example in examples]
    assert [example.record_id for example in plan.clients[0].examples] == pooled
    state, _ = play(plan)
    assert distance(state.adapters, play_plainly(plan, lambda schedule: optax.sgd(0.1))) < 1e-5


def test_local_sites_stay_apart_and_alone():
    plan = toy_plan(toy_trainer(), STEPS, setting="local")
    state, _ = play(plan, rounds=1)
    members = sample_cohort(round_key(KEY, 1, "cohort"), len(plan.clients), plan.cohort)
    for c in range(len(plan.clients)):
        moved = not same(entry(state.adapters, c), toy_model()[2])
        assert moved == (c in members)
    first, second = members[:2]
    assert distance(entry(state.adapters, first), entry(state.adapters, second)) > 1e-3


def test_a_client_does_not_depend_on_the_others_or_its_slot():
    sites = toy_sites()
    trainer = toy_trainer(dropout=0.4)
    everyone, _ = play(toy_plan(trainer, STEPS, setting="local", cohort=5))
    few, _ = play(toy_plan(trainer, STEPS, setting="local", cohort=3, sites=(sites[4], sites[1], sites[0])))
    for here, there in ((0, 4), (1, 1), (2, 0)):
        assert distance(entry(few.adapters, here), entry(everyone.adapters, there)) < 1e-6


@pytest.mark.parametrize(("keep", "lasts"), [("auto", False), ("no", False), ("yes", True)])
def test_optimizer_state_lasts_over_rounds_where_asked(keep, lasts):
    plan = toy_plan(toy_trainer("adamw", 0.01), replace(STEPS, keep_optimizer=keep))
    state, reports = play(plan)
    assert bool(state.client_state) == lasts
    if lasts:
        names = [client.name for report in reports for client in report.clients]
        taken = [2 * names.count(client.name) for client in plan.clients]
        assert state.client_state["optimizer"][0].count.tolist() == taken


def poisoned(plan, name: str):
    """The first state of a plan, with a NaN in one client's optimiser."""
    state = initial_state(plan, toy_model()[2])
    c = [client.name for client in plan.clients].index(name)
    spoilt = jax.tree.map(lambda leaf: leaf.at[c].set(jnp.nan), state.client_state["optimizer"][0].mu)
    adam, *others = state.client_state["optimizer"]
    return replace(state, client_state={"optimizer": (adam._replace(mu=spoilt), *others)})


@pytest.mark.parametrize("steps", [1, 2])
def test_a_client_that_is_not_finite_is_left_out_and_reported(steps):
    local = LocalTraining(batch_size=3, local_steps=steps, keep_optimizer="yes")
    plan = toy_plan(toy_trainer("adamw", 0.01), local, layout="in pairs", cohort=5)
    params, start = toy_model()[1], poisoned(plan, "site-2")
    state, report = run_round(plan, params, start)
    assert [client.name for client in report.clients if not client.included] == ["site-2"]
    others = tuple(site for site in toy_sites() if site[0] != "site-2")
    without = toy_plan(toy_trainer("adamw", 0.01), local, layout="in pairs", cohort=4, sites=others)
    expected, _ = run_round(without, params, initial_state(without, toy_model()[2]))
    assert distance(state.adapters, expected.adapters) < 1e-7
    kept = jax.tree.leaves(entry(state.client_state["optimizer"][0].nu, 2))
    assert all((leaf == 0).all() for leaf in kept)  # as it was before the round


def test_a_local_site_that_is_not_finite_keeps_its_adapters():
    plan = toy_plan(toy_trainer("adamw", 0.01), STEPS, setting="local", layout="in pairs", cohort=5)
    state, report = run_round(plan, toy_model()[1], poisoned(plan, "site-2"))
    clean, _ = run_round(plan, toy_model()[1], initial_state(plan, toy_model()[2]))
    assert [client.included for client in report.clients] == [True, True, False, True, True]
    assert same(entry(state.adapters, 2), toy_model()[2])
    for c in (0, 1, 3, 4):
        assert same(entry(state.adapters, c), entry(clean.adapters, c))


def test_no_finite_client_is_an_error_with_the_losses():
    plan = toy_plan(toy_trainer("sgd", 1e30), STEPS)
    with pytest.raises(UserError, match=r"round 1: .*losses: site-\d nan, site-\d nan, site-\d nan.*learning_rate"):
        play(plan, rounds=1)


def spy(view: type, seen: list) -> Aggregation:
    """FedAvg that notes what it is shown."""

    def update(shown, state, adapters):
        seen.append(jax.tree.map(jnp.shape, shown))
        if view is Stack:
            shown = Sum(jax.tree.map(lambda d: jnp.tensordot(shown.weights, d, 1), shown.messages), shown.weights.sum())
        return jax.tree.map(lambda a, t: a + t / shown.weight, adapters, shown.total), state

    return Aggregation(init=lambda adapters: (), update=update, view=view)


@pytest.mark.parametrize("view", [Sum, Stack])
def test_the_server_sees_the_declared_view_and_no_more(view):
    seen = []
    plan = toy_plan(toy_trainer(), STEPS, layout="in pairs", aggregation=spy(view, seen))
    state, _ = play(plan, rounds=1)
    (shown,) = seen
    assert type(shown) is view
    expected, _ = play(toy_plan(toy_trainer(), STEPS, layout="in pairs"), rounds=1)
    assert distance(state.adapters, expected.adapters) < 1e-6
    if view is Stack:
        assert shown.weights == (3,)  # the cohort, without the slot that stays empty
        shapes = jax.tree.map(lambda leaf: (3, *leaf.shape), toy_model()[2])
        assert shown.messages == shapes


def test_the_server_optimizer_moves_by_the_mean_delta():
    average, _ = play(toy_plan(toy_trainer(), STEPS), rounds=1)
    start = toy_model()[2]
    adam = FedAdam(server_lr=0.01, tau=1e-3)
    state, _ = play(toy_plan(toy_trainer(), STEPS, aggregation=adam.make()), rounds=1)
    delta = jax.tree.map(jnp.subtract, average.adapters, start)
    expected = jax.tree.map(lambda a, d: a + 0.01 * d / (jnp.abs(d) + 1e-3), start, delta)  # Adam's first step
    assert distance(state.adapters, expected) < 1e-5


def test_rounds_after_the_first_compile_nothing(caplog):
    # One bucket, so that the first round sees every shape.
    plan = toy_plan(toy_trainer("adamw", 0.01), replace(STEPS, keep_optimizer="yes"), layout="one by one")
    _, params, adapters = toy_model()
    state, _ = run_round(plan, params, initial_state(plan, adapters))
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        for _ in range(2):
            state, _ = run_round(plan, params, state)
        compiled = [record.message for record in caplog.records if record.message.startswith("Compiling")]
        jax.jit(lambda x: x + 1)(jnp.ones(3))
    assert compiled == []
    assert any(record.message.startswith("Compiling") for record in caplog.records)  # the log is what we think


def test_memory_does_not_grow_with_the_cohort(monkeypatch):
    plan, held = toy_plan(toy_trainer(), STEPS, layout="one by one", cohort=5), []
    run_chunk = rounds._run_chunk

    def watched(*arguments):
        held.append(sum(array.nbytes for array in jax.live_arrays()))
        return run_chunk(*arguments)

    monkeypatch.setattr(rounds, "_run_chunk", watched)
    play(plan, rounds=1)
    assert len(held) == 5
    assert held[2:] == held[2:3] * 3  # the first two differ by the view that the first chunk made


def test_reports_count_tokens_with_and_without_padding():
    plan = toy_plan(toy_trainer(), LocalTraining(batch_size=4, local_epochs=1), cohort=5)
    _, (report,) = play(plan, rounds=1)
    for client, (name, examples) in zip(report.clients, toy_sites(), strict=True):
        assert (client.name, client.examples) == (name, len(examples))
        assert client.tokens == sum(len(example.tokens) for example in examples)
        assert client.update_norm > 0
    assert report.tokens == sum(client.tokens for client in report.clients) < report.padded_tokens


def test_the_same_key_gives_the_same_bits_and_another_does_not():
    plan = toy_plan(toy_trainer(), STEPS)
    one, other = (play(plan, rounds=1)[0].adapters for _ in range(2))
    assert same(one, other)
    third, _ = play(plan._replace(key=jax.random.key(8)), rounds=1)
    assert not same(one, third.adapters)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Federation(rounds=0), "federation.rounds is 0"),
        (lambda: Federation(cohort=0), "federation.cohort is 0"),
        (lambda: Execution(clients_per_chunk=0), "execution.clients_per_chunk is 0"),
        (lambda: Execution(tokens_per_microbatch=-1), "execution.tokens_per_microbatch is -1"),
        (lambda: Execution(buckets=0), "execution.buckets is 0"),
        (lambda: Execution(evaluation_buckets=0), "execution.evaluation_buckets is 0"),
    ],
)
def test_impossible_values_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_fedavg_with_half_the_server_rate_goes_half_way():
    start = toy_model()[2]
    whole, _ = play(toy_plan(toy_trainer(), STEPS), rounds=1)
    half, _ = play(toy_plan(toy_trainer(), STEPS, aggregation=FedAvg(server_lr=0.5).make()), rounds=1)
    middle = jax.tree.map(lambda a, b: (a + b) / 2, start, whole.adapters)
    assert distance(half.adapters, middle) < 1e-6
