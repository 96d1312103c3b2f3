"""Two of the eight clinics are malicious: they send the negative of what they have trained, five times as large.

    python -m experiments.run --config=configs/attacked.py
    python -m experiments.run --config=configs/all_layers.py --federation.cohort=8       # nobody attacks

The server cuts the two largest and the two smallest values of each coordinate before it takes the mean (the trimmed
mean), so the tuned model should come near to that of the run without an attack, a little behind it: the cut takes
honest values too, and the two clinics' flashcards are lost. With ``FedAvg()`` here instead, the two outweigh the other
six, and the tuned model should come out worse than the untouched base.

All eight take part in each round: in a smaller cohort the two could be more than the share that is cut. About twice
the work of ``configs/all_layers.py``.
"""

from fedjax_llm.adversaries.sign_flip import SignFlip
from fedjax_llm.aggregation.trimmed_mean import TrimmedMean
from fedjax_llm.config import Data, Experiment
from fedjax_llm.data.hpo import HpoFlashcards
from fedjax_llm.evaluation.evaluate import Evaluation
from fedjax_llm.federation.plan import Execution, Federation
from fedjax_llm.lora import Lora
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer, Schedule

CLINICS = ("blood", "cardiovascular", "digestive", "ear", "endocrine", "eye", "immune", "respiratory")


def get_config() -> Experiment:
    return Experiment(
        lora=Lora(rank=8, alpha=16, targets=("q_proj", "v_proj")),
        data=Data(source=HpoFlashcards(sites=CLINICS), max_length=112, system="You are a medical dictionary."),
        training=LocalTraining(
            batch_size=4,
            local_steps=2,
            optimizer=Optimizer("adamw", learning_rate=2e-3),
            round_schedule=Schedule("cosine", end=0.1),
        ),
        federation=Federation(rounds=10),
        aggregation=TrimmedMean(trim=0.25),
        attack=SignFlip(scale=5.0),
        malicious=0.25,
        evaluation=Evaluation(test_records=14, choice_questions=8, generations=4, max_new_tokens=48),
        execution=Execution(tokens_per_microbatch=384, buckets=3, evaluation_buckets=2),
    )
