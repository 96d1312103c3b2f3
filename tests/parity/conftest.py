"""The real model, once in JAX and once in torch."""

import pytest


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2 as we load it, and the folder that we converted it to."""
    from fedjax_llm.models.loading import converted_folder, load

    base = load("smollm2-135m-instruct")
    return base, converted_folder(base.fingerprint)


@pytest.fixture
def smollm2_in_torch(smollm2):
    """The converted folder as transformers loads it, anew for each test."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2[1], dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def medical_chats(smollm2):
    """Token ids of chats, rendered by the model's own template; of different lengths."""
    from fedjax_llm.data.records import Message

    pairs = [
        ("What is nystagmus?", "Rhythmic, involuntary oscillations of one or both eyes."),
        ("Which condition is described: an abnormally small jaw, 3-5 mm behind the norm?", "Micrognathia."),
        ("Name a cause of hyperkalaemia (K+ > 5.5 mmol/L).", "Renal failure; also ACE inhibitors.\n\nAsk a doctor."),
    ]
    chats = [(Message("user", question), Message("assistant", answer)) for question, answer in pairs]
    return [smollm2[0].tokenizer.encode(smollm2[0].tokenizer.render(chat, False)) for chat in chats]
