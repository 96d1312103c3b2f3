"""Metadata, dependencies and extras. Tool settings are in pyproject.toml, known-good pins in constraints.txt.

Lower bounds are the oldest versions that the tests have been run with. There are no upper bounds: a library that
caps its users' environment ages badly, and constraints.txt is there for whoever wants what is known to work.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """The version that ``fedjax_llm/__init__.py`` states, read without importing it (jax is not there yet)."""
    found = re.search(r'^__version__ = "(.+)"$', (HERE / "fedjax_llm/__init__.py").read_text("utf-8"), re.MULTILINE)
    assert found, "fedjax_llm/__init__.py states no __version__"
    return found[1]


RUNTIME = [
    "cryptography>=45",
    "dp-accounting>=0.6",
    "filelock>=3.12",
    "flax>=0.12.8",
    "gguf>=0.17",
    "huggingface_hub>=1.0",
    "jax>=0.10.2",
    "jax_privacy>=2.0",
    "jinja2>=3.1",
    "markupsafe>=2.1",
    "matplotlib>=3.9",
    "msgpack>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "packaging>=24",
    "pycryptodome>=3.20",
    "requests>=2.32",
    "rich>=13.7",
    "safetensors>=0.5",
    "scipy>=1.14",
    "tensorboardX>=2.6",
    "tokenizers>=0.22",
    "transformers>=5.0",
    "tyro>=1.0",
]
EXTRAS = {
    "test": ["hypothesis>=6.100", "pytest>=8.3", "pytest-timeout>=2.4", "pytest-xdist>=3.6", "setuptools>=77"],
    "lint": ["pyrefly>=1.4", "ruff>=0.17"],
    "parity": ["peft>=0.18", "torch>=2.8"],  # the reference that `make parity` compares with
    "topology": ["libtpu>=0.0.42"],  # compiles for TPUs that are not there (`experiments.plan --topology`)
    "hub": ["datasets>=4.0"],  # any Hugging Face dataset by name
    "flower": ["flwr>=1.41"],  # federation over real sites (`fedjax_llm/deployment/`)
    "sql": ["sqlalchemy>=2.1"],  # text from a database (`SqlTable`); drivers are the database's own
    "serve": ["anyio>=4.16", "starlette>=1.3", "uvicorn>=0.49"],  # the page of `experiments.serve`
    "wandb": ["wandb>=0.31"],
    "mlflow": ["alembic>=1.18", "mlflow-skinny>=3.17", "sqlalchemy>=2.1"],
    "browser": ["playwright>=1.50"],  # for the tests of the page; they want a Chromium too
    "lm-eval": ["lm-eval>=0.4.13", "tqdm>=4.66"],  # `experiments.lm_eval`: EleutherAI's evaluation harness
    "docs": ["mkdocs>=1.6", "mkdocstrings-python>=2.0"],  # `make docs`
    "notebook": ["ipykernel>=6.29", "nbclient>=0.10", "nbformat>=5.10"],  # notebooks/
}
# What the tests of optional parts need, so that `make test` leaves none of them out.
EXTRAS["dev"] = [one for name in ("test", "lint", "flower", "sql", "serve", "wandb", "mlflow") for one in EXTRAS[name]]
EXTRAS["dev"].append("httpx>=0.28")  # starlette's test client

setup(
    name="fedjax_llm",
    version=version(),
    description="Federated fine-tuning of large language models in JAX",
    long_description=(HERE / "README.md").read_text("utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["fedjax_llm", "fedjax_llm.*"]),
    package_data={
        "fedjax_llm.runs": ["*.html", "*.css"],
        "fedjax_llm.serving": ["*.html", "*.css", "*.js", "*.svg"],
    },
    install_requires=RUNTIME,
    extras_require=EXTRAS,
    entry_points={"lm_eval.models": ["fedjax_llm = fedjax_llm.experiment.lm_eval_model:FedjaxLM"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
