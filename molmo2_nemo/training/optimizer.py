"""Megatron's optimizer with a learning rate, a warm-up and a freeze switch per component."""

import gc
import math
import re

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate

from molmo2_nemo import compat
from molmo2_nemo.config.components import COMPONENTS, component_of
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.lora import trained_components
from molmo2_nemo.config.schema import Config, OptimConfig
from molmo2_nemo.training.optimizer_shards import save_shards

# The key of the step count in the state of a torch Adam that has no parameter.
NOTHING = "no parameter"


def build_optimizer(cfg: Config, model: list[DistributedDataParallel], precision: str) -> MegatronOptimizer:
    """Adam over one parameter group per component. Collective. Raises ConfigError on a refused combination."""
    optim = cfg.optim
    values = dict(
        optimizer="adam",
        lr=optim.llm.lr,
        min_lr=0.0,
        weight_decay=optim.weight_decay,
        clip_grad=optim.clip_grad,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        bf16=precision != "fp32",
        use_distributed_optimizer=model[0].ddp_config.use_distributed_optimizer,
        overlap_param_gather=model[0].ddp_config.overlap_param_gather,
    )

    def of(component):
        return ParamWithNamePredicate(name=component, fn=lambda parameter, name: component_of(name) == component)

    # Megatron matches a checkpoint's groups to the running ones by fields such as lr_mult, which our schedule does
    # not use: the component's number there keeps groups apart even when their settings agree.
    overrides = {
        ParamKey(with_name_predicate=of(component)): {"component": component, "lr_mult": float(number)}
        for number, component in enumerate(COMPONENTS)
    }
    try:
        config = OptimizerConfig(**{**values, **cfg.optimizer})
        optimizer = get_megatron_optimizer(config, model, config_overrides=overrides)
        _start_torch_adam(optimizer)
        for part in _parts(optimizer):
            if isinstance(part, DistributedOptimizer):
                save_shards(part)
        if config.optimizer_cpu_offload:
            # Megatron copies the weights to the host twice, and the first copies, 4 bytes a parameter, are in a cycle.
            gc.collect()
        return optimizer
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"Megatron refuses the optimizer settings {cfg.optimizer}: {error}") from error


def _start_torch_adam(optimizer: MegatronOptimizer) -> None:
    """Give torch's Adam inside a distributed optimizer its state before the first step: Megatron can neither save nor
    load it without. Transformer Engine's and apex's need nothing.

    That of a rank without a trained parameter, as a pipeline stage of frozen weights is, gets a step count alone.
    """
    for part in _parts(optimizer):
        if not _is_torch_adam(part):
            continue
        if not any(group["params"] for group in part.optimizer.param_groups):
            part.optimizer.state[NOTHING] = {"step": torch.zeros(())}
        for group in part.optimizer.param_groups:
            group["fused"] = group["fused"] or all(parameter.is_cpu for parameter in group["params"])
            for parameter in group["params"]:
                device = parameter.device if group["fused"] or group["capturable"] else None
                part.optimizer.state[parameter].update(
                    step=torch.zeros((), device=device),
                    exp_avg=torch.zeros_like(parameter),
                    exp_avg_sq=torch.zeros_like(parameter),
                )


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict) -> None:
    """What was loaded into the optimizer's sharded state dict goes into the optimizer.

    Of the parameter groups, the step count alone is the checkpoint's; rates, weight decay, betas and epsilon are those
    of the configuration. torch's Adam keeps its step count with every parameter (Transformer Engine's and apex's keep
    one for all). Megatron 0.19 cannot load that, and would give all parameters the same tensor, which each of them
    would then increment. Raises ConfigError for the state of another kind of optimizer.
    """
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    states = [state] if len(parts) == 1 else [state[number] for number in range(len(parts))]
    for part, part_state in zip(parts, states):
        # Megatron's optimizer in float32 without sharding has no level of its own for what is inside.
        is_flat = isinstance(part, FP32Optimizer)
        if is_flat == ("optimizer" in part_state):
            raise ConfigError(
                f"the checkpoint was saved with ddp.use_distributed_optimizer={str(is_flat).lower()}, this run has "
                f"{str(not is_flat).lower()}: set the old value, or start a new run with train.init_from=CHECKPOINT."
            )
        _use_running_groups(part, part_state if is_flat else part_state["optimizer"])
    if not any(_is_torch_adam(part) for part in parts):
        optimizer.load_state_dict(state)
        return
    moments = [part_state.pop("param_state", None) for part_state in states]
    optimizer.load_state_dict(state)
    for part, part_moments in zip(parts, moments):
        if part_moments is None:
            continue
        kept = part.optimizer.state
        steps = {parameter: values.pop("step").clone() for parameter, values in kept.items()}
        part.load_parameter_state_from_fully_reshardable(part_moments)
        for parameter, step in steps.items():
            kept[parameter]["step"] = step.clone()


def _use_running_groups(part: MegatronOptimizer, saved: dict) -> None:
    """Replace the parameter groups of a saved state by the running ones, at the saved step.

    Megatron would look for each running group among the saved ones by fields such as its largest rate, which a person
    may have changed, and take over all values of the one it finds. One step count for all, as Megatron demands: a
    component that was frozen joins at the others' count, with moments of zero.
    """
    steps = [group["step"] for group in saved["param_groups"] if "step" in group]
    running = part.optimizer.state_dict()["param_groups"]
    saved["param_groups"] = [group | ({"step": max(steps)} if steps else {}) for group in running]


def _is_torch_adam(part: MegatronOptimizer) -> bool:
    return isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.Adam)


def check_frozen(names: list[str], trained: int, optim: OptimConfig) -> None:
    """Raise ConfigError for a pattern that matches no parameter's name, and where all parameters are frozen.

    Collective. names: of this rank's parameters. trained: how many of them are trained.
    """
    everybodys = [None] * dist.get_world_size()
    found = [pattern for pattern in optim.freeze_patterns if any(re.search(pattern, name) for name in names)]
    dist.all_gather_object(everybodys, (found, trained))
    if not any(trained for _, trained in everybodys):
        how = [f"optim.{c}.freeze=true" for c in COMPONENTS if getattr(optim, c).freeze]
        how += [f"optim.freeze_patterns={optim.freeze_patterns}"] if optim.freeze_patterns else []
        raise ConfigError(f"{', '.join(how)} leave no parameter that is trained: take one of them back.")
    for pattern in optim.freeze_patterns:
        if not any(pattern in found for found, _ in everybodys):
            raise ConfigError(
                f"optim.freeze_patterns: {pattern} is in no parameter's name; names are like {', '.join(names[:3])}."
            )


@torch.no_grad()
def clip_and_step(
    optimizer: MegatronOptimizer, max_norm: float, finite_loss: bool = True
) -> tuple[bool, dict[str, float]]:
    """Clip the gradient of each component by its own norm, then update. Collective.

    Returns whether there was an update and the norms before clipping by component. Without an update, that is when a
    norm or some rank's loss is not finite, weights and optimizer state stay as they are. max_norm: 0 clips nothing.
    One norm for each group as the public trainer has it (allenai/molmo2, olmo/train/optim.py).
    """
    parts = _parts(optimizer)
    found_inf = any([part.prepare_grads() for part in parts])  # noqa: C419  each of them has to
    # A rank whose part of the model is frozen has no optimizer, but must take part in the sums.
    group = parts[0].get_grad_stats_parallel_group() if parts else parallel_state.get_model_parallel_group()
    squares = []
    for component in COMPONENTS:
        grads = [grad for part in parts for grad in compat.gradients_for_norm(part, _parameters(part, component))]
        each = compat.norms(grads)
        own = torch.linalg.vector_norm(torch.stack(each)) if each else torch.zeros((), device=_device())
        squares.append(own.float().square())
    # Like megatron.core.optimizer.clip_grads.get_grad_norm_fp32, which without Transformer Engine and apex waits for a
    # GPU at each tensor: here once for all of them.
    total = torch.stack(squares)
    dist.all_reduce(total, group=group)
    norms = {component: square**0.5 for component, square in zip(COMPONENTS, total.tolist())}
    verdict = torch.tensor(
        finite_loss and not found_inf and all(map(math.isfinite, norms.values())), dtype=torch.int32, device=_device()
    )
    dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
    if not verdict:
        return False, norms
    for part in parts:
        decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
        for component in COMPONENTS:
            if max_norm > 0 and _parameters(part, component):
                clip_grad_by_total_norm_fp32(_parameters(part, component), max_norm, norms[component], decoupled)
    updated = optimizer.step_with_ready_grads()
    for part in parts:
        if updated and _is_torch_adam(part) and NOTHING in part.optimizer.state:
            part.optimizer.state[NOTHING]["step"] += 1
    return updated, norms


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers that have parameters on this rank."""
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in parts if not getattr(part, "is_stub_optimizer", False)]


def _parameters(optimizer: MegatronOptimizer, component: str) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups if group["component"] == component for p in group["params"]]


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def learning_rate(peak: float, warmup_steps: int, step: int, max_steps: int, optim: OptimConfig) -> float:
    """Linear warm-up from 0, then decay to `min_lr_ratio` x peak at `max_steps`; `step` counts from 1.

    With a decay every run ends at its minimum: beside a warm-up that is as long as the run, or longer, the rate is the
    lower one of the warm-up's and of a decay over the whole run.
    """
    warm_up = step / warmup_steps if step <= warmup_steps else 1.0
    if optim.decay == "constant":
        return peak * warm_up
    if step <= warmup_steps < max_steps:
        return peak * warm_up
    before = warmup_steps if warmup_steps < max_steps else 0
    progress = min(1.0, (step - before) / (max_steps - before))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if optim.decay == "cosine" else 1 - progress
    decayed = optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shape
    return peak * (decayed if step >= max_steps else min(warm_up, decayed))


def set_learning_rates(optimizer: MegatronOptimizer, cfg: Config, step: int) -> dict[str, float]:
    """Write the rates of `step` (from 1) into the parameter groups; returns those of components that are trained."""
    rates = {}
    for component in COMPONENTS:
        settings = getattr(cfg.optim, component)
        rates[component] = learning_rate(settings.lr, settings.warmup_steps, step, cfg.train.max_steps, cfg.optim)
    for group in optimizer.param_groups:
        group["lr"] = rates[group["component"]]
    return {component: rates[component] for component in trained_components(cfg.optim, cfg.lora)}
