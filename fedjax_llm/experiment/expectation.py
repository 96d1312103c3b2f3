"""What a run is expected to take, and what is learned from how it went."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fedjax_llm.experiment import cost_constants
from fedjax_llm.experiment.cost_model import Constants
from fedjax_llm.experiment.prediction import Prediction, Workload, predict, resident_bytes, scaled_to, workload
from fedjax_llm.experiment.prepare import Prepared
from fedjax_llm.runs import environment


class Expectation(NamedTuple):
    """What is expected of a run.

    Attributes:
      constants: of the machine, from which it follows.
      work: of the run.
      held: bytes that the process held.
      peak: the most that it had held before.
      prediction: what is told.
    """

    constants: Constants
    work: Workload
    held: int
    peak: int
    prediction: Prediction


def expect(prepared: Prepared, constants: Constants | None = None) -> Expectation:
    """Predicts a run that is ready to begin.

    Args:
      prepared: the run.
      constants: of the machine; ``None``: those that are kept, else a guess.
    """
    constants = cost_constants.known(prepared.base) if constants is None else constants
    work, held, peak = workload(prepared), resident_bytes(), environment.peak_rss_bytes()
    return Expectation(constants, work, held, peak, predict(prepared, work, constants, held))


def learn(
    prepared: Prepared, expected: Expectation, summary: Mapping[str, Any], finishing: float
) -> dict[str, dict[str, Any]]:
    """Sets what a run took against what was expected, and refines this machine's constants by it.

    Args:
      prepared: the run.
      expected: of it.
      summary: with the figures of its rounds.
      finishing: seconds from the last round to the report, without compiling.

    Returns:
      ``predicted`` and ``measured``, for ``summary.json``; times in seconds, compiling apart.
    """
    training = summary["train_seconds"] - summary["compile_seconds"]
    timed = [(scaled_to(expected.work, summary["padded_tokens"]), training), (expected.work.evaluation, finishing)]
    peak = max(summary["peak_rss_bytes"], environment.peak_rss_bytes())
    # A peak that is not of the run itself, but of loading the model, says nothing.
    grown = peak - expected.held if peak > expected.peak else 0
    constants = cost_constants.refined(expected.constants, timed, grown, expected.work.memory)
    cost_constants.store(prepared.base, constants)
    measured = {
        "padded_tokens": summary["padded_tokens"],
        "training_seconds": training,
        "finishing_seconds": finishing,
        "compile_seconds": summary["compile_seconds"],
        "memory_bytes": peak,
    }
    return {"predicted": expected.prediction.to_json(), "measured": measured}
