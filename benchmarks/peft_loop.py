"""A client's local LoRA training with PyTorch and PEFT, and optionally Opacus: what `peft_peer.py` times.

A module of its own, so that Flower's worker processes import it by name and `cached_client` lasts as long as they do.
Letters: B examples a step, L tokens of the longest of them.
"""

import functools
import json
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM

State = dict[str, Tensor]


class Example(NamedTuple):
    """Token ids, of which the first ``prompt`` are no targets."""

    tokens: list[int]
    prompt: int


@dataclass(frozen=True)
class Options:
    """What is timed. Hashable, so that a worker can keep the model that belongs to it.

    Attributes:
      model: folder of a Hugging Face checkpoint.
      examples: JSON lines of the clients' examples; see :func:`read_examples`.
      steps: local AdamW steps of a client in a round, each on all of its examples.
      targets: names of the linear layers that get adapters.
      layers: numbers of the transformer layers that get adapters; empty: all.
      threads: torch's threads in one client.
      private: DP-SGD by Opacus: each example's gradient clipped to 1 over all adapters, noise multiplier 1.
    """

    model: str
    examples: str
    steps: int
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    threads: int
    private: bool


@dataclass(frozen=True)
class Client:
    """A PEFT model, and the module to call for a loss: the model itself, or Opacus's wrapper of it."""

    model: PeftModel
    net: torch.nn.Module


def load_client(options: Options) -> Client:
    """The frozen base with fresh adapters (r=8, alpha=16), the same in every process."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)  # every process starts from the same adapters ...
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, attn_implementation="sdpa")
    layers = list(options.layers) or None
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=list(options.targets), layers_to_transform=layers)
    model = get_peft_model(base, lora).train()
    torch.seed()  # ... but not from the same noise
    if not options.private:
        return Client(model, model)
    from opacus.grad_sample import GradSampleModule  # only here, so that the rest also runs without Opacus

    return Client(model, GradSampleModule(model, strict=False, loss_reduction="sum"))


@functools.lru_cache(maxsize=1)
def cached_client(options: Options) -> Client:
    """`load_client`, once a process."""
    return load_client(options)


def adapter_state(client: Client) -> State:
    """A copy of the adapters, by PEFT's names."""
    return {name: leaf.detach().clone() for name, leaf in get_peft_model_state_dict(client.model).items()}


@functools.lru_cache(maxsize=1)
def read_examples(path: str) -> tuple[tuple[Example, ...], ...]:
    """The examples of every client, once a process.

    Args:
      path: of JSON lines ``{"client": c, "tokens": [...], "prompt_length": n}``, clients numbered from 0.
    """
    clients: dict[int, list[Example]] = {}
    with open(path, encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            clients.setdefault(line["client"], []).append(Example(line["tokens"], line["prompt_length"]))
    return tuple(tuple(clients[number]) for number in range(len(clients)))


def padded(examples: Sequence[Example], pad_id: int = 0) -> State:
    """The model's arguments for a batch, padded on the right to its longest example.

    Without padding there is no mask, which spares the attention one.
    """
    length = max(len(example.tokens) for example in examples)
    tokens = torch.full((len(examples), length), pad_id)
    labels, mask = torch.full_like(tokens, -100), torch.zeros_like(tokens)
    for row, example in enumerate(examples):
        own, count = torch.tensor(example.tokens), len(example.tokens)
        tokens[row, :count], mask[row, :count] = own, 1
        labels[row, example.prompt : count] = own[example.prompt :]
    batch = {"input_ids": tokens, "labels": labels}
    return batch if mask.all() else {**batch, "attention_mask": mask}


def example_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Every example's mean loss over its own targets, in nats.

    Hugging Face's loss divides by the targets of the whole batch: there an example's gradient depends on the others'
    lengths before it is clipped, and clipping bounds nobody's influence.

    Args:
      logits: [B, L, V].
      labels: [B, L], -100 where a token is no target; the logits at l predict the label at l + 1.

    Returns:
      [B]; 0 for an example without targets.
    """
    labels = F.pad(labels[:, 1:], (0, 1), value=-100)  # shifting the labels spares a copy of the logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none")
    return losses.view_as(labels).sum(1) / (labels != -100).sum(1).clamp(min=1)


def batch_loss(client: Client, options: Options, batch: State) -> Tensor:
    """The examples' losses [B] if private, which Opacus wants summed; else Hugging Face's mean over all targets []."""
    if not options.private:
        return client.net(**batch, use_cache=False).loss
    inputs = {name: leaf for name, leaf in batch.items() if name != "labels"}
    positions = torch.arange(batch["labels"].shape[1]).expand_as(batch["labels"])  # Opacus wants a batch axis here too
    return example_losses(client.net(**inputs, position_ids=positions, use_cache=False).logits, batch["labels"])


def make_optimizer(client: Client, options: Options, batch: int) -> torch.optim.Optimizer:
    """AdamW on the adapters; private: on (sum of clipped gradients + noise) / B, with the public ``batch`` B."""
    optimizer = torch.optim.AdamW([leaf for leaf in client.model.parameters() if leaf.requires_grad], lr=1e-3)
    if not options.private:
        return optimizer
    from opacus.optimizers import DPOptimizer

    # Its "mean" speaks of the result: the noised sum is divided by the expected batch size.
    return DPOptimizer(
        optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=batch, loss_reduction="mean"
    )


def train_client(client: Client, options: Options, state: State, client_id: int) -> tuple[State, dict[str, float]]:
    """One client's round from the server's adapters.

    Returns:
      The client's adapters, and its figures: mean loss in nats, seconds, examples, real tokens,
      peak resident memory in MiB.
    """
    start = time.perf_counter()
    set_peft_model_state_dict(client.model, state)
    examples = read_examples(options.examples)[client_id]
    optimizer = make_optimizer(client, options, len(examples))
    losses = []
    for _ in range(options.steps):
        batch = padded(examples)
        optimizer.zero_grad()
        loss = batch_loss(client, options, batch)
        loss.sum().backward()
        optimizer.step()
        losses.append(loss.mean().item())
    optimizer.zero_grad()
    figures = {
        "loss": sum(losses) / len(losses),
        "train_s": time.perf_counter() - start,
        "num-examples": len(examples),
        "tokens": options.steps * sum(len(example.tokens) for example in examples),
        "rss_mb": peak_memory(),
    }
    return adapter_state(client), figures


def peak_memory() -> float:
    """Peak resident memory of this process in MiB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
