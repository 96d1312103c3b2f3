"""Every refusal of a mechanism: that it comes, with its reason and its way out, and that what is allowed passes."""

from collections.abc import Callable

import pytest
import regimes

from fedjax_llm.errors import UserError
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.guarantee import Privacy, build
from fedjax_llm.privacy.local_dp import LocalDp
from fedjax_llm.privacy.mechanism import AdaptiveClip, Budget, Population, Regime

RECORDS = regimes.REGIME._replace(rounds=4, batch_size=8)
SITES = RECORDS._replace(unit="site", optimizer="adamw", learning_rate=1e-3, local_epochs=1)
POPULATION = Population(tuple("abcdefgh"), (100,) * 8, (4,) * 8, (1,) * 8)
GIVEN = Budget(None, 1e-5)
GRADIENT, SITE = (DpSgd, DpFedSgd), (DpFedAvg, LocalDp)


def allowed(mechanism: Callable) -> Regime:
    return RECORDS if mechanism in GRADIENT else SITES


def refused(mechanism: object, regime: Regime, *parts: str) -> None:
    """The check fails, and its message holds all parts."""
    with pytest.raises(UserError) as caught:
        mechanism.check(regime)  # type: ignore[attr-defined]
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("mechanism", [*GRADIENT, *SITE])
def test_what_is_allowed_passes(mechanism: Callable):
    mechanism(noise_multiplier=1.0).check(allowed(mechanism))


@pytest.mark.parametrize("unit", ["record", "patient"])
@pytest.mark.parametrize("setting", ["federated", "local", "centralised"])
def test_dp_sgd_serves_every_setting_that_trains_and_whatever_follows_a_step(unit: str, setting: str):
    free = RECORDS._replace(optimizer="adamw", learning_rate=0.1, constant_rate=False, proximal=0.1, local_steps=9)
    DpSgd().check(free._replace(unit=unit, setting=setting, weighting="examples", server_view="Stack"))


def test_local_dp_serves_any_aggregator_and_weighting():
    LocalDp().check(SITES._replace(server_view="Stack", weighting="examples", normalise="token", proximal=1.0))


@pytest.mark.parametrize("mechanism", [*GRADIENT, *SITE])
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"adapter_dtype": "bfloat16"}, ("bfloat16", "float32")),
        ({"setting": "base"}, ("'base'", "nothing is trained", "privacy.mechanism to None")),
    ],
)
def test_no_mechanism_protects(mechanism: Callable, change: dict, parts: tuple):
    refused(mechanism(), allowed(mechanism)._replace(**change), *parts)


@pytest.mark.parametrize(
    ("mechanism", "setting"),
    [(DpFedSgd, "local"), (DpFedAvg, "local"), (DpFedAvg, "centralised"), (LocalDp, "local"), (LocalDp, "centralised")],
)
def test_settings_in_which_a_mechanism_makes_no_sense(mechanism: Callable, setting: str):
    refused(mechanism(), allowed(mechanism)._replace(setting=setting), repr(setting), "federated", "DpSgd")


@pytest.mark.parametrize("mechanism", GRADIENT)
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"unit": "site"}, ("'record' or 'patient'", "DpFedAvg")),
        ({"local_epochs": 2}, ("local_epochs is 2", "Poisson", "training.local_steps")),
        ({"normalise": "token"}, ("'token'", "one unit changes the share of all others", "'example'")),
    ],
)
def test_clipped_gradients_cannot_protect(mechanism: Callable, change: dict, parts: tuple):
    refused(mechanism(), RECORDS._replace(**change), *parts)


@pytest.mark.parametrize("mechanism", SITE)
@pytest.mark.parametrize("unit", ["record", "patient"])
def test_noise_on_the_outcome_of_several_steps_protects_no_smaller_unit(mechanism: Callable, unit: str):
    refused(mechanism(), SITES._replace(unit=unit), f"One {unit} changes every gradient after", "'site'", "DpSgd")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"local_steps": 3}, ("local_steps is 3", "without noise", "DpSgd")),
        ({"optimizer": "adamw"}, ("'adamw'", "plain sum", "sgd with learning rate 1.0")),
        ({"learning_rate": 0.5}, ("learning rate 0.5", "sgd with learning rate 1.0")),
        ({"constant_rate": False}, ("changes by a schedule", "constant")),
        ({"proximal": 0.1}, ("proximal is 0.1", "proximal to 0")),
        ({"weighting": "examples"}, ("'examples'", "noise on the sum would be too small", "'uniform'")),
        ({"server_view": "Stack"}, ("every site's update before that", "FedAvg", "DpSgd")),
    ],
)
def test_dp_fedsgd_cannot_protect(change: dict, parts: tuple):
    refused(DpFedSgd(), RECORDS._replace(**change), *parts)


@pytest.mark.parametrize(
    ("mechanism", "change", "parts"),
    [
        (DpFedAvg(), {"weighting": "examples"}, ("'examples'", "'uniform'", "examples_cap")),
        (DpFedAvg(examples_cap=50), {}, ("examples_cap is 50", "'uniform'")),
        (DpFedAvg(), {"server_view": "Stack"}, ("every site's update before that", "LocalDp")),
    ],
)
def test_dp_fedavg_cannot_protect(mechanism: DpFedAvg, change: dict, parts: tuple):
    refused(mechanism, SITES._replace(**change), *parts)


def test_sampling_does_not_count_against_those_who_see_the_cohort():
    seen = DpFedAvg(noise_multiplier=1.0, cohort_is_secret=False)
    with pytest.raises(UserError, match=r"4 of 8 sites.*do not see the cohort.*cohort=None.*LocalDp"):
        seen.make(SITES._replace(cohort=4), POPULATION, GIVEN)
    assert seen.make(SITES, POPULATION, GIVEN).cohort_probability == 1.0


@pytest.mark.parametrize(
    ("count_noise", "noise_multiplier", "parts"),
    [
        (None, 0.8, ("count_noise 0.4 among 8 sites", "below 0.8. Ways out: let more sites", "adaptive=None")),
        (0.4, 0.8, ("count_noise 0.4 among 8 sites", "below 0.8. Ways out: let more sites", "adaptive=None")),
        (0.2, 0.5, ("below 0.4. Ways out: leave count_noise out (0.4, which allows multipliers below 0.8), let",)),
        (
            5.0,
            0.5,
            ("deviation 5 among 8 sites", "a twentieth of the cohort, 0.4", "below 0.8", "Leave count_noise out"),
        ),
    ],
)
def test_adaptive_clipping_needs_a_large_cohort(count_noise: float | None, noise_multiplier: float, parts: tuple):
    mechanism = DpFedAvg(noise_multiplier=noise_multiplier, adaptive=AdaptiveClip(count_noise=count_noise))
    with pytest.raises(UserError) as caught:
        mechanism.make(SITES, POPULATION, GIVEN)
    for part in parts:
        assert part in str(caught.value)


def test_calibrated_noise_too_is_refused_where_the_cohort_is_too_small_for_it():
    adaptive = DpFedAvg(adaptive=AdaptiveClip())
    with pytest.raises(UserError, match=r"the noise multiplier is \d.*below 0\.8"):
        adaptive.make(SITES, POPULATION, Budget(1.0, 1e-3, "rdp"))


@pytest.mark.parametrize("mechanism", [*GRADIENT, *SITE])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier is 0.0; it must be positive and finite.*mechanism to None"),
        ({"noise_multiplier": -1.0}, "noise_multiplier is -1.0"),
        ({"noise_multiplier": float("inf")}, "noise_multiplier is inf"),
        ({"noise_multiplier": float("nan")}, "noise_multiplier is nan"),
        ({"clip_norm": 0.0}, "clip norm is 0.0"),
        ({"scope": "layer"}, "scope is 'layer'; did you mean 'layers'"),
    ],
)
def test_impossible_noise_and_clipping(mechanism: Callable, values: dict, message: str):
    with pytest.raises(UserError, match=message):
        mechanism(**values)


@pytest.mark.parametrize("mechanism", GRADIENT)
@pytest.mark.parametrize(
    "values",
    [{"sampling_probability": 0.0}, {"sampling_probability": 1.1}, {"examples_per_unit": 0}],
)
def test_impossible_sampling(mechanism: Callable, values: dict):
    ((name, value),) = values.items()
    with pytest.raises(UserError, match=f"{mechanism.__name__}.{name} is {value}"):
        mechanism(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"examples_cap": 0}, "examples_cap is 0"),
        ({"adaptive": AdaptiveClip(quantile=1.0)}, "quantile is 1.0"),
        ({"adaptive": AdaptiveClip(count_noise=0.0)}, "count_noise is 0.0"),
        ({"adaptive": AdaptiveClip(learning_rate=-1.0)}, "learning_rate is -1.0"),
        ({"adaptive": AdaptiveClip(), "noise": object()}, "adaptive clipping and correlated noise"),
    ],
)
def test_impossible_dp_fedavg(values: dict, message: str):
    with pytest.raises(UserError, match=message):
        DpFedAvg(**values)


@pytest.mark.parametrize("mechanism", [*GRADIENT, *SITE])
def test_noise_that_nothing_decides_or_two_things_do(mechanism: Callable):
    regime = allowed(mechanism)
    for given, target, message in [
        (None, None, "set privacy.target_epsilon"),
        (1.0, 8.0, "target_epsilon is 8.0 and .*noise_multiplier is 1.0.*budget_epsilon"),
    ]:
        with pytest.raises(UserError, match=message):
            Privacy(mechanism(noise_multiplier=given), regime.unit, target).check(regime)
        with pytest.raises(UserError, match=message):
            mechanism(noise_multiplier=given).make(regime, POPULATION, Budget(target, 1e-5))


@pytest.mark.parametrize("mechanism", GRADIENT)
def test_a_site_without_units(mechanism: Callable):
    empty = POPULATION._replace(units=(100,) * 7 + (0,))
    with pytest.raises(UserError, match="site 'h' trains on no record"):
        mechanism(noise_multiplier=1.0).make(RECORDS, empty, GIVEN)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"unit": "patients"}, "privacy.unit is 'patients'; did you mean 'patient'"),
        ({"accountant": "prv"}, "privacy.accountant is 'prv'"),
        ({"randomness": "os"}, "privacy.randomness is 'os'; known: reproducible, secret"),
        ({"target_epsilon": 0.0}, "privacy.target_epsilon is 0.0"),
        ({"budget_epsilon": float("inf")}, "privacy.budget_epsilon is inf"),
        ({"delta": 0.0}, "privacy.delta is 0.0"),
        ({"delta": 1.0}, "privacy.delta is 1.0"),
    ],
)
def test_impossible_privacy(values: dict, message: str):
    with pytest.raises(UserError, match=message):
        Privacy(**values)


@pytest.mark.parametrize("name", ["target_epsilon", "budget_epsilon"])
def test_a_claim_without_a_mechanism(name: str):
    with pytest.raises(UserError, match=f"privacy.{name} is 8.0, but privacy.mechanism is None"):
        Privacy(**{name: 8.0}).check(RECORDS)


@pytest.mark.parametrize(("mechanism", "regime"), [(DpSgd(noise_multiplier=1.0), RECORDS), (LocalDp(1.0, 1.0), SITES)])
def test_a_delta_that_one_unit_may_vanish_in_is_refused(mechanism: object, regime: Regime):
    loose = Privacy(mechanism, regime.unit, delta=0.2)
    with pytest.raises(UserError, match="delta"):
        build(loose, regime, POPULATION)


def test_delta_is_checked_at_the_smallest_and_the_largest_site():
    for units in [(100_000, 100), (100, 100_000)]:
        population = Population(("a", "b"), units, (1, 1), (1, 1))
        with pytest.raises(UserError, match="delta"):
            build(Privacy(DpSgd(noise_multiplier=1.0), delta=5e-4), RECORDS, population)


def test_the_mechanism_refuses_through_privacy():
    with pytest.raises(UserError, match="local_epochs"):
        Privacy(DpSgd(noise_multiplier=1.0)).check(RECORDS._replace(local_epochs=1))
    assert build(Privacy(), RECORDS, POPULATION) is None
