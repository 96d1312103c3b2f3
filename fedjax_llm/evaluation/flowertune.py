"""FlowerTune's medical evaluation: short greedy answers, matched with the key.

Facts from Flower's ``benchmarks/flowertune-llm/evaluation/medical/benchmarks.py`` and ``utils.py``: the prompt's form,
that as many tokens are generated as the first key of each batch of 16 has, and how an answer is matched. An answer in
another form than the key's is wrong there, however right it is, and ``maybe`` only counts where nothing else was
written. The instruction at the prompt's head is that of Meditron (Chen et al. 2023, arXiv 2311.16079) there. It is not
repeated here: give it as ``instruction`` where figures shall stand beside the leaderboard's.
"""

import re
import string
from collections.abc import Sequence

from fedjax_llm.data.medical_choice import MedicalQuestion, Name
from fedjax_llm.errors import UserError
from fedjax_llm.models.tokenizer import Tokenizer

BATCH = 16
INSTRUCTIONS: dict[Name, str] = {
    "pubmedqa": "You judge clinical statements. Is what is asked right, going by the text? Write yes, no, or maybe.",
    "medqa": "You sit the licensing examination for doctors. Write the letter of the one right option.",
    "medmcqa": "You sit the entrance examination of a medical school. Write the letter of the one right option.",
    "careqa": "You sit the examination for specialist training. Write the letter of the one right option.",
}
"""Benchmark -> what every prompt begins with, in words of ours that ask for the same."""
_SHORT = ("a", "b", "c", "d", "e", "yes", "no")
_DOUBLED = (("yesyes", "yes"), ("nono", "no"), ("yesno", "yes"), ("noyes", "no"))


def prompt(name: Name, question: MedicalQuestion, instruction: str | None = None) -> str:
    """The text that the model continues: a chat in a form of its own, whatever the model's template.

    Args:
      name: of the benchmark.
      question: of it.
      instruction: that the prompt begins with; ``None``: one of ours.

    Raises:
      UserError: FlowerTune does not evaluate this benchmark.
    """
    if name not in INSTRUCTIONS:
        raise UserError(f"FlowerTune does not evaluate {name}; it does {', '.join(INSTRUCTIONS)}: drop 'match'")
    if name == "pubmedqa":
        asked = f"{question.context}\n{question.question}"
    else:
        end = "" if question.question.endswith(("?", ".")) else "?"
        listed = (
            f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, question.options, strict=False)
        )
        asked = "\n".join([f"Question: {question.question}{end}\n", "Options:", *listed])
    body = f"{instruction or INSTRUCTIONS[name]}\n{asked}\nThe answer is:\n"
    return f"<|im_start|>question\n{body}<|im_end|>\n<|im_start|>answer\n"


def key(name: Name, question: MedicalQuestion) -> str:
    """What has to be written: a letter, or in PubMedQA the decision."""
    return question.options[question.answer] if name == "pubmedqa" else string.ascii_uppercase[question.answer]


def new_tokens(keys: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """How many tokens each answer may have: as many as the first key of its batch of 16 has."""
    return [len(tokenizer.encode(keys[place - place % BATCH])) for place in range(len(keys))]


def matches(name: Name, written: str, wanted: str) -> bool:
    """Whether a text counts as the key."""
    written, wanted = written.lower(), wanted.lower()
    kept = written
    if "\n##" in kept:
        kept = kept.split("\n##")[1].split("\n")[0]
    kept = " ".join(re.sub(r"[^a-zA-Z0-9]", " ", kept).split())
    if name == "pubmedqa":
        kept = next((kept.replace(twice, once) for twice, once in _DOUBLED if twice in kept), kept)
    else:
        kept = kept[:1]
    return (kept if kept in _SHORT else written) == wanted
