"""Other layouts of the same training: ranked at one number of GPUs, and the best at each of many. Imports no torch."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

from molmo2_nemo.config.checks import check_settings
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import RECOMPUTE, Config
from molmo2_nemo.planner.efficiency import FAST, SLOW, Assumptions
from molmo2_nemo.planner.memory import GIB, RESERVE_GIB, Job, peak, worst_stage
from molmo2_nemo.planner.step_time import Estimate, estimate

SCALES = tuple(2**i for i in range(3, 13))  # 8 to 4,096 GPUs

Found = tuple[Job, Estimate, float]


def search(
    config: Config, gpus: int, memory: float, device: str, columns: tuple[Assumptions, Assumptions] = (FAST, SLOW)
) -> list[Found]:
    """(layout, estimate, peak bytes) of all tensor x pipeline x context x recompute choices that fit, fastest first.

    All keep the rows of a step. memory: GiB of a GPU.
    """
    found, counts = [], {}
    for candidate in layouts(config, gpus):
        for recompute in RECOMPUTE.values():
            others = {k: v for k, v in config.transformer.items() if not k.startswith("recompute")}
            job = Job(replace(candidate, transformer={**others, **recompute}), gpus)
            job.counts = counts.get((job.t, job.p))
            needed = peak(worst_stage(job)[1])[0]
            counts[job.t, job.p] = job.counts
            if needed <= (memory - RESERVE_GIB) * GIB:
                found.append((job, estimate(job, device, columns), needed))
                break  # more recomputation is slower
    return sorted(found, key=lambda item: item[1].seconds)


def layouts(config: Config, gpus: int, rows_are_given: bool = False) -> Iterator[Config]:
    """The configuration at each tensor x pipeline x context parallel layout that its model and rows allow.

    With a row at a time where the replicas cannot share a step's rows otherwise, unless rows_are_given.
    """
    numbers = {config.train.micro_batch_size} | (set() if rows_are_given else {1})
    for tp, pp, cp in itertools.product((1, 2, 4, 8), repeat=3):
        if tp * pp * cp > gpus:
            continue
        layout = replace(
            config.parallel,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            context_parallel_size=cp,
            sequence_parallel=tp > 1,
            virtual_pipeline_model_parallel_size=None,
            num_layers_in_first_pipeline_stage=None,
            num_layers_in_last_pipeline_stage=None,
        )
        for rows in sorted(numbers, reverse=True):
            candidate = replace(config, parallel=layout, train=replace(config.train, micro_batch_size=rows))
            try:
                check_settings(candidate, gpus)
            except ConfigError:
                continue
            yield candidate
            break


def scale(
    config: Config, memory: float, device: str, columns: tuple[Assumptions, Assumptions] = (FAST, SLOW)
) -> list[tuple[int, Found | None]]:
    """(GPUs, fastest layout that fits or None) at 8 to 4,096 GPUs; all keep the rows of a step."""
    return [(gpus, next(iter(search(config, gpus, memory, device, columns)), None)) for gpus in SCALES]


def recompute_of(job: Job) -> str:
    own = {k: v for k, v in job.config.transformer.items() if k.startswith("recompute")}
    return next((name for name, values in RECOMPUTE.items() if values == own), "as set")
