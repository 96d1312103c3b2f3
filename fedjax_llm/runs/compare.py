"""Runs side by side: figures, losses by site, and paired differences over the records that runs share."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedjax_llm.errors import UserError
from fedjax_llm.runs import directory, statement
from fedjax_llm.runs.directory import read_json
from fedjax_llm.runs.progress import byte_size, duration, with_interval
from fedjax_llm.runs.summary import MEASURES, macro_paired_difference, paired_difference, restrict, summarise_evaluation

_MOST_SITES = 40  # rows of a table

_LABELS = {
    "nll": "nats per answer token",
    "perplexity": "perplexity",
    "token_accuracy": "next-token accuracy",
    "choice_accuracy": "multiple choice",
}


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` finds; all of it is JSON-able (``dataclasses.asdict``).

    Attributes:
      runs: by name, in the order given: ``setting``, ``rounds`` (done) of ``planned``, ``tokens``, ``bytes`` (up and
        down), ``seconds``, ``privacy`` (``epsilon``, ``delta``, ``unit`` and ``adjacency``; ``None``: no differential
        privacy), and the macro figures of :func:`~fedjax_llm.runs.summary.summarise_evaluation` with their bounds.
      sites: by site and run, ``nll, nll_low, nll_high`` (nats per answer token).
      differences: by run (but the first), ``macro`` and ``sites``: this run minus the first, over shared records.
      warnings: what makes the comparison less than fair.
    """

    runs: Mapping[str, Mapping[str, Any]]
    sites: Mapping[str, Mapping[str, Mapping[str, float]]]
    differences: Mapping[str, Mapping[str, Any]]
    warnings: tuple[str, ...]


def compare(paths: Sequence[str | Path], seed: int = 0, resamples: int = 2000, names: Sequence[str] = ()) -> Comparison:
    """Reads finished runs and lays them side by side.

    A run's model is its tuned one, or the base where nothing was trained.

    Args:
      paths: run directories, at least one; the paired differences are against the first.
      seed: of the bootstrap.
      resamples: bootstrap replicates.
      names: of the runs; their folders' if not given.

    Raises:
      UserError: no run is given, there is none in a folder, or its ``summary.json`` or ``evaluation.json`` is missing
        or unreadable; or there are not as many names as runs.
    """
    folders = named(paths, names)
    summaries = {name: read_json(folder / "summary.json") for name, folder in folders.items()}
    evaluations = {name: _evaluated(read_json(folder / "evaluation.json")) for name, folder in folders.items()}
    figures = {name: summarise_evaluation(one, seed, resamples) for name, one in evaluations.items()}
    first, *others = folders
    differences, warnings = {}, []
    for name in others:
        shared, warning = _shared(first, evaluations[first], name, evaluations[name])
        warnings += warning
        if shared:
            pair = (restrict(evaluations[first], shared), restrict(evaluations[name], shared), seed, resamples)
            try:
                differences[name] = {"macro": macro_paired_difference(*pair), "sites": paired_difference(*pair)}
            except UserError as error:
                warnings.append(f"{name} and {first} cannot be paired: {error}")
    rows = {name: _row(summaries[name], figures[name]) for name in folders}
    warnings += _unlike_guarantees(rows)
    sites = list(dict.fromkeys(site for one in figures.values() for site in one["sites"]))
    return Comparison(
        runs=rows,
        sites={
            site: {name: _loss(one["sites"][site]) for name, one in figures.items() if site in one["sites"]}
            for site in sites
        },
        differences=differences,
        warnings=tuple(warnings),
    )


def named(paths: Sequence[str | Path], names: Sequence[str] = ()) -> dict[str, Path]:
    """The folders of runs by the runs' names.

    Args:
      paths: of runs, at least one.
      names: as for :func:`compare`.

    Raises:
      UserError: as for :func:`compare`.
    """
    if not paths:
        raise UserError("nothing to compare: name at least one run directory")
    for path in paths:
        directory.refuse_absent(Path(path))
    if not names:
        return dict(zip(_names(paths), map(Path, paths), strict=True))
    if len(names) != len(paths) or len(set(names)) < len(names):
        raise UserError(f"the names {', '.join(names)} are for {len(paths)} runs: give each run one of its own")
    return dict(zip(names, map(Path, paths), strict=True))


def render(console: Console, comparison: Comparison) -> None:
    """Prints a comparison: figures, losses by site, paired differences, warnings."""
    console.print(_figures_table(comparison))
    console.print(_sites_table(comparison))
    if comparison.differences:
        console.print(_differences_table(comparison))
    for warning in comparison.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))


def _names(paths: Sequence[str | Path]) -> list[str]:
    """The folders' names, or their paths where names are the same."""
    names = [Path(path).resolve().name for path in paths]
    doubles = {name for name, count in Counter(names).items() if count > 1}
    names = [str(path) if name in doubles else name for name, path in zip(names, paths, strict=True)]
    for name, count in Counter(names).items():
        if count > 1:
            raise UserError(f"the run {name} is named {count} times; name each run once")
    return names


def _evaluated(evaluation: Mapping[str, Any]) -> Mapping[str, Any]:
    """The evaluation of the run's own model."""
    return evaluation.get("final") or evaluation["base"]


def _row(summary: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, Any]:
    """A run's part of the comparison."""
    privacy = summary.get("privacy")
    return {
        "setting": summary["setting"],
        "rounds": summary.get("rounds_done", summary.get("rounds")) or 0,
        "planned": summary.get("rounds") or 0,
        "tokens": summary.get("tokens_trained") or 0,
        "bytes": (summary.get("upload_bytes") or 0) + (summary.get("download_bytes") or 0),
        "seconds": summary.get("train_seconds") or 0.0,
        "privacy": privacy and {name: privacy[name] for name in ("epsilon", "delta", "unit", "adjacency")},
    } | {name: value for name, value in figures.items() if name not in ("sites", "guessers")}


def _unlike_guarantees(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A warning where epsilons cannot be compared, because they are not of the same unit and delta."""
    kinds: dict[str, list[str]] = {}
    for name, row in rows.items():
        if row["privacy"]:
            kinds.setdefault(statement.terms(row["privacy"]), []).append(name)
    if len(kinds) < 2:
        return []
    told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())
    return [f"the runs' epsilons are not of the same unit and delta, a smaller one need not protect more ({told})"]


def _loss(figures: Mapping[str, Any]) -> dict[str, float]:
    """A site's loss and its bounds."""
    return {f"nll{end}": figures[f"nll{end}"] for end in ("", "_low", "_high")}


def _shared(
    first: str, one: Mapping[str, Any], name: str, other: Mapping[str, Any]
) -> tuple[dict[str, list[str]], list[str]]:
    """The records that both evaluated, by site in the first run's order, and a warning where they are not all."""
    shared, apart = {}, 0
    for site in dict.fromkeys([*one["sites"], *other["sites"]]):
        here = one["sites"].get(site, {}).get("records", [])
        there = set(other["sites"].get(site, {}).get("records", []))
        both = [record for record in here if record in there]
        apart += len(set(here) ^ there)
        if both:
            shared[site] = both
    if not apart:
        return shared, []
    count = sum(map(len, shared.values()))
    return shared, [
        f"{name} was evaluated on other records than {first} ({apart} are in one of them only); their figures "
        f"are not of the same data, the paired difference is over the {count} records that both have"
    ]


def _table(title: str, first: str, names: Sequence[str]) -> Table:
    """A table with a column for each run."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.min_width = len(title)
    table.add_column(Text(first), overflow="fold")
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")
    return table


def _cell(text: str) -> Text:
    """A figure with its interval below it, so that many runs fit beside each other."""
    return Text(text.replace(" [", "\n["))


def _figures_table(comparison: Comparison) -> Table:
    """Setting, effort and macro figures."""
    runs = comparison.runs.values()
    table = _table("Runs (macro means over sites, 95% intervals)", "", list(comparison.runs))
    table.add_row("setting", *(Text(run["setting"]) for run in runs))
    table.add_row("rounds", *(_rounds(run) for run in runs))
    table.add_row("privacy", *(_guarantee(run["privacy"]) for run in runs))
    table.add_row("tokens trained", *(f"{run['tokens']:,}" for run in runs))
    for measure in MEASURES:
        table.add_row(_LABELS[measure], *(_cell(with_interval(run, measure)) for run in runs))
    table.add_row("bytes exchanged", *(byte_size(run["bytes"]) for run in runs))
    table.add_row("training time", *(duration(run["seconds"]) for run in runs))
    return table


def _rounds(run: Mapping[str, Any]) -> str:
    """Rounds done, of those planned where it is not all."""
    return f"{run['rounds']:,}" + (f" of {run['planned']:,}" if run["rounds"] != run["planned"] else "")


def _guarantee(privacy: Mapping[str, Any] | None) -> str:
    """Epsilon with adjacency, unit and delta, a line each."""
    if privacy is None:
        return "none"
    return "\n".join([f"epsilon {statement.bound(privacy['epsilon'])}", *statement.terms(privacy).split(", ")])


def _first_sites(sites: Sequence[str], table: Table) -> Sequence[str]:
    """The sites that a table shows; what it leaves out is said in its caption."""
    if len(sites) > _MOST_SITES:
        table.caption, table.caption_justify = f"... and {len(sites) - _MOST_SITES:,} more sites", "left"
    return sites[:_MOST_SITES]


def _sites_table(comparison: Comparison) -> Table:
    """Loss by site."""
    table = _table("Held-out loss by site (nats per answer token)", "site", list(comparison.runs))
    for site in _first_sites(list(comparison.sites), table):
        figures = comparison.sites[site]
        table.add_row(Text(site), *(_cell(with_interval(figures.get(name, {}), "nll")) for name in comparison.runs))
    return table


def _differences_table(comparison: Comparison) -> Table:
    """Paired differences against the first run, the macro mean first."""
    first = next(iter(comparison.runs))
    title = "Paired difference of loss (below zero: better)"
    table = _table(title, f"minus {first}", list(comparison.differences))
    found = comparison.differences.values()
    table.add_row("macro mean", *(_cell(_signed(one["macro"])) for one in found))
    for site in _first_sites(list(dict.fromkeys(site for one in found for site in one["sites"])), table):
        table.add_row(Text(site), *(_cell(_signed(one["sites"].get(site))) for one in found))
    return table


def _signed(interval: Mapping[str, float] | None) -> str:
    """A difference with its bounds and signs."""
    if interval is None:
        return "-"
    return f"{interval['difference']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"
