"""A real language model learns medical flashcards at eight organ-system clinics, with differential privacy.

    python -m experiments.run --config=configs/quickstart.py
    python -m experiments.privacy --config=configs/quickstart.py       # what it will guarantee
    python -m experiments.privacy runs/quickstart-federated            # what it has spent, from its ledger

Adding or removing one flashcard record (epsilon 8 at delta 1e-5) is hidden from everyone who sees the noised sums:
the other clinics, and whoever gets the adapters. In each of 16 rounds every clinic draws each of its records with
probability 0.014, sends the sum of their clipped gradients, and noise is added once to the sum over the clinics.
``configs/quickstart_not_private.py`` is the same without privacy.

What was tried, and what it bought at the same epsilon, delta and unit (nats per answer token on validation records, one
seed, 640 sampled records in all, in an emulation on fewer records; steps were not tuned equally; the base has 3.65):

    clip norm 1 -> 0.3 (the median gradient has 0.33)             3.39 -> 3.01   last 2 layers, v, o and down
    layers: last 2 (v, o, down) -> 4 (v, down) -> 8 (v alone)     3.01 -> 2.94 -> 2.82
    few numbers: v alone and clip 0.15 in the last 4              2.94 -> 2.90   3,072 numbers for 12,288
    many numbers: v, o, up and down in the last 4                 3.05           46,080
    both factors trained at this rate                             diverges (10.6): one factor it is
    40% more records (896)                                        2.82 -> 2.80
    10 rounds of 64 records for 16 of 40 (last 4)                 2.92 -> 2.93
    a step that decays linearly                                   2.82 -> 2.82; an unlucky seed 2.93 -> 2.83

Noise on the sum makes it possible at this size: added by each of the eight clinics it would be sqrt(8) times as large.
Layers below the adapters run forward only, once an example, and serve base and tuned model in the evaluation. The
choices were made on these cards, which are public; on private ones that would have to be accounted for.
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
    """The experiment described above."""
    return Experiment(
        lora=Lora(rank=4, alpha=8, targets=("v_proj",), layers=tuple(range(-8, 0)), train="b"),
        data=Data(source=HpoFlashcards(sites=CLINICS), max_length=112, system="You are a medical dictionary."),
        # Clinics send sums of clipped gradients; the server's aggregator takes the step.
        training=LocalTraining(batch_size=5, local_steps=1, optimizer=Optimizer("sgd", learning_rate=1.0)),
        federation=Federation(rounds=16, weighting="uniform"),
        aggregation=FedAvg(server_lr=100.0),
        privacy=Privacy(
            mechanism=DpFedSgd(clip_norm=0.15, sampling_probability=0.014),
            unit="record",
            target_epsilon=8.0,
            delta=1e-5,
            real_data=False,
        ),
        evaluation=Evaluation(test_records=14, choice_questions=8, generations=4, max_new_tokens=48),
        execution=Execution(tokens_per_microbatch=384, buckets=3, evaluation_buckets=2),
    )
