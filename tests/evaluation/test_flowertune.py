"""FlowerTune's form: the prompt letter by letter, the number of tokens, and which texts count."""

import pytest
from tiny import tiny_tokenizer

from fedjax_llm.data.medical_choice import MedicalQuestion
from fedjax_llm.errors import UserError
from fedjax_llm.evaluation.flowertune import INSTRUCTIONS, key, matches, new_tokens, prompt

MCQ = MedicalQuestion("1", "Which organ", "", ("lung", "heart", "skin", "eye"), 1)
PUBMED = MedicalQuestion("2", "Is it safe?", "A trial.\nA result.", ("yes", "no", "maybe"), 2)


def test_the_prompt_of_options():
    wanted = (
        f"<|im_start|>question\n{INSTRUCTIONS['medmcqa']}\nQuestion: Which organ?\n\nOptions:\nA. lung\nB. heart\n"
        "C. skin\nD. eye\nThe answer is:\n<|im_end|>\n<|im_start|>answer\n"
    )
    assert prompt("medmcqa", MCQ) == wanted
    ended = MedicalQuestion("1", "Name the organ.", "", MCQ.options, 1)
    assert "Question: Name the organ.\n\nOptions:" in prompt("medqa", ended)
    assert prompt("medqa", ended, "As published.").startswith("<|im_start|>question\nAs published.\nQuestion: Name")


def test_the_prompt_of_pubmedqa():
    wanted = (
        f"<|im_start|>question\n{INSTRUCTIONS['pubmedqa']}\nA trial.\nA result.\nIs it safe?\nThe answer is:\n"
        "<|im_end|>\n<|im_start|>answer\n"
    )
    assert prompt("pubmedqa", PUBMED) == wanted


def test_mmlu_is_not_part_of_it():
    with pytest.raises(UserError, match="does not evaluate mmlu"):
        prompt("mmlu", MCQ)


def test_keys():
    assert key("medqa", MCQ) == "B"
    assert key("pubmedqa", PUBMED) == "maybe"


def test_the_first_key_of_a_batch_of_sixteen_sets_the_number_of_tokens():
    """A token a byte: a batch that begins with ``no`` cannot hold ``maybe``."""
    keys = ["no", *["maybe"] * 15, "maybe", "yes"]
    assert new_tokens(keys, tiny_tokenizer()) == [2] * 16 + [5] * 2


@pytest.mark.parametrize(
    ("name", "written", "wanted", "counts"),
    [
        ("medqa", "B", "B", True),
        ("medqa", " b. heart", "B", True),
        ("medqa", "\n**B**", "B", True),
        ("medqa", "Because of it, A", "B", True),  # the first letter is all that is looked at
        ("medqa", "The answer is B", "B", False),
        ("medqa", "heart", "B", False),
        ("medqa", "", "B", False),
        ("medqa", "A\n## B", "B", True),
        ("pubmedqa", "Yes.", "yes", True),
        ("pubmedqa", "YesYes", "yes", True),
        ("pubmedqa", "noyes", "no", True),
        ("pubmedqa", "yes it is", "yes", False),
        ("pubmedqa", "maybe", "maybe", True),
        ("pubmedqa", "Maybe.", "maybe", False),
        ("pubmedqa", "no", "yes", False),
    ],
)
def test_what_counts(name, written, wanted, counts):
    assert matches(name, written, wanted) == counts
