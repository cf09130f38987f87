"""What a training loader takes of the machine: open files, and memory for the batches that wait."""

import resource

from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import DataConfig, VisionConfig

# Bytes of pixels that may wait in a loader for the next step. A step of 32 rows of 128 crops has 1.8 GB.
BYTES_AHEAD = 8 * 2**30


def batches_per_worker(data: DataConfig, vision: VisionConfig, micro_batch_size: int, micro_batches: int) -> int:
    """How many batches each worker may have made or begun that nobody has asked for (torch's prefetch_factor).

    As many as a step has, so that the next step's are made while this one computes, and one more of each worker;
    fewer where their pixels could be more than BYTES_AHEAD, and two at least. micro_batches: of a step.
    """
    workers = max(1, data.num_workers)
    crops = micro_batch_size * data.max_crops
    most = BYTES_AHEAD // (crops * vision.patches_per_crop * vision.patch_dim)
    return max(2, min(-(-micro_batches // workers) + 1, most // workers))


def allow_open_files(needed: int) -> None:
    """Raise this process' and its workers' limit of open files. ConfigError: the system does not allow so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(f"the blend needs {needed} open files, the limit is {hard}: raise it (ulimit -n {needed}).")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
