"""Asks the tuned model of a run.

    python -m experiments.ask runs/quickstart-federated "What is arrhythmia?"
    python -m experiments.ask runs/quickstart-federated --base

Without a question it asks for one after the other.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import jax
import tyro

from experiments.command_line import told
from fedjax_llm.data.chat import encode_prompt
from fedjax_llm.data.records import Message
from fedjax_llm.errors import UserError
from fedjax_llm.experiment.compilation import use_compilation_cache
from fedjax_llm.experiment.tuned import TunedModel, open_run
from fedjax_llm.models.decoding import Greedy, Nucleus, Sampler, pieces, stream
from fedjax_llm.runs import directory, keys
from fedjax_llm.types import Adapters


def answer(
    tuned: TunedModel, adapters: Adapters, question: str, max_new_tokens: int, sampler: Sampler
) -> Iterator[str]:
    """The answer, piece by piece as it is made.

    Args:
      tuned: the model.
      adapters: its own, scaled, or ``{}`` for the base model.
      question: of the user.
      max_new_tokens: at most.
      sampler: chooses the tokens.
    """
    system = [Message("system", tuned.system)] if tuned.system is not None else []
    tokenizer = tuned.base.tokenizer
    prompt = encode_prompt([*system, Message("user", question)], tokenizer)
    tokens = stream(
        tuned.base.model,
        tuned.base.params,
        adapters,
        prompt,
        max_new_tokens=max_new_tokens,
        end_ids=tokenizer.end_ids,
        sampler=sampler,
    )
    return pieces(tokens, tokenizer.decode)


def main(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    question: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="QUESTION")] = None,
    base: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    key_file: Path | None = None,
) -> None:
    """Answers a question with the tuned model of a run; without a question, asks for one after the other.

    Args:
      run: the folder of a run.
      question: what to ask.
      base: also show what the base model answers.
      max_new_tokens: of an answer, at most.
      temperature: of sampling; 0 takes the most likely token each time.
      top_p: sample from the likeliest tokens that together have this probability.
      seed: of sampling.
      key_file: of an encrypted run, if the key is not where the run says.
    """
    sampler = Nucleus(jax.random.key(seed), temperature, top_p) if temperature else Greedy()
    use_compilation_cache()
    directory.refuse_absent(run)
    with keys.using(key_file):
        tuned = open_run(run)
    voices = {"tuned": tuned.scaled} | ({"base": {}} if base else {})
    for asked in _questions() if question is None else [question]:
        for name, adapters in voices.items():
            if base:
                print(f"{name}: ", end="", flush=True)
            for piece in answer(tuned, adapters, asked, max_new_tokens, sampler):
                print(piece, end="", flush=True)
            print()


def _questions() -> Iterator[str]:
    """Lines that the user types, until an empty one or the end of the input."""
    print("Each question stands for itself. An empty line ends.", file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        yield line


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m experiments.ask", description=told(__doc__))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print()
        sys.exit(130)
