"""``POST /ask``: what is answered, what is refused, and what a browser that goes away leaves behind."""

import json

import anyio
import pytest
from starlette.testclient import TestClient
from tiny import tiny_adapters, tiny_base

from fedjax_llm.serving import asking
from fedjax_llm.serving.app import create
from fedjax_llm.serving.asking import LARGEST_BODY, Asking
from fedjax_llm.serving.pages import RunPage
from fedjax_llm.serving.turns import Turns
from fedjax_llm.serving.voices import Limits, Voices

pytestmark = pytest.mark.usefixtures("short_reports")


def voices():
    base = tiny_base()
    return Voices(base, tiny_adapters(base.model), None, Limits(128, 16))


@pytest.fixture(scope="module")
def client():
    app = create(RunPage("<p>page</p>", {"run-0": "<svg/>"}), voices(), waiting=1)
    return TestClient(app, base_url="http://localhost:8080")


def asked(**fields):
    return {"question": "Why?", "max_new_tokens": 6} | fields


def lines(answer):
    return [json.loads(line) for line in answer.text.splitlines()]


def said(answer, voice):
    return "".join(event.get("text", "") for event in lines(answer) if event.get("voice") == voice)


def test_a_question_is_answered_by_both_models(client):
    answer = client.post("/ask", json=asked())
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    assert lines(answer)[:2] == [{"waiting": True}, {"started": True}]
    assert said(answer, "base")
    assert said(answer, "base") != said(answer, "tuned")
    assert {event["voice"] for event in lines(answer) if "tokens" in event} == {"base", "tuned"}


def test_temperature_and_seed_are_heeded(client):
    first, again, other = (client.post("/ask", json=asked(temperature=1.5, seed=seed)) for seed in (1, 1, 2))
    assert said(first, "base") == said(again, "base") != said(other, "base")


def test_markup_comes_back_as_json_text_and_is_never_html(client, monkeypatch):
    monkeypatch.setattr(
        Voices, "answer", lambda self, question: (event for event in [{"voice": "base", "text": question.text}])
    )
    text = "</p><script>alert(1)</script>\n\u2028{}"
    answer = client.post("/ask", json=asked(question=text))
    assert "html" not in answer.headers["content-type"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    events = [json.loads(line) for line in answer.text.split("\n") if line]
    assert {"voice": "base", "text": text} in events


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "not JSON"),
        (b"[1]", 400, "not a JSON object"),
        (b"[" * 9000, 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        (json.dumps({"question": "Why?"}), 400, "max_new_tokens is missing"),
        (json.dumps(asked(question=5)), 400, "question has the wrong type"),
        (json.dumps(asked(max_new_tokens=True)), 400, "max_new_tokens has the wrong type"),
        (json.dumps(asked(temprature=1)), 400, "did you mean 'temperature'?"),
        (json.dumps(asked(temperature=float("nan"))), 400, "temperature is not a number"),
        (json.dumps(asked(temperature=float("inf"))), 422, "temperature is inf"),
        (json.dumps(asked(temperature=9)), 422, "temperature is 9"),
        (json.dumps(asked(max_new_tokens=17)), 422, "1 to 16 can be"),
        (json.dumps(asked(max_new_tokens=10**30)), 422, "1 to 16 can be"),
        (json.dumps(asked(question="Why? " * 60)), 422, "shorten it"),
        (json.dumps(asked(question="\ud800")), 422, "half of a character"),
        (json.dumps(asked(question="x" * LARGEST_BODY)), 413, "larger than"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_reason(client, body, status, message):
    answer = client.post("/ask", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert message in answer.json()["error"]


def test_a_body_that_grows_beyond_the_bound_is_refused_without_its_length(client):
    def parts():
        yield from [b" " * 1000] * 40

    answer = client.post("/ask", content=parts(), headers={"content-type": "application/json"})
    assert answer.status_code == 413


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_types_that_forms_elsewhere_could_send_are_refused(client, kind):
    assert client.post("/ask", content=json.dumps(asked()), headers={"content-type": kind}).status_code == 415


def test_the_guard_stands_before_it(client):
    assert client.post("/ask", json=asked(), headers={"origin": "http://evil.example"}).status_code == 403
    assert client.post("/ask", json=asked(), headers={"host": "evil.example"}).status_code == 421
    assert client.get("/ask").status_code == 405


def request(endpoint, sent, gone):
    """One request to the endpoint without a server; ``gone`` is set when its browser goes away."""
    body = [{"type": "http.request", "body": json.dumps(asked()).encode(), "more_body": False}]

    async def receive():
        if body:
            return body.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)
        await anyio.sleep(0)

    headers = [(b"content-type", b"application/json")]
    return endpoint({"type": "http", "method": "POST", "path": "/ask", "headers": headers}, receive, send)


def test_an_error_within_an_answer_is_told_in_its_last_line_and_raised(monkeypatch):
    def broken(self, question):
        yield {"voice": "base", "text": "Be"}
        raise MemoryError("full")

    async def go():
        with pytest.raises(BaseExceptionGroup) as raised:
            await request(Asking(voices(), Turns(0)), sent, anyio.Event())
        return raised.value.exceptions

    sent = []
    monkeypatch.setattr(Voices, "answer", broken)
    (error,) = anyio.run(go)
    assert isinstance(error, MemoryError)
    last = json.loads(sent[-1]["body"])
    assert "MemoryError" in last["error"]
    assert "full" not in last["error"]


def test_who_goes_away_ends_the_answer_and_the_next_has_a_turn(monkeypatch):
    ended = []

    def endless(self, question):
        try:
            while True:
                yield {"voice": "base", "text": "more "}
        finally:
            ended.append(True)

    async def go():
        endpoint, sent, gone = Asking(voices(), Turns(0)), [], anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(request, endpoint, sent, gone)
            while len(sent) < 6:
                await anyio.sleep(0.01)
            refused = []
            await request(endpoint, refused, anyio.Event())  # the queue has no place
            gone.set()
        return refused[0]["status"], await second(endpoint)

    async def second(endpoint):
        sent = []
        monkeypatch.setattr(Voices, "answer", lambda self, question: (one for one in ()))
        with anyio.fail_after(5):
            await request(endpoint, sent, anyio.Event())
        return sent[0]["status"]

    monkeypatch.setattr(Voices, "answer", endless)
    assert anyio.run(go) == (429, 200)
    assert ended == [True]


def test_a_body_that_does_not_arrive_is_given_up(monkeypatch):
    async def go():
        sent = []

        async def receive():
            await anyio.sleep_forever()

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        endpoint = Asking(voices(), Turns(0))
        await endpoint({"type": "http", "method": "POST", "path": "/ask", "headers": headers}, receive, send)
        return sent[0]["status"]

    monkeypatch.setattr(asking, "_BODY_SECONDS", 0.05)
    assert anyio.run(go) == 408
