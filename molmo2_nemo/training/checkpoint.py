"""Training checkpoints: model, optimizer, step and loader state, for any layout to reload."""

import queue
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint import CheckpointException

from molmo2_nemo import checkpoint_dir
from molmo2_nemo.config import ConfigError
from molmo2_nemo.training.step import load_model_state, refuse_other_architecture, sharded_model_state

# Optimizer shards of the distributed optimizer are gathered to whole parameters, so that any layout can read them.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def _state(model, optimizer, is_loading: bool) -> dict:
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            # The last update's weights are not gathered before the next forward pass asks for them.
            with torch.no_grad():
                chunk.start_param_sync(force_sync=True)
    model_state = sharded_model_state(model)
    return {
        **model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=_METADATA),
    }


def save_sharded(state: dict, folder: Path) -> None:
    """Megatron's distributed save of a sharded state dict into an empty folder. Collective."""
    # Megatron collects what its writer threads report in a queue of a manager process: seconds to start, and it would
    # outlive a rank that is killed. The threads are this process's own, so a plain queue will do.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(state, str(folder))


def save(
    folder: Path, step: int, model, optimizer, loader_state, info: dict, config_yaml: str, keep_last: int,
    keep_every: int = 0,
) -> tuple[Path, str | None]:  # fmt: skip
    """Write step_XXXXXXXX aside and publish it by rename. Collective.

    All but the last `keep_last` are removed, those of steps that are multiples of `keep_every` stay. loader_state:
    this data-parallel replica's, on the rank that has the loader, else None. Returns the directory and None, or why it
    could not be written: then the checkpoints before it are as they were.
    """
    final = folder / checkpoint_dir.step_name(step)
    state = _state(model, optimizer, is_loading=False)
    failure, temporary = _no_room(folder, state), None
    if failure is None:
        failure, temporary = _on_rank_0(lambda: checkpoint_dir.aside(final))
    if failure is not None:
        return final, failure

    def write():
        save_sharded(state, temporary)
        if loader_state is not None:
            (temporary / f"loader_dp{parallel_state.get_data_parallel_rank():03d}.state").write_bytes(loader_state)

    def publish():
        (temporary / "config.yaml").write_text(config_yaml)
        checkpoint_dir.publish(temporary, final, unwrap_model(model)[0].model, {"step": step, **info})
        kept = checkpoint_dir.find_checkpoints(folder)[:-keep_last]
        for old in kept:
            if not keep_every or checkpoint_dir.step_of(old) % keep_every:
                shutil.rmtree(old)

    failure = _failure(write)
    if failure is None:
        failure, _ = _on_rank_0(publish)
    if failure is not None:
        failure += f" ({shutil.disk_usage(folder).free / 2**20:,.0f} MiB free in {folder})"
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    dist.barrier()
    return final, failure


def _no_room(folder: Path, state: dict) -> str | None:
    """A sentence if the disk has less room than the state takes. Collective."""
    tensors = [x for x in nested_values(state) if isinstance(x, ShardedTensor) and is_main_replica(x.replica_id)]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    needed = torch.tensor(sum(x.data.nbytes for x in tensors if x.data is not None), dtype=torch.int64, device=device)
    dist.all_reduce(needed)

    def free():
        folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(folder).free

    failure, room = _on_rank_0(free)
    if failure is None and room < int(needed):
        return f"{folder} has {room / 2**20:,.0f} MiB free, a checkpoint takes {int(needed) / 2**20:,.0f} MiB: make room"
    return failure


def _failure(action: Callable[[], None]) -> str | None:
    """Do it on every rank; None, or what went wrong on the first rank where something did. Collective."""
    failure = None
    try:
        action()
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        failure = f"rank {dist.get_rank()}: {_last_line(error)}"
    failures = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    return next((failure for failure in failures if failure is not None), None)


def _on_rank_0(action: Callable[[], Any]) -> tuple[str | None, Any]:
    """(what went wrong, or None; the result), on all ranks. Collective."""
    outcome = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[1] = action()
        except OSError as error:
            outcome[0] = str(error)
    dist.broadcast_object_list(outcome)
    return outcome[0], outcome[1]


def load(checkpoint: Path, model, optimizer) -> dict:
    """Continue from a training checkpoint of any layout. Collective. Returns its marker.

    Raises ConfigError when it is damaged, of another architecture, or holds weights only.
    """
    marker = checkpoint_dir.read_marker(checkpoint)
    architecture = unwrap_model(model)[0].model
    refuse_other_architecture(checkpoint_dir.read_model(checkpoint), architecture, checkpoint)
    try:
        loaded = dist_checkpointing.load(_state(model, optimizer, is_loading=True), str(checkpoint))
    except Exception as error:
        raise ConfigError(
            f"checkpoint {checkpoint} cannot be continued with these settings ({_last_line(error)}): use train.init_from "
            "to start from its weights alone."
        ) from error
    load_model_state(model, loaded)
    optimizer.load_state_dict(loaded["optimizer"])
    return marker


def loader_states(checkpoint: Path) -> list[Path]:
    """The loader states of all data-parallel replicas that it was saved with, in their order."""
    return sorted(checkpoint.glob("loader_dp*.state"), key=lambda path: (len(path.name), path.name))


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
