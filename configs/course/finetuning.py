"""The classroom setting of federated fine-tuning: medical flashcards, 20 IID partitions, cosine over the rounds.

    pip install -e '.[hub]'
    python -m experiments.run --config=configs/course/finetuning.py

Wants the Hugging Face hub (model and text) and an accelerator.
"""

from fedjax_llm.config import Data, Experiment, Model
from fedjax_llm.data.hub import HubDataset
from fedjax_llm.data.partition import Iid
from fedjax_llm.federation.plan import Federation
from fedjax_llm.lora import Lora
from fedjax_llm.training.client_update import LocalTraining
from fedjax_llm.training.optimizers import Optimizer, Schedule


def get_config() -> Experiment:
    """The experiment described above."""
    return Experiment(
        model=Model("mistralai/Mistral-7B-v0.1", dtype="bfloat16"),
        lora=Lora(rank=16, alpha=64, targets=("q_proj", "v_proj"), dropout=0.075),
        data=Data(
            source=HubDataset(
                "medalpaca/medical_meadow_medical_flashcards", prompt_column="input", answer_column="output"
            ),
            partition=Iid(sites=20),
            max_length=512,
        ),
        training=LocalTraining(
            batch_size=16,
            local_steps=10,
            optimizer=Optimizer("adamw", learning_rate=5e-5),
            round_schedule=Schedule("cosine", end=0.02),
        ),
        federation=Federation(rounds=200, cohort=16),
    )
