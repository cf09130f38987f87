"""The environment of this process: its rank, and the variables that libraries read at import. Imports no torch."""

import ctypes
import logging
import os
import warnings

# Loggers that print at every start what a user can do nothing about.
_NOISY_LOGGERS = (
    "megatron.core",
    "torch.utils.cpp_extension",
    "torch.distributed",
    "nv_one_logger",
    "megatron.energon",
)
_NOISY_WARNINGS = (
    ".*Apex (is|are) not installed.*",
    ".*is experimental and still under.*",
    ".*CUDA_DEVICE_MAX_CONNECTIONS.*",
    ".*Future Hydra versions.*",
    ".*full scope is deprecated.*",
    ".*argument order of load has been changed.*",
    ".*torch.distributed is disabled.*",
    r".*`torch\.distributed\.\w+` is deprecated.*",  # Megatron's calls
    ".*pin_memory.*",
    ".*invalid escape sequence.*",  # when Python compiles a library's file for the first time
    # Megatron's distributed optimizer of float32 weights holds views of them.
    ".*grad attribute of a Tensor that is not a leaf.*",
)


def rank_from_environment() -> int:
    """The rank of this process in the job: torchrun's RANK, else srun's SLURM_PROCID, else 0."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def is_launched() -> bool:
    """Whether torchrun or srun has started this process as one of its ranks; alone inside of salloc it is not."""
    return "WORLD_SIZE" in os.environ or {"SLURM_STEP_ID", "SLURM_PROCID"} <= os.environ.keys()


def world_size_from_environment() -> int:
    """The number of ranks of this job: torchrun's WORLD_SIZE, else srun's SLURM_NTASKS inside a step, else 1."""
    if not is_launched():
        return 1
    names = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    return int(next((os.environ[name] for name in names if name in os.environ), "1"))


def local_rank() -> int:
    """The number of this process and of its GPU on its node: torchrun's LOCAL_RANK, else SLURM_LOCALID, else 0."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def set_gpu_environment() -> None:
    """Set the variables that CUDA reads when it starts, unless the user has set them. They have no effect on a CPU."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):  # torch reads either
        # Segments that can grow, since micro-batches of changing size fragment fixed ones.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # One hardware queue: Megatron's overlap of tensor parallel communication needs kernels to start in order.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def set_cpu_environment() -> None:
    """Without NVIDIA's driver, disable torch's compiler, whose import would take a quarter of the start.

    cpu.install disables it, too, but only after Megatron has imported it. A value that the user has set is kept.
    """
    try:
        ctypes.CDLL("libcuda.so.1")  # NVIDIA's driver
    except OSError:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        # torch's profiler writes an error to the terminal when it looks for GPUs.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def quiet_libraries() -> None:
    """Hide the log lines and warnings listed above; all others are still shown."""
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in _NOISY_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
