"""``POST /ask``: a question in, both answers out as lines of JSON, as they grow."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from anyio import to_thread
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from fedjax_llm.errors import UserError, nearest
from fedjax_llm.serving.turns import Busy, Turns
from fedjax_llm.serving.voices import Events, Question, Voices

LARGEST_BODY = 32 * 1024
"""Bytes of a request, at most."""
_BODY_SECONDS = 10.0
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "question": str,
    "max_new_tokens": int,
    "temperature": (int, float),
    "seed": int,
}


class Refused(Exception):
    """A request that is not answered: the status and what to tell."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


class Asking:
    """The endpoint, an ASGI application.

    The lines are the events of :meth:`~fedjax_llm.serving.voices.Voices.answer`, after ``{"waiting": true}`` where the
    question has to wait and ``{"started": true}``; ``{"error": "..."}`` ends an answer that went wrong. A browser that
    goes away ends its answer after the token that is being made.

    Args:
      voices: the models.
      turns: the queue.
    """

    def __init__(self, voices: Voices, turns: Turns) -> None:
        self._voices, self._turns = voices, turns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        try:
            question = read_question(await _body(Request(scope, receive)))
            async with self._turns.place() as turn:
                # Tokenising takes a moment, in which other requests go on.
                events = await to_thread.run_sync(_refusing, self._voices, question)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(_cancel_when_gone, receive, tasks.cancel_scope)
                    await _speak(events, turn, send)
                    tasks.cancel_scope.cancel()
        except ClientDisconnect:
            return
        except Busy:
            why = "other questions are waiting already; ask again in a moment"
            await JSONResponse({"error": why}, 429, {"Retry-After": "5"})(scope, receive, send)
        except Refused as refused:
            await JSONResponse({"error": refused.why}, refused.status)(scope, receive, send)


def read_question(body: bytes) -> Question:
    """The question in a request's body.

    Raises:
      Refused: it is not JSON of the right fields and types.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the request is not JSON") from None
    if not isinstance(found, dict):
        raise Refused(400, "the request is not a JSON object")
    for name in found:
        if name not in _FIELDS:
            raise Refused(400, f"there is no field {name[:40]!r}{nearest(name[:40], _FIELDS)}")
    for name, kind in _FIELDS.items():
        if name in ("question", "max_new_tokens") and name not in found:
            raise Refused(400, f"the field {name} is missing")
        if name in found and (not isinstance(found[name], kind) or isinstance(found[name], bool)):
            raise Refused(400, f"the field {name} has the wrong type")
    if found.get("temperature", 0) != found.get("temperature", 0):
        raise Refused(400, "the field temperature is not a number")
    return Question(found["question"], found["max_new_tokens"], found.get("temperature", 0.0), found.get("seed", 0))


def _refusing(voices: Voices, question: Question) -> Events:
    """The answers, or a refusal with the reason."""
    try:
        return voices.answer(question)
    except UserError as error:
        raise Refused(422, str(error)) from None


async def _body(request: Request) -> bytes:
    """The body of a request, which must be JSON, small, and arrive in time."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the request must be of the type application/json")
    if not _small(request.headers):
        raise Refused(413, f"the request is larger than {LARGEST_BODY:,} bytes")
    found = bytearray()
    try:
        with anyio.fail_after(_BODY_SECONDS):
            async for part in request.stream():
                found += part
                if len(found) > LARGEST_BODY:
                    raise Refused(413, f"the request is larger than {LARGEST_BODY:,} bytes")
    except TimeoutError:
        raise Refused(408, "the request did not arrive in time") from None
    return bytes(found)


def _small(headers: Headers) -> bool:
    """Whether a request says that it is small, or does not say."""
    stated = headers.get("content-length", "0")
    return stated.isdecimal() and len(stated) < 10 and int(stated) <= LARGEST_BODY


async def _cancel_when_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    """Ends the answer when its browser has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


async def _speak(events: Events, turn: Callable[[], Awaitable[None]], send: Send) -> None:
    """Sends the lines, each as soon as it is known."""

    async def line(event: dict[str, Any], more: bool = True) -> None:
        body = (json.dumps(event, ensure_ascii=False) + "\n").encode("utf-8", "replace") if event else b""
        await send({"type": "http.response.body", "body": body, "more_body": more})

    kind = [(b"content-type", b"application/x-ndjson; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": kind})
    await line({"waiting": True})
    await turn()
    await line({"started": True})
    try:
        while (event := await to_thread.run_sync(next, events, None)) is not None:
            await line(event)
    except Exception as error:
        # The status is sent already; without this line the page would take half an answer for a whole one.
        await line({"error": f"the answer ended early: {type(error).__name__}. The terminal of the server says more"})
        raise
    finally:
        events.close()
    await line({}, more=False)
