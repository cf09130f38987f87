"""Run by test_loss.py on two ranks: each holds half of the head's rows; the second half is partly padding.

Rank 0 prints one JSON line: vocabulary size -> for losses and gradients, of each rank, the largest difference from
torch in float64, over 1 + the size of torch's number.
"""

import json

import torch
import torch.distributed as dist

from molmo2_nemo.model.loss import head_losses

ROWS, HIDDEN, TOKENS = 256, 16, 50


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs).abs() / (1 + theirs.abs())).max().item()


def compare(vocab_size: int) -> dict[str, float]:
    half = slice(ROWS // 2 * dist.get_rank(), ROWS // 2 * (dist.get_rank() + 1))
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, HIDDEN, generator=generator) for n in (TOKENS, ROWS))
    labels = torch.randint(vocab_size, (TOKENS,), generator=generator)
    h, w = hidden.clone().requires_grad_(), weight[half].clone().requires_grad_()
    cross_entropy, square = head_losses(h, w, labels, vocab_size, dist.group.WORLD, True)
    (cross_entropy + 0.1 * square).sum().backward()
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = h64 @ w64[:vocab_size].t()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    squares = torch.logsumexp(logits, 1).square()
    (expected + 0.1 * squares).sum().backward()
    return {
        "losses": difference(cross_entropy, expected),
        "squares": difference(square, squares),
        "hidden_gradients": difference(h.grad, h64.grad),
        "weight_gradients": difference(w.grad, w64.grad[half]),
        "largest_weight_gradient": w64.grad[half].abs().max().item(),
    }


def main() -> None:
    dist.init_process_group("gloo")
    found = {}
    for vocab_size in (200, 120):  # 120: the second rank holds padding alone
        found[vocab_size] = [None] * dist.get_world_size()
        dist.all_gather_object(found[vocab_size], compare(vocab_size))
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


main()
