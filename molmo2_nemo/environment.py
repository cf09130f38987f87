"""The process's environment: who this rank is, and what libraries read before they are imported. Imports no torch."""

import ctypes
import logging
import os
import warnings

# Loggers that repeat at every start what a user can do nothing about.
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
    ".*pin_memory.*",
    ".*invalid escape sequence.*",  # when Python compiles a library's file for the first time
    # Megatron's distributed optimizer of float32 weights holds views of them.
    ".*grad attribute of a Tensor that is not a leaf.*",
)


def rank_from_environment() -> int:
    """This process among the ranks of the job: torchrun's RANK, else srun's SLURM_PROCID, else 0."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def world_size_from_environment() -> int:
    """Ranks of this job: torchrun's WORLD_SIZE, else srun's SLURM_NTASKS inside a step, else 1."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ:
        return int(os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1")))
    return 1


def local_rank() -> int:
    """This process among those of its node, which is also its GPU: torchrun's LOCAL_RANK, else srun's, else 0."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


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
