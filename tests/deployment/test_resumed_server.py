"""A server that is killed and resumed goes on where it was, and what was spent stays spent."""

import pytest
from small_job import Disturbed, adapters, deployed, lines, private_job, same_bits, workers

from fedjax_llm.deployment.messages import Said
from fedjax_llm.deployment.site import Budget
from fedjax_llm.errors import UserError
from fedjax_llm.privacy import ledger

pytestmark = pytest.mark.usefixtures("short_reports")


class Killed(BaseException):
    """The end of the server's process, as far as a test can have it."""


@pytest.mark.parametrize("again", [False, True], ids=["sites stay", "sites are restarted too"])
def test_a_resumed_run_gives_the_same_bits_and_never_a_smaller_epsilon(again, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    for folder in (whole, part):
        folder.mkdir()
    job = private_job(part, rounds=3)
    deployed(whole, private_job(whole, rounds=3))
    answered = []

    def hand(name: str, request: Said, reach) -> Said:
        said = reach()
        if said.word == "trained" and request.values["round"] == 2:
            answered.append(name)
            if len(answered) == 2:
                raise Killed  # two sites have trained for the round, and nobody has their messages
        return said

    budget = Budget(20.0, 1e-3)
    sites = workers(part, job, budget)
    with pytest.raises(Killed):
        deployed(part, job, Disturbed(sites, hand))
    spent = ledger.read(part / "run" / "ledger.jsonl")
    assert [entry.round for entry in spent.entries] == [1, 2]
    if again:
        sites = workers(part, job, budget)
    deployed(part, job, Disturbed(sites, lambda name, request, reach: reach()), resume=True)
    assert same_bits(adapters(part / "run"), adapters(whole / "run"))
    assert lines(part / "run") == lines(whole / "run")
    assert ledger.read(part / "run" / "ledger.jsonl").entries[:2] == spent.entries
    assert {site._budget().standing().releases for site in sites.values()} == {3}


def test_a_run_that_is_none_of_a_federation_cannot_be_resumed(tmp_path):
    job = private_job(tmp_path)
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="holds no run of a federation"):
        deployed(tmp_path, job, resume=True)
