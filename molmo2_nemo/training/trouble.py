"""Steps that go wrong: a jump of the loss, and where a value stopped being finite."""

import math
import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model
from torch import Tensor

from molmo2_nemo import compat
from molmo2_nemo.checkpoint_dir import step_name
from molmo2_nemo.training.batches import INDICES, whole_crops
from molmo2_nemo.training.step import forward_backward, global_names

# Losses of earlier steps that a step's is compared with, and how many there must be.
WINDOW, ENOUGH = 64, 16
# A loss is a jump if it lies above the median of the window by more than this many standard deviations, which are
# estimated by the median absolute deviation, and by more than this share of the median.
DEVIATIONS, SHARE = 6.0, 0.15
# The median absolute deviation of a normal distribution is this part of its standard deviation.
MAD_OF_NORMAL = 0.6745
# Replicas that save their batch where no loss, but a gradient is not finite.
MAX_SAVED = 8


class SpikeAlarm:
    """Knows the losses of the last steps. The same on all ranks. losses: of steps before this start of the run."""

    def __init__(self, losses: Iterable[float] = ()):
        self.losses = deque(losses, maxlen=WINDOW)

    def is_jump(self, loss: float) -> bool:
        """Whether the loss of a step is far above those before. It is remembered, unless it is."""
        if len(self.losses) >= ENOUGH:
            median = statistics.median(self.losses)
            deviation = statistics.median(abs(x - median) for x in self.losses) / MAD_OF_NORMAL
            if loss > median + max(DEVIATIONS * deviation, SHARE * abs(median)):
                return True
        self.losses.append(loss)
        return False

    @property
    def usual(self) -> float:
        """The median of the losses before."""
        return statistics.median(self.losses)


def loss_of_step(weighted_losses: list[Tensor], total_weight: Tensor) -> float:
    """The step's mean cross entropy over all ranks. Collective.

    weighted_losses: what `forward_backward` returned, empty except on the last pipeline stage.
    """
    total = torch.zeros((), dtype=torch.float64, device=total_weight.device)
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        for weighted in weighted_losses:
            total += weighted[0].double().sum()
    dist.all_reduce(total)
    return float(total / total_weight)


def first_not_finite(model: list[DistributedDataParallel], batches: list[dict], total_weight: Tensor) -> str:
    """Where the forward pass of these micro-batches first gives a value that is not finite: one phrase. Collective.

    Runs it again, with a hook on every module. Of several ranks, the one of the earliest pipeline stage is believed.
    """
    found = []

    def watch(name):
        def hook(module, inputs, output):
            if not found and not all(_is_finite(tensor) for tensor in compat.tensors_in(output)):
                parts = ("its inputs already", "its inputs are finite")
                were_finite = all(_is_finite(tensor) for tensor in compat.tensors_in(inputs))
                found.append(f"the output of {name} ({parts[were_finite]})")

        return hook

    hooks = []
    for chunk in unwrap_model(model):
        for name, parameter in global_names(chunk):
            if not found and not _is_finite(parameter):
                found.append(f"the weights {name}")
        for name, module in chunk.named_modules():
            hooks.append(module.register_forward_hook(watch(name or type(module).__name__)))
    try:
        with torch.no_grad():
            forward_backward(model, batches, total_weight, forward_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    own = (parallel_state.get_pipeline_model_parallel_rank(), found[0]) if found else None
    everybodys = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, own)
    ranks = [rank for rank, place in enumerate(everybodys) if place is not None]
    if not ranks:
        return "no output of the forward pass: the gradient alone"
    first = min(ranks, key=lambda rank: (everybodys[rank][0], rank))
    more = f", and on {len(ranks) - 1} other rank(s)" if len(ranks) > 1 else ""
    return f"{everybodys[first][1]} on rank {first}{more}"


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether all values of all tensors are finite; true for none. One wait for the device."""
    return not tensors or bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.detach().isfinite().all())


def save_batches(
    folder: Path, step: int, batches: list[dict], is_finite: bool, replica: dist.ProcessGroup, names: list[str]
) -> list[str]:
    """Write the micro-batches of the replicas whose loss is not finite, for inspect_data --batch. Collective.

    is_finite: whether this rank's losses are. names: of the sources. Where all losses are finite, the first MAX_SAVED
    replicas write theirs. Returns the files' names; nothing where the disk cannot be written.
    """
    device = batches[0]["input_ids"].device
    flag = torch.tensor(not is_finite, dtype=torch.int32, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=replica)
    anybodys = flag.clone()
    dist.all_reduce(anybodys, op=dist.ReduceOp.MAX)
    number = parallel_state.get_data_parallel_rank()
    wanted = bool(flag) or (not anybodys and number < MAX_SAVED)
    written = None
    if wanted:
        batches = [batch | {"crops": whole_crops(batch)} if "crops" in batch else batch for batch in batches]
    if wanted and dist.get_rank() == dist.get_process_group_ranks(replica)[0]:
        path = folder / f"batch_{step_name(step)}_dp{number:03d}.pt"
        rows = [
            {key: x.cpu() if isinstance(x, Tensor) else x for key, x in batch.items() if key not in INDICES}
            for batch in batches
        ]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save({"step": step, "sources": names, "micro_batches": rows}, path)
            written = str(path)
        except OSError:
            pass
    everybodys = [None] * dist.get_world_size()
    dist.all_gather_object(everybodys, written)
    return [path for path in everybodys if path is not None]


def finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
