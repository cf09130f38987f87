"""Settings that say `auto`: of what fits into a GPU by the plan, the fastest. Imports neither torch nor Megatron."""

import bisect
import functools
from dataclasses import replace

from molmo2_nemo.config.checks import check_settings
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import AUTO, LAYERS, RECOMPUTE, Config
from molmo2_nemo.planner.memory import GIB, H100_GIB, RESERVE_GIB, Job, count_parameters, peak, worst_stage
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
    chunks = CHUNKS if train.vision_chunk_crops == AUTO else (train.vision_chunk_crops,)
    towers = (True, LAYERS) if train.vision_recompute == AUTO else (train.vision_recompute,)

    def choice(more: dict, chunk: int, tower=towers[0]) -> Config:
        made = replace(train, vision_chunk_crops=chunk, vision_recompute=tower)
        return replace(config, transformer=others | more, train=made)

    more, chunk, tower, needed = {} if wanted in (AUTO, None) else RECOMPUTE[wanted], chunks[0], towers[0], 0.0
    if AUTO not in (wanted, train.vision_chunk_crops, train.vision_recompute):
        return choice(more, chunk), lines
    if device == "cuda":
        limit = (memory_gib - RESERVE_GIB) * GIB
        found = []
        for of_tower in towers:
            choose = functools.partial(choice, tower=of_tower)
            found += [(*one, of_tower) for one in _tried(choose, more, wanted == AUTO, chunks, gpus, limit)]
        _, chunk, more, needed, tower = min(found, key=lambda one: one[0])
    said = [f"transformer.recompute=auto takes {name_of(more)}"] if wanted == AUTO else []
    said += [f"train.vision_chunk_crops=auto takes {chunk}"] if train.vision_chunk_crops == AUTO else []
    said += [f"train.vision_recompute=auto takes {str(tower).lower()}"] if train.vision_recompute == AUTO else []
    by = f"{needed / GIB:.1f} of {memory_gib:.1f} GiB by the plan, {RESERVE_GIB:g} of them kept free"
    lines.append(f"{', '.join(said)} ({by if device == 'cuda' else 'on a CPU'})")
    return choice(more, chunk, tower), lines


def least(config: Config, gpus: int) -> Config:
    """The configuration without `auto`, with what needs the least memory; nothing that `resolve` chooses needs less."""
    train, fields = config.train, config.transformer
    crops, tower = train.vision_chunk_crops, train.vision_recompute
    train = replace(
        train,
        vision_chunk_crops=SMALL_CHUNKS[-1] if crops == AUTO else crops,
        vision_recompute=True if tower == AUTO else tower,
    )
    fields = fields | ({"recompute": "full"} if fields.get("recompute") == AUTO else {})
    return resolve(replace(config, train=train, transformer=fields), gpus)[0]


def quickest(config: Config, gpus: int) -> list[Config]:
    """Configurations without `auto`, of which one takes the least time; nothing that `resolve` chooses takes less."""
    train, fields = config.train, config.transformer
    crops, tower = train.vision_chunk_crops, train.vision_recompute
    fields = fields | ({"recompute": "none"} if fields.get("recompute") == AUTO else {})
    crops = CHUNKS[0] if crops == AUTO else crops
    return [
        resolve(
            replace(config, train=replace(train, vision_chunk_crops=crops, vision_recompute=one), transformer=fields),
            gpus,
        )[0]
        for one in ((True, LAYERS) if tower == AUTO else (tower,))
    ]


def name_of(recompute: dict) -> str:
    """What a choice of recomputation is called."""
    blocks = f"full for {recompute.get('recompute_num_layers')} layers of a pipeline stage"
    return next((name for name, fields in RECOMPUTE.items() if fields == recompute), blocks)


def _tried(choice, fixed: dict, is_open: bool, chunks: tuple, gpus: int, limit: float) -> list[tuple]:
    """(what to sort by, crops of a chunk, recomputation, peak bytes) of each choice that is allowed.

    First are those within the limit, by time, last the others, by memory; of equals the largest chunk. fixed: the
    recomputation, unless it `is_open`.
    """
    small = SMALL_CHUNKS if chunks == CHUNKS else ()
    one = Job(choice({}, chunks[0]), gpus)
    layers, counts = max(one.layers), count_parameters(one)  # of every choice
    pieces = choice({}, chunks[0]).parallel.virtual_pipeline_model_parallel_size
    found = []

    def fits(more: dict, chunk: int) -> bool:
        candidate = choice(more, chunk)
        try:
            check_settings(candidate, gpus)
        except ConfigError:
            return False  # with FP8 recipes and offloading not every choice is allowed
        job = Job(candidate, gpus)
        job.counts = counts
        needed = peak(worst_stage(job)[1])[0]
        order = (chunk in small, estimate(job).seconds) if needed <= limit else (2, needed)
        found.append(((*order, -chunk), chunk, more, needed))
        return needed <= limit

    for chunk in (*chunks, *small):
        if chunk in small and any(order[0] is False for order, *_ in found):
            break  # small chunks are for what does not fit otherwise
        for more in RECOMPUTE.values() if is_open else [fixed]:
            fits(more, chunk)
        if is_open and not pieces:  # Megatron counts layers of a piece, the plan those of a stage
            # As few layers as suffice: more need less memory and more time.
            bisect.bisect_left(range(1, layers), True, key=lambda count, chunk=chunk: fits(_block(count), chunk))
    return found


def _block(layers: int) -> dict:
    """The first so many layers of each pipeline stage are made again whole, the others keep everything."""
    return dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=layers)
