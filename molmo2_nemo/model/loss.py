"""The head and the losses on its logits, which are never held for all positions at once.

N positions, H hidden size, V rows of the head with padding, t tensor parallel ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from molmo2_nemo.config.schema import LOGITS_PER_CHUNK


def head_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
    reduce_input_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Cross entropy and squared log-partition of each position, float32 [N] each, both differentiable.

    hidden: [N, H], the same on all tensor parallel ranks. weight: [V / t, H], this rank's rows of the head; rows at
    `vocab_size` and above (padding) have no probability. labels: int64 [N], below vocab_size.
    reduce_input_grad: sum the gradient of `hidden` over the tensor parallel ranks here; False where the caller's
    gather does it. The squared log-partition is the z-loss (PaLM, arXiv 2204.02311, section 5) without its factor.

    Logits are made for a chunk of positions at a time, in the forward pass and again in the backward pass.
    """
    return _HeadLosses.apply(hidden, weight, labels, vocab_size, tp_group, reduce_input_grad)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, vocab_size, tp_group, reduce_input_grad):
        ranks, width = tp_group.size(), weight.shape[0]
        first = tp_group.rank() * width
        own = max(0, min(width, vocab_size - first))  # rows that are not padding
        log_partition = hidden.new_empty(len(hidden), dtype=torch.float32)
        of_label = hidden.new_empty(len(hidden), dtype=torch.float32)
        for part in _chunks(len(hidden), width):
            logits = _logits(hidden[part], weight, own)
            largest = logits.amax(dim=1)
            if ranks > 1:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=tp_group)
            index, is_own = _local(labels[part], first, own)
            chosen = torch.where(is_own, logits.gather(1, index[:, None])[:, 0], 0.0)
            total = logits.sub_(largest[:, None]).exp_().sum(dim=1)
            if ranks > 1:
                both = torch.stack((total, chosen))
                dist.all_reduce(both, group=tp_group)
                total, chosen = both
            log_partition[part], of_label[part] = largest + total.log(), chosen
        ctx.save_for_backward(hidden, weight, labels, log_partition)
        ctx.place = (first, own, tp_group, reduce_input_grad)
        return log_partition - of_label, log_partition.square()

    @staticmethod
    def backward(ctx, grad_loss, grad_square):
        hidden, weight, labels, log_partition = ctx.saved_tensors
        first, own, tp_group, reduce_input_grad = ctx.place
        grad_hidden = torch.empty_like(hidden)
        # Summed over chunks in float32 whatever the weights are.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        scale = grad_loss + 2 * log_partition * grad_square
        for part in _chunks(len(hidden), weight.shape[0]):
            grad = _logits(hidden[part], weight, own).sub_(log_partition[part, None]).exp_().mul_(scale[part, None])
            index, is_own = _local(labels[part], first, own)
            grad.scatter_add_(1, index[:, None], torch.where(is_own, -grad_loss[part], 0.0)[:, None])
            grad = grad.to(weight.dtype)
            grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.t() @ hidden[part]
        if reduce_input_grad and tp_group.size() > 1:
            dist.all_reduce(grad_hidden, group=tp_group)
        return grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype), *[None] * 4


def _chunks(count: int, width: int) -> list[slice]:
    size = max(1, LOGITS_PER_CHUNK // width)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _logits(hidden: Tensor, weight: Tensor, own: int) -> Tensor:
    logits = (hidden @ weight.t()).float()
    logits[:, own:] = torch.finfo(torch.float32).min
    return logits


def _local(labels: Tensor, first: int, own: int) -> tuple[Tensor, Tensor]:
    """Columns of labels on this rank, 0 where they are on another, and which are here."""
    index = labels - first
    is_own = (index >= 0) & (index < own)
    return torch.where(is_own, index, 0), is_own
