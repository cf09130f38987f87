"""Run by test_loss.py on two ranks: each holds half of the head's rows; the second half is partly padding."""

import torch
import torch.distributed as dist

from molmo2_nemo.model.loss import head_losses

dist.init_process_group("gloo")
rank = dist.get_rank()
for vocab_size in (200, 120):  # 120: the second rank holds padding alone
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(50, 16, generator=generator), torch.randn(256, 16, generator=generator)
    labels = torch.randint(vocab_size, (50,), generator=generator)
    h, w = hidden.clone().requires_grad_(), weight[128 * rank : 128 * (rank + 1)].clone().requires_grad_()
    cross_entropy, square = head_losses(h, w, labels, vocab_size, dist.group.WORLD, True)
    (cross_entropy + 0.1 * square).sum().backward()
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = h64 @ w64[:vocab_size].t()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (expected + 0.1 * torch.logsumexp(logits, 1).square()).sum().backward()
    torch.testing.assert_close(cross_entropy.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h.grad.double(), h64.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(w.grad.double(), w64.grad[128 * rank : 128 * (rank + 1)], rtol=1e-4, atol=1e-4)
dist.destroy_process_group()
