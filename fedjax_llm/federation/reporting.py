"""What a round reports of its clients, and when that is nothing to go on with."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jax import Array

from fedjax_llm.data.packing import target_count
from fedjax_llm.data.records import EncodedExample
from fedjax_llm.errors import UserError
from fedjax_llm.federation.clients import Client
from fedjax_llm.federation.local_work import Work
from fedjax_llm.federation.plan import ClientReport, RoundPlan, Traffic
from fedjax_llm.federation.release import Updates
from fedjax_llm.federation.secured import Ended


def client_reports(
    plan: RoundPlan,
    traffic: Sequence[Traffic],
    clients: Sequence[Client],
    work: Sequence[Work],
    losses: Array,
    updates: Updates,
    ranks: np.ndarray,
    staleness: np.ndarray,
) -> tuple[ClientReport, ...]:
    """What each client did."""
    per_token = plan.local.normalise == "token"
    sums, norms, finite = (np.asarray(array) for array in (losses, updates.norms, updates.finite))
    reports = []
    for c, (client, steps) in enumerate(zip(clients, work, strict=True)):
        units = [unit if isinstance(unit, tuple) else (unit,) for step in steps for unit in step]
        seen: list[EncodedExample] = [example for unit in units for example in unit]
        count = sum(map(target_count, seen)) if per_token else len(units)
        reports.append(
            ClientReport(
                name=client.name,
                loss=float(sums[c]) / count if count else None,
                tokens=sum(len(example.tokens) for example in seen),
                examples=len(seen),
                update_norm=float(norms[c]),
                included=bool(finite[c]),
                download_bytes=traffic[c].download,
                upload_bytes=traffic[c].upload,
                rank=int(ranks[c]) if plan.ranks else None,
                staleness=None if plan.federation.asynchronous is None else int(staleness[c]),
            )
        )
    return tuple(reports)


def with_traffic(reports: Sequence[ClientReport], ended: Ended) -> list[ClientReport]:
    """The reports with the bytes of the protocol, in which the message went, in place of the message's own."""
    return [
        replace(
            report,
            download_bytes=report.download_bytes + ended.traffic[report.name].download,
            upload_bytes=ended.traffic[report.name].upload,
        )
        for report in reports
    ]


def with_waste(wasted: Traffic, ended: Ended) -> Traffic:
    """What was exchanged in vain, with the keys and shares of those who dropped out."""
    lost = [ended.traffic[name] for name in ended.report.dropped]
    return Traffic(wasted.download + sum(one.download for one in lost), wasted.upload + sum(one.upload for one in lost))


def check_included(plan: RoundPlan, number: int, reports: Sequence[ClientReport]) -> None:
    """Refuses a round that nobody's update is left of."""
    if plan.mechanism is None and reports and not any(report.included for report in reports):
        raise UserError(
            f"round {number}: not one client came back with a finite update (losses: "
            + ", ".join(f"{report.name} {report.loss:.3g}" for report in reports)
            + "); lower training.optimizer.learning_rate"
        )
