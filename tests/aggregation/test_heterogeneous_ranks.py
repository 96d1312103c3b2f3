"""Clients that train adapters of different ranks, in real rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_rounds import toy_model, toy_plan, toy_trainer

from fedjax_llm import lora
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.aggregation.flexlora import FlexLora
from fedjax_llm.aggregation.flora import FLora
from fedjax_llm.aggregation.hetlora import HetLora
from fedjax_llm.federation import rounds
from fedjax_llm.federation.rounds import initial_state, run_round
from fedjax_llm.federation.sampling import round_key, sample_cohort
from fedjax_llm.training.client_update import LocalTraining

RANKS = (1, 3, 2, 1, 2)
STEPS = LocalTraining(batch_size=3, local_steps=2)


def plan_of(algorithm, ranks=RANKS, rate: float = 0.1, cohort: int = 3):
    aggregation = algorithm.make()
    trainer = toy_trainer("sgd", rate)
    if aggregation.client.gradient is not None:
        trainer = trainer._replace(correct=aggregation.client.gradient)
    return toy_plan(trainer, STEPS, aggregation=aggregation, cohort=cohort)._replace(ranks=ranks)


def play(plan, monkeypatch, number: int = 2):
    """The states from the first on, the reports, and what the clients sent in each round."""
    _, params, adapters = toy_model()
    states, reports, sent, join = [initial_state(plan, adapters)], [], [], rounds.release.join

    def watched(view, kind, messages, weights, real):
        sent.append(messages)
        return join(view, kind, messages, weights, real)

    monkeypatch.setattr(rounds.release, "join", watched)
    for _ in range(number):
        state, report = run_round(plan, params, states[-1])
        states.append(state)
        reports.append(report)
    return states, reports, sent


@pytest.mark.parametrize("algorithm", [FedAvg(), FlexLora(), HetLora(), FLora()], ids=str)
def test_components_beyond_a_clients_rank_stay_exactly_zero_in_what_it_sends(algorithm, monkeypatch):
    plan = plan_of(algorithm)
    assert plan.aggregation.ranks
    _, reports, sent = play(plan, monkeypatch)
    slots = {client.name: RANKS[n] for n, client in enumerate(plan.clients)}
    seen = set()
    for report, messages in zip(reports, sent, strict=True):
        for c, client in enumerate(report.clients):
            rank = slots[client.name]
            assert client.rank == rank
            seen.add(rank)
            for factors in messages.values():
                dead = (factors["a"][c][:, rank:], factors["b"][c][rank:])
                alive = (factors["a"][c][:, :rank], factors["b"][c][:rank])
                assert not any(map(np.any, dead))
                assert all(np.abs(part).max() > 1e-5 for part in alive)
    assert seen == {1, 2, 3}


def test_fewer_components_take_fewer_bytes(monkeypatch):
    _, (report,), _ = play(plan_of(FedAvg()), monkeypatch, 1)
    whole = lora.nbytes(toy_model()[2])
    assert {client.upload_bytes for client in report.clients} == {whole * client.rank // 3 for client in report.clients}


def test_flexlora_is_exact_where_the_ranks_of_the_clients_fit_into_its_own(monkeypatch):
    _, reports, _ = play(plan_of(FlexLora(), ranks=(1,) * 5), monkeypatch)
    assert all(report.aggregation_error < 1e-5 for report in reports)


def test_flora_is_exact_whatever_the_ranks(monkeypatch):
    _, reports, _ = play(plan_of(FLora()), monkeypatch)
    assert all(report.aggregation_error < 1e-5 for report in reports)


def test_hetlora_prunes_the_ranks_of_the_cohort_alone(monkeypatch):
    plan = plan_of(HetLora(gamma=0.5, penalty=2.0), ranks=(3,) * 5, cohort=2)
    states, reports, _ = play(plan, monkeypatch)
    ranks = [states[n].client_state["rank"].tolist() for n in range(3)]
    names = [client.name for client in plan.clients]
    for number, report in enumerate(reports):
        cohort = {names.index(client.name) for client in report.clients}
        assert {client.rank for client in report.clients} == {ranks[number][c] for c in cohort}
        for c in range(5):
            before, after = ranks[number][c], ranks[number + 1][c]
            assert after == (max(1, before // 2) if c in cohort else before)
    assert states[2].client_state["rank"].dtype == jnp.int32


def test_hetlora_without_a_penalty_to_shrink_them_keeps_its_ranks_where_they_grow(monkeypatch):
    plan, trained = plan_of(HetLora(gamma=0.5, penalty=0.0)), []
    rule = plan.aggregation.client
    states, _, sent = play(plan, monkeypatch, 1)
    start = toy_model()[2]
    cohort = [int(c) for c in sample_cohort(round_key(plan.key, 1, "cohort"), len(plan.clients), plan.cohort)]
    for slot, c in enumerate(cohort):
        end = jax.tree.map(lambda leaf, s=slot: leaf[s], sent[0])
        for factors, old in zip(end.values(), start.values(), strict=True):
            left = max(1, RANKS[c] // 2)
            norms = [
                np.linalg.norm(tree["a"][:, left : RANKS[c]]) * np.linalg.norm(tree["b"][left : RANKS[c]])
                for tree in (factors, old)
            ]
            trained.append((c, norms))
    assert rule.gradient is None
    for c in cohort:
        end, begun = np.sum([norms for client, norms in trained if client == c], axis=0)
        expected = max(1, RANKS[c] // 2) if end < begun else RANKS[c]
        assert int(states[1].client_state["rank"][c]) == expected
