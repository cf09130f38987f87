"""What a run takes beside its GPUs' time and memory: host memory, checkpoints, data. Imports no torch."""

import math
from dataclasses import dataclass

from molmo2_nemo.config.components import is_frozen
from molmo2_nemo.planner.efficiency import GPUS_PER_NODE, Assumptions
from molmo2_nemo.planner.memory import GIB, HOST_GRADIENT, Job, count_parameters, offloaded_parameters
from molmo2_nemo.planner.parameters import parameters
from molmo2_nemo.planner.step_time import Estimate, row_core_seconds
from molmo2_nemo.planner.work import holds_images

RANK_BYTES = 4 * GIB  # of a training process: libraries, CUDA's context, NCCL; assumed
WORKER_BYTES = 0.65 * GIB  # of a loader process, with 118 sources (docs/benchmarks.md, "Loading data")
CHECKSUM = 1.1e9  # bytes/s of a core (docs/benchmarks.md, "Checksums of checkpoints")


@dataclass
class RunCosts:
    """Pairs are (fast, slow) as in planner/efficiency.py. Bytes, seconds; those of a node are of the busiest one."""

    gpu_hours: tuple[float, float]
    host_bytes: float  # of a node while it trains
    host_bytes_saving: float  # more while a checkpoint is saved
    checkpoint_bytes: float
    save_seconds: tuple[float, float]
    restore_seconds: tuple[float, float]
    read_bytes: tuple[float, float]  # a second and node
    moved_bytes: tuple[float, float]  # from the storage to all nodes over the run, if no cache kept anything
    loader_cores: tuple[float, float]  # of a GPU, so that it need not wait
    workers: tuple[int, int]  # data.num_workers for that


def run_costs(job: Job, cost: Estimate, columns: tuple[Assumptions, Assumptions]) -> RunCosts:
    train, ranks = job.config.train, min(job.gpus, GPUS_PER_NODE)
    steps = cost.fast.seconds, cost.slow.seconds
    computing = [step.seconds - step.causes["loading"] for step in (cost.fast, cost.slow)]
    nodes = math.ceil(job.gpus / GPUS_PER_NODE)
    size = checkpoint_bytes(job)
    trained = max(counts.trained for counts in count_parameters(job)[1])
    # Each rank copies and writes its shards of the optimizer's state, and those of the first replica the weights.
    shard = trained * optimizer_bytes(job) / (job.d * job.c if job.distributed else 1)
    weights = job.e * max(counts.total for counts in count_parameters(job)[1])
    first = job.t * (job.p if nodes == 1 else 1)  # ranks of a node that write weights
    staged = (ranks if job.distributed else first) * shard + first * weights
    read = [size / min(nodes * column.storage, column.storage_of_all) for column in columns]
    save = [
        (shard + weights) / column.pcie + max(staged / column.storage, size / column.storage_of_all)
        for column in columns
    ]
    compared = size / (job.gpus * CHECKSUM) if train.verify_checkpoints else 0.0
    of_crop = [column.crop_bytes if holds_images(job.config) else column.frame_bytes for column in columns]
    rows = loaders(job) * job.micro_batches * job.rows
    cores = [row_core_seconds(job, column) * train.global_batch_size / job.gpus for column in columns]
    return RunCosts(
        gpu_hours=tuple(seconds * train.max_steps * job.gpus / 3600 for seconds in steps),
        host_bytes=host_bytes(job),
        host_bytes_saving=staged,
        checkpoint_bytes=size,
        save_seconds=tuple(save),
        restore_seconds=tuple(seconds + compared for seconds in read),
        read_bytes=tuple(rows * job.work.crops * of_crop[i] / steps[i] for i in (0, 1)),
        moved_bytes=tuple(train.max_steps * train.global_batch_size * job.work.crops * of_crop[i] for i in (0, 1)),
        loader_cores=tuple(cores[i] / computing[i] for i in (0, 1)),
        workers=tuple(math.ceil(cores[i] * job.gpus / job.d / computing[i]) for i in (0, 1)),
    )


def optimizer_bytes(job: Job) -> int:
    """Of a checkpoint for each trained parameter: Adam's moments, and float32 weights.

    Those are in it beside float32 weights, too, where the state is sharded.
    """
    return 8 if job.precision == "fp32" and not job.distributed else 12


def checkpoint_bytes(job: Job) -> float:
    by_component = count_parameters(job)[0].values()
    weights, trained = (sum(getattr(counts, name) for counts in by_component) for name in ("total", "trained"))
    if job.config.lora.rank:
        weights = trained  # the others stay where they are (lora_base.py)
    return job.e * weights + optimizer_bytes(job) * trained


def loaders(job: Job) -> int:
    """Of a node: one for each replica that begins there."""
    return max(1, min(job.d, min(job.gpus, GPUS_PER_NODE) // (job.t * job.c)))


def host_bytes(job: Job) -> float:
    """Of a node: processes, and the pixels of a step, of which each rank of the first pipeline stage holds its own."""
    ranks, vision = min(job.gpus, GPUS_PER_NODE), job.config.model.vision
    pixels = job.work.crops * vision.patches_per_crop * vision.patch_dim * job.rows * job.micro_batches
    first = min(ranks, job.t * job.c * job.d) / (job.t * job.c)
    held = ranks * RANK_BYTES + loaders(job) * job.config.data.num_workers * WORKER_BYTES + first * pixels
    return held + ranks * host_optimizer_bytes(job)


def host_optimizer_bytes(job: Job) -> float:
    """What a rank's optimizer on the host holds there: float32 weights, moments, and the gradients.

    These are pinned, and torch rounds pinned memory up to a power of two (pytorch/pytorch:
    aten/src/ATen/core/CachingHostAllocator.h).
    """
    m, shards = job.config.model, job.d * job.c if job.distributed else 1
    sizes = [
        HOST_GRADIENT * elements / (job.t if split else 1) / shards
        for name, elements, split in parameters(m)
        if not is_frozen(name, job.config.optim, m.tie_embeddings)
    ]
    rounded = sum(2 ** math.ceil(math.log2(max(1.0, size))) for size in sizes) / max(1.0, sum(sizes))
    return offloaded_parameters(job) * (optimizer_bytes(job) + HOST_GRADIENT * rounded)
