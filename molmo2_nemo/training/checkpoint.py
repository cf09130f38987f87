"""Training checkpoints: model, optimizer, step and loader state, for any layout to reload."""

import shutil
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
from megatron.core.utils import unwrap_model

from molmo2_nemo import checkpoint_dir
from molmo2_nemo.config import ConfigError
from molmo2_nemo.training.step import refuse_other_architecture, sharded_model_state

# Optimizer shards of the distributed optimizer are gathered to whole parameters, so that any layout can read them.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def _state(model, optimizer, is_loading: bool) -> dict:
    model_state = sharded_model_state(model)
    return {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=_METADATA),
    }


def save_sharded(state: dict, folder: Path) -> None:
    """Megatron's distributed save of a sharded state dict into an empty folder. Collective."""
    # Megatron collects write results through a manager process. Left alone it would start a fresh interpreter on
    # every rank, which imports everything again: seconds for nothing.
    get_write_results_queue(mp_mode="fork")
    dist_checkpointing.save(state, str(folder))


def save(folder: Path, step: int, model, optimizer, loader_state, info: dict, config_yaml: str, keep_last: int) -> Path:
    """Write step_XXXXXXXX aside, publish it by rename, remove all but the last `keep_last`. Collective.

    loader_state: this data-parallel replica's, on the rank that has the loader, else None. Returns the directory.
    """
    final = folder / checkpoint_dir.step_name(step)
    temporary = [str(checkpoint_dir.aside(final)) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(temporary)
    temporary = Path(temporary[0])
    save_sharded(_state(model, optimizer, is_loading=False), temporary)
    if loader_state is not None:
        (temporary / f"loader_dp{parallel_state.get_data_parallel_rank():03d}.state").write_bytes(loader_state)
    dist.barrier()
    if dist.get_rank() == 0:
        (temporary / "config.yaml").write_text(config_yaml)
        checkpoint_dir.publish(temporary, final, unwrap_model(model).model, {"step": step, **info})
        for old in checkpoint_dir.find_checkpoints(folder)[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load(checkpoint: Path, model, optimizer) -> dict:
    """Continue from a training checkpoint of any layout. Collective. Returns its marker.

    Raises ConfigError when it is damaged, of another architecture, or holds weights only.
    """
    marker = checkpoint_dir.read_marker(checkpoint)
    module = unwrap_model(model)
    refuse_other_architecture(checkpoint_dir.read_model(checkpoint), module.model, checkpoint)
    try:
        loaded = dist_checkpointing.load(_state(model, optimizer, is_loading=True), str(checkpoint))
    except Exception as error:
        raise ConfigError(
            f"checkpoint {checkpoint} cannot be continued with these settings ({_last_line(error)}): use train.init_from "
            "to start from its weights alone."
        ) from error
    module.load_state_dict(loaded["model"], strict=False)
    optimizer.load_state_dict(loaded["optimizer"])
    return marker


def loader_states(checkpoint: Path) -> list[Path]:
    """The loader states of all data-parallel replicas that it was saved with, in their order."""
    return sorted(checkpoint.glob("loader_dp*.state"), key=lambda path: (len(path.name), path.name))


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
