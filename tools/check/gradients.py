"""Gradients of a whole model, gathered from the ranks of any layout, and how far two of them are apart."""

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.utils import unwrap_model

from molmo2_nemo import checkpoint_dir
from molmo2_nemo.hf import convert
from molmo2_nemo.training.checkpoint import save_sharded
from molmo2_nemo.training.step import sharded_model_state


def make_shards_whole(model) -> None:
    """With a distributed optimizer a rank has reduced only its shard of each gradient buffer: gather the rest."""
    for buffer in (buffer for chunk in model for buffer in chunk.buffers):
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        for bucket in buffer.buckets:
            shards = list(bucket.grad_data.chunk(group.size()))
            own = shards[group.rank()].clone()
            gathered = [torch.empty_like(own) for _ in shards]
            dist.all_gather(gathered, own, group=group)
            bucket.grad_data.copy_(torch.cat(gathered))


def released_gradients(model, architecture, scratch: Path) -> dict[str, torch.Tensor]:
    """Gradients of all ranks under released names, through the same code that saves and exports weights.

    On rank 0; nothing on the others.
    """
    gradients = {id(p): p.main_grad for chunk in unwrap_model(model) for p in chunk.parameters()}
    state = sharded_model_state(model)
    for entry in (entry for chunk in state.values() for entry in chunk.values()):
        if isinstance(entry, ShardedTensor | ShardedTensorFactory) and id(entry.data) in gradients:
            entry.data = gradients[id(entry.data)].view_as(entry.data).clone()
    if dist.get_rank() == 0:
        checkpoint_dir.aside(scratch / "gradients")
    dist.barrier()
    folder = scratch / ".gradients.tmp"
    save_sharded(state, folder)
    return dict(convert.released_tensors(folder, architecture)) if dist.get_rank() == 0 else {}


def difference(ours, theirs, floor: float = 0.0) -> float:
    """Norm of the difference over the norm of `theirs`, which counts as `floor` at least."""
    return ((ours - theirs).norm() / max(theirs.norm().item(), floor, 1e-30)).item()
