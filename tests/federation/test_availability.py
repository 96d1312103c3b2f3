"""Dropouts, stragglers, over-selection and asynchronous clients: who is in a round, and what that does to it."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny import same
from toy_rounds import KEY, play, toy_model, toy_plan, toy_trainer

from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.aggregation.fedsa import FedSaLora
from fedjax_llm.aggregation.flexlora import FlexLora
from fedjax_llm.aggregation.rolora import RoLora
from fedjax_llm.aggregation.scaffold import Scaffold
from fedjax_llm.errors import UserError
from fedjax_llm.federation import cohorts, release, rounds
from fedjax_llm.federation.availability import Answers, Asynchronous, Availability, among, answers, buffered, latency
from fedjax_llm.federation.plan import Federation
from fedjax_llm.federation.sampling import round_key, sample_cohort
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.types import Aggregation, Stack

IDS = tuple(range(100, 140))
STEPS = LocalTraining(batch_size=3, local_steps=1)
FALSE_ALARM = 1e-6


def test_reliable_clients_are_the_cohort_as_it_was_drawn():
    found = answers(KEY, 3, IDS, 7, Availability())
    assert found.cohort.tolist() == sample_cohort(round_key(KEY, 3, "cohort"), len(IDS), 7).tolist()
    assert (len(found.silent), len(found.late), found.elapsed) == (0, 0, 1.0)


def test_dropouts_have_the_given_probability():
    silent = sum(len(answers(KEY, number, IDS, len(IDS), Availability(dropout=0.3)).silent) for number in range(1, 26))
    assert stats.binomtest(silent, 25 * len(IDS), 0.3).pvalue > FALSE_ALARM


def test_latencies_are_log_normal_around_one_and_partly_a_clients_own():
    model = Availability(spread=0.7, jitter=0.3)
    times = np.log([[latency(KEY, number, client, model) for number in range(1, 9)] for client in range(60)])
    assert stats.kstest(times.mean(axis=1) / math.hypot(0.7, 0.3 / math.sqrt(8)), "norm").pvalue > FALSE_ALARM
    within = (times - times.mean(axis=1, keepdims=True)).ravel()
    chi = (within**2).sum() / 0.3**2
    assert FALSE_ALARM < stats.chi2.sf(chi, 60 * 7) < 1 - FALSE_ALARM


availabilities = st.builds(
    Availability,
    dropout=st.floats(0, 0.9),
    spread=st.floats(0, 1),
    jitter=st.floats(0, 1),
    deadline=st.none() | st.floats(0.2, 3),
    over_selection=st.floats(1, 3),
)


@settings(max_examples=25, deadline=None)
@given(availability=availabilities, number=st.integers(1, 9), cohort=st.integers(1, 12))
def test_the_fastest_who_answer_in_time_are_in(availability, number, cohort):
    ids = IDS[:12]
    found = answers(KEY, number, ids, cohort, availability)
    size = min(len(ids), math.ceil(availability.over_selection * cohort - 1e-9))
    selected = sample_cohort(round_key(KEY, number, "cohort"), len(ids), size)
    parts = [found.cohort, found.silent, found.late]
    assert sorted(np.concatenate(parts).tolist()) == selected.tolist()  # everyone is somewhere, once
    times = {place: latency(KEY, number, ids[place], availability) for place in selected.tolist()}
    assert {place for place, time in times.items() if time == math.inf} == set(found.silent.tolist())
    within = math.inf if availability.deadline is None else availability.deadline
    in_time = sorted((time, place) for place, time in times.items() if time <= within and time < math.inf)
    assert found.cohort.tolist() == sorted(place for _, place in in_time[:cohort])
    if len(found.cohort) == min(cohort, size):
        assert found.elapsed == max(times[place] for place in found.cohort.tolist())
    elif availability.deadline is not None and availability != Availability():
        assert found.elapsed == availability.deadline


def test_over_selection_shortens_rounds_and_wastes_work():
    slow = Availability(dropout=0.1, jitter=1.0)
    waiting = [answers(KEY, number, IDS, 10, slow) for number in range(1, 31)]
    hasty = [answers(KEY, number, IDS, 10, replace(slow, over_selection=2.0)) for number in range(1, 31)]
    assert np.mean([found.elapsed for found in hasty]) < np.mean([found.elapsed for found in waiting]) / 2
    assert min(len(found.cohort) for found in hasty) == 10 > np.mean([len(found.cohort) for found in waiting])
    assert all(len(found.late) == 0 for found in waiting)


def test_a_secret_sample_loses_its_silent_clients_and_no_others():
    selected = np.array([1, 4, 5, 9])
    found = among(KEY, 2, IDS, selected, len(IDS), Availability(dropout=0.5))
    assert set(found.cohort) | set(found.silent) == set(selected)
    assert len(found.late) == 0


# Asynchronous clients.


UNEVEN = Availability(spread=0.5, jitter=0.5)


def played(rounds_: int, cohort: int, concurrency: int, availability=UNEVEN, ids=IDS):
    return [buffered(KEY, n, ids, cohort, Asynchronous(concurrency), availability) for n in range(1, rounds_ + 1)]


def test_the_buffer_is_full_of_different_clients_whose_versions_add_up():
    """Follows every client through all rounds by what the answers say alone."""
    cohort, concurrency, began = 4, 9, {}
    started = set()
    for number, found in enumerate(played(12, cohort, concurrency), start=1):
        assert len(set(found.cohort.tolist())) == cohort
        for client, staleness in zip(found.cohort.tolist(), found.staleness.tolist(), strict=True):
            if staleness:  # it trained before this round, and from the version that it began with
                assert began.pop(client) == number - 1 - staleness
            else:
                began.pop(client, None)
        began |= dict.fromkeys(found.before.tolist(), number - 1) | dict.fromkeys(found.after.tolist(), number)
        started |= set(found.before.tolist()) | set(found.after.tolist())
        assert found.elapsed > 0
    assert max(found.staleness.max() for found in played(12, cohort, concurrency)) >= 2
    assert len(started) > 20


def test_one_client_at_a_time_is_never_stale():
    for found in played(4, 1, 1, Availability()):
        assert found.staleness.tolist() == [0]
        assert found.elapsed == 1.0


def test_silent_asynchronous_clients_are_replaced():
    found = played(6, 4, 6, Availability(dropout=0.5, jitter=0.5), IDS[:7])
    assert sum(len(one.silent) for one in found) > 5
    assert all(len(one.cohort) == 4 for one in found)


def asynchronous_plan(staleness: float, layout: str = "together", **changes):
    federation = Federation(
        cohort=2,
        weighting="uniform",
        asynchronous=Asynchronous(4, staleness),
        availability=Availability(spread=1.0, jitter=0.5),
    )
    return toy_plan(toy_trainer(), STEPS, layout=layout, cohort=2, federation=federation, **changes)


@pytest.mark.parametrize("layout", ["together", "one by one"])
def test_stale_updates_begin_with_old_adapters_and_weigh_less(layout):
    """Against a plain loop that keeps all the server's versions."""
    plan, staleness = asynchronous_plan(0.5, layout), []
    _, params, adapters = toy_model()
    state, versions = rounds.initial_state(plan, adapters), [adapters]
    for number in range(1, 6):
        found = cohorts.answers_of(plan, number)
        moved = []
        for client, age in zip(found.cohort.tolist(), found.staleness.tolist(), strict=True):
            lone = toy_plan(toy_trainer(), STEPS, setting="local", layout="one by one", cohort=5)
            begun = replace(rounds.initial_state(lone, versions[-1 - age]), round=jnp.int32(number - 1))
            trained, _ = rounds.run_round(lone, params, begun)
            delta = jax.tree.map(lambda new, old, c=client: new[c] - old, trained.adapters, versions[-1 - age])
            moved.append(jax.tree.map(lambda leaf, a=age: leaf / math.sqrt(1 + a), delta))
        versions.append(jax.tree.map(lambda a, *deltas: a + sum(deltas) / 2, versions[-1], *moved))
        state, report = rounds.run_round(plan, params, state)
        assert [client.staleness for client in report.clients] == found.staleness.tolist()
        assert report.elapsed == found.elapsed
        staleness += found.staleness.tolist()
        for ours, plain in zip(*map(jax.tree.leaves, (state.adapters, versions[-1])), strict=True):
            np.testing.assert_allclose(ours, plain, atol=1e-5)
    assert max(staleness) >= 1


def test_what_clients_began_with_is_part_of_the_state():
    plan = asynchronous_plan(0.5)
    _, params, adapters = toy_model()
    state = rounds.initial_state(plan, adapters)
    for _ in range(2):
        state, _ = rounds.run_round(plan, params, state)
    again = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, state))
    assert same(rounds.run_round(plan, params, again)[0].adapters, rounds.run_round(plan, params, state)[0].adapters)


# Rounds.


def test_lost_clients_change_nothing_and_their_bytes_are_counted():
    federation = Federation(cohort=5, availability=Availability(dropout=0.4, jitter=0.5, deadline=1.2))
    plan = toy_plan(toy_trainer(), STEPS, cohort=5, federation=federation)
    state, reports = play(plan, rounds=3)
    seen = {"silent": 0, "late": 0}
    for number, report in enumerate(reports, start=1):
        found = cohorts.answers_of(plan, number)
        names = {name: [plan.clients[i].name for i in getattr(found, name)] for name in ("cohort", "silent", "late")}
        assert [client.name for client in report.clients] == names["cohort"]
        assert (list(report.silent), list(report.late)) == (names["silent"], names["late"])
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(toy_model()[2]))
        lost = len(names["silent"]) + len(names["late"])
        assert report.wasted == (lost * size, len(names["late"]) * size)
        assert cohorts.cohort_of(plan, number).tolist() == sorted([*found.cohort, *found.late])  # who is charged
        seen = {name: seen[name] + len(names[name]) for name in seen}
    assert min(seen.values()) > 0
    alone, _ = play(plan._replace(federation=replace(federation, availability=None)), rounds=3)
    assert not same(state.adapters, alone.adapters)


def unheard(aggregation, **changes):
    """The report of a round with clients that were late, and what one that was heard exchanged."""
    federation = Federation(cohort=5, availability=Availability(jitter=1.0, deadline=1.0))
    plan = toy_plan(toy_trainer(), STEPS, cohort=5, federation=federation, aggregation=aggregation)
    _, (report,) = play(plan._replace(**changes), rounds=1)
    assert report.late
    assert report.clients
    return report


@pytest.mark.parametrize("algorithm", [Scaffold(), RoLora(), FedSaLora()], ids=lambda one: type(one).__name__)
def test_late_clients_waste_what_heard_ones_exchange(algorithm):
    """More than a delta where the algorithm has clients send more, and less where factors rest or stay."""
    report = unheard(algorithm.make())
    heard = {(client.download_bytes, client.upload_bytes) for client in report.clients}
    assert heard == {(report.wasted.download / len(report.late), report.wasted.upload / len(report.late))}


def test_late_clients_of_lower_rank_waste_less():
    full, half = (unheard(FlexLora().make(), ranks=ranks).wasted for ranks in ((), (1,) * 5))
    assert 3 * half.upload == full.upload > 0
    assert 3 * half.download == full.download


def test_a_stack_has_room_for_silent_clients():
    """So that a rule that takes a cohort's size from the stack is compiled once, and knows whom it lacks."""
    shapes = []

    def update(view, state, adapters):
        shapes.append((view.weights.shape[0], int(np.sum(np.asarray(view.weights) > 0))))
        return adapters, state

    federation = Federation(cohort=5, availability=Availability(dropout=0.4))
    aggregation = Aggregation(init=lambda adapters: (), update=update, view=Stack)
    plan = toy_plan(toy_trainer(), STEPS, cohort=5, federation=federation, aggregation=aggregation)
    with jax.disable_jit():
        view = release.seen(plan, Stack({"w": jnp.ones((3, 2))}, jnp.ones(3)), np.arange(3), 1)
        aggregation.update(view, (), ())
    assert shapes == [(5, 3)]
    assert not np.any(view.messages["w"][3:])


def test_a_round_that_nobody_answers_changes_nothing():
    federation = Federation(cohort=1, availability=Availability(dropout=0.9))
    plan = toy_plan(toy_trainer(), STEPS, cohort=1, federation=federation, aggregation=FedAvg().make())
    empty = next(number for number in range(1, 50) if not len(cohorts.answers_of(plan, number).cohort))
    _, params, adapters = toy_model()
    before = replace(rounds.initial_state(plan, adapters), round=jnp.int32(empty - 1))
    after, report = rounds.run_round(plan, params, before)
    assert (int(after.round), report.clients, report.tokens) == (empty, (), 0)
    assert same(after.adapters, before.adapters)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Availability(dropout=1.0), "availability.dropout is 1.0"),
        (lambda: Availability(spread=-1.0), "availability.spread is -1.0"),
        (lambda: Availability(jitter=math.inf), "availability.jitter is inf"),
        (lambda: Availability(deadline=0.0), "availability.deadline is 0.0"),
        (lambda: Availability(over_selection=0.5), "availability.over_selection is 0.5"),
        (lambda: Asynchronous(0), "asynchronous.concurrency is 0"),
        (lambda: Asynchronous(3, -1.0), "asynchronous.staleness is -1.0"),
        (lambda: Federation(asynchronous=Asynchronous(3)), "federation.cohort is None: the cohort is the buffer"),
        (lambda: Federation(cohort=4, asynchronous=Asynchronous(3)), "concurrency is 3 and federation.cohort is 4"),
        (
            lambda: Federation(cohort=2, asynchronous=Asynchronous(3), availability=Availability(deadline=1.0)),
            "asynchronous clients are not waited for",
        ),
    ],
)
def test_impossible_values_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_answers_are_a_function_of_the_key():
    one, other = (buffered(KEY, 3, IDS, 3, Asynchronous(6), Availability(jitter=1.0)) for _ in range(2))
    assert isinstance(one, Answers)
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    third = buffered(jax.random.key(8), 3, IDS, 3, Asynchronous(6), Availability(jitter=1.0))
    assert not np.array_equal(one.cohort, third.cohort)
