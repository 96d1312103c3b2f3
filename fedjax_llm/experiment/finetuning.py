"""After the rounds: every site trains on alone, from the shared adapters (Wang et al. 2019, arXiv 1910.10252)."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from fedjax_llm import lora as low_rank
from fedjax_llm import trees
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.experiment.prepare import Prepared
from fedjax_llm.experiment.training_loop import Ended
from fedjax_llm.federation import effective
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.federation.rounds import initial_state, run_round
from fedjax_llm.runs.progress import RunProgress
from fedjax_llm.training.optimizers import Schedule
from fedjax_llm.types import RoundState


def finetune(prepared: Prepared, ended: Ended, progress: RunProgress) -> tuple[Prepared, Ended]:
    """Local training at all sites, ``federation.finetune_rounds`` times; nothing travels.

    What is random in it depends on the seed and on the number of rounds before, so that a run that was killed in the
    midst of it begins it again and ends with the same bits.

    Returns:
      The run with a plan in which every site has adapters of its own, and their state.
    """
    rounds = prepared.experiment.federation.finetune_rounds
    if not rounds or prepared.plan is None or prepared.plan.setting != "federated":
        return prepared, ended
    plan, state = alone(prepared.plan, ended.state, rounds)
    with progress.phase("Fine-tuning at the sites", rounds, "rounds") as advance:
        for _ in range(rounds):
            state, _ = run_round(plan, prepared.base.params, state, hosts=prepared.hosts)
            jax.block_until_ready(state.adapters)
            advance(1)
    return replace(prepared, plan=plan), ended._replace(state=state)


def alone(plan: RoundPlan, state: RoundState, rounds: int) -> tuple[RoundPlan, RoundState]:
    """The plan and the first state of the sites' own training after a federation.

    Args:
      plan: of the federated rounds.
      state: after them.
      rounds: how many follow.
    """
    number = int(state.round)
    local = plan._replace(
        setting="local",
        trainer=plan.trainer._replace(correct=None, proximal=0.0),
        aggregation=FedAvg().make(),
        federation=replace(plan.federation, rounds=number + rounds, availability=None, asynchronous=None),
        local=replace(plan.local, keep_optimizer="yes", round_schedule=Schedule()),
        cohort=len(plan.clients),
        offset=effective.moved(plan, state.server_state),
        ranks=(),
        codec=None,
        corrupt=None,
    )
    count, own = len(plan.clients), state.client_state.get("personal", {})
    begun = initial_state(local, low_rank.join(state.adapters, jax.tree.map(lambda leaf: leaf[0], own)))
    adapters = low_rank.join(trees.repeat(state.adapters, count), own)
    return local, replace(begun, round=jnp.int32(number), adapters=adapters)
