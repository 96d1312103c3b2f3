"""Who sees what of a run, and what secure aggregation made of its rounds: for the display, the summary, the report."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedjax_llm import lora as low_rank
from fedjax_llm.experiment.prepare import Prepared
from fedjax_llm.experiment.protection import selected
from fedjax_llm.experiment.training_loop import shows_clients
from fedjax_llm.secure import disclosure


def disclosed(prepared: Prepared, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What ``summary.json`` holds under ``secure``; ``None`` where nothing is federated.

    Args:
      prepared: the run.
      lines: of its metrics.
    """
    experiment, plan = prepared.experiment, prepared.plan
    if plan is None or experiment.setting != "federated":
        return None
    terms = None if plan.secure is None else plan.secure.terms_of(selected(experiment, len(plan.clients)))
    _, shared = low_rank.partition(prepared.adapters, plan.aggregation.personal)
    saw = disclosure.who_sees_what(
        terms,
        None if plan.mechanism is None else plan.mechanism.noised,
        values=low_rank.size(shared),
        colluders=0 if terms is None else terms.colluders,
        client_metrics=shows_clients(experiment),
    )
    rounds = [line["secure"] for line in lines if "secure" in line]
    return {
        "protocol": None if terms is None else disclosure.protocol(terms),
        "saw": [list(pair) for pair in saw],
        "sums": sum(not one["abandoned"] for one in rounds),
        "abandoned": sum(bool(one["abandoned"]) for one in rounds),
        "dropped": sum(len(one["dropped"]) for one in rounds),
        "cut": sum(one["cut"] for one in rounds),
    }
