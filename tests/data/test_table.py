"""Rows to sites of records."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.data.records import Message
from fedjax_llm.data.splits import Fractions, split_of
from fedjax_llm.data.table import Columns, example_of, scalar, sites_of
from fedjax_llm.errors import UserError


def pair(prompt="q", answer="a", **more):
    return {"prompt": prompt, "answer": answer} | more


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def gather(rows, columns=Columns()):  # noqa: B008 (frozen)
    """Sites of (site, row) pairs, by name."""
    return {
        site.name: site for site in sites_of(((name, f"row {i}", row) for i, (name, row) in enumerate(rows)), columns)
    }


def test_prompt_and_answer():
    example = example_of("f:1", {"Q": "Why?", "A": " So. "}, Columns(prompt="Q", answer="A"))
    assert example.messages == (Message("user", "Why?"), Message("assistant", " So. "))


def test_messages_go_before_prompt_and_answer_and_may_be_json_text():
    turns = chat(("system", "s"), ("user", "u"), ("assistant", "a"))
    wanted = (Message("system", "s"), Message("user", "u"), Message("assistant", "a"))
    assert example_of("f:1", turns | pair(), Columns()).messages == wanted
    as_text = {"messages": '[{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]'}
    assert example_of("f:1", as_text, Columns()).messages == wanted[1:]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"promt": "q", "answer": "a"}, "no column 'prompt'; did you mean 'promt'.; the columns are: answer, promt"),
        ({"x": "q"}, "no column 'prompt'; known: x"),
        ({"prompt": "q"}, "no column 'answer'"),
        (pair(answer=" \n"), "the answer is empty"),
        (pair(prompt=""), "nothing is asked"),
        (pair(answer=None), "'answer' must hold text, not NoneType"),
        (pair(prompt=3), "'prompt' must hold text, not int"),
        (pair(prompt="half \ud800"), "surrogate"),
        (chat(("user", "q")), "the last message is the user's"),
        (chat(("assistant", "a")), "nothing is asked"),
        (chat(("user", "q"), ("asistant", "a")), "message 2 has the role 'asistant'; did you mean 'assistant'"),
        ({"messages": []}, "a list of messages with one at least"),
        ({"messages": {"role": "user"}}, "a list of messages"),
        ({"messages": "[broken"}, "text, but not JSON"),
        ({"messages": [{"role": "user"}]}, "message 1 must be"),
        ({"messages": ["hello"]}, "message 1 must be"),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(UserError, match=f"^f:1: .*{message}"):
        example_of("f:1", row, Columns())


def test_scalar():
    assert scalar("f:1", {"a": 3}, "a") == "3"
    assert scalar("f:1", {"a": " x "}, "a") == "x"
    assert scalar("f:1", {"a": ""}, "a") is None
    assert scalar("f:1", {"a": None}, "a") is None
    with pytest.raises(UserError, match=r"f:1: the column 'a' must hold text or a number, not list"):
        scalar("f:1", {"a": []}, "a")


def test_columns_become_label_owner_and_fields():
    row = pair(id=7, kind="x", patient="p1", ward="north", beds=12, tags=["t"], note=None)
    (record,) = gather([("s", row)], Columns(id="id", label="kind", owner="patient"))["s"].records
    assert (record.id, record.label, record.owner) == ("7", "x", "p1")
    assert record.fields == {"kind": "x", "patient": "p1", "ward": "north", "beds": "12"}


def test_rows_with_one_id_are_one_record():
    rows = [("s", pair("q1", id="r")), ("s", pair("q2", id="other")), ("s", pair("q3", id="r"))]
    records = gather(rows, Columns(id="id"))["s"].records
    assert [record.id for record in records] == ["r", "other"]
    assert [example.messages[0].content for example in records[0].examples] == ["q1", "q3"]


def test_rows_of_one_record_must_agree():
    rows = [("s", pair("q1", id="r", who="a")), ("s", pair("q2", id="r", who="b"))]
    with pytest.raises(UserError, match="row 1: record 'r' has the owner 'b' here and 'a' before"):
        gather(rows, Columns(id="id", owner="who"))
    with pytest.raises(UserError, match="label"):
        gather(rows, Columns(id="id", label="who"))


def test_empty_and_missing_ids():
    with pytest.raises(UserError, match="row 0: the id column 'id' is empty"):
        gather([("s", pair(id=""))], Columns(id="id"))
    with pytest.raises(UserError, match="row 0: no column 'idd'; did you mean 'id'"):
        gather([("s", pair(id="1"))], Columns(id="idd"))


def test_default_ids_tell_rows_apart_by_all_that_they_hold():
    rows = [pair(), pair(answer="b"), pair(ward="north"), pair(ward="south")]
    records = gather([("s", row) for row in rows])["s"].records
    assert len({record.id for record in records}) == 4
    assert all(len(record.id) == 32 for record in records)


@given(st.lists(st.sampled_from("abcdef"), min_size=1), st.randoms())
def test_default_ids_do_not_depend_on_the_order(prompts, random):
    rows = [("s", pair(prompt)) for prompt in prompts]
    shuffled = random.sample(rows, len(rows))
    one, other = (gather(order)["s"].records for order in (rows, shuffled))
    assert {record.id: record for record in one} == {record.id: record for record in other}
    assert len({record.id for record in one}) == len(rows)


def test_copies_of_a_row_are_in_one_split():
    for number in range(20):
        records = gather([("s", pair(f"q{number}"))] * 5)["s"].records
        assert len({record.id for record in records}) == 5
        assert len({split_of(record, Fractions(0.3, 0.3), 0) for record in records}) == 1


@pytest.mark.parametrize("columns", [Columns(), Columns(id="id")])
def test_an_id_at_two_sites(columns):
    alone = gather([("b", pair(id="r"))], columns)["b"].records[0]
    sites = gather([("b", pair(id="r")), ("a", pair(id="r"))], columns)
    (at_a,), (at_b,) = sites["a"].records, sites["b"].records
    assert (at_a.id, at_b.id) == (f"a/{alone.id}", f"b/{alone.id}")
    # Its split is that which it has alone, at both sites.
    splits = {split_of(record, Fractions(0.4, 0.4), salt) for salt in (3,) for record in (alone, at_a, at_b)}
    assert len(splits) == 1


def test_sites_are_in_alphabetic_order():
    assert list(gather([("b", pair()), ("a", pair("other")), ("c", pair("third"))])) == ["a", "b", "c"]
