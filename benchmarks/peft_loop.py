"""A client's local LoRA training with PyTorch and PEFT, and optionally Opacus: what `peft_peer.py` times.

A module of its own, so that Flower's worker processes import it by name and `cached_client` lasts as long as they do.
Letters: B examples a step, L tokens an example.
"""

import functools
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM

State = dict[str, Tensor]


@dataclass(frozen=True)
class Options:
    """What is timed. Hashable, so that a worker can keep the model that belongs to it.

    Attributes:
      model: folder of a Hugging Face checkpoint.
      steps: local AdamW steps of a client in a round.
      batch: examples a step, B.
      length: tokens an example, L; every token but the first is a target.
      targets: names of the linear layers that get adapters.
      threads: torch's threads in one client.
      private: DP-SGD by Opacus: each example's gradient clipped to 1 over all adapters, noise multiplier 1.
    """

    model: str
    steps: int
    batch: int
    length: int
    targets: tuple[str, ...]
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
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=list(options.targets))).train()
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


def batches(options: Options, vocabulary: int, client_id: int) -> Iterator[State]:
    """The client's local steps: random tokens [B, L], the same in every round and however the client is run."""
    generator = torch.Generator().manual_seed(client_id)
    positions = torch.arange(options.length)[None].expand(options.batch, -1)  # Opacus wants a batch axis here too
    for _ in range(options.steps):
        tokens = torch.randint(0, vocabulary, (options.batch, options.length), generator=generator)
        yield {"input_ids": tokens, "labels": tokens, "position_ids": positions}


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
    return example_losses(client.net(**inputs, use_cache=False).logits, batch["labels"])


def make_optimizer(client: Client, options: Options) -> torch.optim.Optimizer:
    """AdamW on the adapters; private: on (sum of clipped gradients + noise) / B, with the public B."""
    optimizer = torch.optim.AdamW([leaf for leaf in client.model.parameters() if leaf.requires_grad], lr=1e-3)
    if not options.private:
        return optimizer
    from opacus.optimizers import DPOptimizer

    # Its "mean" speaks of the result: the noised sum is divided by the expected batch size.
    return DPOptimizer(
        optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=options.batch, loss_reduction="mean"
    )


def train_client(client: Client, options: Options, state: State, client_id: int) -> tuple[State, dict[str, float]]:
    """One client's round from the server's adapters.

    Returns:
      The client's adapters, and its figures: mean loss in nats, seconds, tokens, peak resident memory in MiB.
    """
    start = time.perf_counter()
    set_peft_model_state_dict(client.model, state)
    optimizer = make_optimizer(client, options)
    losses = []
    for batch in batches(options, client.model.config.vocab_size, client_id):
        optimizer.zero_grad()
        loss = batch_loss(client, options, batch)
        loss.sum().backward()
        optimizer.step()
        losses.append(loss.mean().item())
    optimizer.zero_grad()
    figures = {
        "loss": sum(losses) / len(losses),
        "train_s": time.perf_counter() - start,
        "tokens": options.steps * options.batch * options.length,
        "rss_mb": peak_memory(),
    }
    return adapter_state(client), figures


def peak_memory() -> float:
    """Peak resident memory of this process in MiB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
