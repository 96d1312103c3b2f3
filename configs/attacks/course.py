"""The comparison that a course on private federated learning wants to see, with every number computed.

    python -m experiments.attack --config=configs/attacks/course.py

SmolLM2 learns flashcards at eight clinics, whose records also state secrets of people who do not exist: 28 secrets 1 to
64 times each, and 200 once or not at all by a coin. It is trained centralised, federated, and federated with
differential privacy at epsilon 8 and 1, each on about 110,000 tokens, with three seeds. The unit of privacy is a
patient: all records of one person at a site, so that stating a secret more often does not weaken its protection. Then
every model is asked for the secrets, for membership, and audited. The command can be stopped at any time; the same
command goes on. Full fine-tuning is set beside LoRA in memorisation.py.
"""

from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.config import Data, Experiment, Output
from fedjax_llm.data.hpo import HpoFlashcards
from fedjax_llm.data.planted import PlantedSecrets
from fedjax_llm.data.splits import Fractions
from fedjax_llm.evaluation.evaluate import Evaluation
from fedjax_llm.experiment.course import Course
from fedjax_llm.experiment.ground import Attacks
from fedjax_llm.federation.plan import Execution, Federation
from fedjax_llm.lora import Lora
from fedjax_llm.privacy.dp_fedsgd import DpFedSgd
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer

CLINICS = ("blood", "cardiovascular", "digestive", "ear", "endocrine", "eye", "immune", "respiratory")
UPPER = tuple(range(-6, 0))
CARDS = HpoFlashcards(questions=("definition",), sites=CLINICS, max_records_per_site=150)


def private(epsilon: float) -> dict:
    """What changes under differential privacy: few numbers are trained, 128 patients a round, and the server steps."""
    mechanism = DpFedSgd(clip_norm=0.15, sampling_probability=0.17)
    return {
        "lora": Lora(rank=4, alpha=8, targets=("v_proj",), layers=UPPER, train="b"),
        "training": LocalTraining(batch_size=16, local_steps=1, optimizer=Optimizer("sgd", learning_rate=1.0)),
        "federation.rounds": 16,
        "aggregation": FedAvg(server_lr=100.0),
        "privacy": Privacy(mechanism=mechanism, unit="patient", target_epsilon=epsilon, delta=1e-5, real_data=False),
    }


def experiment() -> Experiment:
    """What all ways have in common; as it is, federated without privacy."""
    return Experiment(
        lora=Lora(rank=8, alpha=16, targets=("*_proj",), layers=UPPER),
        data=Data(
            source=PlantedSecrets(CARDS, coins=200),
            fractions=Fractions(validation=0.05, test=0.45),
            max_length=96,
            system="You are a clinic's assistant.",
        ),
        training=LocalTraining(batch_size=8, local_steps=4, optimizer=Optimizer("adamw", learning_rate=3e-3)),
        federation=Federation(rounds=8, weighting="uniform"),
        evaluation=Evaluation(test_records=24, choice_questions=0, generations=0),
        execution=Execution(tokens_per_microbatch=256, buckets=4, evaluation_buckets=2, trunk_megabytes=4096),
        output=Output(aggregation_error=False),
    )


def get_attack() -> Course:
    """The attack described above."""
    return Course(
        experiment=experiment(),
        ways={
            "centralised": {"setting": "centralised", "training.optimizer.learning_rate": 1e-3},
            "federated": {},
            "federated, epsilon 8": private(8.0),
            "federated, epsilon 1": private(1.0),
        },
        seeds=(0, 1, 2),
        attacks=Attacks(shadows=16, shadow_epochs=1),
    )
