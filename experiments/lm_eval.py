"""EleutherAI's Language Model Evaluation Harness with the models of this project: its own command line, unchanged.

    python -m experiments.lm_eval run --model fedjax_llm --model_args run=runs/mine --tasks pubmedqa,medmcqa
    python -m experiments.lm_eval run --model fedjax_llm --model_args run=runs/mine,base=true --tasks pubmedqa
    python -m experiments.lm_eval run --model fedjax_llm --model_args model=NAME,adapter=FOLDER --tasks FILE.yaml
    python -m experiments.lm_eval ls tasks

It registers the model ``fedjax_llm`` and hands over (``pip install 'fedjax_llm[lm-eval]'``).
"""

import importlib
import sys

from fedjax_llm.errors import UserError, tell


def main() -> int:
    """Runs the harness's command line; returns the exit status."""
    try:
        harness = _harness()
        importlib.import_module("fedjax_llm.experiment.lm_eval_model")
        harness.cli_evaluate()
        return 0
    except UserError as error:
        return tell(error)


def _harness():
    """The harness's main module.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module("lm_eval.__main__")
    except ImportError as error:
        raise UserError(f"lm-eval is not installed ({error}): pip install 'fedjax_llm[lm-eval]'") from error


if __name__ == "__main__":
    sys.exit(main())
