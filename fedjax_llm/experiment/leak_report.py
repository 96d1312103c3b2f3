"""The page and the terminal's tables about one attacked run."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from fedjax_llm.runs import leak_plots
from fedjax_llm.runs.leak_figures import Leak, area_of, by_repetitions, extracted, percent, tries
from fedjax_llm.runs.leak_page import Picture, Section
from fedjax_llm.runs.progress import plain_table

ATTACK_NAMES = {
    "loss": "loss",
    "reference": "reference (base model)",
    "zlib": "zlib",
    "min_k": "Min-K%",
    "min_k_plus": "Min-K%++",
    "lira": "LiRA",
    "lira_offline": "LiRA, offline",
    "rmia": "RMIA",
}
SECRET_COLUMNS = (
    "stated",
    "secrets",
    "exposure, bits",
    "extrapolated, median",
    "greedy",
    "greedy, asked by others",
    "among the beams",
    "samples for a half chance",
)
MEMBER_COLUMNS = ("attack", "AUC", "TPR at 1% FPR", "TPR at 0.1% FPR")


def secret_rows(secrets: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row for every number of repetitions, controls first."""
    return [_secret_row(leak) for leak in by_repetitions(secrets)]


def _secret_row(leak: Leak) -> tuple[str, ...]:
    """One row of :data:`SECRET_COLUMNS`."""
    return (
        f"{leak.repetitions}x" if leak.repetitions else "never (control)",
        str(leak.secrets),
        "-" if leak.exposure is None else str(leak.exposure),
        "-" if leak.extrapolated is None else f"{leak.extrapolated:.1f}",
        percent(leak.greedy),
        percent(leak.foreign),
        percent(leak.beam),
        tries(leak.tries),
    )


def member_rows(curves: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A row for every attack."""
    return [
        (
            ATTACK_NAMES.get(name, name),
            area_of(curve).text(3),
            *(_rate(curve["tpr_at"][fpr], curve["non_members"]) for fpr in ("0.01", "0.001")),
        )
        for name, curve in curves.items()
    ]


def _rate(rate: Mapping[str, Any], non_members: int) -> str:
    """A true-positive rate; where fewer than one non-member may be above, that of none."""
    note = "" if rate["allowed"] else f" (none of {non_members})"
    return f"{rate['tpr']:.1%} [{rate['low']:.1%}, {rate['high']:.1%}]{note}"


def audit_row(name: str, shown: Mapping[str, Any]) -> tuple[str, ...]:
    """Name, lower bound, claimed epsilon, delta, canaries, confidence, verdict."""
    claimed = shown["claimed"]
    verdict = "no claim" if claimed is None else "CONTRADICTED" if shown["contradicted"] else "consistent"
    return (
        name,
        f"{shown['lower_bound']:.2f}",
        "none" if claimed is None else f"{claimed:.2f}",
        f"{shown['delta']:g}",
        str(shown["canaries"]),
        f"{shown['confidence']:.0%}",
        verdict,
    )


AUDIT_COLUMNS = ("audit", "epsilon shown, at least", "epsilon claimed, at most", "delta", "canaries", "confidence", "")


def run_sections(found: Mapping[str, Any]) -> tuple[str, list[Section]]:
    """What to say of one attacked run: a sentence or two, and the sections of its page."""
    curves, secrets, shown = found["membership"], found["secrets"], found["audit"]
    best = max(curves.values(), key=lambda curve: curve["auc"])
    lede = f"The strongest membership attack has an AUC of {area_of(best).text(3)} (0.5: it cannot tell)."
    sections = []
    if secrets:
        planted = [one for one in secrets if one["repetitions"] and not one["coin"]]
        given = sum(map(extracted, planted))
        lede += f" Greedy decoding gives back {given} of {len(planted)} planted secrets in full."
        sections.append(_secrets_section(secrets))
    sections.append(_members_section(curves))
    if shown is not None:
        told = (
            "Each canary is a made-up secret that a fair coin put into training once or not at all; the audit guesses "
            "which by their likelihood (Steinke et al. 2023). It can show that a claim is wrong, not that it is right."
        )
        rows = (audit_row("one run, text canaries", shown),)
        sections.append(Section("Audit", (told,), AUDIT_COLUMNS, rows))
    return lede, [*sections, _facts(found)]


def _secrets_section(secrets: Sequence[Mapping[str, Any]]) -> Section:
    """Planted secrets by repetitions."""
    leaks = by_repetitions(secrets)
    told = (
        "Secrets of people who do not exist, stated so many times in training, beside controls that were never stated. "
        "Exposure is how many bits ahead of other values of its kind a secret's value is (Carlini et al. 2019); of a "
        "control it is 1.44 on average. Greedy: the model gives the whole value as its likeliest answer, asked as the "
        "site asks, or in other words by somebody who knows the name alone.",
    )
    figures = []
    if all(leak.exposure is not None for leak in leaks):
        points = [leak.point(leak.exposure) for leak in leaks if leak.exposure is not None]
        svg = leak_plots.by_repetitions({"exposure": points}, "exposure (bits)", level=(1.44, "never stated: 1.44"))
        figures.append(Picture("exposure", svg, "Exposure by the number of times that a secret was stated"))
    greedy = {
        "asked by its site": [leak.point(leak.greedy) for leak in leaks],
        "asked by others": [leak.point(leak.foreign) for leak in leaks],
    }
    svg = leak_plots.by_repetitions(greedy, "share given back in full")
    figures.append(Picture("extraction", svg, "Share of secrets that greedy decoding gives back in full"))
    return Section("Planted secrets", told, SECRET_COLUMNS, tuple(secret_rows(secrets)), tuple(figures))


def _members_section(curves: Mapping[str, Mapping[str, Any]]) -> Section:
    """Membership inference."""
    one = next(iter(curves.values()))
    told = (
        f"{one['members']} training records against {one['non_members']} that were held out by a hash of their ids: a "
        "random split, so that nothing but training tells them apart.",
    )
    svg = leak_plots.roc_curves(list(curves.values()), [ATTACK_NAMES.get(name, name) for name in curves])
    picture = Picture("membership", svg, "ROC curves of membership inference, both axes logarithmic")
    return Section("Membership inference", told, MEMBER_COLUMNS, tuple(member_rows(curves)), (picture,))


def _facts(found: Mapping[str, Any]) -> Section:
    """What the figures depend on."""
    rows = [("run", found["run"]), ("model", found["model"]["name"])]
    if found["site"] is not None:
        rows.append(("adapters of the site", found["site"]))
    claim = found["claim"]
    stated = (
        "no differential privacy" if claim is None else f"epsilon {claim['epsilon']:.2f} at delta {claim['delta']:g}"
    )
    rows += [("claim", stated), *((name, str(value)) for name, value in found["attacks"].items())]
    return Section("Settings", columns=("setting", "value"), rows=tuple(rows))


def run_table(found: Mapping[str, Any]) -> list[Table]:
    """The figures for a terminal."""
    tables = []
    if found["secrets"]:
        tables.append(table("Planted secrets", SECRET_COLUMNS, secret_rows(found["secrets"])))
    tables.append(table("Membership inference", MEMBER_COLUMNS, member_rows(found["membership"])))
    if found["audit"] is not None:
        tables.append(table("Audit", AUDIT_COLUMNS, [audit_row("one run, text canaries", found["audit"])]))
    return tables


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for a terminal; what stands in it is never taken for markup."""
    made = plain_table(title)
    for number, name in enumerate(columns):
        made.add_column(name, justify="left" if not number else "right", overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made
