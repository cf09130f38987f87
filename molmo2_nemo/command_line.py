"""What every recipe does before Hydra reads its command line. Imports neither torch nor Megatron."""

import logging
import os
import warnings

from molmo2_nemo.config import ConfigError, refuse_unknown_overrides, register

# Loggers that repeat at every start what a user can do nothing about.
_NOISY_LOGGERS = ("megatron.core", "torch.utils.cpp_extension", "torch.distributed", "nv_one_logger", "megatron.energon")
_NOISY_WARNINGS = (
    ".*Apex (is|are) not installed.*", ".*is experimental and still under.*", ".*CUDA_DEVICE_MAX_CONNECTIONS.*", ".*Future Hydra versions.*", ".*full scope is deprecated.*",
    ".*argument order of load has been changed.*", ".*torch.distributed is disabled.*", ".*pin_memory.*",
)  # fmt: skip


def prepare(arguments: list[str]) -> None:
    """Register the schema; end the program with one sentence for an override of a key or option that does not exist."""
    quiet_libraries()
    set_gpu_environment()
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


def quiet_libraries() -> None:
    """Silence known noise; every other warning still shows."""
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in _NOISY_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
