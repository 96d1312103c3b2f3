"""The algorithms made for adapters in real rounds: what averaging loses, and what stays at each client."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import same
from toy_rounds import mean_gradient, toy_model, toy_plan, toy_trainer

from fedjax_llm import lora
from fedjax_llm.aggregation.ditto import Ditto
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.aggregation.fedex import FedExLora
from fedjax_llm.aggregation.fedper import FedPer
from fedjax_llm.aggregation.fedsa import FedSaLora
from fedjax_llm.aggregation.flexlora import FlexLora
from fedjax_llm.aggregation.flora import FLora
from fedjax_llm.aggregation.lora_fair import LoraFair
from fedjax_llm.aggregation.rolora import RoLora
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.federation.rounds import initial_state, run_round
from fedjax_llm.federation.sampling import round_key, sample_cohort, sample_steps
from fedjax_llm.training.client_update import LocalTraining

RATE = 0.1
STEPS = LocalTraining(batch_size=3, local_steps=2)


@cache
def played(algorithm, train: str = "both", rounds: int = 2, rate: float = RATE):
    """The plan, its states from the first on, and the reports."""
    _, params, adapters = toy_model()
    if train == "core":
        adapters = lora.cored(adapters)
    trained, frozen = lora.split(adapters, train)
    plan = toy_plan(toy_trainer("sgd", rate), STEPS, aggregation=algorithm.make())._replace(frozen=frozen)
    states, reports = [initial_state(plan, trained)], []
    for _ in range(rounds):
        state, report = run_round(plan, params, states[-1])
        states.append(state)
        reports.append(report)
    return plan, states, reports


def distance(one, other) -> float:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    return max(float(np.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


def members(plan: RoundPlan, number: int) -> list[int]:
    return [int(c) for c in sample_cohort(round_key(plan.key, number, "cohort"), len(plan.clients), plan.cohort)]


def batches(plan: RoundPlan, number: int, c: int):
    key = jax.random.fold_in(round_key(plan.key, number, "order"), plan.clients[c].id)
    return sample_steps(key, plan.clients[c].examples, STEPS.batch_size, STEPS.local_steps, None)


def trained(plan: RoundPlan, number: int, c: int, adapters, pull: float = 0.0, anchor=None):
    """One client's local steps of SGD, as a plain loop."""
    for batch in batches(plan, number, c):
        _, gradient = mean_gradient(toy_model()[1], adapters, batch, "example")
        if anchor is not None:
            gradient = jax.tree.map(lambda g, v, w: g + pull * (v - w), gradient, adapters, anchor)
        adapters = jax.tree.map(lambda v, g: v - RATE * g, adapters, gradient)
    return adapters


def averaged(plan: RoundPlan, cohort: list[int], trees):
    weights = [len(plan.clients[c].examples) for c in cohort]
    return jax.tree.map(lambda *leaves: np.average(np.stack(leaves), axis=0, weights=weights), *trees)


def of_client(tree, c: int):
    return jax.tree.map(lambda leaf: leaf[c], tree)


# What averaging loses.


@pytest.mark.parametrize(
    ("algorithm", "train"),
    [
        (FLora(), "both"),
        (FedExLora(), "both"),
        (RoLora(), "both"),
        (FedAvg(), "b"),
        (FedAvg(), "core"),
    ],
    ids=str,
)
def test_the_mean_of_the_products_is_exact(algorithm, train):
    _, states, reports = played(algorithm, train)
    for report in reports:
        assert report.aggregation_error < 1e-5
        assert all(client.update_norm > 1e-3 for client in report.clients)
    assert distance(states[0].adapters, states[2].adapters) > 1e-3


def test_the_mean_of_both_factors_is_not():
    _, _, reports = played(FedAvg(), rate=3.0)
    assert min(report.aggregation_error for report in reports) > 1e-3


def test_lora_fair_and_flexlora_lose_less_than_the_mean_of_the_factors_and_fedex_truncated_less_than_untruncated():
    errors = {
        algorithm: played(algorithm, rate=3.0, rounds=1)[2][0].aggregation_error
        for algorithm in (FedAvg(), LoraFair(), FlexLora(), FedExLora(residual_rank=1), FedExLora(residual_rank=3))
    }
    mean, fair, flex, one, three = errors.values()
    assert 0 < flex < fair < mean
    assert 0 < three < one < mean


def test_rolora_moves_and_sends_the_live_factor_alone():
    _, states, reports = played(RoLora())
    for number, (live, dead) in enumerate((("b", "a"), ("a", "b"))):
        before, after = states[number].adapters, states[number + 1].adapters
        for path, factors in before.items():
            assert same(factors[dead], after[path][dead])
            assert distance(factors[live], after[path][live]) > 1e-4
        sizes = {name: sum(factors[name].nbytes for factors in before.values()) for name in ("a", "b")}
        assert {client.upload_bytes for client in reports[number].clients} == {sizes[live]}
        assert {client.download_bytes for client in reports[number].clients} == {sum(sizes.values())}


def test_flora_goes_on_from_the_merged_weights():
    """The second round equals plain training of fresh factors on the weights as they are then."""
    plan, states, _ = played(FLora())
    _, params, _ = toy_model()
    merged = lora.add(params, jax.tree.map(lambda r: plan.trainer.scaling * r, states[1].server_state["residual"]))
    ends = []
    for c in members(plan, 2):
        adapters = states[1].adapters
        for batch in batches(plan, 2, c):
            _, gradient = mean_gradient(merged, adapters, batch, "example")
            adapters = jax.tree.map(lambda v, g: v - RATE * g, adapters, gradient)
        ends.append(lora.products(adapters))
    expected = jax.tree.map(jnp.add, states[1].server_state["residual"], averaged(plan, members(plan, 2), ends))
    assert distance(states[2].server_state["residual"], expected) < 1e-5
    assert distance(states[2].server_state["residual"], states[1].server_state["residual"]) > 1e-5


# What stays at each client.


def test_fedsa_averages_a_and_leaves_b_to_each_client():
    plan, states, reports = played(FedSaLora())
    adapters = toy_model()[2]
    own = {c: {path: {"b": f["b"]} for path, f in adapters.items()} for c in range(len(plan.clients))}
    shared = {path: {"a": f["a"]} for path, f in adapters.items()}
    for number in (1, 2):
        cohort, ends = members(plan, number), []
        for c in cohort:
            end = trained(plan, number, c, lora.join(shared, own[c]))
            own[c] = {path: {"b": f["b"]} for path, f in end.items()}
            ends.append({path: {"a": f["a"]} for path, f in end.items()})
        shared = averaged(plan, cohort, ends)
        before, after = (state.client_state["personal"] for state in states[number - 1 : number + 1])
        for c in range(len(plan.clients)):
            assert distance(of_client(after, c), own[c]) < 1e-5
            assert same(of_client(before, c), of_client(after, c)) == (c not in cohort)
        assert distance(states[number].adapters, shared) < 1e-5
        size = sum(factors["a"].nbytes for factors in states[number].adapters.values())
        assert {client.upload_bytes for client in reports[number - 1].clients} == {size}
        assert reports[number - 1].aggregation_error is None
    assert set(members(plan, 1)) & set(members(plan, 2))  # someone came back to its own b


def test_fedper_keeps_the_upper_layers():
    personal = FedPer(base_layers=2).make().personal
    modules = {f"layers.{n}.self_attn.q_proj": n for n in (0, 1, 2, 11)}
    assert {module for module in modules if personal(module, "a")} == {m for m, n in modules.items() if n >= 2}
    assert all(personal(module, "a") == personal(module, "b") for module in modules)


def test_ditto_is_fedavg_with_adapters_of_everyones_own_pulled_towards_the_servers():
    pull = 0.7
    plan, states, _ = played(Ditto(strength=pull))
    server = toy_model()[2]
    own = dict.fromkeys(range(len(plan.clients)), server)
    for number in (1, 2):
        cohort = members(plan, number)
        ends = [trained(plan, number, c, server) for c in cohort]
        own |= {c: trained(plan, number, c, own[c], pull, server) for c in cohort}
        server = averaged(plan, cohort, ends)
        assert distance(states[number].adapters, server) < 1e-5
        for c in own:
            assert distance(of_client(states[number].client_state["own"], c), own[c]) < 1e-5
    first, second = cohort[:2]
    assert distance(own[first], own[second]) > 1e-3
    assert distance(own[first], server) > 1e-3
    assert same(states[2].adapters, played(FedAvg())[1][2].adapters)
