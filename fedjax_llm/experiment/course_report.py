"""The page and the terminal's tables of a course: every way to train, side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fedjax_llm.experiment.leak_report import ATTACK_NAMES, AUDIT_COLUMNS, audit_row, table
from fedjax_llm.experiment.memorisation_report import memorisation_section
from fedjax_llm.runs import leak_plots
from fedjax_llm.runs.leak_figures import Estimate, auc_of, by_repetitions, extracted, mean_of, percent, share_of
from fedjax_llm.runs.leak_page import Picture, Section

BASE = "base model"
OFTEN = 16
"""Secrets that were stated so often or more count as stated often."""
COLUMNS = (
    "model", "epsilon", "loss, nats a token", "seeds' spread", "next token right", "secrets given back, greedy",
    "asked by others", "among the beams", f"exposure, {OFTEN}x and more", "best membership AUC",
    "epsilon shown, at most over seeds",
)  # fmt: skip


def models_of(found: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The runs of every way; first the base model, as a run that trained nothing."""
    runs = found["runs"]
    plain = {**found["base"], "final": runs[0]["base"], "claim": None, "tokens_trained": 0}
    return {BASE: [plain], **{way: [one for one in runs if one["way"] == way] for way in found["ways"]}}


def course_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row of :data:`COLUMNS` for every model."""
    return [_row(name, runs) for name, runs in models_of(found).items()]


def _row(name: str, runs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """One model: utility, then leaks."""
    losses = [one["final"]["nll"] for one in runs]
    planted = [secret for one in runs for secret in one["secrets"] if secret["repetitions"] and not secret["coin"]]
    beams = [secret for secret in planted if "beam" in secret]
    often = [secret for secret in planted if secret["repetitions"] >= OFTEN and secret["exposure"] is not None]
    claims = [one["claim"]["epsilon"] for one in runs if one["claim"] is not None]
    low, high = (sum(one["final"][key] for one in runs) / len(runs) for key in ("nll_low", "nll_high"))
    attack, area = best_attack(runs)
    shown = [one["audit"]["lower_bound"] for one in runs if one["audit"] is not None]
    return (
        name,
        f"{max(claims):.2f}" if claims else "none" if name != BASE else "-",
        f"{sum(losses) / len(losses):.3f} [{low:.3f}, {high:.3f}]",
        f"{min(losses):.3f} to {max(losses):.3f}" if len(losses) > 1 else "-",
        f"{sum(one['final']['token_accuracy'] for one in runs) / len(runs):.1%}",
        percent(share_of([extracted(one) for one in planted])),
        percent(share_of([extracted(one, "foreign_greedy") for one in planted])),
        percent(share_of([bool(one["beam"] or one["foreign_beam"]) for one in beams]) if beams else None),
        str(mean_of([one["exposure"] for one in often])) if often else "-",
        f"{area.text(3)} ({ATTACK_NAMES[attack]})",
        f"{max(shown):.2f}" if shown else "-",
    )


def best_attack(runs: Sequence[Mapping[str, Any]]) -> tuple[str, Estimate]:
    """The attack with the highest mean AUC, and that; with so many attacks the best is somewhat above 0.5 by chance."""
    areas = {name: auc_of([one["membership"][name] for one in runs]) for name in runs[0]["membership"]}
    best = max(areas, key=lambda name: areas[name].value)
    return best, areas[best]


def course_sections(found: Mapping[str, Any]) -> tuple[str, list[Section]]:
    """A sentence or two, and the page's sections."""
    models = models_of(found)
    rows = course_rows(found)
    lede = "; ".join(
        f"{row[0]}: loss {row[2].split()[0]}, {row[5].split()[0]} of the secrets given back" for row in rows
    )
    sections = [_comparison(found, rows, models), _members(models), _audits(found)]
    if found["memorisation"] is not None:
        sections.append(memorisation_section(found["memorisation"]))
    return lede + ".", sections


def _comparison(
    found: Mapping[str, Any], rows: Sequence[tuple[str, ...]], models: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Section:
    """Utility and leaks, and what became of secrets by their repetitions."""
    tokens = {
        name: sum(one["tokens_trained"] for one in runs) / len(runs) for name, runs in models.items() if name != BASE
    }
    told = (
        "Tokens trained on, mean over seeds: "
        + ", ".join(f"{name} {count:,.0f}" for name, count in tokens.items())
        + ".",
        "Loss is on held-out records; its interval is over records, the spread over seeds. Shares and exposure are "
        "over all planted secrets of all seeds, each seed training on the same secrets.",
    )
    exposure, greedy = {}, {}
    for name, runs in models.items():
        leaks = by_repetitions([secret for one in runs for secret in one["secrets"]])
        exposure[name] = [leak.point(leak.exposure) for leak in leaks if leak.exposure is not None]
        greedy[name] = [leak.point(leak.greedy) for leak in leaks]
    level = (1.44, "never stated: 1.44")
    figures = [
        Picture(
            "course_exposure",
            leak_plots.by_repetitions(exposure, "exposure (bits)", level=level),
            "Exposure of planted secrets by how often they were stated, by way of training",
        )
        if all(exposure.values())
        else None,
        Picture(
            "course_extraction",
            leak_plots.by_repetitions(greedy, "share given back in full"),
            "Share of secrets that greedy decoding gives back in full",
        ),
    ]
    return Section("Side by side", told, COLUMNS, tuple(rows), tuple(one for one in figures if one is not None))


def _members(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> Section:
    """Membership inference: every attack on every model."""
    names = list(next(iter(models.values()))[0]["membership"])
    areas = {
        model: {ATTACK_NAMES[name]: auc_of([one["membership"][name] for one in runs]) for name in names}
        for model, runs in models.items()
    }
    rows = tuple((model, *(area.text(3) for area in own.values())) for model, own in areas.items())
    rates = tuple(
        (
            model,
            *(
                f"{sum(one['membership'][name]['tpr_at']['0.01']['tpr'] for one in runs) / len(runs):.1%}"
                for name in names
            ),
        )
        for model, runs in models.items()
    )
    svg = leak_plots.intervals(areas, "AUC of membership inference", at=0.5)
    figures = [Picture("course_membership", svg, "AUC of every membership attack on every way of training")]
    curve = {model: max(runs[0]["membership"].values(), key=lambda one: one["auc"]) for model, runs in models.items()}
    labels = [f"{model}, {ATTACK_NAMES[one['name']]}" for model, one in curve.items()]
    svg = leak_plots.roc_curves(list(curve.values()), labels)
    figures.append(Picture("course_roc", svg, "The strongest attack on each way of training, first seed, log axes"))
    columns = ("AUC", *(ATTACK_NAMES[name] for name in names))
    told = ("AUC with intervals; below, the true-positive rate at 1% false positives, mean over seeds.",)
    apart = ("TPR at 1% FPR", *("" for _ in names))
    return Section("Membership inference", told, columns, (*rows, apart, *rates), tuple(figures))


def _audits(found: Mapping[str, Any]) -> Section:
    """Lower bounds beside claims."""
    audited = [one for one in found["runs"] if one["audit"] is not None]
    named = {f"{one['way']}, seed {one['seed']}": one["audit"] for one in audited}
    rows = tuple(audit_row(name, shown) for name, shown in named.items())
    told = (
        "Text canaries, planted by fair coins and guessed by their likelihood. A lower bound says that no true epsilon "
        "is below it, with the confidence given; it is weak against a black box, and says nothing of the rest.",
    )
    if not named:
        return Section("Audits", ("No secret was planted by a coin.",))
    svg = leak_plots.bounds({name: (shown["lower_bound"], shown["claimed"]) for name, shown in named.items()})
    picture = Picture("course_audits", svg, "Epsilon that audits show beside the epsilon that is claimed")
    return Section("Audits", told, AUDIT_COLUMNS, rows, (picture,))


def course_tables(found: Mapping[str, Any]) -> list[Table]:
    """The figures for a terminal."""
    rows, columns = course_rows(found), COLUMNS
    turned = [(columns[part], *(row[part] for row in rows)) for part in range(1, len(columns))]
    return [table("What each way is worth, and what it leaks", ("", *(row[0] for row in rows)), turned)]
