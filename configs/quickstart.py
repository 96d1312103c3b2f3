"""A real language model learns medical flashcards at eight organ-system clinics, with differential privacy.

    python -m experiments.run --config=configs/quickstart.py
    python -m experiments.privacy --config=configs/quickstart.py       # what it will guarantee
    python -m experiments.privacy runs/quickstart-federated            # what it has spent, from its ledger

One flashcard record more or less (epsilon 8, delta 1e-5) is hidden from everyone who sees the noised sums: the other
clinics, and whoever gets the adapters. In each of 16 rounds every clinic draws each of its records with probability
0.016, sends the sum of their clipped gradients, and noise is added once to the sum over the clinics.
"""

from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.config import Data, Experiment
from fedjax_llm.data.hpo import HpoFlashcards
from fedjax_llm.evaluation.evaluate import Evaluation
from fedjax_llm.federation.plan import Execution, Federation
from fedjax_llm.lora import Lora
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer

CLINICS = ("blood", "cardiovascular", "digestive", "ear", "endocrine", "eye", "immune", "respiratory")


def get_config() -> Experiment:
    return Experiment(
        lora=Lora(rank=4, alpha=8, targets=("v_proj",), layers=tuple(range(-8, 0)), train="b"),
        data=Data(source=HpoFlashcards(sites=CLINICS), max_length=112, system="You are a medical dictionary."),
        # Clinics send sums of clipped gradients; the server's aggregator takes the step.
        training=LocalTraining(batch_size=5, local_steps=1, optimizer=Optimizer("sgd", learning_rate=1.0)),
        federation=Federation(rounds=16, weighting="uniform"),
        aggregation=FedAvg(server_lr=100.0),
        privacy=Privacy(
            mechanism=DpFedSgd(clip_norm=0.15, sampling_probability=0.016),
            unit="record",
            target_epsilon=8.0,
            delta=1e-5,
            real_data=False,
        ),
        evaluation=Evaluation(test_records=14, choice_questions=8, generations=4, max_new_tokens=48),
        execution=Execution(tokens_per_microbatch=384, buckets=3, evaluation_buckets=2),
    )
