"""Rounds over one's own loss, against plain loops over clients, steps and examples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedjax_llm.aggregation
from fedjax_llm.aggregation.fedadam import FedAdam
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.aggregation.krum import Krum
from fedjax_llm.aggregation.mimelite import MimeLite
from fedjax_llm.aggregation.qfedavg import QFedAvg
from fedjax_llm.aggregation.scaffold import Scaffold
from fedjax_llm.catalogue import makers
from fedjax_llm.errors import UserError
from fedjax_llm.federation.own_loss import federate
from fedjax_llm.federation.plan import Federation
from fedjax_llm.federation.sampling import client_id, round_key, sample_cohort, sample_steps
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer, Schedule
from fedjax_llm.types import Aggregation

OF_ADAPTERS = {"Ditto", "FLora", "FedExLora", "FedPer", "FedSaLora", "FlexLora", "HetLora", "LoraFair", "RoLora"}
PARAMS = {"head": {"w": jnp.array([0.5, -1.0, 0.25]), "b": jnp.array(0.1)}}
RATE = 0.05
SGD = LocalTraining(2, 3, optimizer=Optimizer("sgd", RATE))


def loss(params: Any, example: Any) -> jax.Array:
    """Half the squared error of a linear model."""
    return 0.5 * jnp.square(example["x"] @ params["head"]["w"] + params["head"]["b"] - example["y"])


def sites(sizes: Sequence[int] = (5, 8, 3, 9, 6, 4, 7, 5)) -> dict[str, dict[str, np.ndarray]]:
    """Clients of unequal size whose targets are about weights of their own."""
    rng, found = np.random.default_rng(0), {}
    for number, size in enumerate(sizes):
        x = rng.normal(size=(size, 3)).astype(np.float32)
        found[f"site {number}"] = {"x": x, "y": (x @ rng.normal(size=3) + number).astype(np.float32)}
    return found


def slope(vector: np.ndarray, x: np.ndarray, y: float) -> np.ndarray:
    """Of the loss at (w, b) as one vector, in closed form."""
    return (x @ vector[:3] + vector[3] - y) * np.append(x, 1.0)


def vector(params: Any) -> np.ndarray:
    """(w, b)."""
    return np.append(params["head"]["w"], params["head"]["b"]).astype(np.float64)


def play(**settings: Any) -> list[np.ndarray]:
    """The server's parameters after each round."""
    settings = {"training": SGD} | settings
    clients = settings.pop("clients", None) or sites()
    return [vector(params) for params, _ in federate(loss, settings.pop("params", PARAMS), clients, **settings)]


def plain(clients: dict[str, Any], federation: Federation, training: LocalTraining, seed: int = 0) -> list[np.ndarray]:
    """FedAvg of plain SGD, as loops in float64."""
    server, names, found = vector(PARAMS), list(clients), []
    for number in range(1, federation.rounds + 1):
        total, weights = np.zeros(4), 0.0
        for place in sample_cohort(
            round_key(jax.random.key(seed), number, "cohort"), len(names), federation.cohort
        ).tolist():
            data, own = clients[names[place]], server.copy()
            key = jax.random.fold_in(round_key(jax.random.key(seed), number, "order"), client_id(names[place]))
            size, epochs = len(data["y"]), training.local_epochs
            steps = None if epochs else training.local_steps
            for batch in sample_steps(key, range(size), training.batch_size, steps, epochs):
                mean = np.mean([slope(own, data["x"][i], data["y"][i]) for i in batch], axis=0)
                own = own - RATE * (mean + training.proximal * (own - server))
            weight = size if federation.weighting == "examples" else 1
            total, weights = total + weight * (own - server), weights + weight
        server = server + total / weights
        found.append(server)
    return found


@pytest.mark.parametrize(
    ("federation", "training"),
    [
        (Federation(3), {"local_steps": 3}),
        (Federation(3, weighting="uniform"), {"local_steps": 5}),
        (Federation(4, cohort=3), {"local_steps": 2, "proximal": 0.7}),
        (Federation(2), {"local_epochs": 2}),
    ],
    ids=["examples", "uniform", "cohort and proximal", "epochs"],
)
def test_rounds_equal_loops(federation: Federation, training: dict[str, Any]):
    local = LocalTraining(batch_size=2, optimizer=Optimizer("sgd", RATE), **training)
    found = play(federation=federation, training=local, clients_per_chunk=3)
    np.testing.assert_allclose(found, plain(sites(), federation, local), rtol=2e-5, atol=2e-6)


def test_chunks_change_nothing():
    several, one = (play(federation=Federation(2), clients_per_chunk=size) for size in (3, 100))
    np.testing.assert_allclose(several, one, rtol=1e-6)


def test_a_reported_loss_is_the_mean_over_the_examples_of_the_steps():
    local = LocalTraining(100, 1, local_epochs=1, optimizer=Optimizer("sgd", RATE))
    (_, report), *_ = federate(loss, PARAMS, sites(), federation=Federation(1), training=local)
    for name, data in sites().items():
        errors = data["x"] @ vector(PARAMS)[:3] + vector(PARAMS)[3] - data["y"]
        assert report.losses[name] == pytest.approx(np.mean(errors**2) / 2, rel=1e-5)
    assert report.update_norm > 0
    assert report.epsilons() == {}


def test_the_learning_rate_follows_its_schedules():
    local = LocalTraining(2, 1, optimizer=Optimizer("sgd", RATE), round_schedule=Schedule("linear"))
    first, second = (
        play(federation=Federation(rounds), training=local)[0] - vector(PARAMS) for rounds in (1, 2)
    )  # the first of one round and of two: full rate both times
    np.testing.assert_allclose(first, second, rtol=1e-6)
    last = play(federation=Federation(2), training=local)
    unscheduled = play(federation=Federation(2), training=LocalTraining(2, 1, optimizer=Optimizer("sgd", RATE)))
    np.testing.assert_allclose(last[1] - last[0], (unscheduled[1] - unscheduled[0]) / 2, rtol=1e-5)


@pytest.mark.parametrize("algorithm", makers(fedjax_llm.aggregation), ids=lambda algorithm: algorithm.__name__)
def test_every_algorithm_runs_or_says_why_not(algorithm: type):
    if algorithm.__name__ in OF_ADAPTERS:
        with pytest.raises(UserError, match="language models with adapters"):
            play(aggregation=algorithm())
        return
    found = play(aggregation=algorithm(), federation=Federation(3))
    assert len(found) == 3
    assert np.isfinite(found).all()
    assert np.abs(found[-1] - vector(PARAMS)).max() > 1e-4


@pytest.mark.parametrize(
    "algorithm", [QFedAvg(q=0, learning_rate=RATE), MimeLite(momentum=0.0)], ids=lambda a: type(a).__name__
)
def test_algorithms_that_probe_fall_back_to_fedavg(algorithm: Any):
    np.testing.assert_allclose(play(aggregation=algorithm), play(aggregation=FedAvg()), rtol=1e-5)


def test_memory_and_broadcasts_cure_the_drift_of_clients():
    """FedAvg's fixed point is off the joint optimum where local curvature differs; control variates lead to it."""
    clients = {"flat": {"x": np.eye(3, dtype=np.float32) * 0.5, "y": np.array([1, 0, 2], np.float32)}}
    clients["steep"] = {"x": np.eye(3, dtype=np.float32) * 2, "y": np.array([-1, 2, 0], np.float32)}
    x, y = (np.concatenate([clients[name][key] for name in clients]) for key in ("x", "y"))
    best = np.linalg.lstsq(np.column_stack([x, np.ones(6)]), y, rcond=None)[0]
    settings = {
        "clients": clients,
        "federation": Federation(80, weighting="uniform"),
        "training": LocalTraining(3, 10, optimizer=Optimizer("sgd", 0.1)),
    }
    drifted, corrected = (play(aggregation=one, **settings)[-1] for one in (FedAvg(), Scaffold()))
    assert np.abs(drifted - best).max() > 0.05
    np.testing.assert_allclose(corrected, best, atol=2e-3)


def test_the_optimiser_lasts_where_it_is_to():
    local = {"batch_size": 100, "local_epochs": 1, "optimizer": Optimizer("sgd", RATE, {"momentum": 0.9})}
    one_site = {"one": sites()["site 1"]}
    kept, fresh = (
        play(clients=one_site, federation=Federation(2), training=LocalTraining(keep_optimizer=keep, **local))
        for keep in ("yes", "no")
    )
    np.testing.assert_allclose(kept[0], fresh[0])
    np.testing.assert_allclose(kept[1] - fresh[1], 0.9 * (kept[0] - vector(PARAMS)), rtol=1e-4)


def test_parameters_come_back_as_they_were_given():
    nested = [PARAMS["head"]["w"], (PARAMS["head"]["b"], {"deep": jnp.ones(2)})]

    def own(params: Any, example: Any) -> jax.Array:
        return loss({"head": {"w": params[0], "b": params[1][0]}}, example) + jnp.sum(params[1][1]["deep"]) * 0

    (found, _), *_ = federate(own, nested, sites(), federation=Federation(1), training=SGD)
    assert jax.tree.structure(found) == jax.tree.structure(nested)
    np.testing.assert_allclose(vector({"head": {"w": found[0], "b": found[1][0]}}), play(federation=Federation(1))[0])


def test_a_client_that_breaks_is_left_out():
    broken = sites()
    broken["site 3"]["x"] = np.full_like(broken["site 3"]["x"], np.nan)
    rest = {name: data for name, data in broken.items() if name != "site 3"}
    (_, report), *_ = federate(loss, PARAMS, broken, federation=Federation(1), training=SGD)
    assert report.excluded == ("site 3",)
    np.testing.assert_allclose(
        play(clients=broken, federation=Federation(1)), play(clients=rest, federation=Federation(1)), rtol=1e-5
    )


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no clients": ({"clients": {"one": {"x": np.zeros((0, 3)), "y": np.zeros(0)}}}, "at least one"),
    "lengths": ({"clients": {"one": {"x": np.zeros((2, 3)), "y": np.zeros(3)}}}, "client 'one' holds arrays"),
    "shapes": ({"clients": {"a": sites()["site 0"], "b": {"x": np.zeros((2, 4)), "y": np.zeros(2)}}}, "'a' and 'b'"),
    "integers": ({"params": {"head": {"w": jnp.arange(3), "b": jnp.array(0.0)}}}, "floating-point"),
    "cohort": ({"federation": Federation(cohort=9)}, "only 8 clients"),
    "tokens": ({"training": LocalTraining(normalise="token")}, "training.normalise"),
    "fine-tuning": ({"federation": Federation(finetune_rounds=1)}, "finetune_rounds"),
    "patients": ({"privacy": Privacy(DpSgd(), "patient", 1.0)}, "privacy.unit is 'patient'"),
    "several steps": ({"privacy": Privacy(DpSgd(), target_epsilon=1.0), "aggregation": QFedAvg()}, "neither clips"),
    "too few for Krum": (
        {"clients": sites((3, 3)), "aggregation": Krum(byzantine=1)},
        "a cohort of at least 5 clients",
    ),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_work_is_refused_before_the_first_round(settings: dict[str, Any], message: str):
    settings = dict(settings)
    with pytest.raises(UserError, match=message):
        federate(loss, settings.pop("params", PARAMS), settings.pop("clients", sites()), **settings)


def test_a_loss_over_a_batch_is_refused():
    with pytest.raises(UserError, match="one floating-point number"):
        federate(lambda params, example: example["x"] * params["head"]["w"], PARAMS, sites())


def test_equal_seeds_give_equal_rounds():
    settings = {"federation": Federation(2, cohort=3), "aggregation": FedAdam()}
    np.testing.assert_array_equal(play(seed=3, **settings), play(seed=3, **settings))
    assert np.abs(np.subtract(play(seed=3, **settings), play(seed=4, **settings))).max() > 1e-5


def test_algorithms_and_losses_that_cannot_be_hashed_serve_too():
    @dataclass
    class Loose:
        """Not frozen, so without a hash; as a loss, and as an algorithm."""

        rates: dict[str, float]

        def make(self) -> Aggregation:
            return FedAvg(self.rates["server"]).make()

        def __call__(self, params: Any, example: Any) -> jax.Array:
            return loss(params, example)

    loose = Loose({"server": 0.5})
    (found, _), *_ = federate(loose, PARAMS, sites(), federation=Federation(1), training=SGD, aggregation=loose)
    np.testing.assert_allclose(vector(found) * 2 - vector(PARAMS), play(federation=Federation(1))[0], rtol=1e-5)
