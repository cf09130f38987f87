"""Megatron's optimizer with a learning rate, a warm-up and a freeze switch per component."""

import math

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate

from molmo2_nemo.config import COMPONENTS, Config, ConfigError, OptimConfig


def component_of(name: str) -> str:
    """`vit`, `connector` or `llm` for a parameter's name. The extra vocabulary's rows train with the connector."""
    name = name.removeprefix("module.")
    if name.startswith("vision.vit."):
        return "vit"
    if name.startswith("vision.connector.") or name == "embedding.extra_embedding":
        return "connector"
    return "llm"


def is_frozen(name: str, optim: OptimConfig, tied: bool) -> bool:
    """Whether a parameter is not trained: its component's switch, and the base embedding with a head tied to it."""
    name = name.removeprefix("module.")
    if getattr(optim, component_of(name)).freeze:
        return True
    is_table = name == "embedding.word_embeddings.weight" or (tied and name == "output_layer.weight")
    return optim.freeze_embedding and is_table


def build_optimizer(cfg: Config, model: DistributedDataParallel, precision: str) -> MegatronOptimizer:
    """Adam over one parameter group per component. Collective. Raises ConfigError on a refused combination."""
    optim = cfg.optim
    values = dict(
        optimizer="adam", lr=optim.llm.lr, min_lr=0.0, weight_decay=optim.weight_decay, clip_grad=optim.clip_grad,
        adam_beta1=optim.adam_beta1, adam_beta2=optim.adam_beta2, adam_eps=optim.adam_eps, bf16=precision != "fp32",
        use_distributed_optimizer=model.ddp_config.use_distributed_optimizer,
    )  # fmt: skip

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
        return get_megatron_optimizer(config, [model], config_overrides=overrides)
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"Megatron refuses the optimizer settings {cfg.optimizer}: {error}") from error


def learning_rate(peak: float, warmup_steps: int, step: int, max_steps: int, optim: OptimConfig) -> float:
    """Linear warm-up from 0, then decay to `min_lr_ratio` x peak at `max_steps`; `step` counts from 1."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if optim.decay == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if optim.decay == "cosine" else 1 - progress
    return peak * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shape)


def set_learning_rates(optimizer: MegatronOptimizer, cfg: Config, step: int) -> dict[str, float]:
    """Write the rates of `step` (from 1) into the parameter groups; returns them by component."""
    rates = {}
    for component in COMPONENTS:
        settings = getattr(cfg.optim, component)
        rates[component] = learning_rate(settings.lr, settings.warmup_steps, step, cfg.train.max_steps, cfg.optim)
    for group in optimizer.param_groups:
        group["lr"] = rates[group["component"]]
    return rates


def parameter_table(model: DistributedDataParallel) -> dict[str, tuple[int, int]]:
    """This rank's (trained, frozen) parameter counts by component."""
    table = {component: [0, 0] for component in COMPONENTS}
    for name, parameter in model.named_parameters():
        table[component_of(name)][0 if parameter.requires_grad else 1] += parameter.numel()
    return {component: tuple(counts) for component, counts in table.items()}
