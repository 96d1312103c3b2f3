"""Logits of a batch, once by transformers and once by us."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM

from fedjax_llm.models.causal_lm import CausalLM
from fedjax_llm.models.family import family_of
from fedjax_llm.models.loading import read_params
from fedjax_llm.models.safetensors_format import read_folder
from fedjax_llm.types import Adapters, Params

TOLERANCE = 1e-4


def padded(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [M, L], padded on the right with a token that is in use elsewhere, and the mask of the real ones."""
    length = max(map(len, sequences))
    tokens = np.array([[*row, *[5] * (length - len(row))] for row in sequences], np.int32)
    return tokens, np.array([[n < len(row) for n in range(length)] for row in sequences])


def ours_of(folder: Path) -> tuple[CausalLM, Params]:
    """A model folder, read by us."""
    checkpoint = read_folder(folder)
    family = family_of(checkpoint.config)
    config = family.config_from_hf(checkpoint.config)
    return CausalLM(family, config), read_params(checkpoint, family, config, "float32")


def random_model(config: Any) -> Any:
    """A model of transformers whose norms and biases are random too, so that each of them matters."""
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def torch_logits(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[M, L, V]."""
    with torch.no_grad():
        output = model(input_ids=torch.from_numpy(tokens).long(), attention_mask=torch.from_numpy(mask).long())
    return output.logits.numpy()


def our_logits(model: CausalLM, params: Params, adapters: Adapters, tokens: np.ndarray) -> np.ndarray:
    """[M, L, V]; the adapters are scaled already."""
    with jax.default_matmul_precision("highest"):
        hidden = model.hidden(params, adapters, jnp.asarray(tokens))
        logits = model.logits(params, hidden.reshape(-1, hidden.shape[-1]))
    return np.asarray(logits).reshape(*tokens.shape, -1)


def assert_close(ours: np.ndarray, theirs: np.ndarray, mask: np.ndarray, tolerance: float = TOLERANCE) -> None:
    """Within the tolerance at every real position; says by how much it is, or would have been."""
    worst, largest = np.abs(ours - theirs)[mask].max(), np.abs(theirs[mask]).max()
    print(f"largest difference {worst:.2e}, of logits up to {largest:.1f}")
    assert worst < tolerance


def assert_deep_model_close(
    model: CausalLM, params: Params, adapters: Adapters, theirs: Any, tokens: np.ndarray, mask: np.ndarray
) -> None:
    """Within the tolerance where products are summed in float64; in float32, within 1e-5 of the largest logit.

    SmolLM2's activations reach 25 000, so in float32 the order of summation alone moves its logits (up to 40): those of
    transformers are 1e-4 away from its own in float64. There, too, norms and rotations are in float32.
    """
    single = torch_logits(theirs, tokens, mask)
    assert_close(our_logits(model, params, adapters, tokens), single, mask, 1e-5 * np.abs(single[mask]).max())
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda array: jnp.asarray(array, jnp.float64), params)
        ours = our_logits(model, wide, adapters, tokens)
    assert_close(ours, torch_logits(theirs.double(), tokens, mask), mask)
