"""Messages over Flower's records and nodes, with a grid in memory."""

from collections.abc import Callable, Iterable

import numpy as np
import pytest

pytest.importorskip("flwr", reason="the extra [flower] is not installed")
from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.supercore.task_identity import TaskIdentity

from fedjax_llm.deployment.flower import FlowerSites, from_records, to_records
from fedjax_llm.deployment.messages import FAILED, STRANGER, Said
from fedjax_llm.errors import UserError

NODES = {"hill": 11, "town": 22}


@pytest.fixture(autouse=True)
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as Flower's ServerApp of a run, which alone may send messages."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Grid:
    """Carries messages to functions by node; what they give is there at the next look, ``None`` is lost."""

    def __init__(self, answers: dict[int, Callable[[Said], Said | Error | None]]) -> None:
        self.answers, self.sent, self.ready = answers, list[tuple[int, str, str]](), dict[str, Message]()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        numbers = []
        for message in messages:
            number, node = f"m{len(self.sent)}", message.metadata.dst_node_id
            said = from_records(message.content)
            self.sent.append((node, said.word, message.metadata.message_type))
            told = self.answers[node](said)
            if told is not None:
                self.ready[number] = reply(number, node, told)
            numbers.append(number)
        return numbers

    def pull_messages(self, numbers: Iterable[str]) -> list[Message]:
        return [self.ready.pop(number) for number in list(numbers) if number in self.ready]


def reply(number: str, node: int, told: Said | Error) -> Message:
    """A node's answer, as the SuperLink hands it over."""
    about = Metadata(
        run_id=1, message_id=f"r{number}", src_node_id=node, dst_node_id=1, reply_to_message_id=number, group_id="1",
        created_at=0.0, ttl=60.0, message_type="train",
    )  # fmt: skip
    return make_message(about, error=told) if isinstance(told, Error) else make_message(about, content=to_records(told))


def sites(hill, town, **options) -> FlowerSites:
    """Two sites that answer so."""
    return FlowerSites(Grid({11: hill, 22: town}), NODES, pause=0.0, **options)


def test_a_message_is_the_same_after_flowers_records():
    said = Said("train", {"round": 3, "data": b"\0\1", "none": None, "names": ["a"]}, [np.arange(6.0).reshape(2, 3)])
    found = from_records(to_records(said))
    assert (found.word, dict(found.values)) == (said.word, dict(said.values))
    assert found.arrays[0].tobytes() == said.arrays[0].tobytes()
    assert found.arrays[0].shape == (2, 3)
    scalar = from_records(to_records(Said("x", {}, [np.float32(2), np.zeros((0, 4), np.int32)])))
    assert [(array.shape, array.dtype.name) for array in scalar.arrays] == [((), "float32"), ((0, 4), "int32")]


def test_other_records_are_refused():
    from flwr.app import ConfigRecord, RecordDict

    for records in (RecordDict({}), RecordDict({"about": ConfigRecord({"word": "train"})})):
        with pytest.raises(UserError, match="no message of a job"):
            from_records(records)


def test_requests_reach_the_nodes_of_their_sites_under_flowers_types():
    over = sites(lambda said: Said("from hill"), lambda said: Said("from town"))
    found = over.ask({"hill": Said("train"), "town": Said("hello")}, None)
    assert {name: said.word for name, said in found.items()} == {"hill": "from hill", "town": "from town"}
    assert over.grid.sent == [(11, "train", "train"), (22, "hello", "query")]
    with pytest.raises(UserError, match="no key is registered for moon"):
        over.ask({"moon": Said("hello")}, None)


def test_a_request_that_was_lost_is_sent_again():
    lost = []

    def town(said: Said) -> Said | None:
        lost.append(said)
        return None if len(lost) < 3 else Said("late")

    over = sites(lambda said: Said("here"), town, resend=0.01)
    assert over.ask({"hill": Said("train"), "town": Said("train")}, None)["town"].word == "late"
    assert [node for node, _, _ in over.grid.sent] == [11, 22, 22, 22]


def test_with_a_deadline_who_has_not_answered_is_missing_and_asked_no_second_time_for_the_same():
    over = sites(lambda said: Said("here"), lambda said: None)
    request = Said("train")
    assert set(over.ask({"hill": request, "town": request}, 0.02)) == {"hill"}
    over.grid.ready["m1"] = reply("m1", 22, Said("late"))
    assert over.ask({"town": request}, 0.02)["town"].word == "late"
    assert len(over.grid.sent) == 2


@pytest.mark.parametrize(
    ("told", "words"),
    [(Said(STRANGER), ""), (Error(0, "the worker does not run"), "does not run")],
    ids=["strange", "failed"],
)
def test_a_site_that_cannot_answer_is_told_at_once(told, words):
    over = sites(lambda said: told, lambda said: None)
    (found,) = over.ask({"hill": Said("train"), "town": Said("train")}, None).values()
    assert found.word in (STRANGER, FAILED)
    if words:
        assert words in found.why


def test_an_answer_from_another_node_does_not_count():
    over = sites(lambda said: None, lambda said: None)
    over.grid.push_messages = lambda messages: ["m0"]
    over.grid.ready["m0"] = reply("m0", 22, Said("trained"))
    found = over.ask({"hill": Said("train")}, None)["hill"]
    assert found.word == FAILED
    assert "another node" in found.why
