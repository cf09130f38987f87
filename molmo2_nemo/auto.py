"""Settings that say `auto`: of what fits into a GPU by the plan, the fastest. Imports neither torch nor Megatron."""

from dataclasses import replace

from molmo2_nemo.config.checks import check_settings
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import AUTO, RECOMPUTE, Config
from molmo2_nemo.planner.memory import GIB, H100_GIB, RESERVE_GIB, Job, peak, worst_stage
from molmo2_nemo.planner.step_time import estimate

# Values of `train.vision_chunk_crops`. 32 crops are 23,328 patches, more than matrix products of a GPU gain from; fewer
# than 8 only where nothing else fits.
CHUNKS, SMALL_CHUNKS = (32, 16, 8), (4, 2, 1)


def resolve(config: Config, gpus: int, memory_gib: float = H100_GIB, device: str = "cuda") -> tuple[Config, list[str]]:
    """The configuration without `auto`, and a line for the log on what was chosen; none where nothing says auto.

    config: checked (config/checks.py). memory_gib: of a GPU; RESERVE_GIB of it are left free. On a CPU, whose memory is
    not planned, it is the most crops and no recomputation.
    """
    fields, train = config.transformer, config.train
    others = {key: value for key, value in fields.items() if key != "recompute"}
    wanted, lines = fields.get("recompute"), []
    if wanted is not None and any(key.startswith("recompute_") for key in others):
        lines.append(f"transformer.recompute={wanted} is not used: transformer.recompute_granularity or another is set")
        wanted = None
    recompute = list(RECOMPUTE) if wanted == AUTO else [wanted]
    chunks = CHUNKS if train.vision_chunk_crops == AUTO else (train.vision_chunk_crops,)

    def choice(name: str | None, chunk: int) -> Config:
        more = {} if name is None else RECOMPUTE[name]
        return replace(config, transformer=others | more, train=replace(train, vision_chunk_crops=chunk))

    if AUTO not in (wanted, train.vision_chunk_crops):
        return choice(wanted, train.vision_chunk_crops), lines
    name, chunk, needed = recompute[0], chunks[0], 0.0
    if device == "cuda":
        name, chunk, needed = _fastest(choice, recompute, chunks, gpus, (memory_gib - RESERVE_GIB) * GIB)
    said = [f"transformer.recompute=auto takes {name}"] if wanted == AUTO else []
    said += [f"train.vision_chunk_crops=auto takes {chunk}"] if train.vision_chunk_crops == AUTO else []
    by = f"{needed / GIB:.1f} of {memory_gib:.1f} GiB by the plan, {RESERVE_GIB:g} of them kept free"
    lines.append(f"{', '.join(said)} ({by if device == 'cuda' else 'on a CPU'})")
    return choice(name, chunk), lines


def _fastest(choice, recompute: list, chunks: tuple, gpus: int, limit: float) -> tuple[str | None, int, float]:
    """(recomputation, crops of a chunk, peak bytes) of the fastest choice within the limit, else of the smallest."""
    found = []
    small = SMALL_CHUNKS if chunks == CHUNKS else ()
    for name in recompute:
        for chunk in (*chunks, *small):
            candidate = choice(name, chunk)
            try:
                check_settings(candidate, gpus)
            except ConfigError:
                continue  # with FP8 recipes and offloading not every choice is allowed
            job = Job(candidate, gpus)
            needed = peak(worst_stage(job)[1])[0]
            if needed <= limit:
                found.append((chunk in small, estimate(job).seconds, -chunk, name, needed))
            else:
                found.append((2, needed, -chunk, name, needed))
    _, _, chunk, name, needed = min(found, key=lambda one: one[:3])
    return name, -chunk, needed
