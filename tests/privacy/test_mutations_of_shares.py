"""Errors that were made elsewhere with noise shared out among sites, made here on purpose.

For each there is the check that finds it, which right code passes. Statistical checks refuse right code with
probability 1e-6; keys are fixed.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import regimes
from mutants import wrong
from scipy import stats

from fedjax_llm.privacy import accounting, ddgauss, shares, skellam
from fedjax_llm.privacy.ddgauss import DDGauss
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.mechanism import Budget, Mechanism, Population, Shares
from fedjax_llm.privacy.skellam import Skellam
from fedjax_llm.secure import encoding

D, ALPHA = 256, 1e-6
REGIME = regimes.REGIME._replace(values=D, secure=True, survivors=4, colluders=2)
POPULATION = Population(tuple("abcdefgh"), (64,) * 8, (1,) * 8, (1,) * 8)
ROTATION = b"rotation" * 4
RIGHT = {"messages": shares.messages_of, "bound": shares.bound}
MECHANISMS = pytest.mark.parametrize(("mechanism", "unit"), [(DpFedSgd, "record"), (DpFedAvg, "site")])
NOISES = pytest.mark.parametrize("noise", [Skellam(16), DDGauss(16)], ids=["skellam", "ddgauss"])


def make(mechanism, unit: str, noise) -> Mechanism:
    return mechanism(1.0, 1.5, distributed=noise).make(REGIME._replace(unit=unit), POPULATION, Budget(None, 1e-5))


def budget_problems(mechanism: Mechanism) -> set[str]:
    """Whether the shares that remain at worst cost more than the events say."""
    how, event = mechanism.shares, mechanism.events["a"]
    assert how is not None
    left = REGIME.survivors - REGIME.colluders
    really = replace(event, summands=left, noise_multiplier=math.sqrt(left) * how.stddev / event.sensitivity)
    more = accounting.epsilon([really], 1e-5) > accounting.epsilon([event], 1e-5) * (1 + 1e-9)
    return {"epsilon"} if more else set()


def encoded(x: np.ndarray, how: Shares, number: int = 0) -> np.ndarray:
    """Integers without noise."""
    quiet = how._replace(draw=lambda key, size: np.zeros(size, np.int64))
    keys = {"noise_key": bytes(32), "rounding_key": number.to_bytes(32, "big"), "rotation_key": ROTATION}
    found = encoding.encode(x, quiet, **keys).astype(np.int64)
    half = 1 << (how.bits - 1)
    return (found + half) % (2 * half) - half


def unrotated(rotated: np.ndarray) -> np.ndarray:
    """What is rotated to this."""
    return np.array([encoding.rotate(one, ROTATION) @ rotated for one in np.eye(rotated.size)])


def filled(value: float, norm: float) -> np.ndarray:
    """The same value in all places but one, which makes up the norm."""
    found = np.full(D, value)
    found[0] = math.sqrt(norm**2 * (1 - 1e-9) - (D - 1) * value**2)
    return found


def length_problems(mechanism: Mechanism) -> set[str]:
    """Whether a unit can change the integers by more than the events say; every message is of the clip norm at most."""
    how, bound = mechanism.shares, mechanism.events["a"].sensitivity
    assert how is not None
    even = math.floor(how.scale / math.sqrt(D)) - 1.0
    if how.conditional:
        message = unrotated(filled(even + 0.5, how.scale) / how.scale)  # random rounding moves halves most
        moved = [encoded(message, how, number) for number in range(50)]
    else:
        below = unrotated(np.full(D, 0.5 - 1e-6) / how.scale)
        gradient = unrotated(filled(even + 2e-6, how.scale) / how.scale)  # just crosses every middle
        moved = [encoded(below + gradient, how) - encoded(below, how)]
    return {"length"} if max(float(np.linalg.norm(one)) for one in moved) > bound else set()


def draw_problems(kind: str, draw: Callable[[bytes, int], np.ndarray], stddev: float) -> set[str]:
    """Whether shares are not distributed as accounted for, or are not functions of secret keys alone."""
    keys = [number.to_bytes(32, "big") for number in range(3)]
    first, other = draw(keys[0], 200_000), draw(keys[1], 200_000)
    found = set()
    if np.corrcoef(first, other)[0, 1] > stats.norm.isf(ALPHA) / math.sqrt(first.size):
        found.add("dependence")
    if not np.array_equal(first, draw(keys[0], 200_000)):
        found.add("key")
    values = np.arange(-3, 4)
    if kind == "skellam":
        mass = stats.skellam.pmf(values, stddev**2 / 2, stddev**2 / 2)
    else:
        wide = np.arange(-50, 51)
        mass = np.exp(-(values**2) / (2 * stddev**2)) / np.exp(-(wide**2) / (2 * stddev**2)).sum()
    expected = np.append(mass, 1 - mass.sum()) * first.size
    counts = np.array([np.count_nonzero(first == value) for value in values])
    counts = np.append(counts, first.size - counts.sum())
    if stats.chisquare(counts, expected).pvalue < ALPHA:
        found.add("distribution")
    return found


@NOISES
@MECHANISMS
def test_right_shares_pass(mechanism, unit: str, noise):
    found = make(mechanism, unit, noise)
    assert budget_problems(found) == set()
    assert length_problems(found) == set()
    assert draw_problems(noise.kind, noise.draw(0.9), 0.9) == set()


def for_all_who_were_invited(regime, *args, **kind):
    """As if nobody dropped out, and nobody told."""
    return RIGHT["messages"](regime._replace(survivors=8, colluders=0), *args, **kind)


def for_all_who_stay(regime, *args, **kind):
    """As if no colluder knew its own share."""
    return RIGHT["messages"](regime._replace(colluders=0), *args, **kind)


@NOISES
@MECHANISMS
@pytest.mark.parametrize("mutant", [for_all_who_were_invited, for_all_who_stay])
def test_noise_that_counts_on_shares_which_may_be_missing_is_found(mutant: Callable, mechanism, unit: str, noise):
    with wrong(shares, "messages_of", mutant):
        assert budget_problems(make(mechanism, unit, noise)) == {"epsilon"}


def without_rounding(messages, scale, beta):
    return messages.clip_norm * scale * (1 + messages.slack)


@NOISES
def test_a_bound_that_forgets_the_rounding_is_found(noise):
    """Where whole messages are rounded again until they are within it, no bound is too small, only slow to meet."""
    with wrong(shares, "bound", without_rounding):
        found = make(DpFedSgd, "record", noise)
    assert length_problems(found) == {"length"}


def rounded_once(rotated, how, key):
    draws = np.random.default_rng(list(key)).random(rotated.size)
    return np.floor(rotated + draws).astype(np.int64)


@NOISES
def test_random_rounding_without_the_condition_is_found(noise):
    found = make(DpFedAvg, "site", noise)
    with wrong(encoding, "_conditionally", rounded_once):
        assert length_problems(found) == {"length"}


def rounded_normals(stddev, key, size):
    return np.rint(np.random.default_rng(list(key)).normal(0, stddev, size)).astype(np.int64)


@pytest.mark.parametrize(("module", "noise"), [(skellam, Skellam()), (ddgauss, DDGauss())])
def test_normals_that_are_rounded_are_found(module, noise):
    def mutant(parameter, key, size):
        return rounded_normals(0.9, key, size)

    with wrong(module, "_draw", mutant):
        assert draw_problems(noise.kind, noise.draw(0.9), 0.9) == {"distribution"}


@pytest.mark.parametrize(("module", "noise"), [(skellam, Skellam()), (ddgauss, DDGauss())])
def test_noise_that_is_seeded_with_the_time_is_found(module, noise, monkeypatch: pytest.MonkeyPatch):
    """Two sites that draw at the same time draw the same, whatever their keys."""
    right, clock = module._draw, time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: clock)

    def mutant(parameter, key, size):
        return right(parameter, time.time_ns().to_bytes(32, "big"), size)

    with wrong(module, "_draw", mutant):
        assert draw_problems(noise.kind, noise.draw(0.9), 0.9) == {"dependence"}


@pytest.mark.parametrize(("module", "noise"), [(skellam, Skellam()), (ddgauss, DDGauss())])
def test_noise_with_too_little_spread_is_found(module, noise):
    right = module._draw
    with wrong(module, "_draw", lambda parameter, key, size: right(0.9 * parameter, key, size)):
        assert "distribution" in draw_problems(noise.kind, noise.draw(0.9), 0.9)
