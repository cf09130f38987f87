"""What each rank of a group holds, and collectives with a backward for tensors that differ between ranks."""

import torch
import torch.distributed as dist
from torch import Tensor


def context_slice(seq_length: int, cp_group: dist.ProcessGroup) -> slice:
    """The part of a row that this context parallel rank works on: contiguous, the same length on every rank."""
    rank, size = cp_group.rank(), cp_group.size()
    return slice(rank * seq_length // size, (rank + 1) * seq_length // size)


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Exchange dim-0 slices of a [ranks, ...] tensor."""
    return _AllToAll.apply(x, group)


def all_gather(x: Tensor, group: dist.ProcessGroup, copies: int = 1) -> Tensor:
    """[n, ...] on every rank -> [ranks x n, ...].

    Backward sums the gradients of all ranks and keeps the own slice. copies: how many ranks bring the same gradient
    (tensor parallel ranks compute the same loss); the sum is divided by it.
    """
    return _AllGather.apply(x, group, copies)


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the group, forward and backward: every rank's result depends on every rank's input."""
    return _AllReduce.apply(x, group)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        # The exchange is its own inverse.
        return _AllToAll.apply(grad.contiguous(), ctx.group), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, copies):
        ctx.group, ctx.copies = group, copies
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        own = grad.new_empty((len(grad) // ctx.group.size(), *grad.shape[1:]))
        # The sum of the own slice alone: half of an all-reduce's traffic.
        dist.reduce_scatter_tensor(own, grad, group=ctx.group)
        return own / ctx.copies, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return _AllReduce.apply(grad, ctx.group), None
