"""An experiment as mechanisms see it, for tests to vary."""

from fedjax_llm.privacy.mechanism import Regime

REGIME = Regime(
    setting="federated",
    unit="record",
    rounds=5,
    cohort=None,
    weighting="uniform",
    batch_size=16,
    local_steps=1,
    local_epochs=None,
    normalise="example",
    optimizer="sgd",
    learning_rate=1.0,
    constant_rate=True,
    proximal=0.0,
    adapter_dtype="float32",
    server_view="Sum",
)
