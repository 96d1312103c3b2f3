"""``report.html``: one page that holds everything a reader wants to know of a run, and opens offline."""

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fedjax_llm.runs import metrics, plots, statement
from fedjax_llm.runs.directory import read_json, write_text
from fedjax_llm.runs.progress import byte_size, duration, percent, with_interval
from fedjax_llm.runs.summary import macro_paired_difference, paired_difference, summarise_evaluation

_MEASURES = (
    ("nll", "Loss, nats per answer token", "lower"),
    ("perplexity", "Perplexity", "lower"),
    ("token_accuracy", "Next-token accuracy", "higher"),
    ("choice_accuracy", "Multiple choice, four options", "higher"),
)
TEMPLATES = Path(__file__).parent
"""Where the pages' parts are."""
_UNCOVERED = " Computed on private text without noise: the guarantee does not cover it."
_MINUS = "\N{MINUS SIGN}"
_SETTINGS = {
    "federated": "Federated: the sites send adapter updates and keep their text.",
    "centralised": "Centralised: all text in one place, the upper baseline.",
    "local": "Local only: every site trains by itself, nothing is exchanged.",
    "base": "The base model as it comes, untrained.",
}


def write_report(run: str | Path) -> Path:
    """Reads a run's files and writes ``report.html`` beside them.

    The page loads nothing: styles and figures are in it. What comes from data is escaped.

    Args:
      run: a run directory with ``config.json``, ``environment.json``, ``summary.json``, ``evaluation.json`` and, if it
        trained, ``metrics.jsonl``.

    Returns:
      The page's path.

    Raises:
      UserError: a file is missing or cannot be read.
    """
    folder = Path(run).absolute()
    path = folder / "report.html"
    write_text(path, render(read(folder)))
    return path


def render(run: Mapping[str, Any]) -> str:
    """The page's HTML.

    Args:
      run: ``name`` and the content of the run's files: ``config``, ``environment``, ``summary``, ``evaluation``,
        ``metrics`` (a list of lines).
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"bytes": byte_size, "duration": duration, "percent": percent}
    return environment.get_template("report.html").render(content(run) | {"style": style()})


def style() -> Markup:
    """The style sheet of all pages, for inlining."""
    return Markup(Path(__file__).with_name("page.css").read_text("utf-8"))


def read(folder: Path) -> dict[str, Any]:
    """The run's files."""
    files = {name: read_json(folder / f"{name}.json") for name in ("config", "environment", "summary", "evaluation")}
    log = folder / "metrics.jsonl"
    return files | {"name": folder.name, "metrics": metrics.read(log) if log.exists() else []}


def content(run: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template names."""
    summary, evaluation, lines = run["summary"], run["evaluation"], run["metrics"]
    seed = summary["seed"]
    results: dict[str, Any] = {}
    for model in ("base", "final"):
        if evaluation.get(model):
            results[model] = summarise_evaluation(evaluation[model], seed) | (summary.get(model) or {})
    final = results.get("final")
    pair = (evaluation["base"], evaluation["final"], seed) if final else None
    paired = paired_difference(*pair) if pair else {}
    largest = _largest(summary["sites"])
    return {
        "name": run["name"],
        "setting": _SETTINGS.get(summary["setting"], summary["setting"]),
        "summary": summary,
        "base": results["base"],
        "final": final,
        "change": macro_paired_difference(*pair) if pair else None,
        "compared": len(paired),
        "better": sum(site["high"] < 0 for site in paired.values()),
        "worse": sum(site["low"] > 0 for site in paired.values()),
        "results": _results(results["base"], final),
        "figures": _figures(run, results, paired),
        "rounds": statement.rounds_done(summary) if summary["rounds"] else "",
        "site_count": len(summary["sites"]),
        "site_note": _note(summary["sites"]),
        "sites": _sites({site: summary["sites"][site] for site in largest}, results, paired),
        "size_columns": list(next(iter(summary["sites"].values()), {})),
        "generations": evaluation.get("generations", []),
        "excluded": sum(len(line.get("excluded", ())) for line in lines),
        "privacy": _privacy(summary["privacy"]) if summary["privacy"] else None,
        "secure": summary.get("secure"),
        "facts": _facts(run),
        "config": json.dumps(run["config"], indent=2, ensure_ascii=False),
        "environment": json.dumps(run["environment"], indent=2, ensure_ascii=False),
    }


def _results(base: Mapping[str, Any], final: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A row for each measure: label, which way is better, base and tuned with intervals; the guessers below."""
    rows = [
        {
            "label": label,
            "better": better,
            "base": with_interval(base, measure),
            "final": with_interval(final, measure) if final else None,
        }
        for measure, label, better in _MEASURES
        if base.get(measure) is not None
    ]
    guessers = [
        {"label": f"guesser: {name}", "better": None, "base": percent(score), "final": "" if final else None}
        for name, score in base.get("guessers", {}).items()
    ]
    return rows + guessers


def _privacy(privacy: Mapping[str, Any]) -> dict[str, Any]:
    """The statement with what the template says around it."""
    accounts = privacy["accounts"]
    limits = [(name, privacy[name]) for name in ("target", "budget") if privacy[name] is not None]
    facts = [
        ("Mechanism", privacy["mechanism"]),
        ("Unit", f"{privacy['unit']}; {privacy['adjacency']}"),
        ("Clip norm", f"{privacy['clip_norm']:g}, {privacy['scope']}"),
        ("Accountant", privacy["accountant"]),
        ("Randomness of the noise", privacy["randomness"]),
        *((name.capitalize(), f"epsilon {limit:g} ({statement.terms(privacy)})") for name, limit in limits),
    ]
    return {
        **privacy,
        "short": f"epsilon {statement.bound(privacy['epsilon'])} ({statement.terms(privacy)})",
        "meaning": statement.meaning(privacy),
        "facts": facts,
        "headings": statement.headings(privacy),
        "rows": [(name, statement.cells(one)) for name, one in statement.worst(accounts, plots.MOST_SITES)],
        "rest": statement.left_out(accounts, plots.MOST_SITES),
    }


def _figures(
    run: Mapping[str, Any], results: Mapping[str, Any], paired: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """The plots that this run has data for: drawing and caption."""
    summary, lines = run["summary"], run["metrics"]
    uncovered = _UNCOVERED if summary["privacy"] else ""
    figures = _privacy_figures(summary["privacy"], lines) if summary["privacy"] else []
    figures += [(drawing, caption + uncovered) for drawing, caption in _loss_figures(run, results, paired)]
    sizes = summary["sites"]
    if sizes:
        caption = f"What each site holds. A record is in one split only.{_note(sizes)}"
        figures.append((plots.site_sizes({site: sizes[site] for site in _largest(sizes)}), caption))
    traffic = list(accumulate(line["upload_bytes"] + line["download_bytes"] for line in lines))
    if traffic and traffic[0] > 0 and summary.get("full_model_bytes"):
        caption = "Bytes up and down so far: adapters as sent, against whole models for the same cohorts (log scale)."
        figures.append((plots.communication(traffic, _full_model_traffic(lines, summary)), caption))
    errors = [(line["round"], error) for line in lines if (error := line.get("aggregation_error")) is not None]
    if errors:
        caption = (
            "Aggregation error: how far the server's effective weights are from the weighted mean of the clients' "
            "products, relative to that mean (Frobenius norm over all adapted matrices). Averaging two factors apart "
            "is not averaging their product; exact algorithms stay at rounding."
        )
        figures.append((plots.aggregation_error(errors), caption + uncovered))
    return [{"drawing": Markup(drawing), "caption": caption} for drawing, caption in figures]


def _privacy_figures(privacy: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Epsilon by round, and the losses by epsilon where it grows over the rounds."""
    most, least = statement.series(lines)
    if not most:
        return []
    terms, limits = statement.terms(privacy), [(name, privacy[name]) for name in ("budget", "target")]
    limit = next(((name, epsilon) for name, epsilon in limits if epsilon is not None), None)
    where = f"at delta {privacy['delta']:g}, {privacy['adjacency']}"
    band = " The band reaches down to the site that has spent least." if most != least else ""
    caption = f"Epsilon spent so far, {where}: the most that any site has spent.{band}"
    figures = [(plots.epsilon_by_round(most, least, limit, terms), caption)]
    spent = dict(most)
    named = {"training": _series(lines, "loss")[0], "validation": _validation(lines)[0]}
    losses = {name: [(spent[number], loss) for number, loss in one if number in spent] for name, one in named.items()}
    losses = {name: points for name, points in losses.items() if len({epsilon for epsilon, _ in points}) > 1}
    if losses:
        caption = (
            f"What the loss cost: loss after each round against the epsilon spent until then, {where}.{_UNCOVERED}"
        )
        figures.append((plots.loss_by_epsilon(losses, terms), caption))
    return figures


def _loss_figures(
    run: Mapping[str, Any], results: Mapping[str, Any], paired: Mapping[str, Mapping[str, float]]
) -> list[tuple[str, str]]:
    """Held-out, training and validation losses."""
    sizes, lines, final = run["summary"]["sites"], run["metrics"], results.get("final")
    largest, note = _largest(sizes), _note(sizes)
    shown = [site for site in largest if site in results["base"]["sites"]]
    figures = []
    if shown:
        base = {site: results["base"]["sites"][site] for site in shown}
        tuned = {site: final["sites"][site] for site in shown} if final else None
        caption = f"Held-out loss by site, with 95% bootstrap intervals over records. Lower is better.{note}"
        figures.append((plots.base_and_tuned(base, tuned), caption))
    if paired:
        caption = f"What tuning changed, record by record (paired bootstrap, 95%). Left of zero is better.{note}"
        figures.append((plots.differences({site: paired[site] for site in shown}), caption))
    if lines:
        mean, by_site = _series(lines, "loss")
        thin = {site: by_site[site] for site in largest if site in by_site}
        caption = f"Training loss by round: the cohort's mean (bold) and each site (thin).{note}"
        figures.append((plots.curves(mean, thin, "training loss (nats per answer token)"), caption))
        held_out, by_site = _validation(lines)
        if held_out:
            thin = {site: by_site[site] for site in largest if site in by_site}
            caption = (
                f"Loss on validation records while training: the mean over sites (bold) and each site (thin).{note}"
            )
            figures.append((plots.curves(held_out, thin, "validation loss (nats per token)"), caption))
    return figures


def _largest(sizes: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The sites that figures and tables show: all, or of many the largest."""
    return sorted(sizes, key=lambda site: -sizes[site].get("train_records", 0))[: plots.MOST_SITES]


def _note(sizes: Mapping[str, Any]) -> str:
    """Says which sites are shown, where it is not all."""
    return f" The {plots.MOST_SITES} largest of {len(sizes):,} sites." if len(sizes) > plots.MOST_SITES else ""


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[Any], dict[str, list[Any]]]:
    """(round, value) of the whole round and of each site; rounds without a finite value are left out."""
    mean = [(line["round"], line[name]) for line in lines if line[name] is not None]
    sites: dict[str, list[Any]] = {}
    for line in lines:
        for site, figures in line.get("sites", {}).items():
            if figures.get(name) is not None:
                sites.setdefault(site, []).append((line["round"], figures[name]))
    return mean, sites


def _validation(lines: Sequence[Mapping[str, Any]]) -> tuple[list[Any], dict[str, list[Any]]]:
    """(round, nll) of the rounds that were validated, for the mean and for each site."""
    validated = [
        {
            "round": line["round"],
            "nll": line["validation"]["nll"],
            "sites": {site: {"nll": nll} for site, nll in line["validation"].get("sites", {}).items()},
        }
        for line in lines
        if line.get("validation")
    ]
    return _series(validated, "nll")


def _full_model_traffic(lines: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[float]:
    """Cumulative bytes had the run exchanged whole models: the total, shared out by the rounds' cohorts."""
    clients = list(accumulate(len(line["cohort"]) for line in lines))
    return [summary["full_model_bytes"] * count / max(1, clients[-1]) for count in clients]


def _sites(
    sizes: Mapping[str, Mapping[str, int]], results: Mapping[str, Any], paired: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """A row of the table for each site."""
    rows = []
    for site, counts in sizes.items():
        figures = {model: results[model]["sites"].get(site, {}) for model in results}
        difference = paired.get(site)
        rows.append(
            {
                "name": site,
                "counts": list(counts.values()),
                "base": with_interval(figures["base"], "nll"),
                "final": with_interval(figures.get("final", {}), "nll"),
                "difference": _signed(difference) if difference else "-",
            }
        )
    return rows


def _signed(interval: Mapping[str, float]) -> str:
    """A difference with its bounds, signs shown, with a true minus."""
    point, low, high = (f"{interval[end]:+.3f}".replace("-", _MINUS) for end in ("difference", "low", "high"))
    return f"{point} [{low}, {high}]"


def _facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How it was made: label and text, those that are known."""
    summary, environment = run["summary"], run["environment"]
    data = summary.get("data") or environment.get("data") or {}
    git = environment.get("git")
    packages = environment.get("packages", {})
    memory = environment.get("memory_bytes")
    facts = [
        ("Command", environment.get("command")),
        ("Seed", summary["seed"]),
        ("Data", data.get("version")),
        ("Citation", data.get("citation")),
        ("Code", git and git["commit"][:12] + (" with uncommitted changes" if git["dirty"] else "")),
        ("Started", environment.get("started")),
        ("Python", environment.get("python")),
        ("Packages", ", ".join(f"{name} {version}" for name, version in packages.items() if version)),
        ("Machine", environment.get("cpu")),
        ("Cores", environment.get("cores")),
        ("Memory", memory and byte_size(memory)),
        ("Devices", ", ".join(environment.get("devices", []))),
        ("Peak memory", summary.get("peak_rss_bytes") and byte_size(summary["peak_rss_bytes"])),
    ]
    return [(label, str(value)) for label, value in facts if value not in (None, "")]
