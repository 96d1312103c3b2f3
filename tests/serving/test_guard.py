"""Requests of other sites' pages are refused, and browsers are told to load nothing from elsewhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from fedjax_llm.serving.guard import FIGURE_POLICY, LOOPBACK, Guard, host_name


def client(names=LOOPBACK):
    async def page(request):
        headers = {"Content-Security-Policy": FIGURE_POLICY} if request.url.path == "/figure" else None
        return PlainTextResponse("inside", headers=headers)

    routes = [Route(path, page, methods=["GET", "POST"]) for path in ("/", "/figure")]
    return TestClient(Starlette(routes=routes, middleware=[Middleware(Guard, names=names)]))


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost:9", "LOCALHOST", "[::1]:8080", "127.0.0.1"])
def test_the_names_of_this_computer_are_answered(host):
    assert client().get("/", headers={"host": host}).text == "inside"


FOREIGN = (
    *("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "127.0.0.1@evil.example", "0.0.0.0:8080"),
    *("::1", "localhost/", "localhost:x", "localhost:1:2", "[localhost", "evil.example#localhost", ""),
)


@pytest.mark.parametrize("host", FOREIGN)
def test_other_names_are_refused(host):
    for method in ("get", "post"):
        answer = getattr(client(), method)("/", headers={"host": host})
        assert answer.status_code == 421
        assert "inside" not in answer.text


def test_two_host_headers_are_refused():
    headers = [("host", "localhost"), ("host", "evil.example")]
    assert client().get("/", headers=headers).status_code == 421


def test_a_name_that_was_given_is_answered_and_no_other():
    named = client(("clinic-3.example",))
    assert named.get("/", headers={"host": "clinic-3.example:8080"}).status_code == 200
    answer = named.get("/", headers={"host": "localhost:8080"})
    assert (answer.status_code, answer.json()["error"]) == (
        421,
        "this server does not go by the name that was asked for; it answers to clinic-3.example",
    )


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://localhost:8080", "sec-fetch-site": "same-origin"}, 200),
        ({"origin": "http://localhost:8081"}, 403),
        ({"origin": "http://127.0.0.1:8080"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://localhost:8080.evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
    ],
)
def test_posts_of_other_sites_are_refused(headers, status):
    assert client().post("/", headers={"host": "localhost:8080", **headers}).status_code == status


def test_every_answer_tells_the_browser_what_it_may_do():
    for answer in (
        client().get("/", headers={"host": "localhost"}),
        client().get("/absent", headers={"host": "localhost"}),
        client().get("/", headers={"host": "evil.example"}),
    ):
        directives = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert directives.pop("default-src") == "'none'"
        assert set(directives.values()) == {"'self'", "'none'"}
        assert directives["frame-ancestors"] == directives["base-uri"] == directives["form-action"] == "'none'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert "set-cookie" not in answer.headers
        assert "access-control-allow-origin" not in answer.headers


def test_a_figures_own_policy_stands():
    answer = client().get("/figure", headers={"host": "localhost"})
    assert answer.headers.get_list("content-security-policy") == [FIGURE_POLICY]
    assert "script-src" not in FIGURE_POLICY


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20))
def test_no_host_but_the_name_itself_and_a_port_is_taken_for_it(text):
    name = host_name(text)
    if name == "localhost":
        before, _, port = text.lower().partition(":")
        assert before == "localhost"
        assert port == "" or port.isdecimal()
