"""The head's losses and their gradients against PyTorch in float64."""

import pytest
import torch
import torch.distributed as dist

from molmo2_nemo import compat
from molmo2_nemo.config import schema
from molmo2_nemo.model import loss


@pytest.fixture(scope="module")
def alone():
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


@pytest.mark.parametrize(
    "count, vocab_size, rows, chunk", [(37, 100, 128, 5), (64, 128, 128, 64), (1, 3, 128, 1), (0, 9, 16, 4)]
)
@pytest.mark.parametrize("trained", [True, False])
def test_losses_and_gradients_are_those_of_torch(alone, monkeypatch, count, vocab_size, rows, chunk, trained):
    monkeypatch.setattr(schema, "LOGITS_PER_CHUNK", chunk * rows)
    generator = torch.Generator().manual_seed(count)
    hidden, weight = torch.randn(count, 24, generator=generator), torch.randn(rows, 24, generator=generator)
    labels = torch.randint(vocab_size, (count,), generator=generator)
    scale = torch.rand(2, count, generator=generator)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
    cross_entropy, square = loss.head_losses(h, w, labels, vocab_size, alone, True)
    (scale[0] @ cross_entropy + scale[1] @ square).backward()

    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = h64 @ w64[:vocab_size].t()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    squares = torch.logsumexp(logits, 1).square()
    (scale[0].double() @ expected + scale[1].double() @ squares).backward()
    torch.testing.assert_close(cross_entropy.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(square.double(), squares, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h.grad.double(), h64.grad, rtol=1e-4, atol=1e-4)
    if trained:
        torch.testing.assert_close(w.grad.double(), w64.grad, rtol=1e-4, atol=1e-4)
        assert not w.grad[vocab_size:].any()
    else:
        assert w.grad is None


def test_logits_of_all_positions_are_never_held(alone, monkeypatch):
    """No tensor that forward and backward make is larger than a chunk of logits or the weights."""
    largest = 0

    class Sizes(compat.dispatch_mode()):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            nonlocal largest
            out = function(*arguments, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    monkeypatch.setattr(schema, "LOGITS_PER_CHUNK", 16 * 4096)
    hidden, weight = torch.randn(2048, 8, requires_grad=True), torch.randn(4096, 8, requires_grad=True)
    with Sizes():
        cross_entropy, square = loss.head_losses(hidden, weight, torch.zeros(2048, dtype=torch.long), 4096, alone, True)
        (cross_entropy + square).sum().backward()
    assert largest <= 16 * 4096 < 2048 * 4096
