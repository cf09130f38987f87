"""The head and the losses on its logits, which are never held for all positions at once.

N positions, H hidden size, V rows of the head with padding, t tensor parallel ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import custom_op

from molmo2_nemo.config.schema import positions_per_chunk


def head_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
    reduce_input_grad: bool,
    fused: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cross entropy and squared log-partition of each position, float32 [N] each, both differentiable.

    hidden: [N, H], the same on all tensor parallel ranks. weight: [V / t, H], this rank's rows of the head; rows at
    `vocab_size` and above (padding) have no probability. labels: int64 [N], below vocab_size.
    reduce_input_grad: sum the gradient of `hidden` over the tensor parallel ranks here; False where the caller's
    gather does it. The squared log-partition is the z-loss (PaLM, arXiv 2204.02311, section 5) without its factor.

    Logits are made for a chunk of positions at a time, in the forward pass and again in the backward pass. fused: by a
    kernel each that reads them once, and in the backward pass writes their gradient over them (kernels.py).
    """
    return _HeadLosses.apply(hidden, weight, labels, vocab_size, tp_group, reduce_input_grad, fused)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, vocab_size, tp_group, reduce_input_grad, fused):
        ranks, width = tp_group.size(), weight.shape[0]
        first = tp_group.rank() * width
        own = max(0, min(width, vocab_size - first))  # rows that are not padding
        index = labels - first
        index = torch.where((index >= 0) & (index < own), index, -1)  # -1: on another rank
        log_partition = hidden.new_empty(len(hidden), dtype=torch.float32)
        of_label = hidden.new_empty(len(hidden), dtype=torch.float32)
        for part in _chunks(len(hidden), width, fused):
            largest, total, chosen = statistics(_logits(hidden[part], weight, own, fused), index[part], own, fused)
            if ranks > 1:
                of_all = largest.clone()
                dist.all_reduce(of_all, op=dist.ReduceOp.MAX, group=tp_group)
                both = torch.stack((total * (largest - of_all).exp(), chosen))
                dist.all_reduce(both, group=tp_group)
                largest, (total, chosen) = of_all, both
            log_partition[part], of_label[part] = largest + total.log(), chosen
        ctx.save_for_backward(hidden, weight, index, log_partition)
        ctx.place = (own, tp_group, reduce_input_grad, fused)
        return log_partition - of_label, log_partition.square()

    @staticmethod
    def backward(ctx, grad_loss, grad_square):
        hidden, weight, index, log_partition = ctx.saved_tensors
        own, tp_group, reduce_input_grad, fused = ctx.place
        grad_hidden = torch.empty_like(hidden)
        # Summed over chunks in float32 whatever the weights are.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        scale = grad_loss + 2 * log_partition * grad_square
        grad_loss = grad_loss.contiguous()
        for part in _chunks(len(hidden), weight.shape[0], fused):
            grad = _logits(hidden[part], weight, own, fused)
            gradient_(grad, index[part], log_partition[part], scale[part], grad_loss[part], own, fused)
            grad = grad.to(weight.dtype)
            grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                _add_product(grad_weight, grad.t(), hidden[part])
            del grad  # before the next chunk's logits are made
        if reduce_input_grad and tp_group.size() > 1:
            dist.all_reduce(grad_hidden, group=tp_group)
        return grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype), *[None] * 5


def statistics(logits: Tensor, index: Tensor, own: int, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logit of each position, the sum of exp(logit - largest), and the logit at `index`; float32 [n].

    logits: [n, V / t], of which the first `own` count; without the kernel they are overwritten, and the others the
    smallest number. index: int64 [n]; -1: the logit is 0.
    """
    if fused:
        return logit_statistics(logits, index, own)
    largest = logits.amax(dim=1)
    chosen = torch.where(index >= 0, logits.gather(1, index.clamp(min=0)[:, None])[:, 0], 0.0)
    return largest, logits.sub_(largest[:, None]).exp_().sum(dim=1), chosen


def gradient_(
    logits: Tensor, index: Tensor, log_partition: Tensor, scale: Tensor, grad_loss: Tensor, own: int, fused: bool
) -> None:
    """Write their gradient over logits: scale x probability, less grad_loss at `index`; all float32 [n]."""
    if fused:
        return logit_gradient_(logits, index, log_partition, scale, grad_loss, own)
    logits.sub_(log_partition[:, None]).exp_().mul_(scale[:, None])
    logits.scatter_add_(1, index.clamp(min=0)[:, None], torch.where(index >= 0, -grad_loss, 0.0)[:, None])


@custom_op("molmo2::logit_statistics", mutates_args=())
def logit_statistics(logits: Tensor, index: Tensor, own: int) -> tuple[Tensor, Tensor, Tensor]:
    from molmo2_nemo.model import kernels

    found = _of_positions(logits)
    kernels.logit_statistics[(len(logits),)](logits, index, *found, logits.shape[1], own, BLOCK=4096, num_warps=8)
    return found


@logit_statistics.register_fake
def _(logits, index, own):
    return _of_positions(logits)


@custom_op("molmo2::logit_gradient", mutates_args=("logits",))
def logit_gradient_(
    logits: Tensor, index: Tensor, log_partition: Tensor, scale: Tensor, grad_loss: Tensor, own: int
) -> None:
    from molmo2_nemo.model import kernels

    (count, width), block = logits.shape, 4096
    kernels.logit_gradient[(count, -(-width // block))](
        logits, index, log_partition, scale, grad_loss, width, own, BLOCK=block, num_warps=8
    )


def _of_positions(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(logits.new_empty(len(logits), dtype=torch.float32) for _ in range(3))


def _chunks(count: int, width: int, fused: bool) -> list[slice]:
    size = positions_per_chunk(width, fused)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _logits(hidden: Tensor, weight: Tensor, own: int, fused: bool) -> Tensor:
    logits = hidden @ weight.t()
    if fused:
        return logits
    logits = logits.float()
    logits[:, own:] = torch.finfo(torch.float32).min
    return logits


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b inside of the product, where there is one for these types."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
