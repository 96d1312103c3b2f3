"""Privacy of rounds over one's own loss: what is clipped, how much noise there is, and what it costs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.config import Experiment, regime_of
from fedjax_llm.errors import UserError
from fedjax_llm.federation import own_loss
from fedjax_llm.federation.own_loss import federate
from fedjax_llm.federation.own_rounds import Report
from fedjax_llm.federation.plan import Federation
from fedjax_llm.federation.sampling import client_id, sample_units, secret_round_key
from fedjax_llm.privacy import guarantee, noise
from fedjax_llm.privacy.correlated import BandedToeplitz
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.privacy.local_dp import LocalDp
from fedjax_llm.privacy.mechanism import AdaptiveClip, Population
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer

CLIP, SIZES = 0.5, (40, 25, 60)
SECRET = noise.run_key("reproducible", 11)
ONE_STEP = LocalTraining(8, 1, optimizer=Optimizer("sgd", 1.0))
UNIFORM = Federation(1, weighting="uniform")


def pull(params: Any, example: jax.Array) -> jax.Array:
    """Its gradient is minus the example, wherever the parameters are."""
    return -jnp.sum(params["w"] * example)


def sites(scale: float = 1.0) -> dict[str, np.ndarray]:
    """Examples of norm about ``2 scale``."""
    rng = np.random.default_rng(1)
    return {f"site {i}": (scale * rng.normal(size=(size, 4))).astype(np.float32) for i, size in enumerate(SIZES)}


def play(clients: dict[str, np.ndarray], mechanism: Any, **settings: Any) -> tuple[list[np.ndarray], list[Report]]:
    """The parameters and the reports of all rounds."""
    unit = "site" if isinstance(mechanism, DpFedAvg | LocalDp) else "record"
    privacy = {"unit": unit, "real_data": False} | settings.pop("privacy", {})
    settings = {"federation": UNIFORM, "training": ONE_STEP} | settings
    width = next(iter(clients.values())).shape[1]
    start = {"w": jnp.zeros(width)}
    found = list(federate(pull, start, clients, privacy=Privacy(mechanism, **privacy), **settings))
    return [np.asarray(params["w"], np.float64) for params, _ in found], [report for _, report in found]


def bounded(example: np.ndarray) -> np.ndarray:
    """Clipped, in float64."""
    return example * min(1.0, CLIP / np.linalg.norm(example.astype(np.float64)))


def test_dp_sgd_equals_loops_over_steps_and_examples(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(own_loss.noise, "run_key", lambda *told: SECRET)
    local = LocalTraining(8, 3, optimizer=Optimizer("sgd", 0.1))
    found, _ = play(
        sites(), DpSgd(CLIP, 0.8), federation=Federation(2), training=local, aggregation=FedAvg(), clients_per_chunk=2
    )
    server = np.zeros(4)
    for number in (1, 2):
        moved = np.zeros(4)
        for name, data in sites().items():
            key = jax.random.fold_in(secret_round_key(SECRET, number, 0, "units"), client_id(name))
            units = [(i,) for i in range(len(data))]
            batches = sample_units(key, units, min(1.0, 8 / len(data)), 3, 1)
            site_key = jax.random.fold_in(secret_round_key(SECRET, number, 0, "site noise"), client_id(name))
            for step, batch in enumerate(batches):
                total = -sum((bounded(data[i]) for (i,) in batch), np.zeros(4))
                template = {"": {"['w']": jnp.zeros(4)}}
                drawn = noise.gaussian(noise.step_key(site_key, step), template, 0.8 * CLIP)
                moved -= 0.1 * (total + np.asarray(drawn[""]["['w']"])) / 8 * len(data) / sum(SIZES)
        server = server + moved
        np.testing.assert_allclose(found[number - 1], server, rtol=1e-4, atol=1e-6)


QUIET = 1e-6  # a noise multiplier that leaves the sum as it is


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e6])
def test_one_example_moves_the_sum_by_at_most_the_clip_norm(scale: float):
    mechanism, whole = DpFedSgd(CLIP, QUIET, sampling_probability=1.0), sites(scale)
    less = whole | {"site 1": whole["site 1"][:-1]}
    one, other = (play(clients, mechanism)[0][0] * sum(map(len, clients.values())) for clients in (whole, less))
    expected = np.linalg.norm(bounded(whole["site 1"][-1]))
    assert np.linalg.norm(one - other) <= CLIP * (1 + 1e-4)
    assert np.linalg.norm(one - other) == pytest.approx(expected, rel=1e-3)


def test_an_example_that_is_not_finite_moves_nothing():
    mechanism, whole = DpFedSgd(CLIP, QUIET, sampling_probability=1.0), sites()
    broken = whole | {"site 1": np.concatenate([whole["site 1"], np.full((1, 4), np.nan, np.float32)])}
    one, other = (play(clients, mechanism)[0][0] * sum(map(len, clients.values())) for clients in (whole, broken))
    np.testing.assert_allclose(one, other, rtol=1e-4)


def test_one_site_moves_the_sum_by_at_most_the_clip_norm():
    whole = sites(50.0)
    found = []
    for clients in (whole, {name: data for name, data in whole.items() if name != "site 2"}):
        (after,), (report,) = play(clients, DpFedAvg(CLIP, QUIET))
        found.append(after * len(clients))
        assert report.clip_norm == CLIP
    assert np.linalg.norm(found[0] - found[1]) == pytest.approx(CLIP, rel=1e-3)


WIDE = {f"site {i}": np.zeros((size, 20_000), np.float32) for i, size in enumerate(SIZES)}
"""Zero gradients: what moves is noise."""
STDDEVS = {
    "sum of records": (DpFedSgd(CLIP, 2.0, sampling_probability=0.5), 2.0 * CLIP / (0.5 * sum(SIZES))),
    "sum of sites": (DpFedAvg(CLIP, 2.0), 2.0 * CLIP / 3),
    "every site": (LocalDp(CLIP, 2.0), 2.0 * CLIP / np.sqrt(3)),
    "every step": (DpSgd(CLIP, 2.0), 2.0 * CLIP / 8 / np.sqrt(3)),
}


@pytest.mark.parametrize(("mechanism", "stddev"), STDDEVS.values(), ids=STDDEVS.keys())
def test_the_noise_is_as_large_as_stated(mechanism: Any, stddev: float):
    (after,), _ = play(WIDE, mechanism)
    assert np.std(after) == pytest.approx(stddev, rel=5 / np.sqrt(2 * 20_000))
    assert abs(np.mean(after)) < 5 * stddev / np.sqrt(20_000)


def test_sites_and_rounds_draw_noise_of_their_own():
    found, _ = play(WIDE, LocalDp(CLIP, 2.0), federation=Federation(3, weighting="uniform"))
    steps = np.diff([np.zeros(20_000), *found], axis=0)
    assert np.abs(np.corrcoef(steps) - np.eye(3)).max() < 5 / np.sqrt(20_000)


ALIKE = {
    "DpSgd": (DpSgd(CLIP), "record", {"local_steps": 3}),
    "DpFedSgd": (DpFedSgd(CLIP), "record", {"local_steps": 1, "optimizer": Optimizer("sgd", 1.0)}),
    "DpFedAvg": (DpFedAvg(CLIP), "site", {"local_steps": 2}),
    "LocalDp": (LocalDp(CLIP), "site", {"local_steps": 2}),
}


@pytest.mark.parametrize(("mechanism", "unit", "local"), ALIKE.values(), ids=ALIKE.keys())
def test_noise_and_epsilon_are_those_of_a_language_model_of_the_same_sampling(mechanism: Any, unit: str, local: dict):
    training = LocalTraining(batch_size=8, **local)
    federation = Federation(4, weighting="uniform")
    privacy = Privacy(mechanism, unit, target_epsilon=3.0, delta=1e-4, real_data=False)
    experiment = Experiment(training=training, federation=federation, privacy=privacy)
    units = SIZES if unit == "record" else (1, 1, 1)
    population = Population(tuple(sites()), units, (4, 4, 4), (1, 1, 1))
    expected = guarantee.build(privacy, regime_of(experiment), population)
    assert expected is not None
    *_, (_, report) = federate(
        pull, {"w": jnp.zeros(4)}, sites(), federation=federation, training=training, privacy=privacy
    )
    found = report.mechanism
    assert found is not None
    assert found.events == expected.events
    np.testing.assert_array_equal(found.stddev, expected.stddev)
    charged = {name: (event,) * 4 for name, event in expected.events.items()}
    assert report.epsilons() == pytest.approx(guarantee.spent(expected, charged, 1e-4))
    assert 2.5 < max(report.epsilons().values()) <= 3.0
    assert "at delta 0.0001" in report.guarantee()


def test_a_budget_ends_the_rounds():
    federation = Federation(50, weighting="uniform")
    _, reports = play(sites(), LocalDp(CLIP, 8.0), federation=federation, privacy={"budget_epsilon": 2.0})
    assert 1 <= len(reports) < 50
    assert max(reports[-1].epsilons().values()) <= 2.0
    _, one_more = play(sites(), LocalDp(CLIP, 8.0), federation=Federation(len(reports) + 1, weighting="uniform"))
    assert max(one_more[-1].epsilons().values()) > 2.0


def test_a_clip_norm_follows_its_quantile():
    clients = {f"site {i}": np.full((4, 4), 0.5, np.float32) for i in range(100)}  # each moves by 1
    mechanism = DpFedAvg(0.1, 1.0, adaptive=AdaptiveClip(learning_rate=0.5))
    _, reports = play(clients, mechanism, federation=Federation(20, weighting="uniform"))
    norms = [report.clip_norm for report in reports]
    assert norms[0] == pytest.approx(0.1)
    assert 0.7 < np.mean(norms[-5:]) < 1.4


def test_other_data_or_another_loss_draw_other_noise():
    start = play(WIDE, LocalDp(CLIP, 2.0))[0][0]
    np.testing.assert_array_equal(start, play(WIDE, LocalDp(CLIP, 2.0))[0][0])
    changed = {name: data + 1e-12 for name, data in WIDE.items()}
    assert abs(np.corrcoef(start, play(changed, LocalDp(CLIP, 2.0))[0][0])[0, 1]) < 5 / np.sqrt(20_000)
    secret = play(WIDE, LocalDp(CLIP, 2.0), privacy={"randomness": "secret"})[0][0]
    assert abs(np.corrcoef(start, secret)[0, 1]) < 5 / np.sqrt(20_000)


def test_groups_that_take_turns_are_refused():
    mechanism = DpSgd(CLIP, 1.0, noise=BandedToeplitz(bands=2, amplified=True))
    with pytest.raises(UserError, match="amplified to False"):
        play(sites(), mechanism, federation=Federation(4), training=LocalTraining(2, 2))
