"""Whether a run fits into the memory of its GPUs, and which settings would make it fit. Imports no torch."""

from dataclasses import replace

from molmo2_nemo.config.checks import check_settings
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import Config
from molmo2_nemo.planner.memory import GIB, H100_GIB, RESERVE_GIB, Job, Part, peak, worst_stage


def verdict(config: Config, gpus: int, gpu_memory_gib: float = H100_GIB) -> str | None:
    """A sentence if the run does not fit into GPUs of so much memory, with the keys to change; None if it fits."""
    job = Job(config, gpus)
    stage, parts = worst_stage(job)
    needed, phase = peak(parts)
    limit = (gpu_memory_gib - RESERVE_GIB) * GIB
    if needed <= limit:
        return None
    at = sorted((part for part in parts if phase in part.phases), key=lambda part: -part.bytes)
    largest = ", ".join(f"{part.name} {part.bytes / GIB:.1f}" for part in at[:3])
    return (
        f"{needed / GIB:.1f} GiB are needed on a GPU of {gpu_memory_gib:.1f} GiB ({RESERVE_GIB:g} of them reserved; "
        f"pipeline stage {stage}, {phase}; most for {largest}): {' or '.join(advice(job, parts, limit))}."
    )


def advice(job: Job, parts: list[Part], limit: float) -> list[str]:
    """Changes of single keys that lower the peak, those that are enough first; the peak is computed for each."""
    config = job.config
    full = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    smaller = [n for n in (16, 8, 4, 2) if n < (config.train.vision_chunk_crops or 10**9)]
    tried: list[tuple[str, Config]] = []

    def changed(group: str, **values) -> Config:
        old = getattr(config, group)
        return replace(config, **{group: {**old, **values} if isinstance(old, dict) else replace(old, **values)})

    if job.transformer("recompute_granularity") != "full":
        others = {k: v for k, v in config.transformer.items() if not k.startswith("recompute")}
        words = " ".join(f"transformer.{key}={value}" for key, value in full.items())
        tried.append((words, replace(config, transformer={**others, **full})))
    if config.train.vision_recompute is not True:
        tried.append(("train.vision_recompute=true", changed("train", vision_recompute=True)))
    for chunk in smaller[:2]:
        tried.append((f"train.vision_chunk_crops={chunk}", changed("train", vision_chunk_crops=chunk)))
    if config.train.micro_batch_size > 1:
        tried.append(("train.micro_batch_size=1", changed("train", micro_batch_size=1)))
    for tp in (2, 4, 8):
        if tp > job.t:
            tried.append(
                (
                    f"parallel.tensor_model_parallel_size={tp} parallel.sequence_parallel=true",
                    changed("parallel", tensor_model_parallel_size=tp, sequence_parallel=True),
                )
            )
    for cp in (2, 4, 8):
        if cp > job.c:
            tried.append((f"parallel.context_parallel_size={cp}", changed("parallel", context_parallel_size=cp)))
    for pp in (2, 4):
        if pp > job.p:
            tried.append(
                (f"parallel.pipeline_model_parallel_size={pp}", changed("parallel", pipeline_model_parallel_size=pp))
            )
    if job.ddp("grad_reduce_in_fp32", True):
        tried.append(("ddp.grad_reduce_in_fp32=false", changed("ddp", grad_reduce_in_fp32=False)))
    if not job.optimizer("optimizer_cpu_offload") and job.distributed:
        offload = dict(optimizer_cpu_offload=True, optimizer_offload_fraction=1.0, use_precision_aware_optimizer=True)
        words = " ".join(f"optimizer.{key}={str(value).lower()}" for key, value in offload.items())
        tried.append((words, changed("optimizer", **offload)))
    if job.micro_batches > 1:
        # All micro-batches of a step lie on the device. This one changes the optimisation, so it comes last.
        rows = config.train.global_batch_size // 2
        tried.append((f"train.global_batch_size={rows}", changed("train", global_batch_size=rows)))
    before, found = peak(parts)[0], []
    for words, candidate in tried:
        try:
            check_settings(candidate, job.gpus)
            needed = peak(worst_stage(Job(candidate, job.gpus))[1])[0]
        except ConfigError:
            continue
        if needed < 0.97 * before:
            found.append((needed > limit, needed, f"{words} ({needed / GIB:.1f} GiB)"))
    enough = [words for missing, _, words in found if not missing]
    if enough:
        return [f"set {words}" for words in enough[:3]]
    most = [words for _, _, words in sorted(found)[:3]]
    rest = (
        f"no single key suffices; most is gained by {', '.join(most)}; combine them or use more GPUs"
        if most
        else "use more GPUs"
    )
    return [rest]
