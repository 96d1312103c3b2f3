"""The loss that the benchmark's private peer clips the gradients of."""

import runpy
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

pytestmark = pytest.mark.parity

TARGETS = ((0, 9), (3, 7), (8, 9), (5, 5))  # where each example's targets begin and end; the last has none


@pytest.fixture(scope="module")
def example_losses():
    """From the script, which is no module of a package."""
    return runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "peft_loop.py"))["example_losses"]


@pytest.fixture
def batch():
    """Logits, and labels of examples with unequal numbers of targets."""
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=(4, 9, 11)), dtype=torch.float32, requires_grad=True)
    labels = torch.full((4, 9), -100)
    for row, (begin, end) in enumerate(TARGETS):
        labels[row, begin:end] = torch.tensor(rng.integers(0, 11, end - begin))
    return logits, labels


def test_every_example_has_the_mean_over_its_own_targets(batch, example_losses):
    logits, labels = batch
    found = example_losses(logits, labels).detach()
    for row, (begin, end) in enumerate(TARGETS):
        scores = torch.log_softmax(logits[row].detach(), dim=-1)
        own = [-float(scores[place - 1, labels[row, place]]) for place in range(max(begin, 1), end)]
        assert float(found[row]) == pytest.approx(np.mean(own) if own else 0.0, rel=1e-5)


def test_no_example_moves_anothers_gradient(batch, example_losses):
    logits, labels = batch
    (before,) = torch.autograd.grad(example_losses(logits, labels).sum(), logits)
    fewer = labels.clone()
    fewer[0, 4:] = -100
    (after,) = torch.autograd.grad(example_losses(logits, fewer).sum(), logits)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1:], after[1:])
