"""What a run needs of a GPU and its libraries: checks, defaults, Transformer Engine's communication buffers.

`python -m molmo2_nemo.gpu` prints what a run on a GPU would use of what is installed.
"""

import importlib.metadata
import importlib.util
from dataclasses import replace

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
            f"Transformer Engine installed: {parallel.INSTALL_TRANSFORMER_ENGINE}",
        )
        capability, cuda, words = _FP8_NEEDS[recipe]
        here = torch.cuda.get_device_capability(parallel.local_rank())
        _need(
            here >= capability and _cuda_version() >= cuda,
            f"transformer.fp8_recipe={recipe}",
            f"{words}; this GPU has compute capability {here[0]}.{here[1]} and torch CUDA {torch.version.cuda}",
        )
    _need(train.profile_with != "nsys" or device == "cuda", "train.profile_with=nsys", "a GPU")
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


def memory_gib(device: str) -> float:
    """Memory of this rank's GPU; 0 on a CPU."""
    return torch.cuda.get_device_properties(parallel.local_rank()).total_memory / 2**30 if device == "cuda" else 0.0


def seconds_of_a_step(config: Config, gpus: int) -> tuple[float, float] | None:
    """By the plan, fast and slow; None for a GPU whose peak is not known."""
    from molmo2_nemo.planner.flops import PEAK_TFLOPS
    from molmo2_nemo.planner.memory import Job
    from molmo2_nemo.planner.step_time import estimate

    name = torch.cuda.get_device_name(parallel.local_rank())
    if name not in PEAK_TFLOPS:
        return None
    cost = estimate(Job(config, gpus), name)
    return cost.fast.seconds, cost.slow.seconds


def adam() -> str:
    """Whose Adam Megatron has chosen: the first that is installed."""
    libraries = {"transformer_engine": "Transformer Engine's fused", "apex": "apex's fused"}
    return libraries.get(Adam.__module__.split(".")[0], "torch's")


def missing_libraries(config: Config, device: str, gpus: int) -> list[str]:
    """Sentences on what a run on a GPU does without, and what that costs; none where nothing is missing."""
    if device != "cuda":
        return []
    from molmo2_nemo.planner.memory import Job, peak, worst_stage

    def more(present: dict, missing: dict) -> str:
        """By how much the peak of one choice exceeds that of another."""
        with_it, without = (
            peak(worst_stage(Job(replace(config, parallel=replace(config.parallel, **choice)), gpus))[1])[0] / 2**30
            for choice in (present, missing)
        )
        difference = without - with_it
        return f"{difference:.1f} GiB more than {with_it:.1f}" if difference > 0.05 else f"the same, {with_it:.1f} GiB"

    lines = []
    if not parallel.has_liger_kernel():
        lines.append(
            "liger-kernel is not installed: what stands between matrix products (norms, RoPE, SwiGLU, GELU, dropout)"
            " runs as many small operations, which read and write about three times as many bytes (docs/gpu.md; the"
            " time is unmeasured); peak memory of a GPU is by the plan"
            f" {more({'kernels': 'auto'}, {'kernels': 'plain'})}. Install it with pip install"
            f' "{parallel.LIGER_KERNEL}"'
        )
    if parallel.has_transformer_engine():
        return lines
    kernels = "auto" if parallel.has_liger_kernel() else "plain"
    spec = more(*({"layer_spec": spec, "kernels": kernels} for spec in ("transformer_engine", "local")))
    lines.append(
        "Transformer Engine is not installed: gradients of weights are added in an operation of their own, which is"
        f" slower (how much is unmeasured); FP8 is not possible; peak memory of a GPU is by the plan {spec}. Install it"
        f" with {parallel.INSTALL_TRANSFORMER_ENGINE}"
    )
    if adam() == "torch's":
        lines.append("apex is not installed either: the update is torch's Adam, several kernels instead of one")
    return lines


def installed() -> list[str]:
    """What a run on a GPU would use of what is installed, a line each."""
    lines = [f"torch {torch.__version__}, CUDA {torch.version.cuda}"]
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        recipes = [r for r, (needed, cuda, _) in _FP8_NEEDS.items() if capability >= needed and _cuda_version() >= cuda]
        lines.append(f"GPU: {torch.cuda.get_device_name()}; FP8 recipes it can run: {', '.join(recipes) or 'none'}")
    else:
        lines.append("GPU: torch sees none here")
    if parallel.has_transformer_engine():
        lines.append(f"layers: Transformer Engine {importlib.metadata.version('transformer-engine')}")
    else:
        lines.append(f"layers: Megatron's local ones, no FP8; for others: {parallel.INSTALL_TRANSFORMER_ENGINE}")
    version = importlib.metadata.version("liger-kernel") if parallel.has_liger_kernel() else None
    advice = f'plain; for fused ones: pip install "{parallel.LIGER_KERNEL}"'
    lines.append(f"between matrix products: {f'fused kernels, with liger-kernel {version}' if version else advice}")
    return [*lines, f"Adam: {adam()}", "attention: FlexAttention, compiled by torch"]


def _cuda_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.version.cuda.split(".")[:2])


def description(config: Config, precision: str, device: str) -> str:
    """One line for the log: which layers, which Adam, FP8, and what the length of a row must be a multiple of."""
    multiple, reason = row_multiple(config.parallel, precision, config.transformer.get("fp8_recipe", FP8_RECIPE))
    kernels = "fused" if parallel.uses_fused_kernels(config.parallel, device) else "plain"
    line = f"layers {parallel.layer_spec(config.parallel, device)}, kernels {kernels}, Adam {adam()}"
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


if __name__ == "__main__":
    print("\n".join(installed()))
