"""The page listens on this computer alone, unless somebody says otherwise in so many words."""

import socket

import pytest

from fedjax_llm.errors import UserError
from fedjax_llm.serving import listening
from fedjax_llm.serving.guard import LOOPBACK


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_needs_nothing(host):
    assert listening.names_of(host, (), False) == LOOPBACK
    assert listening.names_of(host, ("clinic-3.example",), False) == (*LOOPBACK, "clinic-3.example")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "clinic-3.example", ""])
def test_other_hosts_need_a_word_for_it(host):
    with pytest.raises(UserError, match="add --open-to-network if that is meant"):
        listening.names_of(host, ("clinic-3.example",), False)


def test_an_address_that_is_open_answers_to_its_own_name():
    assert listening.names_of("10.0.0.7", (), True) == (*LOOPBACK, "10.0.0.7")


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_all_addresses_need_names(host):
    with pytest.raises(UserError, match="name those by which browsers call this computer"):
        listening.names_of(host, (), True)
    assert listening.names_of(host, ("a.example", "fd00::7"), True) == (*LOOPBACK, "a.example", "fd00::7")


@pytest.mark.parametrize("name", ["http://a.example/", "a/b", "x@y", ""])
def test_names_that_are_none(name):
    with pytest.raises(UserError, match="is no name of a computer"):
        listening.names_of("127.0.0.1", (name,), False)


def test_a_port_in_use_is_told_at_once():
    with listening.bound("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        assert listening.url_of("127.0.0.1", first) == f"http://127.0.0.1:{port}/"
        assert listening.url_of("0.0.0.0", first) == f"http://127.0.0.1:{port}/"
        message = rf"cannot listen on 127.0.0.1, port {port}: .* \(0: a free one\)"
        with pytest.raises(UserError, match=message), listening.bound("127.0.0.1", port):
            pass
    with socket.socket() as free:
        assert free.connect_ex(("127.0.0.1", port))


@pytest.mark.parametrize(
    ("host", "port", "message"), [("127.0.0.1", 70000, "no port"), ("nowhere.invalid", 0, "no address")]
)
def test_addresses_that_cannot_be_had(host, port, message):
    with pytest.raises(UserError, match=message), listening.bound(host, port):
        pass
