"""A site's ledger recounted: what the budget counted, run by run, from the file alone."""

import io

import pytest
from rich.console import Console

from experiments import privacy
from fedjax_llm.deployment.site_budget import SiteBudget
from fedjax_llm.errors import UserError
from fedjax_llm.privacy import ledger
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.ledger import Header
from fedjax_llm.privacy.site_ledger import Terms
from fedjax_llm.runs.recount_site import recount_site, render

FIRST, SECOND = Event("gaussian", 8.0), Event("matrix", 6.0)


@pytest.fixture
def budget(tmp_path):
    """Of a site that two runs were charged to, one of them on terms."""
    kept = SiteBudget(tmp_path / "budget.jsonl", 5.0, 1e-5, "north", "patient")
    kept.agree("one", Terms("DpFedSgd", "patient", "sum", 0.5, "flat", False, FIRST, "reproducible"))
    for number in (1, 2, 3):
        kept.charge(number, 0, FIRST, run="one")
        kept.charge(number, 0, SECOND, run="two")
    kept.charge(2, 1, FIRST, run="one")
    return kept


def test_it_finds_what_the_budget_counted(budget):
    found = recount_site(budget.path)
    assert found.epsilon == budget.standing().spent
    assert (found.site, found.delta, found.header.unit) == ("north", 1e-5, "patient")
    one, two = found.runs["one"], found.runs["two"]
    assert (one.rounds, one.again, one.events) == (3, 1, (Event("gaussian", 8.0, count=4),))
    assert (two.rounds, two.again, two.terms) == (3, 0, None)
    assert two.events == (Event("gaussian", 6.0),), "correlated noise is one release"
    assert max(one.epsilon, two.epsilon) < found.epsilon < one.epsilon + two.epsilon


def test_epsilon_falls_with_delta(budget):
    table = dict(recount_site(budget.path, delta=1e-2).table)
    assert sorted(table, reverse=True)[0] == 1e-2
    assert sorted(table.values()) == [table[delta] for delta in sorted(table, reverse=True)]
    with pytest.raises(UserError, match="delta is 2"):
        recount_site(budget.path, delta=2)


def test_what_is_printed_says_what_it_rests_on(budget):
    out = io.StringIO()
    render(Console(file=out, width=200), recount_site(budget.path))
    text = out.getvalue()
    assert "site 'north' alone: epsilon <= " in text
    assert "4 Gaussian releases, noise multiplier 8" in text
    assert "DpFedSgd, clip norm 0.5" in text
    assert "one comes from a seed" in text
    assert "not against whoever adds up" in text


def test_the_command_takes_a_file(budget, capsys):
    assert privacy.main([str(budget.path)]) == 0
    assert "over all of its 2 runs" in " ".join(capsys.readouterr().out.split())


def test_the_ledger_of_a_run_is_told_apart(tmp_path, capsys):
    header = Header("record", "", "DpSgd", 1e-5, "pld", "secret", {"north": 3}, (), "c0ffee")
    ledger.create(tmp_path / "ledger.jsonl", header)
    assert privacy.main([str(tmp_path / "ledger.jsonl")]) == 2
    assert "is the ledger of a run" in capsys.readouterr().err
