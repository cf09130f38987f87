"""Micro-batches from the loader of each data-parallel replica to the ranks that need them."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state

# Read on the first pipeline stage only; pixels are most of a batch.
VISION_FIELDS = ("crops", "pooling", "vision_units")
FIELDS = (
    "input_ids", "labels", "loss_weights", "position_ids", "segment_ids", "vision_mask", "source_ids", *VISION_FIELDS,
)  # fmt: skip


class BatchSource:
    """Hands every rank of a replica the same micro-batch. One rank of the replica holds the loader.

    loader: an iterator of Batch on that rank, None elsewhere. group: the replica's ranks.
    """

    def __init__(self, loader, group: dist.ProcessGroup, device: str):
        self.loader, self.group, self.device = loader, group, device
        self.source = dist.get_process_group_ranks(group)[0]
        self.is_source = dist.get_rank() == self.source
        self.first_stage = parallel_state.is_pipeline_first_stage()
        self.vision_group = parallel_state.get_tensor_and_context_parallel_group()

    def next(self) -> dict | None:
        """The next micro-batch as a dict of FIELDS; None when the loader has ended. Collective.

        On the loader's rank also `counters` and `errors`: metrics.DataReport sums them over all ranks.
        """
        batch = next(self.loader, None) if self.is_source else None
        shapes, result = [None], {}
        if self.is_source and batch is not None:
            shapes = [{name: (tuple(getattr(batch, name).shape), getattr(batch, name).dtype) for name in FIELDS}]
            result = {"counters": batch.counters, "errors": batch.errors}
        if self.group.size() > 1:
            dist.broadcast_object_list(shapes, self.source, group=self.group)
        if shapes[0] is None:
            return None
        for name, (shape, dtype) in shapes[0].items():
            vision = name in VISION_FIELDS
            if vision and not self.first_stage:
                continue
            if self.is_source:
                tensor = getattr(batch, name).to(self.device)
            else:
                tensor = torch.empty(shape, dtype=dtype, device=self.device)
            if self.group.size() > 1:
                # The loader's rank is the first of the replica, hence of its first stage too.
                dist.broadcast(tensor, self.source, group=self.vision_group if vision else self.group)
            result[name] = tensor
        return result
