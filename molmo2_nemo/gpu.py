"""What a run needs of a GPU and its libraries: checks, defaults, Transformer Engine's communication buffers."""

import importlib.util

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import Adam, OptimizerConfig

from molmo2_nemo import parallel
from molmo2_nemo.config.checks import row_multiple
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import FP8_RECIPE, Config

# Compute capability and CUDA version that Transformer Engine asks for (its quantization.py).
_FP8_NEEDS = {
    "delayed": ((8, 9), (12, 1), "Ada, Hopper or later"),
    "tensorwise": ((8, 9), (12, 1), "Ada, Hopper or later"),
    "blockwise": ((9, 0), (12, 9), "Hopper or later, and CUDA 12.9"),
    "mxfp8": ((10, 0), (12, 8), "Blackwell"),
}


def check_device(config: Config, device: str) -> None:
    """Refuse what this machine cannot do, and what Megatron's own dataclasses refuse. Raises ConfigError.

    Before any process group, and before GPU memory is allocated.
    """
    train, transformer = config.train, config.transformer
    precision, spec = parallel.resolve_precision(train, device), parallel.layer_spec(config.parallel, device)
    if precision == "fp8":
        recipe = transformer.get("fp8_recipe", FP8_RECIPE)
        _need(
            spec == "transformer_engine",
            "train.precision=fp8",
            f'Transformer Engine installed: pip install "{parallel.TRANSFORMER_ENGINE}"',
        )
        capability, cuda, words = _FP8_NEEDS[recipe]
        here = torch.cuda.get_device_capability(parallel.local_rank())
        version = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
        _need(
            here >= capability and version >= cuda,
            f"transformer.fp8_recipe={recipe}",
            f"{words}; this GPU has compute capability {here[0]}.{here[1]} and torch CUDA {torch.version.cuda}",
        )
    for key in ("cpu_offloading", "tp_comm_overlap"):
        _need(
            spec == "transformer_engine" or not transformer.get(key),
            f"transformer.{key}=true",
            "transformer_engine installed",
        )
    _need(
        spec == "transformer_engine"
        or not transformer.get("gradient_accumulation_fusion")
        or (device == "cuda" and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None),
        "transformer.gradient_accumulation_fusion=true",
        "a GPU with transformer_engine or NVIDIA's apex installed",
    )
    parallel.transformer_configs(config.model, config.parallel, device, precision, transformer, vit_fp8=train.vit_fp8)
    for prefix, cls, values in (
        ("ddp", DistributedDataParallelConfig, ddp_settings(config, device)),
        ("optimizer", OptimizerConfig, {"optimizer": "adam", "bf16": precision != "fp32", **config.optimizer}),
    ):
        try:
            cls(**values)
        except (ValueError, AssertionError, TypeError) as error:
            raise ConfigError(f"Megatron refuses {prefix} settings {getattr(config, prefix)}: {error}") from error


def _need(condition: bool, setting: str, what: str) -> None:
    if not condition:
        raise ConfigError(f"{setting} needs {what}.")


def ddp_settings(config: Config, device: str) -> dict:
    """Fields of DistributedDataParallelConfig: the user's over our defaults.

    Optimizer state is split over data-parallel ranks, also where there is one: only such a state can be continued
    at any layout. On a GPU both of its collectives overlap with compute, as Megatron's own recipes have it; they cost
    nothing on one rank. On a CPU there is nothing to overlap.
    """
    user = config.ddp
    overlaps = user.get("overlap_param_gather", device == "cuda" and user.get("use_distributed_optimizer", True))
    return {
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": device == "cuda" or overlaps,
        "overlap_param_gather": overlaps and user.get("overlap_grad_reduce", True),
        **user,
    }


def description(config: Config, precision: str, device: str) -> str:
    """One line for the log: which layers, which Adam, FP8, and what the length of a row must be a multiple of."""
    library = {"transformer_engine": "Transformer Engine's fused", "apex": "apex's fused"}.get(
        Adam.__module__.split(".")[0]
    )
    multiple, reason = row_multiple(config.parallel, precision, config.transformer.get("fp8_recipe", FP8_RECIPE))
    line = f"layers {parallel.layer_spec(config.parallel, device)}, Adam {library or "torch's"}"
    if precision == "fp8":
        recipe = config.transformer.get("fp8_recipe", FP8_RECIPE)
        why = "" if "fp8_recipe" in config.transformer else " (default: it keeps no state between steps)"
        line += f", FP8 {recipe}{why} in the decoder{' and the vision transformer' if config.train.vit_fp8 else ''}"
    return line + f"; row length in multiples of {multiple} ({reason})"


def initialize_user_buffers(config: Config, precision: str) -> None:
    """Communication buffers for transformer.tp_comm_overlap. Collective. As megatron/training/initialize.py does it."""
    import transformer_engine.pytorch.module.base as te

    transformer, p = config.transformer, config.parallel
    modes = [te.UserBufferQuantizationMode.FP8 if precision == "fp8" else te.UserBufferQuantizationMode.NONE]
    if precision == "fp8" and transformer.get("first_last_layers_bf16"):
        modes.append(te.UserBufferQuantizationMode.NONE)
    tokens = config.data.seq_length * config.train.micro_batch_size // p.context_parallel_size
    te.initialize_ub(
        shape=[tokens, config.model.hidden_size],
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        quantization_modes=modes,
        ub_cfgs={},
        bootstrap_backend=transformer.get("tp_comm_bootstrap_backend", "nccl"),
    )
