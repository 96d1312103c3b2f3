"""Site-level differential privacy: 300 simulated practices, of which about 60 take part in a round, secretly.

    python -m experiments.run --config=configs/many_sites.py

Whether a practice took part at all is what the guarantee hides: epsilon 8 at delta 1e-4 for adding or removing all data
of one site. That is affordable because there are many: the noise that covers one update is added once to the sum over a
cohort. The clip norm follows the median of the updates' norms, found privately. Adapters sit in upper layers, so that
the layers below are computed once an example. ``configs/many_sites_not_private.py`` is the same without privacy.
"""

from fedjax_llm.aggregation.fedavg import FedAvg
from fedjax_llm.config import Data, Experiment
from fedjax_llm.data.hpo import HpoFlashcards
from fedjax_llm.data.partition import Iid
from fedjax_llm.data.splits import Fractions
from fedjax_llm.evaluation.evaluate import Evaluation
from fedjax_llm.federation.plan import Execution, Federation
from fedjax_llm.lora import Lora
from fedjax_llm.privacy.dp_fedavg import DpFedAvg
from fedjax_llm.privacy.guarantee import Privacy
from fedjax_llm.privacy.mechanism import AdaptiveClip
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer


def get_config() -> Experiment:
    """The experiment described above."""
    return Experiment(
        lora=Lora(rank=4, alpha=8, targets=("v_proj",), layers=tuple(range(-8, 0)), train="b"),
        data=Data(
            source=HpoFlashcards(),
            partition=Iid(sites=300),
            fractions=Fractions(validation=0.0, test=0.02),
            test_every_site=False,
            max_length=112,
            system="You are a medical dictionary.",
        ),
        training=LocalTraining(batch_size=2, local_steps=2, optimizer=Optimizer("sgd", learning_rate=30.0)),
        federation=Federation(rounds=10, cohort=60, weighting="uniform"),
        aggregation=FedAvg(server_lr=1.0),
        privacy=Privacy(
            mechanism=DpFedAvg(clip_norm=8.0, adaptive=AdaptiveClip(quantile=0.5, learning_rate=0.2)),
            unit="site",
            target_epsilon=8.0,
            delta=1e-4,
            real_data=False,
        ),
        evaluation=Evaluation(test_records=1, choice_questions=0, generations=4, max_new_tokens=48),
        execution=Execution(tokens_per_microbatch=512, buckets=3, evaluation_buckets=2, clients_per_chunk=20),
    )
