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
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

State = dict[str, torch.Tensor]


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
      private: per-example clipping and noise by Opacus.
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
    return Client(model, GradSampleModule(model, strict=False) if options.private else model)


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


def train_client(client: Client, options: Options, state: State, client_id: int) -> tuple[State, dict[str, float]]:
    """One client's round from the server's adapters.

    Returns:
      The client's adapters, and its figures: mean loss in nats, seconds, tokens, peak resident memory in MiB.
    """
    start = time.perf_counter()
    set_peft_model_state_dict(client.model, state)
    optimizer = torch.optim.AdamW([leaf for leaf in client.model.parameters() if leaf.requires_grad], lr=1e-3)
    if options.private:
        optimizer = DPOptimizer(optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=options.batch)
    losses = []
    for batch in batches(options, client.model.config.vocab_size, client_id):
        optimizer.zero_grad()
        # The mean over all targets. Lengths are equal, so it is also the mean of the examples' means, which is what
        # per-example clipping has to start from.
        loss = client.net(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
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
