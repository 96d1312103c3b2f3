"""Who sees what of a federated run, in sentences: what travels, what is hidden from whom, and what that rests on."""

from typing import Literal

from fedjax_llm.secure.sec_agg import Terms

Noised = Literal["steps", "deltas", "sum", "shares"] | None
_PARTS = {
    None: "",
    "steps": ", with noise from each site's own steps in it",
    "deltas": ", with each site's own noise in it",
    "sum": " before its noise, which the server adds and is trusted with",
    "shares": ", with every site's share of the noise in it; nobody holds it without",
}


def protocol(terms: Terms) -> str:
    """The protocol of a round in a line."""
    complete = terms.neighbours == terms.clients - 1
    graph = "every pair of sites" if complete else f"each site and {terms.neighbours} neighbours"
    return (
        f"{'SecAgg' if complete else 'SecAgg+'}: masks between {graph}; {terms.threshold} of {terms.neighbours + 1} "
        f"shares open a secret; a sum holds at least {terms.survivors} of {terms.clients} sites or is abandoned"
    )


def who_sees_what(
    terms: Terms | None, noised: Noised, *, values: int, colluders: int, client_metrics: bool
) -> tuple[tuple[str, str], ...]:
    """Party and what it sees, a pair each.

    Args:
      terms: of secure aggregation; ``None``: there is none.
      noised: where differential privacy adds noise (``privacy.mechanism.Mechanism.noised``); ``None``: nowhere.
      values: how many numbers a message holds.
      colluders: sites that may tell the server all they know.
      client_metrics: whether the run's own files hold figures of every site.
    """
    rows = [("server", _server(terms, noised, values))]
    if terms is not None and colluders:
        rest = f"still only the sum over the others, at least {terms.survivors - colluders} sites"
        sites = "one site" if colluders == 1 else f"{colluders} sites"
        rows.append((f"server and {sites} together", rest))
    others = "the adapters that the server sends, and nothing of each other's"
    if terms is not None:
        others += f" but keys and encrypted shares, of which {terms.threshold} together open one mask"
    rows += [("other sites", others), ("whoever gets the adapters", "the adapters" + _covered(noised))]
    files = "every site's loss, tokens and update norm" if client_metrics else "the cohort's mean loss and its tokens"
    unsent = "" if client_metrics else ", which no message carries"
    rows.append(("this run's own files", f"{files}{unsent}, in clear, for those who may see the data"))
    return tuple(rows)


def _server(terms: Terms | None, noised: Noised, values: int) -> str:
    """What the server sees."""
    open_to_all = "who took part and when, and how many bytes they sent"
    if terms is None:
        hidden = "" if noised not in ("steps", "deltas") else ", with noise that the site added"
        trusted = " before the noise, which the server adds" if noised == "sum" else ""
        return f"every site's update of {values:,} numbers{hidden}{trusted}; {open_to_all}"
    return (
        f"masked updates, which are uniform random numbers; the sum of {values:,} numbers over at least "
        f"{terms.survivors} sites{_PARTS[noised]}; {open_to_all}"
    )


def _covered(noised: Noised) -> str:
    """What an adapter may tell."""
    return ", whose noise the privacy statement speaks of" if noised else ", which may tell of the text: without noise"
