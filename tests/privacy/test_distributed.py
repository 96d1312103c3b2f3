"""Mechanisms whose noise is shared out among the sites: its size, its cost, and what is refused."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import regimes

from fedjax_llm.errors import UserError
from fedjax_llm.privacy import accounting, guarantee, lattice, participation, shares
from fedjax_llm.privacy.correlated import BandedToeplitz
from fedjax_llm.privacy.ddgauss import DDGauss
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.events import Event
from fedjax_llm.privacy.guarantee import Privacy, build
from fedjax_llm.privacy.mechanism import EVERY_SITE, AdaptiveClip, Budget, Mechanism, Population, Shares
from fedjax_llm.privacy.skellam import Skellam

RECORDS = regimes.REGIME._replace(values=1000, secure=True, survivors=5, colluders=0, rounds=6)
SITES = RECORDS._replace(unit="site")
POPULATION = Population(tuple("abcdef"), (64, 64, 64, 64, 64, 32), (6,) * 6, (1,) * 6)
GIVEN = Budget(None, 1e-5)
KINDS = pytest.mark.parametrize("noise", [Skellam(), DDGauss(), Skellam(16), DDGauss(16)], ids=str)
MECHANISMS = pytest.mark.parametrize(("mechanism", "unit"), [(DpFedSgd, "record"), (DpFedAvg, "site")])


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDJAX_LLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def made(mechanism: Mechanism | None) -> tuple[Mechanism, Shares]:
    assert mechanism is not None
    assert mechanism.shares is not None
    return mechanism, mechanism.shares


@KINDS
@MECHANISMS
def test_calibrated_shares_meet_the_target_at_every_site(noise, mechanism, unit: str):
    privacy = Privacy(mechanism(distributed=noise), unit, target_epsilon=6.0, delta=1e-3)
    found, how = made(build(privacy, RECORDS._replace(unit=unit), POPULATION))
    assert (found.noised, how.kind, how.bits) == ("shares", noise.kind, noise.bits)
    assert how.conditional == (unit == "site")
    spent = guarantee.spent(found, {name: [event] * 6 for name, event in found.events.items()}, 1e-3)
    assert set(spent) == set(POPULATION.sites)
    assert 5.9 < max(spent.values()) <= 6.0
    for event in found.events.values():
        assert (event.kind, event.summands, event.values) == (noise.kind, 5, 1024)
        assert event.sensitivity == how.bound
        # z is what five shares make, over what a unit changes.
        assert event.noise_multiplier == pytest.approx(math.sqrt(5) * how.stddev / how.bound, rel=1e-12)
        assert found.stddev[0] == pytest.approx(math.sqrt(5) * how.stddev / (how.scale * how.clip_norm), rel=1e-12)
    assert participation.GENERATOR not in found.assumptions
    assert participation.INTEGERS in found.assumptions
    assert "nobody among the sites" in found.adversary


@MECHANISMS
def test_wide_integers_cost_little_more_noise_than_real_numbers(mechanism, unit: str):
    regime = RECORDS._replace(unit=unit)
    central = build(Privacy(mechanism(), unit, 6.0, delta=1e-3, accountant="rdp"), regime, POPULATION)
    assert central is not None
    found, _ = made(build(Privacy(mechanism(distributed=Skellam()), unit, 6.0, delta=1e-3), regime, POPULATION))
    assert central.stddev[0] < found.stddev[0] < 1.1 * central.stddev[0]
    assert found.weight == central.weight
    np.testing.assert_array_equal(found.denominators, central.denominators)


@KINDS
@MECHANISMS
def test_the_sum_fits_the_modulus_and_is_as_fine_as_that_allows(noise, mechanism, unit: str):
    found, how = made(mechanism(0.3, 1.5, distributed=noise).make(RECORDS._replace(unit=unit), POPULATION, GIVEN))
    assert math.log2(how.scale).is_integer()
    assert how.clip_norm == 0.3

    def fits(scale: float) -> bool:
        bound = how.bound + (scale - how.scale) * how.clip_norm  # less than it grows by
        share = 1.5 * bound / math.sqrt(5)
        spread = (scale * 0.3 * found.weight) ** 2 / 1024 + 6 * (0.25 + share**2)
        return 6 * math.sqrt(spread) <= 2 ** (noise.bits - 1) and share <= 2**20

    assert fits(how.scale)
    assert not fits(2 * how.scale)
    assert how.draw(bytes(32), 1000).std() == pytest.approx(how.stddev, rel=0.2)


def test_what_a_unit_changes_in_the_integers():
    _, record = made(DpFedSgd(2.0, 1.0, distributed=Skellam(16)).make(RECORDS, POPULATION, GIVEN))
    assert record.bound == pytest.approx(2.0 * record.scale * 1.001 + math.sqrt(1024))
    _, site = made(DpFedAvg(2.0, 1.0, distributed=Skellam(16)).make(SITES, POPULATION, GIVEN))
    length = 2.0 * site.scale
    assert site.bound == pytest.approx(math.sqrt(length**2 + 256 + length + 16))  # beta = exp(-1/2)
    assert shares.bound(shares.Messages(4, 1.0, 1, 1, 1, True), 1.0, 1e-300) == 3.0  # c s + sqrt(d), the worst case


def test_float32_takes_more_room_the_more_units_there_are():
    assert shares.slack(16) == 1e-3
    assert shares.slack(1000) == pytest.approx((1009 + 9 * math.sqrt(1000)) ** 2 / 2**24)
    many = POPULATION._replace(units=(4000,) * 6)
    _, large = made(DpFedSgd(1.0, 1.0, distributed=Skellam()).make(RECORDS._replace(batch_size=1000), many, GIVEN))
    assert large.bound > large.scale * 1.09


@pytest.mark.parametrize(("survivors", "colluders", "needed"), [(6, 0, 6), (6, 5, 1), (4, 1, 3), (2, 1, 1)])
@MECHANISMS
def test_those_who_are_sure_to_stay_and_be_silent_make_all_the_noise(mechanism, unit, survivors, colluders, needed):
    regime = RECORDS._replace(unit=unit, survivors=survivors, colluders=colluders)
    found, how = made(mechanism(1.0, 2.0, distributed=DDGauss()).make(regime, POPULATION, GIVEN))
    assert math.sqrt(needed) * how.stddev == pytest.approx(2.0 * how.bound)
    assert {event.summands for event in found.events.values()} == {needed}
    if colluders:
        assert f"up to {colluders} site" in found.adversary
    # More shares than that cost nothing: their sum is that sum with independent noise on top.
    event = found.events["a"]
    all_there = replace(event, summands=6, noise_multiplier=math.sqrt(6) * how.stddev / how.bound)
    assert (lattice.renyi(all_there) <= lattice.renyi(event) * (1 + 1e-12)).all()


def test_no_share_that_is_sure_to_be_there_is_refused():
    alone = RECORDS._replace(survivors=3, colluders=3)
    with pytest.raises(UserError, match=r"secure.colluders lower"):
        DpFedSgd(distributed=Skellam()).check(alone)
    with pytest.raises(UserError, match="holds no noise"):
        DpFedSgd(1.0, 1.0, distributed=Skellam()).make(alone, POPULATION, GIVEN)
    with pytest.raises(UserError, match="load the model"):
        DpFedSgd(1.0, 1.0, distributed=Skellam()).make(RECORDS._replace(values=0), POPULATION, GIVEN)
    DpFedSgd(distributed=Skellam()).check(RECORDS._replace(survivors=0))  # not known yet


@MECHANISMS
def test_shares_that_are_seen_one_by_one_are_refused(mechanism, unit: str):
    with pytest.raises(UserError, match=r"secure=SecAgg"):
        mechanism(distributed=DDGauss()).check(RECORDS._replace(unit=unit, secure=False))
    mechanism(distributed=DDGauss()).check(RECORDS._replace(unit=unit))
    with pytest.raises(UserError, match="correlated"):
        mechanism(distributed=DDGauss(), noise=BandedToeplitz(4)).check(RECORDS._replace(unit=unit))
    with pytest.raises(UserError, match=r"Skellam\(\), DDGauss\(\) or None"):
        mechanism(distributed=True).check(RECORDS._replace(unit=unit))


def test_a_clip_norm_that_is_found_with_noise_of_its_own_is_refused():
    with pytest.raises(UserError, match="adaptive"):
        DpFedAvg(distributed=Skellam(), adaptive=AdaptiveClip()).check(SITES)


@pytest.mark.parametrize("kind", [Skellam, DDGauss])
@pytest.mark.parametrize("wrong", [{"bits": 24}, {"tail": 0.5}, {"tail": math.inf}, {"beta": 0.0}, {"beta": 1.0}])
def test_impossible_parameters_are_refused(kind, wrong: dict):
    with pytest.raises(UserError, match=f"{kind.__name__}.{next(iter(wrong))}"):
        kind(**wrong)


def test_integers_that_are_too_narrow_are_refused_with_the_way_out():
    wide = RECORDS._replace(values=2**24)
    with pytest.raises(UserError, match="Set bits to 32"):
        DpFedSgd(1.0, 50.0, distributed=Skellam(16)).make(wide, POPULATION, GIVEN)


def test_layers_that_are_clipped_each_stay_within_the_bound_of_all():
    flat, layers = (DpFedSgd(1.0, 1.0, scope, distributed=Skellam()) for scope in ("flat", "layers"))
    assert layers.make(RECORDS, POPULATION, GIVEN).events == flat.make(RECORDS, POPULATION, GIVEN).events


def test_the_server_knows_the_cohort_so_that_drawing_it_does_not_count():
    turns = POPULATION._replace(participations=(3, 3, 3, 3, 2, 4))
    mechanism = DpFedAvg(distributed=Skellam(), cohort_is_secret=True)
    privacy = Privacy(mechanism, "site", 6.0, delta=1e-3)
    assert not privacy.draws_cohorts
    found, how = made(build(privacy, SITES._replace(cohort=3, survivors=3), turns))
    assert EVERY_SITE not in found.events
    assert found.cohort_probability is None
    assert {event.sampling_probability for event in found.events.values()} == {1.0}
    assert (found.weight, found.events["a"].summands) == (3.0, 3)
    # The site that takes part most often decides.
    assert 5.9 < accounting.epsilon([found.events["f"]] * 4, 1e-3) <= 6.0
    assert how.stddev > 0


def test_a_secret_cohort_is_refused_where_the_protocol_tells_everybody_who_takes_part():
    few = SITES._replace(cohort=4)
    with pytest.raises(UserError, match=r"federation\.cohort is 4 of .* no cohort is secret.*distributed=Skellam"):
        DpFedAvg(1.0, 1.0).make(few, POPULATION, GIVEN)
    DpFedAvg(1.0, 1.0).make(few._replace(secure=False), POPULATION, GIVEN)
    DpFedAvg(1.0, 1.0).make(few._replace(cohort=None), POPULATION, GIVEN)


def test_an_owner_at_two_sites_is_accounted_for_by_taking_skellam_noise_apart():
    population = POPULATION._replace(shared=(("a", "b"),))
    regime = RECORDS._replace(unit="patient")
    found, how = made(build(Privacy(DpFedSgd(distributed=Skellam()), "patient", 6.0, delta=1e-3), regime, population))
    spent = guarantee.spent(found, {n: [e] * 6 for n, e in found.events.items()}, 1e-3, shared=population.shared)
    assert max(spent.values()) <= 6.0
    assert max(spent, key=spent.__getitem__) == "a / b"
    z = math.sqrt(5) * how.stddev / how.bound
    assert found.events["a"].noise_multiplier == pytest.approx(z / math.sqrt(2))
    assert found.events["c"].noise_multiplier == pytest.approx(z)
    # Unsampled, two sites together move the sum by twice the bound: that costs no more than what is charged.
    whole = [replace(found.events[name], sampling_probability=1.0) for name in "ab"]
    one = Event("skellam", z / 2, summands=5, sensitivity=2 * how.bound, values=1024)
    assert accounting.epsilon([one], 1e-3) <= accounting.epsilon(whole, 1e-3) * (1 + 1e-6)
    with pytest.raises(UserError, match=r"Set DpFedSgd.distributed to Skellam"):
        DpFedSgd(1.0, 1.0, distributed=DDGauss()).make(regime, population, GIVEN)


def test_weights_of_sites_are_at_most_one_before_rounding():
    regime = SITES._replace(weighting="examples")
    mechanism = DpFedAvg(1.0, 1.0, examples_cap=10, distributed=Skellam())
    mechanism.check(regime)
    weights = mechanism.make(regime, POPULATION, GIVEN).site_weights
    assert weights is not None
    assert [weights(examples) for examples in (0, 5, 10, 1000)] == [0.0, 0.5, 1.0, 1.0]


@MECHANISMS
def test_a_server_that_adds_the_noise_to_a_secure_sum_sees_it_before(mechanism, unit: str):
    privacy = mechanism(1.0, 1.0)
    open_sum = privacy.make(RECORDS._replace(unit=unit, secure=False), POPULATION, GIVEN)
    secure = privacy.make(RECORDS._replace(unit=unit), POPULATION, GIVEN)
    assert secure.noised == "sum"
    assert secure.shares is None
    assert secure.events == open_sum.events
    assert any("sees the sum before that" in one for one in secure.assumptions)
    assert not any("sees the sum before that" in one for one in open_sum.assumptions)


def test_events_are_read_from_ledgers_with_and_without_their_new_fields():
    event = DpFedSgd(1.0, 1.0, distributed=Skellam()).make(RECORDS, POPULATION, GIVEN).events["a"]
    assert Event(**asdict(event)) == event
    old = {"kind": "gaussian", "noise_multiplier": 1.5, "sampling_probability": 0.1, "count": 2, "bands": 1}
    assert Event(**old) == Event("gaussian", 1.5, 0.1, 2)  # type: ignore[arg-type]
