"""Comparisons made up, for tests of tables and figures."""

from fedjax_llm.runs.compare import Comparison


def run(nll=2.5, epsilon=None, unit="record", **changes):
    """A run's row; bounds are a tenth away."""
    figures = {
        name + end: value and value + shift
        for name, value in {"nll": nll, "perplexity": 12.0, "token_accuracy": 0.5, "choice_accuracy": None}.items()
        for end, shift in (("", 0.0), ("_low", -0.1), ("_high", 0.1))
    }
    privacy = epsilon and {"epsilon": epsilon, "delta": 1e-5, "unit": unit, "adjacency": f"add or remove one {unit}"}
    effort = {"setting": "federated", "rounds": 3, "planned": 4, "tokens": 192_000, "bytes": 3 * 10**6, "seconds": 9.0}
    return effort | {"privacy": privacy} | figures | changes


def comparison(warnings=(), **runs):
    """Runs by name; each but the first is better than it by a quarter."""
    differences = {name: {"macro": {"difference": -0.25, "low": -0.5, "high": 0.125}} for name in list(runs)[1:]}
    return Comparison(runs=runs, sites={}, differences=differences, warnings=tuple(warnings))
