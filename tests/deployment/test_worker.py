"""A site's worker: what it tells, what it remembers, and what it will not do."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from small_job import Disturbed, deployed, private_job, sources, tiny, worker, workers, write_job
from tiny import tiny_tokenizer

from fedjax_llm.deployment.messages import REFUSED, STRANGER, Said, to_bytes
from fedjax_llm.deployment.site import Budget
from fedjax_llm.deployment.worker import Worker, kept_key
from fedjax_llm.errors import UserError

pytestmark = pytest.mark.usefixtures("short_reports")


def overheard(folder, job, budget=None):
    """A run, and all that was said in it: (site, request, answer)."""
    said = []

    def hand(name: str, request: Said, reach) -> Said:
        said.append((name, request, reach()))
        return said[-1][2]

    sites = workers(folder, job, budget)
    deployed(folder, job, Disturbed(sites, hand))
    return sites, said


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory):
    """Workers of a private run, what was said, and where."""
    folder = tmp_path_factory.mktemp("heard")
    return *overheard(folder, private_job(folder), Budget(20.0, 1e-3)), folder


def test_no_text_and_no_run_of_tokens_leaves_a_site(heard):
    _, said, folder = heard
    sent = b"".join(to_bytes(answer) for _, _, answer in said)
    assert len(sent) > 1000
    records = [record for source in sources(folder).values() for site in source.load().sites for record in site.records]
    for record in records:
        for message in record.examples[0].messages:
            tokens = np.array(tiny_tokenizer().encode(message.content), np.int32)
            assert message.content.encode() not in sent
            assert tokens[:6].tobytes() not in sent


def test_what_it_tells_of_a_round_is_the_stated_list(heard):
    trained = [answer for _, _, answer in heard[1] if answer.word == "trained"]
    assert len(trained) == 6
    for answer in trained:
        assert set(answer.values) == {"members", "ideal", "kept", "below_clip", "reports", "padded_tokens", "empty"}
        assert answer.values["ideal"] is None
        assert answer.values["kept"] == {}


def test_a_request_that_is_repeated_is_answered_as_before_and_charged_once(heard):
    sites, said, _ = heard
    name, request, first = [entry for entry in said if entry[2].word == "trained"][-1]
    before = sites[name]._budget().standing()
    again = sites[name].answer(replace(request, values=dict(request.values)))
    assert [array.tobytes() for array in again.arrays] == [array.tobytes() for array in first.arrays]
    assert sites[name]._budget().standing() == before


def test_another_round_of_the_same_number_is_not_computed(heard):
    sites, said, _ = heard
    name, request, _ = [entry for entry in said if entry[2].word == "trained"][-1]
    other = replace(request, arrays=[array + 1 for array in request.arrays])
    answer = sites[name].answer(other)
    assert answer.word == REFUSED
    assert "was charged" in answer.why


def test_arrays_of_another_run_are_refused_before_anything_is_charged(heard):
    sites, said, _ = heard
    name, request, _ = [entry for entry in said if entry[2].word == "trained"][-1]
    before = sites[name]._budget().standing()
    for arrays in (request.arrays[1:], [*request.arrays[:-1], request.arrays[-1] * np.nan]):
        values = request.values | {"round": 9}
        assert sites[name].answer(replace(request, values=values, arrays=arrays)).word == REFUSED
    assert sites[name]._budget().standing() == before


def test_a_run_that_it_does_not_know_it_calls_strange_and_other_words_it_refuses(heard, tmp_path):
    _, said, folder = heard
    request = next(request for _, request, answer in said if answer.word == "trained")
    fresh = worker(folder, folder / "job.py", "hill")
    assert fresh.answer(request).word == STRANGER
    assert fresh.answer(replace(request, word="validate")).word == STRANGER
    answer = fresh.answer(Said("shutdown"))
    assert (answer.word, "does not know" in answer.why) == (REFUSED, True)


def test_a_site_whose_text_has_changed_does_not_go_on(heard):
    _, said, folder = heard
    last = [request for name, request, _ in said if (name, request.word) == ("hill", "prepare")][-1]
    texts = folder / "sites" / "hill.jsonl"
    before = texts.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    texts.write_text("".join(json.dumps(row | {"answer": "Cid of the hill."}) + "\n" for row in rows))
    try:
        answer = worker(folder, folder / "job.py", "hill").answer(last)
    finally:
        texts.write_text(before)
    assert answer.word == REFUSED
    assert "not those with which it joined" in answer.why


def test_a_secret_key_is_drawn_once_for_each_run_and_is_the_owners(tmp_path):
    keys = [np.asarray(jax.random.key_data(kept_key(tmp_path, run))).tobytes() for run in ("one", "one", "two")]
    assert keys[0] == keys[1] != keys[2]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_a_site_that_is_none_of_the_jobs_does_not_start(tmp_path):
    found = worker(tmp_path, write_job(tmp_path), "hill")
    with pytest.raises(UserError, match="has no site 'moon'"):
        Worker(replace(found.site, name="moon"), tiny)


def test_under_secure_aggregation_it_gives_nothing_in_clear_and_meets_nobody_twice(tmp_path):
    job = write_job(tmp_path, secure="SecAgg()", rounds=1)
    sites, said = overheard(tmp_path, job)
    begun = next(entry for entry in said if entry[1].word == "secure" and entry[0] == "hill")
    values = {name: begun[1].values[name] for name in ("run", "round", "attempt", "clip_norm")}
    clear = sites["hill"].answer(Said("train", values, begun[1].arrays))
    assert (clear.word, "in clear" in clear.why) == (REFUSED, True)
    again = sites["hill"].answer(begun[1])
    assert (again.word, "was met before" in again.why) == (REFUSED, True)
    few = begun[1].values | {"meeting": {"clients": 1, "session": bytes(16)}}
    assert sites["hill"].answer(replace(begun[1], values=few)).word == REFUSED
    reports = [answer.values["report"] for _, _, answer in said if "report" in answer.values]
    assert len(reports) == 3
    assert all((report["loss"], report["tokens"], report["update_norm"]) == (None, 0, 0.0) for report in reports)
