"""What the user sees while a run goes on: a live display in a terminal, plain lines elsewhere; and tables."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from fedjax_llm.runs import statement

_RECENT = 8  # rounds that the rate and the time left are taken from
_MOST_ACCOUNTS = 16  # in a table on a terminal
_MOST_SITES = 40


class RunProgress:
    """The display of a run, as a context manager.

    In a terminal: a line for the rounds (count, loss, real tokens/s, epsilon, time left) and one for the phase in
    progress. Elsewhere: one plain line a round and two a phase, without control characters.

    Args:
      total_rounds: of the run.
      console: where to print.
      completed: rounds done before a resume.
      budget: the epsilon that the run may spend, shown beside what it has spent; ``None``: no limit.
    """

    def __init__(self, total_rounds: int, console: Console, completed: int = 0, budget: float | None = None):
        self._total, self._completed, self._console, self._budget = total_rounds, completed, console, budget
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RECENT)
        self._rounds: TaskID | None = None
        self._live = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._live.stop()

    @contextmanager
    def phase(self, name: str, total: int | None = None, unit: str = "") -> Iterator[Callable[[int], None]]:
        """Shows long work: a bar with rate and time left, or its beginning and end as lines.

        Args:
          name: such as ``Reading the text``.
          total: how much there is to do; ``None``: not known.
          unit: of ``total``, for the rate, such as ``examples``.

        Yields:
          A function to call with how much more has been done.
        """
        start, done = time.monotonic(), 0
        if not self._console.is_terminal:
            self.say(f"{name} ...")
        task = self._live.add_task(name, total=total, note="")

        def advance(amount: int = 1) -> None:
            nonlocal done
            done += amount
            rate = done / max(time.monotonic() - start, 1e-9)
            note = f"{_short(rate)} {unit}/s" if unit else ""
            if total and done:
                note += f"  {duration((total - done) / rate)} left"
            self._live.update(task, advance=amount, note=note)

        try:
            yield advance
        finally:
            self._live.remove_task(task)
        count = f", {done:,} {unit}" if unit and done else ""
        self.say(f"{name}: done in {duration(time.monotonic() - start)}{count}")

    def round(self, line: Mapping[str, Any]) -> None:
        """Shows a finished round, from its line of ``metrics.jsonl``."""
        self._completed = line["round"]
        timing = line.get("timing", {})
        self._recent.append((timing.get("seconds", 0.0) - timing.get("compile_seconds", 0.0), line["tokens"]))
        seconds = sum(part[0] for part in self._recent)
        rate = sum(part[1] for part in self._recent) / seconds if seconds > 0 else 0.0
        left = duration((self._total - self._completed) * seconds / len(self._recent)) + " left"
        note = f"loss {_number(line['loss'])}  {_short(rate)} tok/s"
        privacy = statement.spent(line.get("epsilon"), self._budget)
        news = []
        if line.get("validation"):
            news.append(f"held-out {_number(line['validation']['nll'])}")
        if line.get("excluded"):
            news.append(f"left out: {', '.join(line['excluded'])}")
        if line.get("secure"):
            note += f"  server saw {_sum_seen(line['secure'])}"
            news += _secure_news(line["secure"], charged=line.get("epsilon") is not None)
        if not self._console.is_terminal:
            self.say("  ".join([f"round {self._completed}/{self._total}", note, privacy, *news, left]))
            return
        if news:
            self.say("  ".join([f"round {self._completed}", *news]))
        if self._rounds is None:
            self._rounds = self._live.add_task("Rounds", total=self._total, note="")
        gap = "\n" if line.get("epsilon") else "  "  # a guarantee in full takes a line of its own
        self._live.update(self._rounds, completed=self._completed, note=f"{note}  {left}{gap}{privacy}")

    def say(self, message: str) -> None:
        """Prints a line above the display; what stands in it is never taken for markup."""
        self._console.print(Text(message), soft_wrap=True)


def settings_table(rows: Iterable[tuple[str, Any]], title: str = "Settings") -> Table:
    """Name and value, a row each."""
    table = plain_table(title)
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(f"{value:,}" if isinstance(value, int) else str(value)))
    return table


def sites_table(rows: Mapping[str, Mapping[str, int]], title: str = "Sites") -> Table:
    """A row for each site (of many: the first) and one for all together.

    Args:
      rows: counts by site; the columns are those of the first site (``train_records`` is shown as ``train records``).
      title: above the table.
    """
    names = list(next(iter(rows.values()))) if rows else []
    table = plain_table(title)
    table.add_column("site", overflow="fold")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for site, counts in list(rows.items())[:_MOST_SITES]:
        table.add_row(Text(site), *(f"{counts.get(name, 0):,}" for name in names))
    if len(rows) > _MOST_SITES:
        table.add_row(f"... and {len(rows) - _MOST_SITES:,} more", style="dim")
    if len(rows) > 1:
        table.add_section()
        table.add_row("all", *(f"{sum(counts.get(name, 0) for counts in rows.values()):,}" for name in names))
    return table


def results_table(summary: Mapping[str, Any]) -> Table:
    """The base model and the tuned one, macro means over sites with 95% intervals, and the guessers.

    Args:
      summary: what ``summary.json`` holds; ``final`` may be absent (setting ``base``).
    """
    final = summary.get("final")
    table = plain_table("Held-out results (macro mean over sites, 95% interval)")
    table.add_column("")
    for name in ("base", "tuned") if final else ("base",):
        table.add_column(name, justify="right")
    labels = {
        "nll": "nats per answer token",
        "perplexity": "perplexity",
        "token_accuracy": "next-token accuracy",
        "choice_accuracy": "multiple choice",
    }
    for measure, label in labels.items():
        cells = [with_interval(part, measure) for part in (summary["base"], final) if part]
        table.add_row(label, *cells)
    for name, score in summary["base"].get("guessers", {}).items():
        table.add_row(Text(f"  guesser: {name}"), percent(score), style="dim")
    return table


def privacy_table(privacy: Mapping[str, Any] | None) -> RenderableType:
    """What a run guarantees: by site (of many: the worst) and at most, against whom, and what is not covered.

    Args:
      privacy: the statement that ``summary.json`` holds as ``privacy``; ``None``: no differential privacy.
    """
    if privacy is None:
        return Text("Privacy: no differential privacy; nothing limits what the model may reveal of the training text.")
    accounts = privacy["accounts"]
    table = plain_table(
        f"Privacy (epsilon at delta {privacy['delta']:g}, {privacy['adjacency']}; {privacy['mechanism']})"
    )
    table.add_column("site", overflow="fold")
    for heading in statement.headings(privacy):
        table.add_column(heading, justify="right")
    for name, figures in statement.worst(accounts, _MOST_ACCOUNTS):
        table.add_row(Text(name), *statement.cells(figures))
    table.add_section()
    table.add_row("maximum", statement.bound(privacy["epsilon"]))
    rest = statement.left_out(accounts, _MOST_ACCOUNTS)
    sentences = [Text(rest, style="dim")] if rest else []
    sentences += [Text(f"{privacy['line'][:1].upper()}{privacy['line'][1:]}.", style="bold")]
    sentences += [Text(f"Stopped: {privacy['stopped']}")] if privacy["stopped"] else []
    sentences += [Text(f"Holds against: {privacy['adversary']}"), Text("Not covered:")]
    sentences += [Text(f"- {sentence}") for sentence in privacy["not_covered"]]
    sentences += [Text(f"Warning: {privacy['warning']}", style="yellow")] if privacy["warning"] else []
    return Group(table, *sentences)


def with_interval(figures: Mapping[str, Any], measure: str) -> str:
    """A figure with its bounds: ``2.95 [2.90, 3.01]``, accuracies in percent, ``-`` where there is none."""
    values = [figures.get(f"{measure}{end}") for end in ("", "_low", "_high")]
    if values[0] is None:
        return "-"
    digits = 2 if measure == "perplexity" else 3
    point, low, high = (percent(v) if measure.endswith("accuracy") else _number(v, digits) for v in values)
    return point if low == "-" else f"{point} [{low}, {high}]"


def percent(value: float | None) -> str:
    """A share as percent with one decimal."""
    return "-" if value is None else f"{100 * value:.1f}%"


def duration(seconds: float) -> str:
    """A time for people: ``4.2s``, ``3m 05s``, ``2h 10m``."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    return f"{minutes // 60}h {minutes % 60:02d}m"


def byte_size(count: float) -> str:
    """A number of bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB"


def _sum_seen(secure: Mapping[str, Any]) -> str:
    """What a round under secure aggregation showed the server."""
    return "nothing" if secure["abandoned"] else f"one sum of {secure['survivors']}"


def _secure_news(secure: Mapping[str, Any], charged: bool) -> list[str]:
    """What is worth a line of a round under secure aggregation."""
    news = []
    if secure["abandoned"]:
        stays = "; what it would have released stays charged" if charged else ""
        news.append(f"abandoned, nothing was released: {secure['abandoned']}{stays}")
    elif secure["dropped"]:
        news.append(f"recovered without {', '.join(secure['dropped'])}")
    if secure["cut"]:
        news.append(f"{secure['cut']:,} numbers were larger than secure.bound and were cut; raise it")
    return news


def plain_table(title: str) -> Table:
    """The look that all tables share; never narrower than its title."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        min_width=len(title),
    )


def _number(value: float | None, digits: int = 4) -> str:
    """A number with a few digits; ``-`` for none."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 10_000 else f"{value:.3g}"


def _short(rate: float) -> str:
    """A rate with three digits."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
