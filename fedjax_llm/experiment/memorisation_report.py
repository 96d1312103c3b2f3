"""What to say of full fine-tuning beside LoRA: leaks along the way, and where both are equally good."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedjax_llm.runs import leak_plots
from fedjax_llm.runs.leak_figures import Estimate, extracted, mean_of, percent, share_of
from fedjax_llm.runs.leak_page import Picture, Section

OFTEN = 8
"""Secrets that were stated so often or more are compared."""
COLUMNS = ("training", "steps", "validation loss", "secrets given back", f"exposure, {OFTEN}x and more", "of controls")


def memorisation_section(found: Mapping[str, Any]) -> Section:
    """The section about both trainings; its first paragraph is the result in a sentence."""
    trainings = found["trainings"]
    level = equal_loss(trainings)
    at = {name: _at(checks, level) for name, checks in trainings.items()}
    full, lora = at["full fine-tuning"], at["LoRA"]
    told = (
        f"At a validation loss of {level:.3f} nats per answer token, which both reach, full fine-tuning has an "
        f"exposure of {full['exposure']:.2f} bits for secrets stated {OFTEN} times or more and gives back "
        f"{full['greedy']:.0%} of them; LoRA {lora['exposure']:.2f} bits and {lora['greedy']:.0%}.",
        f"Model: {found['model']}. One seed; both trained in one place on the same batches in the same order. Figures "
        "between two checks are interpolated. The exposure of a secret that was never stated is 1.44 bits on average.",
    )
    exposure = {
        name: [(one["nll"], _often(one["secrets"]).value) for one in checks] for name, checks in trainings.items()
    }
    greedy = {
        name: [(one["nll"], _given(one["secrets"]).value) for one in checks] for name, checks in trainings.items()
    }
    axis = "validation loss (nats per answer token)"
    figures = (
        Picture(
            "memorisation_exposure", leak_plots.paths(exposure, axis, "exposure (bits)"), "Exposure by validation loss"
        ),
        Picture(
            "memorisation_extraction",
            leak_plots.paths(greedy, axis, "share given back"),
            "Extraction by validation loss",
        ),
    )
    rows = tuple(_row(name, one) for name, checks in trainings.items() for one in checks)
    return Section("Full fine-tuning and LoRA", told, COLUMNS, rows, figures)


def equal_loss(trainings: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """The lowest validation loss that every training reaches."""
    return max(min(one["nll"] for one in checks) for checks in trainings.values())


def _at(checks: Sequence[Mapping[str, Any]], level: float) -> dict[str, float]:
    """Exposure and share where the validation loss first falls to a level."""
    points = [(one["nll"], _often(one["secrets"]).value, _given(one["secrets"]).value) for one in checks]
    place = next(number for number, point in enumerate(points) if point[0] <= level + 1e-9)
    if not place:
        return {"exposure": points[0][1], "greedy": points[0][2]}
    before, after = np.array(points[place - 1]), np.array(points[place])
    part = (before[0] - level) / (before[0] - after[0])
    _, exposure, greedy = before + part * (after - before)
    return {"exposure": float(exposure), "greedy": float(greedy)}


def _chosen(secrets: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Secrets that were stated often."""
    return [one for one in secrets if one["repetitions"] >= OFTEN and not one["coin"]]


def _often(secrets: Sequence[Mapping[str, Any]]) -> Estimate:
    """Their mean exposure."""
    return mean_of([one["exposure"] for one in _chosen(secrets)])


def _given(secrets: Sequence[Mapping[str, Any]]) -> Estimate:
    """The share of them that greedy decoding gives back."""
    return share_of([extracted(one) for one in _chosen(secrets)])


def _row(name: str, check: Mapping[str, Any]) -> tuple[str, ...]:
    """One check."""
    controls = [one["exposure"] for one in check["secrets"] if not one["repetitions"] and not one["coin"]]
    return (
        name,
        str(check["step"]),
        f"{check['nll']:.3f}",
        percent(_given(check["secrets"])),
        str(_often(check["secrets"])),
        str(mean_of(controls)),
    )
