"""Training checkpoints: model, optimizer, step and loader state, for any layout to reload."""

import contextlib
import hashlib
import queue
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint import CheckpointException, FileSystemReader

from molmo2_nemo import checkpoint_dir, compat, lora_base
from molmo2_nemo.config.components import is_adapter
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.files import missing_room, sha256_of, write_json
from molmo2_nemo.training.optimizer import load_optimizer_state
from molmo2_nemo.training.optimizer_shards import PREFIX
from molmo2_nemo.training.step import load_model_state, refuse_other_architecture, sharded_model_state
from molmo2_nemo.training.uploads import Uploads

# Tensors of a distributed optimizer have the keys and shapes of the parameters, so that any layout can read them.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def _state(model, optimizer, marker: dict, is_loading: bool) -> dict:
    """Sharded state dict of the model and its optimizer. marker: of the checkpoint; it says whether adapters are all
    that it holds, which this rank's modules do not: a pipeline stage may have none."""
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            # The last update's weights are not gathered before the next forward pass asks for them.
            with torch.no_grad():
                chunk.start_param_sync(force_sync=True)
    # Beside adapters, the weights are frozen and stay where they are (lora_base.py).
    model_state = sharded_model_state(model, is_adapter if lora_base.KEY in marker else lambda name: True)
    state = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=METADATA)
    return {**model_state, "optimizer": state}


class _SaveStrategy(TorchDistSaveShardedStrategy):
    """Megatron's strategy, which keeps what it has planned: the writer, and the index on rank 0."""

    def _get_save_and_finalize_callbacks(self, writer, planned, strategy):
        self.writer, self.metadata = planned[0], planned[1]
        return super()._get_save_and_finalize_callbacks(writer, planned, strategy)


class ShardedSave:
    """One distributed save of a sharded state dict into a folder.

    Megatron plans it; its asynchronous callers would then fork or spawn a process. Here a thread of the rank writes:
    it can neither outlive the rank nor inherit its signal handlers and GPU context, and it holds the interpreter for
    milliseconds at a time, since torch writes tensors without it.
    """

    def __init__(
        self,
        state: dict,
        folder: Path,
        asynchronous: bool,
        checksums: dict[str, str] | None = None,
    ):
        """Plan, and write, or let the thread write copies in host memory. Collective.

        checksums: of other files that this rank has written, handed on with those of the state dict's.
        """
        # Megatron collects what its writer threads report in a queue of a manager process: seconds to start, and it
        # would outlive a rank that is killed. The threads are this process's own, so a plain queue will do.
        compat.use_results_queue(queue.Queue())
        self.folder, self.plan = folder, _SaveStrategy()
        live = {x.data.untyped_storage().data_ptr() for x in _tensors(state) if x.data.is_cpu}
        request = dist_checkpointing.save(
            state, str(folder), self.plan, async_sharded_save=True, async_strategy="mcore"
        )
        self.thread, self.failure, self.checksums = None, None, dict(checksums or {})
        if request.async_fn is None:
            return  # nothing to write on this rank
        rank, buckets, results = request.async_fn_args
        paths = [Path(path) for path, *_ in buckets]

        def write(staged):
            request.async_fn(rank, staged, results)
            try:
                self.checksums.update({path.name: sha256_of(path) for path in paths})
            except OSError as error:
                self.failure = str(error)

        staged = request.preload_fn()
        if asynchronous:
            staged = [_copied(bucket, live) for bucket in staged]
        # The writer only counts them from here on; the tensors are the thread's.
        self.plan.writer.write_buckets = [path for path, *_ in buckets]
        self.thread = threading.Thread(target=write, args=(staged,), daemon=True)
        self.thread.start()
        if not asynchronous:
            self.thread.join()

    def written(self) -> bool:
        """Whether all ranks have written theirs. Collective."""
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        busy = self.thread is not None and self.thread.is_alive()
        busy = torch.tensor(busy, dtype=torch.int32, device=device)
        dist.all_reduce(busy, op=dist.ReduceOp.MAX)
        return not busy

    def wait(self) -> None:
        """For this rank's thread."""
        if self.thread is not None:
            self.thread.join()

    def finish(self, last: Callable[[dict[str, str]], None] = lambda checksums: None) -> str | None:
        """Wait for the ranks, write the index and, on rank 0, do the `last` thing. Collective.

        last: gets the SHA-256 of what the ranks have written, by file name.

        Returns None, or what went wrong on the first rank where something did. Megatron's own way to finish leaves the
        other ranks in a collective when rank 0 cannot write.
        """
        self.wait()
        results = self.plan.writer.retrieve_write_results()
        failure = None if self.failure is None else f"rank {dist.get_rank()}: {self.failure}"
        if not isinstance(results, list):
            failure, results = f"rank {dist.get_rank()}: {_last_line(results[0])}", None
        reports = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object((failure, results, self.checksums), reports)

        def write_index():
            for failure, *_ in reports:
                if failure is not None:
                    raise OSError(failure)
            self.plan.writer.finish(self.plan.metadata, [results for _, results, _ in reports])
            save_config(CheckpointingConfig(self.plan.backend, self.plan.version), str(self.folder))
            last({name: checksum for *_, checksums in reports for name, checksum in checksums.items()})

        return _on_rank_0(write_index)[0]


def _copied(bucket: tuple, live: set[int]) -> tuple:
    """A bucket (path, name, (bytes, tensors)) staged in host memory, without tensors that training goes on with.

    live: addresses of their storages. Megatron copies from GPUs, and of what is in host memory the views alone.
    """
    path, name, (data, tensors) = bucket
    tensors = [(item, x.clone() if x.untyped_storage().data_ptr() in live else x) for item, x in tensors]
    return path, name, (data, tensors)


def save_sharded(state: dict, folder: Path) -> None:
    """Megatron's distributed save of a sharded state dict into an empty folder. Collective. Raises OSError."""
    failure = ShardedSave(state, folder, asynchronous=False).finish()
    if failure is not None:
        raise OSError(failure)


@dataclass
class Saved:
    """The result of a save. failure: why there is no checkpoint, or None; earlier checkpoints are not touched."""

    step: int
    path: Path
    failure: str | None
    held_up: float  # seconds that training waited
    seconds: float  # from the beginning to the end


@dataclass
class _Pending:
    step: int
    final: Path
    begun: float
    temporary: Path | None = None
    write: ShardedSave | None = None
    publish: Callable[[], None] | None = None
    needed: int = 0  # bytes
    failure: str | None = None
    held_up: float = 0.0


class Saver:
    """Writes checkpoints step_XXXXXXXX into `folder`, one at a time, under a temporary name until they are complete.

    Once one is complete, older ones are removed: all but the last `keep_last` complete ones and those of steps that are
    multiples of `keep_every`. What is damaged stays, as does what is newer, and neither counts: a run that has passed
    over a damaged checkpoint never removes a good one for it. asynchronous: the tensors are copied to host memory and
    written while training goes on. What `uploads` is reading stays until the next save. All methods are collective.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int,
        keep_every: int = 0,
        asynchronous: bool = False,
        uploads: Uploads | None = None,
    ):
        self.folder, self.keep_last, self.keep_every, self.asynchronous = folder, keep_last, keep_every, asynchronous
        self.uploads = uploads
        self.pending = None

    def begin(
        self,
        step: int,
        model,
        optimizer,
        loader_state: bytes | None,
        info: dict,
        config_yaml: str,
        is_best: bool = False,
    ) -> None:
        """Begin to save; `poll` or `finish` gives the result. The previous save must be finished.

        loader_state: this data-parallel replica's, on the rank that has the loader, else None. info: for the marker;
        with lora_base.KEY only adapters are saved. is_best: it takes the place of the best checkpoint
        (checkpoint_dir.BEST), which is never removed.
        """
        assert self.pending is None
        self.pending = now = _Pending(step, self.folder / checkpoint_dir.step_name(step), time.monotonic())
        state = _state(model, optimizer, info, is_loading=False)
        now.needed = _bytes_of(state)
        now.failure = _no_room(self.folder, now.needed)
        if now.failure is None:
            now.failure, now.temporary = _on_rank_0(lambda: self._aside(now.final))
        if now.failure is None:

            def write():
                checksums = {}
                if loader_state is not None:
                    name = f"loader_dp{parallel_state.get_data_parallel_rank():03d}.state"
                    (now.temporary / name).write_bytes(loader_state)
                    checksums[name] = hashlib.sha256(loader_state).hexdigest()
                now.write = ShardedSave(state, now.temporary, self.asynchronous, checksums)

            now.failure = _failure(write)
        architecture = unwrap_model(model)[0].model

        def publish(checksums):
            (now.temporary / "config.yaml").write_text(config_yaml)
            checkpoint_dir.publish(now.temporary, now.final, architecture, {"step": step, **info}, checksums)
            if is_best:
                write_json(self.folder / checkpoint_dir.BEST, {"step": step, **info["best"]})
            self._prune(step, info.get("best", {}).get("step"))

        now.publish, now.held_up = publish, time.monotonic() - now.begun

    def poll(self) -> Saved | None:
        """The result of the save that was begun, or None while ranks still write it. Does not wait for them."""
        now = self.pending
        if now is None or (now.failure is None and not now.write.written()):
            return None
        return self.finish()

    def finish(self) -> Saved | None:
        """Wait for the save that was begun, if there is one."""
        now, self.pending = self.pending, None
        if now is None:
            return None
        waits = time.monotonic()
        if now.failure is None:
            now.failure = now.write.finish(now.publish)
        elif now.write is not None:
            now.write.wait()
        if now.failure is not None and dist.get_rank() == 0:
            if now.temporary is not None:
                shutil.rmtree(now.temporary, ignore_errors=True)
                with contextlib.suppress(OSError):  # of a disk that is gone; the failure says so
                    missing = missing_room(self.folder, now.needed, "a checkpoint")
                    now.failure += f"; {missing}" if missing else ""
        dist.barrier()
        ends = time.monotonic()
        return Saved(now.step, now.final, now.failure, now.held_up + ends - waits, ends - now.begun)

    def _prune(self, step: int, best_step: int | None = None) -> None:
        """Remove what need not be kept now that there is a checkpoint of `step`. On rank 0.

        best_step: of the best one as the run knows it, should best.json be damaged.
        """
        found = [path for path in checkpoint_dir.find_checkpoints(self.folder) if checkpoint_dir.step_of(path) <= step]
        whole = {checkpoint_dir.step_of(path): path for path in found if checkpoint_dir.is_complete(path)}
        best = checkpoint_dir.best(self.folder)
        kept = {best_step, best and checkpoint_dir.step_of(best)}
        for old in checkpoint_dir.surplus(list(whole), self.keep_last, self.keep_every, kept):
            if self.uploads is None or not self.uploads.uses(whole[old]):
                shutil.rmtree(whole[old])

    def _aside(self, final: Path) -> Path:
        """The folder to write to. Removes what interrupted saves have left behind."""
        for left in self.folder.glob(".step_*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        return checkpoint_dir.aside(final)


def _tensors(state: dict) -> list[ShardedTensor | ShardedTensorFactory]:
    """Those of a sharded state dict. A factory stands for a matrix that is saved as several tensors."""
    return [x for x in nested_values(state) if isinstance(x, ShardedTensor | ShardedTensorFactory)]


def _bytes_of(state: dict) -> int:
    """What all ranks together write of a sharded state dict. Collective."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    own = sum(x.data.nbytes for x in _tensors(state) if is_main_replica(x.replica_id))
    needed = torch.tensor(own, dtype=torch.int64, device=device)
    dist.all_reduce(needed)
    return int(needed)


def _no_room(folder: Path, needed: int) -> str | None:
    """A sentence if the disk has less room than a checkpoint takes. Collective."""

    def missing():
        folder.mkdir(exist_ok=True)  # not its parents: a run that was moved away does not come back at the old place
        return missing_room(folder, needed, "a checkpoint")

    failure, sentence = _on_rank_0(missing)
    return failure or sentence


def _failure(action: Callable[[], None]) -> str | None:
    """Run `action` on every rank. Returns the error of the first rank that had one, or None. Collective."""
    failure = None
    try:
        action()
    except (Exception, CheckpointException) as error:  # CheckpointException is a BaseException
        failure = f"rank {dist.get_rank()}: {_last_line(error)}"
    failures = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    return next((failure for failure in failures if failure is not None), None)


def _on_rank_0(action: Callable[[], Any]) -> tuple[str | None, Any]:
    """Run `action` on rank 0. Returns (its error or None, its result) on all ranks. Collective."""
    outcome = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[1] = action()
        except OSError as error:
            outcome[0] = str(error)
    dist.broadcast_object_list(outcome)
    return outcome[0], outcome[1]


def load(checkpoint: Path, model, optimizer) -> tuple[dict, list[str]]:
    """Continue from a training checkpoint of any layout. Collective.

    Returns its marker, and the names of parameters of this rank whose optimizer state starts fresh, since the
    checkpoint has none: they were frozen. What the checkpoint has of parameters that are frozen now is left alone.
    Raises ConfigError when it is damaged, of another architecture, or holds weights only.
    """
    marker = checkpoint_dir.read_marker(checkpoint)
    architecture = unwrap_model(model)[0].model
    refuse_other_architecture(checkpoint_dir.read_model(checkpoint), architecture, checkpoint)
    try:
        with checkpoint_dir.nothing_executed(checkpoint):
            keys = FileSystemReader(checkpoint).read_metadata().state_dict_metadata.keys()
            state = _state(model, optimizer, marker, is_loading=True)
            if not any(key.startswith(PREFIX) for key in keys):
                raise ValueError("it has no optimizer state")
            fresh = _fill_in(state["optimizer"], set(keys))
            # Other numbers of groups cannot be merged, and those of the checkpoint are wanted for their step alone.
            state["optimizer"].pop("param_groups", None)
            loaded = dist_checkpointing.load(state, str(checkpoint))
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"checkpoint {checkpoint} cannot be continued with these settings ({_last_line(error)}): use"
            " train.init_from to start from its weights alone."
        ) from error
    load_model_state(model, loaded)
    weights = {}
    for tensor in (part for entry in _tensors(sharded_model_state(model)) for part in _parts(entry)):
        weights.setdefault(tensor.key, []).append(tensor)
    for entry in fresh:
        _take_weights(entry, weights)
    load_optimizer_state(optimizer, loaded["optimizer"])
    return marker, sorted({_name_of(entry) for entry in fresh})


def _fill_in(state: dict | list, keys: set[str]) -> list[ShardedTensor | ShardedTensorFactory]:
    """Replace the tensors of an optimizer's sharded state dict that the checkpoint lacks by zeros, and return them.

    That is right for moments. The optimizer's copy of the weights has to be filled in: `_take_weights`.
    """
    found = []
    for place, value in list(state.items() if isinstance(state, dict) else enumerate(state)):
        if isinstance(value, dict | list):
            found += _fill_in(value, keys)
        elif isinstance(value, ShardedTensor | ShardedTensorFactory) and value.key not in keys:
            new = torch.zeros_like(value.data)
            state[place] = LocalNonpersistentObject(new)
            found.append(replace(value, data=new))
    return found


def _name_of(entry: ShardedTensor | ShardedTensorFactory) -> str:
    """The parameter's name in the key of an optimizer's tensor."""
    return entry.key.removeprefix(PREFIX).split(".", 1)[1]


def _parts(entry: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    return list(nested_values(entry.build())) if isinstance(entry, ShardedTensorFactory) else [entry]


def _take_weights(entry: ShardedTensor | ShardedTensorFactory, weights: dict[str, list[ShardedTensor]]) -> None:
    """Fill the model's weights into an optimizer's tensor, unless it is a moment."""
    if entry.key.removeprefix(PREFIX).startswith(("exp_avg.", "exp_avg_sq.")):
        return
    for part in _parts(entry):
        for whole in weights[_name_of(part)]:
            begins = [a - b for a, b in zip(part.global_offset, whole.global_offset)]
            place = [slice(begin, begin + size) for begin, size in zip(begins, part.local_shape)]
            if all(0 <= at.start and at.stop <= size for at, size in zip(place, whole.local_shape)):
                part.data.copy_(whole.data[tuple(place)])


def loader_states(checkpoint: Path) -> list[Path]:
    """The loader states of all data-parallel replicas that it was saved with, in their order."""
    return sorted(checkpoint.glob("loader_dp*.state"), key=lambda path: (len(path.name), path.name))


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
