"""Eleven ways to aggregate adapters, at the clinics' own data and at a strong label skew, on the real model.

    python -m experiments.sweep --config=configs/sweeps/aggregation_small.py
    python -m experiments.sweep --config=configs/sweeps/aggregation_small.py --seeds 0

66 runs of less than a minute each on two cores. Small enough to be run while waiting, and too small to rank algorithms
that differ by a few hundredths: six rounds of eight clients, 24 examples a client in all, adapters of rank 4 in the
upper third of the layers, no learning rate tuned for any algorithm. What shows already is what averaging the factors
loses, what travels, and how far that gets.
"""

from fedjax_llm.aggregation.diloco import DiLoCo
from fedjax_llm.aggregation.fedadam import FedAdam
from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.aggregation.fedex import FedExLora
from fedjax_llm.aggregation.fedsa import FedSaLora
from fedjax_llm.aggregation.flexlora import FlexLora
from fedjax_llm.aggregation.flora import FLora
from fedjax_llm.aggregation.hetlora import HetLora
from fedjax_llm.aggregation.lora_fair import LoraFair
from fedjax_llm.aggregation.rolora import RoLora
from fedjax_llm.config import Data, Experiment, Output
from fedjax_llm.data.hpo import HpoFlashcards
from fedjax_llm.data.partition import DirichletByLabel
from fedjax_llm.evaluation.evaluate import Evaluation
from fedjax_llm.experiment.sweep import Sweep
from fedjax_llm.federation.plan import Execution, Federation
from fedjax_llm.lora import Lora
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer

CLINICS = ("blood", "cardiovascular", "digestive", "ear", "endocrine", "eye", "immune", "respiratory")


def get_base() -> Experiment:
    """The experiment that every cell of the grid changes."""
    return Experiment(
        lora=Lora(rank=4, alpha=8, targets=("q_proj", "v_proj"), layers=tuple(range(-10, 0))),
        data=Data(
            source=HpoFlashcards(sites=CLINICS, max_records_per_site=200),
            test_every_site=False,
            max_length=64,
            too_long="drop",
            system="You are a medical dictionary.",
        ),
        training=LocalTraining(batch_size=2, local_steps=2, optimizer=Optimizer("adamw", learning_rate=3e-3)),
        federation=Federation(rounds=6),
        evaluation=Evaluation(
            test_records=4, validation_every=2, validation_records=2, choice_questions=0, generations=0
        ),
        execution=Execution(tokens_per_microbatch=384, buckets=2, evaluation_buckets=1),
        output=Output(keep_last=1, keep_best=0),
    )


def get_sweep() -> Sweep:
    """The grid described above."""
    return Sweep(
        name="aggregation-small",
        base=get_base(),
        algorithms={
            "FedAvg": {"aggregation": FedAvg()},
            "FedAdam": {"aggregation": FedAdam(server_lr=3e-3)},
            "DiLoCo": {"aggregation": DiLoCo()},
            "FFA-LoRA": {"aggregation": FedAvg(), "lora.train": "b"},
            "RoLoRA": {"aggregation": RoLora()},
            "FedSA-LoRA": {"aggregation": FedSaLora()},
            "FLoRA": {"aggregation": FLora()},
            "FlexLoRA": {"aggregation": FlexLora()},
            "FedEx-LoRA": {"aggregation": FedExLora()},
            "LoRA-FAIR": {"aggregation": LoraFair()},
            "HetLoRA": {"aggregation": HetLora(), "lora.ranks": (4, 2)},
        },
        data={
            "natural sites": {},
            "Dirichlet 0.1": {"data.partition": DirichletByLabel(sites=8, alpha=0.1, min_records=40)},
        },
        seeds=(0, 1, 2),
    )
