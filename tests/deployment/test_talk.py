"""A program that is asked from time to time says the same as one that is let run; and a replay is checked."""

import threading

import pytest

from fedjax_llm.deployment.talk import Talk
from fedjax_llm.errors import UserError


def counting(rounds: int):
    """Exchanges so many times, each time what it heard last, and gives all that it heard."""

    def program(exchange):
        heard, own = [], b"0"
        for number in range(rounds):
            heard.append(tuple(exchange(own)))
            own = f"{number + 1}:{len(heard[-1])}".encode()
        return heard

    return program


LOG = [[b"x", b"0"], [b"y", b"1:2"], [b"z", b"2:2"]]


def test_it_goes_on_step_by_step():
    talk = Talk(counting(3), 1)
    assert [talk.go_on(LOG[:count]) for count in range(4)] == [b"0", b"1:2", b"2:2", None]
    assert talk.result() == [tuple(step) for step in LOG]


def test_one_that_begins_late_hears_all_at_once():
    talk = Talk(counting(3), 1)
    assert talk.go_on(LOG[:2]) == b"2:2"
    assert talk.go_on(LOG[:2]) == b"2:2"  # asked again, it says the same
    assert talk.go_on(LOG) is None


def test_a_log_in_which_it_said_something_else_is_refused():
    talk = Talk(counting(3), 1)
    with pytest.raises(UserError, match="not those with which it joined"):
        talk.go_on([[b"x", b"other"]])


def test_one_that_is_given_up_ends():
    ended = threading.Event()

    def program(exchange):
        try:
            exchange(b"a")
        finally:
            ended.set()

    talk = Talk(program, 0)
    assert talk.go_on([]) == b"a"
    assert not ended.is_set()
    talk.end()
    assert ended.wait(20)
    with pytest.raises(UserError, match="given up"):
        talk.go_on([[b"a"]])


def test_what_the_program_raises_comes_out():
    def program(exchange):
        exchange(b"a")
        raise UserError("no text here")

    talk = Talk(program, 0)
    assert talk.go_on([]) == b"a"
    with pytest.raises(UserError, match="no text here"):
        talk.go_on([[b"a", b"b"]])
