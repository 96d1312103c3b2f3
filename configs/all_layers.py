"""Without privacy and with adapters in all layers: what the same clinics' flashcards can teach the model.

    python -m experiments.run --config=configs/all_layers.py
    python -m experiments.run --config=configs/all_layers.py --setting=centralised

Four of the eight clinics take part in each round. About five minutes on two cores. ``configs/quickstart.py`` is the
private run.
"""

from fedjax_llm.config import Data, Experiment
from fedjax_llm.data.hpo import HpoFlashcards
from fedjax_llm.evaluation.evaluate import Evaluation
from fedjax_llm.federation.plan import Execution, Federation
from fedjax_llm.lora import Lora
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer, Schedule

CLINICS = ("blood", "cardiovascular", "digestive", "ear", "endocrine", "eye", "immune", "respiratory")


def get_config() -> Experiment:
    """The experiment described above."""
    return Experiment(
        lora=Lora(rank=8, alpha=16, targets=("q_proj", "v_proj")),
        data=Data(source=HpoFlashcards(sites=CLINICS), max_length=112, system="You are a medical dictionary."),
        training=LocalTraining(
            batch_size=4,
            local_steps=2,
            optimizer=Optimizer("adamw", learning_rate=2e-3),
            round_schedule=Schedule("cosine", end=0.1),
        ),
        federation=Federation(rounds=10, cohort=4),
        evaluation=Evaluation(test_records=14, choice_questions=8, generations=4, max_new_tokens=48),
        execution=Execution(tokens_per_microbatch=384, buckets=3, evaluation_buckets=2),
    )
