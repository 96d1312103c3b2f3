"""The rows of a sweep as Markdown, as CSV and on a terminal."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from fedjax_llm.runs.progress import byte_size, percent
from fedjax_llm.runs.sweep_figures import FEWEST, PLAIN

_TARGETS = ("rounds_to_target", "bytes_to_target")


def markdown(name: str, rows: Sequence[Mapping[str, Any]], target: float | None) -> str:
    """``table.md``: a table for each data skew, with what the figures are.

    Args:
      name: of the sweep.
      rows: from ``sweep_figures.rows``.
      target: as given there.
    """
    first = rows[0]["algorithm"]
    heads = headings(first)
    parts = [f"# {name}", "", *_legend(first, target)]
    for data in dict.fromkeys(row["data"] for row in rows):
        own = [row for row in rows if row["data"] == data]
        untrained = next((row["base_nll"] for row in own if row["base_nll"]), None)
        parts += ["", f"## {data}", ""]
        parts += [f"The untrained model has {_number(untrained)} nats per answer token.", ""] if untrained else []
        parts += [_line(heads), _line(["---", *["---:"] * (len(heads) - 2), "---"])]
        parts += [_line(texts(row, first)) for row in own]
    return "\n".join(parts) + "\n"


def headings(first: str) -> list[str]:
    """The columns of :func:`texts`."""
    return [
        "algorithm",
        "seeds",
        "nats per answer token",
        f"minus {first}",
        "next-token accuracy",
        "aggregation error, mean",
        "last round",
        "rounds to target",
        "bytes to target",
        "upload",
        "download",
        "seconds a client and round",
        "note",
    ]


def texts(row: Mapping[str, Any], first: str) -> list[str]:
    """A row as people read it; what there is no figure for is blank."""
    rounds, nbytes = (row[name] for name in _TARGETS)
    reached = "" if row["reached"] is None else f"{row['reached']} of {len(row['seeds'])} seeds"
    return [
        row["algorithm"],
        str(len(row["seeds"])),
        _number(row["nll"]),
        "" if row["algorithm"] == first else _number(row["difference"], signed=True),
        _accuracy(row["token_accuracy"]),
        *(_scientific(row[name]) for name in ("aggregation_error", "aggregation_error_last")),
        f"{rounds['mean']:.3g}" if rounds else (reached if row["reached"] else ""),
        _bytes(nbytes),
        *(_bytes(row[name]) for name in ("upload_bytes", "download_bytes")),
        f"{row['client_seconds']['mean']:.2g}" if row["client_seconds"] else "",
        note(row),
    ]


def note(row: Mapping[str, Any]) -> str:
    """Which seeds are missing, and why."""
    reasons: dict[str, list[str]] = {}
    for seed, reason in row["failed"].items():
        reasons.setdefault(reason, []).append(seed)
    parts = [f"failed with seed {', '.join(seeds)}: {reason}" for reason, seeds in reasons.items()]
    if row["unfinished"]:
        parts.append(f"not yet run: seed {', '.join(map(str, row['unfinished']))}")
    return "; ".join(parts)


def comma_separated(rows: Sequence[Mapping[str, Any]]) -> str:
    """``table.csv``: the same rows in full precision, a mean with its bounds in three columns.

    Args:
      rows: from ``sweep_figures.rows``.
    """
    out = io.StringIO()
    names = ("nll", "difference", *PLAIN[1:], *_TARGETS, "base_nll")
    bounds = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["data", "algorithm", "seeds", "interval", *bounds, "seeds_reached", "note"])
    for row in rows:
        values: list[Any] = [row["data"], row["algorithm"], len(row["seeds"])]
        values.append(row["nll"]["interval"] if row["nll"] else "")
        for name in names:
            found = row[name]
            values += [found[key] for key in ("mean", "low", "high")] if found else ["", "", ""]
        writer.writerow([*values, "" if row["reached"] is None else row["reached"], note(row)])
    return out.getvalue()


def table(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The figures that matter most, for a terminal.

    Args:
      name: of the sweep.
      rows: from ``sweep_figures.rows``.
    """
    first = rows[0]["algorithm"]
    shown = Table(title=name, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("data", "algorithm", "seeds", "nats per token", f"minus {first}", "error", "rounds", "bytes", ""):
        shown.add_column(Text(head), justify="left" if head in ("data", "algorithm", "") else "right", overflow="fold")
    before = None
    for row in rows:
        cells = texts(row, first)
        if before not in (None, row["data"]):
            shown.add_section()
        before = row["data"]
        shown.add_row(*(Text(text) for text in (row["data"], *cells[:4], cells[5], cells[7], cells[8], cells[12])))
    return shown


def _legend(first: str, target: float | None) -> list[str]:
    """What the figures are, in sentences."""
    wanted = (
        f"what {first} has after its last round with the same data and seed"
        if target is None
        else f"{target:g} nats per answer token"
    )
    return [
        "Nats per answer token and accuracy are those of held-out test records after the last round, means over sites "
        "and then over seeds. Brackets hold the 95% t-interval over the seeds: how much the mean would vary with other "
        f"seeds on these records. With fewer than {FEWEST} seeds there is none, and they hold the lowest and the "
        "highest. A seed decides the cohorts, the examples' order, the adapters' start and how simulated sites are "
        f"dealt their records. All algorithms have the same seeds, so differences from {first} are paired by seed.",
        "",
        "Aggregation error: the distance of the server's effective weights from the mean of the clients', relative to "
        "that mean; a server that does more than average (momentum, Adam) leaves it on purpose. The target is "
        f"{wanted}, on validation records, looked at whenever a run validates. Rounds and bytes (of all clients, both "
        "ways) are means, and left out unless every seed reached it. Seconds are those of the "
        "rounds without compilation, all clients side by side on the machine of the run.",
    ]


def _line(texts: Sequence[str]) -> str:
    """A line of a Markdown table; nothing in a text ends its cell."""
    return "| " + " | ".join(" ".join(text.replace("|", "\\|").split()) for text in texts) + " |"


def _bounded(found: Mapping[str, Any] | None, show: Any) -> str:
    """A mean with its bounds, if it has any width."""
    if found is None:
        return ""
    if found["n"] == 1:
        return show(found["mean"])
    return f"{show(found['mean'])} [{show(found['low'])}, {show(found['high'])}]"


def _number(found: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """Nats, with three digits after the point."""
    return _bounded(found, lambda value: f"{value:+.3f}" if signed else f"{value:.3f}")


def _accuracy(found: Mapping[str, Any] | None) -> str:
    """A share in percent, with its bounds."""
    return _bounded(found, percent)


def _scientific(found: Mapping[str, Any] | None) -> str:
    """A mean with two digits, such as ``1.2e-07``."""
    return f"{found['mean']:.1e}" if found else ""


def _bytes(found: Mapping[str, Any] | None) -> str:
    """A mean number of bytes for people."""
    return byte_size(found["mean"]) if found else ""
