"""All weights beside LoRA, at equal validation loss: which has memorised more of the secrets planted in its text?

    python -m experiments.attack --config=configs/attacks/memorisation.py

The cards of eight clinics with planted patient records, as in course.py, in one place and without privacy. Both
trainings take the same batches, and are looked at six times on the way; the whole model is trained, more than an hour
on two cores. A training that is finished is not repeated.
"""

from fedjax_llm.config import Data, Experiment
from fedjax_llm.data.hpo import HpoFlashcards
from fedjax_llm.data.planted import PlantedSecrets
from fedjax_llm.data.splits import Fractions
from fedjax_llm.evaluation.evaluate import Evaluation
from fedjax_llm.experiment.memorisation import Memorisation
from fedjax_llm.federation.plan import Execution

CLINICS = ("blood", "cardiovascular", "digestive", "ear", "endocrine", "eye", "immune", "respiratory")


def get_attack() -> Memorisation:
    """The attack described above."""
    cards = HpoFlashcards(questions=("definition",), sites=CLINICS, max_records_per_site=150)
    return Memorisation(
        experiment=Experiment(
            data=Data(
                source=PlantedSecrets(cards, coins=200),
                fractions=Fractions(validation=0.05, test=0.45),
                max_length=96,
                system="You are a clinic's assistant.",
            ),
            evaluation=Evaluation(test_records=24, choice_questions=0, generations=0),
            execution=Execution(tokens_per_microbatch=256, buckets=4, evaluation_buckets=2),
        ),
        batch_size=8,
        checks=6,
    )
