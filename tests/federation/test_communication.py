"""Bytes on the wire, by the course's formula: 2 x rounds x clients x parameters x bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedjax_llm.federation.communication import Exchange, exchange_of, seconds, totals

counts = st.integers(1, 10**9)


@given(counts, counts, st.integers(1, 100), st.integers(1, 50), st.floats(0.1, 1e4))
def test_the_courses_formula(adapter, model, rounds, clients, bandwidth):
    exchange = exchange_of("federated", 4 * adapter, 4 * model)
    found = totals(exchange, rounds, rounds * clients, bandwidth)
    assert found["upload_bytes"] + found["download_bytes"] == 2 * rounds * clients * adapter * 4
    assert found["full_model_bytes"] == 2 * rounds * clients * model * 4
    assert found["communication_ratio"] == pytest.approx(model / adapter)
    # Clients send side by side, so their number does not lengthen a round.
    assert found["communication_seconds"] == pytest.approx(2 * rounds * adapter * 32 / (bandwidth * 1e6))
    assert found["full_model_seconds"] == pytest.approx(2 * rounds * model * 32 / (bandwidth * 1e6))


@pytest.mark.parametrize("setting", ["centralised", "local", "base"])
def test_other_settings_exchange_nothing(setting):
    exchange = exchange_of(setting, 100, 1000)
    assert exchange == Exchange(0, 0, 0)
    found = totals(exchange, 3, 6, 20.0)
    assert (found["upload_bytes"], found["download_bytes"], found["communication_seconds"]) == (0, 0, 0)
    assert (found["full_model_bytes"], found["communication_ratio"]) == (0, None)


def test_a_megabyte_at_eight_megabits_takes_a_second():
    assert seconds(1e6, 8.0) == 1.0
