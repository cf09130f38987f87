"""Puts a device without kernels in the place of the GPU, for this process.

torch's own backend for others' devices is the device: autograd then needs no driver. Process groups are torch's fake
ones. Attention kernels, which torch would choose by the device, are stood in for by what they keep and make.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.overrides import TorchFunctionMode

from molmo2_nemo import compat, cpu, parallel
from molmo2_nemo.model import attention, mask
from molmo2_nemo.rehearsal.recorder import Recorder
from molmo2_nemo.training.batches import attended_pairs

MASK_BLOCK = 128  # FlexAttention's blocks of the mask (torch.nn.attention.flex_attention.create_block_mask)


class Readout(TorchFunctionMode):
    """`torch.tensor([tensor, ...])`, which torch cannot do with fake tensors, by a number for each of them.

    Also remembers which memory of the host is pinned: pinning itself needs a driver.
    """

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.tensor:
            args = compat.with_values(args, lambda tensor: tensor.item() if compat.is_fake(tensor) else tensor)
        result = function(*args, **(kwargs or {}))
        if kwargs and kwargs.get("pin_memory"):
            self.recorder.pin(result)
        return result


def install(recorder: Recorder, rank: int, world_size: int) -> None:
    """For the rest of this process: torch.cuda is the rehearsed device, torch.distributed the fake one."""
    compat.register_rehearsal_device()
    cpu.install(torch.device(compat.REHEARSAL_DEVICE, 0))
    # Everything is made on the device (`made_there`), and torch cannot move the parameters of a fake module.
    torch.nn.Module.to = lambda self, *args, **kwargs: self
    # One thread for both passes: the order of operations is that of the code, and the recorder sees them all.
    torch.autograd.set_multithreading_enabled(False)
    compat.use_fake_process_groups(rank, world_size)
    new_group = dist.new_group

    def new_fake_group(*args, **kwargs):
        return new_group(*args, **{**kwargs, "backend": "fake"})

    dist.new_group = new_fake_group
    dist.get_backend = lambda group=None: "nccl"

    def gather_objects(found: list, own, group=None) -> None:
        recorder.note_call("all_gather of objects", group)
        found[:] = [own] * len(found)  # all ranks are taken to have what this one has

    dist.all_gather_object = gather_objects
    dist.barrier = lambda group=None, **kwargs: recorder.note_call("barrier", group)
    torch.cuda.synchronize = lambda device=None: recorder.note_sync()

    class Stream(cpu.Inert):
        """A stream or an event, of which the host may wait for the end."""

        def synchronize(self):
            recorder.note_sync()

        def record_event(self, event=None):
            return Stream()

    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: Stream()
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # an H100's; asked by torch.distributed.broadcast
    compat.read_fake_tensors_by(recorder.to_list)
    compat.fake_tensors_are_cuda()
    stand_in_for_attention(recorder)
    # The fused kernels have shape rules of their own: the library behind them need not be installed here.
    parallel.has_liger_kernel = lambda: True


def made_there(function):
    """The same function with the rehearsed device as the default for new tensors."""

    def call(*args, **kwargs):
        with torch.device(compat.REHEARSAL_DEVICE):
            return function(*args, **kwargs)

    return call


class Blocks(BlockMask):
    """A mask of FlexAttention without its rule. tensors: its indices; pairs: how many it lets through."""

    def __init__(self, tensors: list[Tensor], pairs: float):
        self.tensors, self.pairs = tensors, pairs


def stand_in_for_attention(recorder: Recorder) -> None:
    """Compiled kernels by their inputs, outputs, and what they keep for the backward pass: FlexAttention, its mask,
    torch's fused attention. What chooses among them is the model's own code."""

    def block_mask(segment_ids, vision_mask, query_offset=0, num_queries=None):
        rows, S = segment_ids.shape
        queries = S if num_queries is None else num_queries
        blocks, down = -(-S // MASK_BLOCK), -(-queries // MASK_BLOCK)
        # Indices of partly and wholly visible blocks, by rows and by columns (BlockMask's attributes).
        tensors = [
            torch.empty(rows, 1, a, b, dtype=torch.int32, device="cuda")
            for a, b in [(down, blocks)] * 2 + [(blocks, down)] * 2
        ]
        with compat.without_modes():
            pairs = attended_pairs(*map(recorder.values_of, (segment_ids, vision_mask)))
        return Blocks(tensors, pairs * queries / S)

    def flex_attention(query, key, value, block_mask, scale, enable_gqa, kernel_options):
        return FusedAttention.apply(query, key, value, block_mask.pairs, recorder)

    def scaled_dot_product_attention(query, key, value, attn_mask=None, **kwargs):
        pairs = len(query) * query.shape[2] * key.shape[2]
        return FusedAttention.apply(query, key, value, pairs, recorder)

    mask.block_mask = block_mask
    attention.compiled_flex_attention = lambda: flex_attention
    F.scaled_dot_product_attention = scaled_dot_product_attention


class FusedAttention(torch.autograd.Function):
    """What flash and flex attention hold: inputs, output and log-sum-exp; in the backward pass one number a query."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, pairs: float, recorder: Recorder) -> Tensor:
        """[B, N, Q, D] queries, [B, G, K, D] keys and values -> [B, N, Q, D]. pairs: that the mask lets through."""
        B, N, Q, D = query.shape
        ctx.pairs, ctx.recorder, ctx.part = pairs, recorder, recorder.places.here(recorder.phase)[0] + " attention"
        out = query.new_empty(B, Q, N, D).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(B, N, Q, dtype=torch.float32))
        recorder.product(4 * pairs * N * D, ctx.part)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, log_sum = ctx.saved_tensors
        torch.empty_like(log_sum)
        ctx.recorder.product(8 * ctx.pairs * query.shape[1] * query.shape[3], ctx.part)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None
