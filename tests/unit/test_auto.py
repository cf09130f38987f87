"""train.vision_chunk_crops=auto and transformer.recompute=auto: the fastest that fits, and it is said."""

import itertools
from dataclasses import replace

import pytest

from molmo2_nemo.auto import CHUNKS, SMALL_CHUNKS, resolve
from molmo2_nemo.command_line import compose
from molmo2_nemo.config.checks import check_settings
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import LAYERS, RECOMPUTE
from molmo2_nemo.planner.memory import GIB, RESERVE_GIB, Job, peak, worst_stage
from molmo2_nemo.planner.step_time import estimate

AUTO = ["train.vision_chunk_crops=auto", "transformer.recompute=auto"]


@pytest.fixture(scope="module")
def config():
    words = ["model=molmo2_8b", "parallel=tp2", "parallel.sequence_parallel=true", "schedule=report"]
    return compose("stage2", [*words, *AUTO])


def figures(config, gpus: int) -> tuple[float, float]:
    """(seconds of a step, GiB at its peak)"""
    job = Job(config, gpus)
    return estimate(job).seconds, peak(worst_stage(job)[1])[0] / GIB


@pytest.mark.parametrize("memory", [79.6, 70.0, 60.0, 52.0])
def test_nothing_faster_fits(config, memory):
    found, (line,) = resolve(config, 8, memory)
    seconds, gib = figures(found, 8)
    assert gib <= memory - RESERVE_GIB and f"{gib:.1f} of {memory:.1f} GiB" in line
    chunk = found.train.vision_chunk_crops
    assert f"train.vision_chunk_crops=auto takes {chunk}" in line
    layers = [
        dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=n) for n in (1, 9, 18, 35)
    ]
    for fields, crops in itertools.product([*RECOMPUTE.values(), *layers], CHUNKS):
        other = replace(found, transformer=fields, train=replace(found.train, vision_chunk_crops=crops))
        fits = figures(other, 8)[1] <= memory - RESERVE_GIB
        # A small chunk is taken where no usual one fits at all.
        assert not fits or (chunk not in SMALL_CHUNKS and (seconds, -chunk) <= (figures(other, 8)[0], -crops))


def test_less_memory_is_never_faster(config):
    times = [figures(resolve(config, 8, memory)[0], 8)[0] for memory in (140.0, 100.0, 79.6, 60.0, 52.0)]
    assert times == sorted(times) and len(set(times)) > 3
    assert resolve(config, 8, 140.0)[0].transformer == {}


def test_layers_of_the_vision_tower_are_made_again_one_by_one_where_that_fits(config):
    config = compose("stage2", ["model=molmo2_4b", "schedule=report", "train.vision_recompute=auto"])
    found, (line,) = resolve(config, 8, 140.0)
    assert found.train.vision_recompute == LAYERS and "train.vision_recompute=auto takes layers" in line
    chunked = replace(found, train=replace(found.train, vision_recompute=True))
    (seconds, gib), (longer, less) = figures(found, 8), figures(chunked, 8)
    # 128 crops keep input and middle of 25 layers, 1,152 numbers for each of 729 patches, while the decoder works.
    assert seconds < longer and 9 < gib - less < 11.5
    found, (line,) = resolve(config, 8, less + RESERVE_GIB + 1)
    assert found.train.vision_recompute is True and "train.vision_recompute=auto takes true" in line


def test_where_nothing_fits_the_smallest_is_left_to_the_plans_verdict(config):
    found, (line,) = resolve(config, 8, 20.0)
    assert found.transformer == RECOMPUTE["full"] and found.train.vision_chunk_crops <= min(CHUNKS)
    assert figures(found, 8)[1] > 16.0 and "of 20.0 GiB" in line


def test_one_of_them_alone_and_none(config):
    fixed, _ = resolve(compose("stage2", ["model=molmo2_8b", "train.vision_chunk_crops=4", AUTO[1]]), 64)
    assert fixed.train.vision_chunk_crops == 4 and "recompute" not in fixed.transformer
    named, lines = resolve(compose("stage2", ["transformer.recompute=mlp"]), 8)
    assert named.transformer == RECOMPUTE["mlp"] and lines == []
    plain = compose("stage2", ["transformer.moe_layer_freq=1"])
    assert resolve(plain, 8) == (plain, [])


def test_megatrons_own_fields_come_first_and_it_is_said():
    words = ["transformer.recompute_granularity=selective", "transformer.recompute_modules=[mlp]"]
    found, lines = resolve(compose("stage2", [AUTO[1], *words]), 8)
    assert found.transformer == RECOMPUTE["mlp"] and "transformer.recompute=auto is not used" in lines[0]


def test_a_cpu_is_not_planned(config):
    found, (line,) = resolve(config, 8, 0.0, "cpu")
    assert found.train.vision_chunk_crops == 32 and found.transformer == {} and line.endswith("(on a CPU)")


@pytest.mark.parametrize(
    "word, reason",
    [
        ("train.vision_chunk_crops=many", "must be a number of crops, 0 for all at once, or auto."),
        ("train.vision_chunk_crops=-1", "must not be negative"),
        ("transformer.recompute=some", "transformer.recompute=some"),
    ],
)
def test_other_values_are_refused(word, reason):
    with pytest.raises(ConfigError, match=reason):
        check_settings(compose("stage1", ["model=tiny", "data=sample", "schedule=quickstart", word]), 1)
