"""Micro-batches from the loader of each data-parallel replica to the ranks that need them."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from molmo2_nemo.config.schema import ModelConfig, vision_token_ids
from molmo2_nemo.data.packing import Batch
from molmo2_nemo.model.collectives import context_slice
from molmo2_nemo.model.mask import ROOT_SEGMENT, SEGMENTS_PER_EXAMPLE
from molmo2_nemo.model.vision import crops_of_ranks

# Needed on the first pipeline stage only, and most of a batch's bytes.
VISION_FIELDS = ("crops", "pooling", "patch_index")
FIELDS = (
    "input_ids",
    "labels",
    "loss_weights",
    "position_ids",
    "segment_ids",
    "vision_mask",
    "source_ids",
    "crops",
    "pooling",
)
# Made of a batch on the host: `indices_of`.
INDICES = ("patch_index", "loss_index")
# Stays on the host, on every rank: the model reads its numbers, and would wait for a GPU.
HOST_FIELD = "vision_units"

# What a micro-batch costs, in the order of `work_of`: arguments of flops.forward_flops.
WORK = ("crops", "visual_tokens", "pooled_patches", "tokens", "attended", "loss_tokens")


def work_of(batch: Batch) -> Tensor:
    """Counts of a micro-batch, float64 [len(WORK)]."""
    return torch.tensor(
        [
            len(batch.crops),
            len(batch.pooling),
            (batch.pooling >= 0).sum(),
            (batch.segment_ids >= 0).sum(),
            attended_pairs(batch.segment_ids, batch.vision_mask),
            (batch.loss_weights > 0).sum(),
        ],
        dtype=torch.float64,
    )


def attended_pairs(segment_ids: Tensor, vision_mask: Tensor) -> int:
    """How many pairs of query and key the mask lets through in packed rows (model/mask.py), without padding.

    segment_ids: int64 [B, S]; vision_mask: bool [B, S], true in roots or plain conversations alone.
    """
    pairs = 0
    for segments, vision in zip(segment_ids, vision_mask):
        numbers, lengths = torch.unique(segments[segments >= 0], return_counts=True)
        examples = numbers // SEGMENTS_PER_EXAMPLE
        is_root = numbers % SEGMENTS_PER_EXAMPLE == ROOT_SEGMENT
        pairs += int((lengths * (lengths + 1) // 2).sum())
        # Branches see their root as well.
        roots = torch.zeros(int(examples[-1]) + 1 if len(examples) else 0, dtype=torch.int64)
        roots[examples[is_root]] = lengths[is_root]
        pairs += int((lengths * roots[examples])[~is_root].sum())
        # Vision tokens see later ones of their example, too.
        _, visual = torch.unique(segments[vision] // SEGMENTS_PER_EXAMPLE, return_counts=True)
        pairs += int((visual * (visual - 1) // 2).sum())
    return pairs


def indices_of(input_ids: Tensor, loss_weights: Tensor, patch_id: int) -> dict[str, Tensor]:
    """Where rows have visual tokens and losses, in hidden states [S, B, H] with the first two dimensions as one.

    Of int64 and float32 [B, S]: `patch_index`, int64 [2, T], the places of <im_patch> and which of the rows' visual
    tokens each of them is; `loss_index`, int64 [N], the places whose weight is not 0. Places ascend. With boolean
    masks in their place the host would wait for a GPU to count, in each forward and again in each backward pass.
    """
    is_patch = input_ids == patch_id
    number = is_patch.flatten().cumsum(0).view_as(is_patch) - 1
    places = is_patch.t().flatten().nonzero()[:, 0]
    losses = (loss_weights > 0).t().flatten().nonzero()[:, 0]
    return {"patch_index": torch.stack((places, number.t().flatten()[places])), "loss_index": losses}


def edges_of(indices: dict[str, Tensor], rows: int, seq_length: int, ranks: int) -> dict[str, list[int]]:
    """Where the part of each of so many context parallel ranks begins in `indices_of`, and where the last one ends."""
    places = torch.tensor([rank * seq_length // ranks * rows for rank in range(ranks + 1)])
    of_patches, of_losses = indices["patch_index"][0].cpu().contiguous(), indices["loss_index"].cpu()
    found = (torch.searchsorted(of_patches, places), torch.searchsorted(of_losses, places))
    return {name: edges.tolist() for name, edges in zip(INDICES, found)}


def own_indices(batch: dict, edges: dict[str, list[int]]) -> dict[str, Tensor]:
    """This context parallel rank's part of the batch's indices; places count from where its part of the rows begins."""
    group = parallel_state.get_context_parallel_group()
    rows, seq_length = batch["input_ids"].shape
    first = context_slice(seq_length, group).start * rows
    own = {}
    for name in INDICES:
        if name in batch:
            begin, end = edges[name][group.rank()], edges[name][group.rank() + 1]
            own[name] = batch[name][..., begin:end]
    own["loss_index"] = own["loss_index"] - first
    if "patch_index" in own:
        places, tokens = own["patch_index"]
        own["patch_index"] = torch.stack((places - first, tokens))
    return own


def own_part(batch: dict, model: ModelConfig) -> dict:
    """What this rank needs of a micro-batch of FIELDS and HOST_FIELD that it has whole, as BatchSource hands it out.

    For checks and benchmarks, which make their rows on every rank. Returns what is such a part already as it is.
    """
    if "loss_index" in batch:
        return batch
    indices = indices_of(batch["input_ids"], batch["loss_weights"], vision_token_ids(model)["image_patch_id"])
    cp_size = parallel_state.get_context_parallel_world_size()
    edges = edges_of(indices, *batch["input_ids"].shape, cp_size)
    group = parallel_state.get_tensor_and_context_parallel_group()
    units = batch[HOST_FIELD].cpu()
    counts = crops_of_ranks(units, group.size())
    first = sum(counts[: group.rank()])
    crops = batch["crops"][first : first + counts[group.rank()]]
    return {**batch, HOST_FIELD: units, "crops": crops} | own_indices(batch | indices, edges)


def whole_crops(batch: dict) -> Tensor:
    """All crops of a micro-batch of which each rank holds its share. Collective over the ranks of the first stage.

    On the first of them, on the host; none on the others.
    """
    group = parallel_state.get_tensor_and_context_parallel_group()
    counts = crops_of_ranks(batch[HOST_FIELD], group.size())
    if group.size() == 1 or not sum(counts):
        return batch["crops"].cpu()
    own = batch["crops"].to(batch["input_ids"].device)
    nothing, rank = [0] * group.size(), group.rank()
    whole = own.new_empty((0 if rank else sum(counts), *own.shape[1:]))
    to_first = [len(own), *nothing[1:]]
    dist.all_to_all_single(whole, own.contiguous(), nothing if rank else counts, to_first, group=group)
    return whole.cpu()


def waiting(crops: Tensor) -> Tensor:
    """A copy in host memory, from which crops go to the device for their forward pass without anybody waiting."""
    pinned = torch.cuda.is_available()
    return torch.empty(crops.shape, dtype=crops.dtype, pin_memory=pinned).copy_(crops, non_blocking=pinned)


class BatchSource:
    """Hands every rank of a replica its part of the same micro-batch. One rank of the replica holds the loader.

    loader: an iterator of Batch on that rank, None elsewhere. group: the replica's ranks. model: whose rows these are.
    """

    def __init__(self, loader, group: dist.ProcessGroup, device: str, model: ModelConfig):
        self.loader, self.group, self.device = loader, group, device
        self.patch_id = vision_token_ids(model)["image_patch_id"]
        self.source = dist.get_process_group_ranks(group)[0]
        self.is_source = dist.get_rank() == self.source
        self.first_stage = parallel_state.is_pipeline_first_stage()
        self.vision_group = parallel_state.get_tensor_and_context_parallel_group()

    def next(self) -> dict | None:
        """The next micro-batch as a dict of FIELDS, HOST_FIELD and INDICES; None when the loader has ended. Collective.

        INDICES are those of this rank's part of the rows, and crops, in host memory, those that it encodes; everything
        else is there whole.
        On the loader's rank also `counters` and `errors`, which metrics.DataReport sums over all ranks, `work`,
        and the samples' `keys`, `examples` and `outcomes`.
        """
        batch = next(self.loader, None) if self.is_source else None
        told, result, tensors = [None, None, None], {}, {}
        if self.is_source and batch is not None:
            indices = indices_of(batch.input_ids, batch.loss_weights, self.patch_id)
            tensors = {name: getattr(batch, name) for name in FIELDS} | indices
            shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
            cp_size = parallel_state.get_context_parallel_world_size()
            told = [shapes, getattr(batch, HOST_FIELD), edges_of(indices, *batch.input_ids.shape, cp_size)]
            result = {"counters": batch.counters, "errors": batch.errors, "work": work_of(batch)}
            result |= {"keys": batch.__key__, "examples": batch.examples, "outcomes": batch.outcomes}
        if self.group.size() > 1:
            dist.broadcast_object_list(told, self.source, group=self.group)
        shapes, result[HOST_FIELD], edges = told
        if shapes is None:
            return None
        for name, (shape, dtype) in shapes.items():
            vision = name in VISION_FIELDS
            if name == "crops" or (vision and not self.first_stage):
                continue
            if self.is_source:
                tensor = tensors[name].to(self.device, non_blocking=True)
            else:
                tensor = torch.empty(shape, dtype=dtype, device=self.device)
            if self.group.size() > 1:
                # The loader's rank is the first of the replica, hence of its first stage too.
                dist.broadcast(tensor, self.source, group=self.vision_group if vision else self.group)
            result[name] = tensor
        if self.first_stage:
            result["crops"] = self._own_crops(tensors.get("crops"), shapes["crops"], result[HOST_FIELD])
        return result | own_indices(result, edges)

    def _own_crops(self, crops: Tensor | None, shape_and_type: tuple, vision_units: Tensor) -> Tensor:
        """The crops that this rank encodes. crops: all of them, on the loader's rank. Collective on the first stage.

        They wait in host memory for their forward pass, since a step's would fill a GPU. Those of other ranks pass
        through the GPU of the loader's rank, its own do not.
        """
        ranks, rank = self.vision_group.size(), self.vision_group.rank()
        counts = crops_of_ranks(vision_units, ranks)
        if ranks == 1:
            return crops
        (_, *one), dtype = shape_and_type
        sent, received = [0] * ranks, [0] * ranks
        others = torch.empty((0, *one), dtype=dtype, device=self.device)
        if self.is_source:  # the first rank of the replica, hence of its first stage, too
            own, others = crops.split((counts[0], sum(counts[1:])))
            others, sent = others.to(self.device, non_blocking=True), [0, *counts[1:]]
        else:
            own = torch.empty((counts[rank], *one), dtype=dtype, device=self.device)
            received[0] = counts[rank]
        if sum(counts[1:]):
            arriving = others[:0] if self.is_source else own
            dist.all_to_all_single(arriving, others, received, sent, group=self.vision_group)
        return waiting(own)
