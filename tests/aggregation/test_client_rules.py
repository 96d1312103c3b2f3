"""Algorithms that ask something of their clients: against plain NumPy on quadratics, and in rounds over a model."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import plain_rules as plain
import pytest
from jax.flatten_util import ravel_pytree
from toy_rounds import KEY, mean_gradient, play, toy_model, toy_plan, toy_trainer

from fedjax_llm import trees
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.aggregation.feddyn import FedDyn
from fedjax_llm.aggregation.fednova import FedNova
from fedjax_llm.aggregation.mimelite import MimeLite
from fedjax_llm.aggregation.qfedavg import QFedAvg
from fedjax_llm.aggregation.scaffold import Scaffold
from fedjax_llm.errors import UserError
from fedjax_llm.federation.sampling import round_key, sample_cohort, sample_steps
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer, Schedule
from fedjax_llm.types import Local, Sum, Trained

RULES = {
    FedAvg(): plain.fedavg(),
    Scaffold(participation=0.6): plain.scaffold(1.0, 0.6),
    Scaffold(server_lr=0.5): plain.scaffold(0.5, 1.0),
    FedNova(): plain.fednova(1.0),
    FedNova(server_lr=0.7): plain.fednova(0.7),
    MimeLite(): plain.mimelite(0.9),
    MimeLite(momentum=0.3): plain.mimelite(0.3),
    FedDyn(participation=0.6): plain.feddyn(0.1, 0.6),
    FedDyn(alpha=2.0): plain.feddyn(2.0, 1.0),
    QFedAvg(q=0.5, learning_rate=0.1): plain.qfedavg(0.5, 0.1),
    QFedAvg(q=2.0, learning_rate=0.03): plain.qfedavg(2.0, 0.03),
}
make = cache(lambda algorithm: algorithm.make())

# Clients with losses 1 + sum(curves (y - centres)^2) / 2 take unequal numbers of steps.
C, STEPS, WEIGHTS = 4, np.array([1, 3, 2, 4]), np.array([1.0, 3.0, 2.0, 2.0])
RNG = np.random.default_rng(0)
START, UNRAVEL = ravel_pytree({"q": {"a": jnp.zeros((2, 2)), "b": jnp.ones((2, 3))}})
CENTRES, CURVES = RNG.normal(size=(C, 10)), RNG.uniform(0.3, 2.0, size=(C, 10))
RATES = 0.2 * np.linspace(1.0, 0.4, STEPS.max()) * (np.arange(STEPS.max()) < STEPS[:, None])
OPTIMUM = (WEIGHTS[:, None] * CURVES * CENTRES).sum(0) / (WEIGHTS[:, None] * CURVES).sum(0)


@cache
def quadratic_round(algorithm):
    """A jitted round of the library's functions: (x, state, memory, present [C]) -> (x, state, memory)."""
    aggregation = make(algorithm)
    rule, unravel = aggregation.client, jax.vmap(UNRAVEL)
    centres, curves = unravel(jnp.float32(CENTRES)), unravel(jnp.float32(CURVES))

    def loss(y, centre, curve):
        return 1 + sum(jax.tree.leaves(jax.tree.map(lambda y, c, s: jnp.sum(s * (y - c) ** 2) / 2, y, centre, curve)))

    losses = jax.vmap(jax.value_and_grad(loss))

    @jax.jit
    def one_round(x, state, memory, present):
        received = () if aggregation.broadcast is None else aggregation.broadcast(state)
        start = trees.repeat(x, C)
        local = Local(start, memory, trees.repeat(received, C), jnp.full(C, 2))

        def step(y, rates):
            _, gradient = losses(y, centres, curves)
            if rule.gradient is not None:
                gradient = jax.vmap(rule.gradient)(gradient, y, local)
            return jax.tree.map(lambda y, g: y - rates[:, None, None] * g, y, gradient), ()

        y, _ = jax.lax.scan(step, start, jnp.float32(RATES.T))
        messages = trees.subtract(y, start)
        if rule.report is not None:
            steps, rates = jnp.float32(STEPS), jnp.float32(RATES.sum(1))
            probe = losses(start, centres, curves) if rule.probe else ()
            messages, kept = jax.vmap(rule.report)(Trained(messages, y, steps, rates, *probe), local)
            memory = trees.select(present, kept, memory)
        weights = jnp.where(present, jnp.float32(WEIGHTS), 0.0)
        view = Sum(trees.weighted_sum(weights, messages), weights.sum())
        return *aggregation.update(view, state, x), memory

    return one_round


def begin(algorithm):
    """Adapters, server state and memory before the first round."""
    aggregation, x = make(algorithm), UNRAVEL(START)
    memory = () if aggregation.client.init is None else trees.repeat(aggregation.client.init(x), C)
    return x, aggregation.init(x), memory


def rounds(algorithm, count: int) -> np.ndarray:
    """Where rounds with all clients end."""
    x, state, memory = begin(algorithm)
    for _ in range(count):
        x, state, memory = quadratic_round(algorithm)(x, state, memory, jnp.ones(C, bool))
    return np.asarray(ravel_pytree(x)[0])


def losses_at(x: np.ndarray) -> np.ndarray:
    """[C]."""
    return 1 + (CURVES * (x - CENTRES) ** 2).sum(1) / 2


def quadratic_work(place: int) -> plain.Work:
    def slope(step, y):
        return CURVES[place] * (y - CENTRES[place])

    rates = RATES[place, : STEPS[place]]
    return plain.Work(place, WEIGHTS[place], rates, slope, lambda y: (losses_at(y)[place], slope(0, y)))


@pytest.mark.parametrize("algorithm", RULES, ids=str)
def test_rounds_on_quadratics_are_those_of_the_paper(algorithm):
    x, state, memory = begin(algorithm)
    plain_x, plain_state, plain_memory = np.float64(START), np.zeros(10), plain.fresh_memory(10)
    for cohort in ([0, 1, 3], [1, 2], [0, 1, 2, 3], [3]):
        present = jnp.isin(jnp.arange(C), jnp.array(cohort))
        x, state, memory = quadratic_round(algorithm)(x, state, memory, present)
        works = [quadratic_work(place) for place in cohort]
        plain_x, plain_state = plain.plain_round(RULES[algorithm], plain_x, plain_state, plain_memory, works)
        np.testing.assert_allclose(ravel_pytree(x)[0], plain_x, atol=1e-5)
        if jax.tree.leaves(state):
            np.testing.assert_allclose(ravel_pytree(state)[0], plain_state, atol=1e-5)
        for place in range(C if jax.tree.leaves(memory) else 0):
            own = jax.tree.map(lambda leaf, place=place: leaf[place], memory)
            np.testing.assert_allclose(ravel_pytree(own)[0], plain_memory[place], atol=1e-5)


def test_the_oracles_tell_the_algorithms_apart():
    ends = [rounds(algorithm, 3) for algorithm in RULES]
    gaps = [np.abs(one - other).max() for i, one in enumerate(ends) for other in ends[:i]]
    assert min(gaps) > 1e-3


@pytest.mark.parametrize("algorithm", [Scaffold(), Scaffold(server_lr=0.5), FedDyn(alpha=1.0)], ids=str)
def test_corrected_clients_meet_in_the_optimum_where_fedavg_does_not(algorithm):
    assert np.abs(rounds(FedAvg(), 200) - OPTIMUM).max() > 0.1
    np.testing.assert_allclose(rounds(algorithm, 200), OPTIMUM, atol=1e-4)


def test_normalised_clients_end_nearer_to_the_optimum_than_those_that_are_not():
    far, near = (np.abs(rounds(algorithm, 200) - OPTIMUM).max() for algorithm in (FedAvg(), FedNova()))
    assert near < 0.5 * far


def test_a_higher_q_evens_the_losses_out():
    spreads = [np.ptp(losses_at(rounds(QFedAvg(q, 0.1), 100))) for q in (0.0, 1.0, 4.0)]
    assert spreads[0] > 1.1 * spreads[1] > 1.2 * spreads[2]


@pytest.mark.parametrize("algorithm", [QFedAvg(q=0.0), MimeLite(momentum=0.0)], ids=str)
def test_a_parameter_of_zero_is_fedavg(algorithm):
    assert np.array_equal(rounds(algorithm, 3), rounds(FedAvg(), 3))


def trained(delta: float, *, steps: float = 2.0, rate: float = 0.2, loss: float = 1.0) -> Trained:
    """A client that moved every entry by ``delta``."""
    moved = jax.tree.map(lambda leaf: jnp.full_like(leaf, delta), UNRAVEL(START))
    return Trained(moved, moved, jnp.float32(steps), jnp.float32(rate), jnp.float32(loss), moved)


@pytest.mark.parametrize(("steps", "rate"), [((2, 5), 0.1), ((7, 1), 0.003), ((4, 4), 0.1)])
def test_a_constant_rate_normalises_by_the_numbers_of_steps(steps, rate):
    aggregation, x = FedNova().make(), UNRAVEL(START)
    local, weights, deltas = Local(x, (), (), jnp.int32(2)), np.array([3, 1]) / 4, np.array([0.1, 0.4])
    clients = [trained(delta, steps=tau, rate=tau * rate) for delta, tau in zip(deltas, steps, strict=True)]
    messages = [aggregation.client.report(client, local)[0] for client in clients]
    total = jax.tree.map(lambda one, other: 3 * one + other, *messages)
    moved, _ = aggregation.update(Sum(total, jnp.float32(4)), (), x)
    expected = (weights @ steps) * (weights @ (deltas / steps))
    np.testing.assert_allclose(ravel_pytree(moved)[0], START + expected, atol=1e-6)
    if steps[0] == steps[1]:
        assert expected == pytest.approx(weights @ deltas)


def test_a_client_without_a_step_tells_nothing_of_its_gradient():
    aggregation, x = Scaffold().make(), UNRAVEL(START)
    own, everyone = trained(0.3).delta, trained(0.7).delta
    local = Local(x, own, everyone, jnp.int32(2))
    message, kept = aggregation.client.report(trained(0.0, steps=0.0, rate=0.0), local)
    assert not any(leaf.any() for leaf in jax.tree.leaves(message))
    np.testing.assert_array_equal(ravel_pytree(kept)[0], ravel_pytree(own)[0])


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, 8.0])
def test_a_loss_of_zero_does_no_harm(q):
    aggregation, x = QFedAvg(q).make(), UNRAVEL(START)
    message, _ = aggregation.client.report(trained(0.1, loss=0.0), Local(x, (), (), jnp.int32(2)))
    moved, _ = aggregation.update(Sum(message, jnp.float32(1)), (), x)
    step = np.asarray(ravel_pytree(moved)[0] - START)
    assert np.all((step >= 0) & (step <= 0.1 + 1e-6))


@pytest.mark.parametrize("algorithm", [FedDyn(alpha=0.0), FedDyn(alpha=np.inf), Scaffold(participation=-0.1)], ids=str)
def test_what_the_contract_does_not_try_is_refused_too(algorithm):
    with pytest.raises(UserError, match=r"aggregation\.(alpha|participation) is"):
        algorithm.make()


# Rounds over a model.

LOCAL = LocalTraining(
    batch_size=2, local_epochs=1, optimizer=Optimizer("sgd", 0.1), local_schedule=Schedule("linear", end=0.5)
)
OVER_A_MODEL = (
    Scaffold(participation=0.6),
    FedNova(),
    MimeLite(momentum=0.7),
    FedDyn(alpha=0.5, participation=0.6),
    QFedAvg(2.0, 0.1),
)
PLAIN = (
    plain.scaffold(1.0, 0.6),
    plain.fednova(1.0),
    plain.mimelite(0.7),
    plain.feddyn(0.5, 0.6),
    plain.qfedavg(2.0, 0.1),
)


def plan_of(algorithm, layout: str = "together"):
    trainer = toy_trainer("sgd", 0.1)._replace(correct=make(algorithm).client.gradient)
    plan = toy_plan(trainer, LOCAL, layout=layout, aggregation=make(algorithm))
    return plan._replace(measure_error=False)


@cache
def plainly(algorithm) -> tuple:
    """Adapters, server state and memories [N, ...] after two rounds, client by client and example by example."""
    rule, plan = PLAIN[OVER_A_MODEL.index(algorithm)], plan_of(algorithm)
    _, params, adapters = toy_model()
    x, unravel = ravel_pytree(adapters)
    x, state, memory = np.float64(x), np.zeros(x.size), plain.fresh_memory(x.size)

    def over(batch, y):
        loss, gradient = mean_gradient(params, unravel(jnp.float32(y)), batch, LOCAL.normalise)
        return float(loss), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])

    def slope(batches, step, y):
        return over(batches[step], y)[1]

    for number in (1, 2):
        works = []
        for c in sample_cohort(round_key(KEY, number, "cohort"), len(plan.clients), plan.cohort):
            client = plan.clients[c]
            order = jax.random.fold_in(round_key(KEY, number, "order"), client.id)
            batches = sample_steps(order, client.examples, LOCAL.batch_size, None, 1)
            rates = [0.1 * LOCAL.local_schedule.factor(step, len(batches)) for step in range(len(batches))]
            whole = partial(over, [example for batch in batches for example in batch])
            works.append(plain.Work(int(c), len(client.examples), rates, partial(slope, batches), whole))
        x, state = plain.plain_round(rule, x, state, memory, works)
    return x, state, np.stack([memory[c] for c in range(len(plan.clients))])


@pytest.mark.parametrize("layout", ["together", "one by one"])
@pytest.mark.parametrize("algorithm", OVER_A_MODEL, ids=lambda algorithm: type(algorithm).__name__)
def test_rounds_over_a_model_equal_plain_loops(algorithm, layout):
    x, server_state, memory = plainly(algorithm)
    state, _ = play(plan_of(algorithm, layout))
    np.testing.assert_allclose(ravel_pytree(state.adapters)[0], x, atol=1e-5)
    if jax.tree.leaves(state.server_state):
        np.testing.assert_allclose(ravel_pytree(state.server_state)[0], server_state, atol=1e-5)
    for kept in state.client_state.values():
        leaves = [np.reshape(leaf, (len(memory), -1)) for leaf in jax.tree.leaves(kept)]
        np.testing.assert_allclose(np.concatenate(leaves, axis=1), memory, atol=1e-5)
