"""What SmolLM2 gives back of texts that it may have met in pre-training: licences, and works in the public domain.

    python -m experiments.attack --config=configs/attacks/open_model.py

Each text's first 32 tokens are completed, greedily and five times by sampling, and compared with its next 50 tokens; so
are controls with words replaced and letters written now.
"""

from fedjax_llm.experiment.open_model import OpenModel


def get_attack() -> OpenModel:
    """The attack described above."""
    return OpenModel()
