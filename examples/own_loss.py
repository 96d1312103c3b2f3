"""Federates a small Flax model over clients of synthetic data, with differential privacy for every example."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedjax_llm.aggregation.fedadam import FedAdam
from fedjax_llm.federation.own_loss import federate
from fedjax_llm.federation.plan import Federation
from fedjax_llm.privacy.dp_sgd import DpSgd
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer

rng = np.random.default_rng(0)
centres, clients = 1.5 * rng.normal(size=(4, 8)), {}
for number in range(10):  # every client sees two of the four classes
    y = rng.choice([number % 4, (number + 1) % 4], 200)
    clients[f"client {number}"] = {"x": (centres[y] + rng.normal(size=(200, 8))).astype(np.float32), "y": y}
x, y = (np.concatenate([data[name] for data in clients.values()]) for name in ("x", "y"))
model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(4)])


def loss(params, example):
    """Of one example."""
    return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, example["x"]), example["y"])


params = model.init(jax.random.key(0), jnp.zeros(8))
training = LocalTraining(batch_size=50, local_steps=4, optimizer=Optimizer("sgd", 0.5))
privacy = Privacy(DpSgd(clip_norm=1.0), target_epsilon=4.0, real_data=False)
rounds = federate(
    loss, params, clients, federation=Federation(20, 5), training=training, aggregation=FedAdam(0.05), privacy=privacy
)
for params, report in rounds:
    print(f"round {report.number}: loss {report.loss:.3f}, {np.mean(model.apply(params, x).argmax(1) == y):.1%} right")
print(report.guarantee())
