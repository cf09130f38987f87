"""What every recipe does before Hydra reads its command line. Imports neither torch nor Megatron."""

import ctypes
import logging
import os
import warnings

from molmo2_nemo.config import CONF_DIR, Config, ConfigError, refuse_unknown_overrides, register, to_dataclass

# Loggers that repeat at every start what a user can do nothing about.
_NOISY_LOGGERS = ("megatron.core", "torch.utils.cpp_extension", "torch.distributed", "nv_one_logger", "megatron.energon")
_NOISY_WARNINGS = (
    ".*Apex (is|are) not installed.*", ".*is experimental and still under.*", ".*CUDA_DEVICE_MAX_CONNECTIONS.*", ".*Future Hydra versions.*", ".*full scope is deprecated.*",
    ".*argument order of load has been changed.*", ".*torch.distributed is disabled.*", ".*pin_memory.*",
    # Megatron's distributed optimizer of float32 weights holds views of them.
    ".*grad attribute of a Tensor that is not a leaf.*",
)  # fmt: skip


def prepare(arguments: list[str]) -> None:
    """Register the schema; end the program with one sentence for an override of a key or option that does not exist."""
    quiet_libraries()
    set_gpu_environment()
    set_cpu_environment()
    try:
        refuse_unknown_overrides(arguments)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    register()


def set_gpu_environment() -> None:
    """What CUDA reads when it starts; what the user has set stays. Nothing of it matters on a CPU."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):  # torch reads either
        # Segments grow, so that micro-batches of changing size leave no holes between them.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # One hardware queue: Megatron's overlap of tensor parallel communication relies on the order of launches.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def set_cpu_environment() -> None:
    """Where torch can have no GPU, do without its compiler, which Megatron's modules import: a quarter of a start.

    cpu.install turns it off anyway, but has to import torch first. What the user has set stays.
    """
    try:
        ctypes.CDLL("libcuda.so.1")  # NVIDIA's driver
    except OSError:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def quiet_libraries() -> None:
    """Silence known noise; every other warning still shows."""
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in _NOISY_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def compose(config_name: str, overrides: list[str]) -> Config:
    """The configuration that a recipe would get from these overrides. Raises ConfigError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    refuse_unknown_overrides(overrides)
    if not (CONF_DIR / f"{config_name}.yaml").is_file():
        raise ConfigError(f"--config-name {config_name}: conf/ has no {config_name}.yaml; use stage1, stage2 or stage3.")
    register()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return to_dataclass(hydra_compose(config_name, overrides))
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        key, reason = getattr(cause, "full_key", None), str(cause).strip().splitlines()[0]
        raise ConfigError(f"{key + ': ' if key else 'the configuration cannot be read: '}{reason}") from error
