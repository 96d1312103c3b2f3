"""The job of a federation between real sites: an experiment whose text stays at the sites.

Its configuration is an ordinary one whose source is ``AtSites`` (``data/at_sites.py``). Server and sites hold the same
file; the server holds no site's text, a site its own, and who holds all of it can simulate the federation with the very
same bits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedjax_llm import config
from fedjax_llm.config import MAY_CHANGE, Experiment, to_json
from fedjax_llm.data.at_sites import AtSites
from fedjax_llm.data.packing import Shape
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.prepare import Prepared
from fedjax_llm.federation.plan import RoundPlan
from fedjax_llm.privacy.ledger import config_hash

_MULTIPLE = 8  # of row lengths


def load_job(path: str | Path) -> Experiment:
    """The job of a configuration file.

    Raises:
      UserError: it cannot be read, or cannot be done between real sites.
    """
    experiment = config.load(path)
    config.check(experiment)
    check_job(experiment)
    return experiment


def check_job(experiment: Experiment) -> None:
    """Refuses what cannot be done between real sites.

    Raises:
      UserError: the reason and the way out.
    """
    federation = experiment.federation
    if not isinstance(experiment.data.source, AtSites) or experiment.data.partition is not None:
        raise UserError(
            "data.source of a job must be AtSites(names=...), without a partition: each site has its own text"
        )
    if experiment.setting != "federated":
        raise UserError(f"setting is {experiment.setting!r}; a job between sites is 'federated'")
    simulated = {
        "attack": experiment.attack,
        "federation.availability": federation.availability,
        "federation.asynchronous": federation.asynchronous,
        "federation.finetune_rounds": federation.finetune_rounds or None,
        "lora.ranks": experiment.lora.ranks or None,
        "compression": experiment.compression,
    }
    for name, value in simulated.items():
        if value is not None:
            raise UserError(f"{name} is for simulations, and cannot be had between real sites: leave it out of the job")
    if experiment.execution.mesh.bins.count > 1:
        raise UserError("execution.mesh has several devices; a site of a job trains its one client on one")


def with_sites(job: Experiment, names: Sequence[str], held: Mapping[str, Any] | None = None) -> Experiment:
    """A job among some of its sites.

    Args:
      job: from :func:`load_job`.
      names: of the sites that take part.
      held: the sources of the sites whose text is here.

    Raises:
      UserError: a site is not one of the job's.
    """
    strangers = sorted(set(names) - set(job.data.source.names))
    if strangers:
        raise UserError(f"the job has no site {', '.join(map(repr, strangers))}")
    return replace(job, data=replace(job.data, source=AtSites(tuple(sorted(names)), held)))


def job_hash(job: Experiment) -> str:
    """A hash of all settings that decide results."""
    return config_hash(to_json(job), MAY_CHANGE)


def fixed_shapes(experiment: Experiment, rows_of_unit: int, shared_row: int = 0) -> tuple[Shape, ...]:
    """The shapes of microbatches, from the configuration alone: no site's text shows in them, or changes others' bits.

    Row lengths are equal parts of ``data.max_length``, or of a shared row that is longer; there is a target slot for
    every other token, and for all of a unit.

    Args:
      experiment: with ``execution.tokens_per_microbatch`` and ``execution.buckets``.
      rows_of_unit: how many rows must fit together.
      shared_row: tokens of a row that examples share.
    """
    execution, longest = experiment.execution, max(experiment.data.max_length, shared_row)
    parts = (longest * (k + 1) / execution.buckets for k in range(execution.buckets))
    lengths = sorted({_MULTIPLE * -(-int(part) // _MULTIPLE) for part in parts})
    lengths[-1] = _MULTIPLE * -(-longest // _MULTIPLE)
    shapes = []
    for length in lengths:
        rows = max(rows_of_unit, round(execution.tokens_per_microbatch / length))
        shapes.append(Shape(rows, length, max(rows_of_unit, -(-rows // 2)) * length))
    return tuple(shapes)


def ready(prepared: Prepared) -> Prepared:
    """A job that is prepared like any run, with shapes from its configuration.

    Raises:
      UserError: its algorithm or mechanism keeps a state at the clients.
    """
    plan = prepared.plan
    assert plan is not None
    check_stateless(plan, prepared.experiment)
    rows = 1 if plan.mechanism is None else plan.mechanism.examples_per_unit
    shapes = fixed_shapes(prepared.experiment, rows, plan.shared_row)
    # States of the trunk depend on the shapes that they are computed in.
    trunk = None if plan.trunk is None else replace(plan.trunk, shapes=shapes)
    return replace(prepared, plan=plan._replace(shapes=shapes, trunk=trunk, measure_error=False))


def check_stateless(plan: RoundPlan, experiment: Experiment) -> None:
    """Refuses what clients would have to remember from round to round: a site may come back without its memory."""
    algorithm = plan.aggregation
    keeps = {
        f"aggregation {type(experiment.aggregation).__name__}": algorithm.client.init is not None
        or algorithm.personal is not None
        or algorithm.own is not None,
        "training.keep_optimizer": plan.local.keep_optimizer == "yes",
        "correlated noise of the sites": plan.trainer.mix is not None,
    }
    for name, kept in keeps.items():
        if kept:
            raise UserError(
                f"{name} keeps a state at every site from round to round, which a deployment does not have yet"
            )
