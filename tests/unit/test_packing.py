import importlib.util
import itertools
import pickle
from collections import Counter
from dataclasses import fields
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import REPOSITORY

from molmo2_nemo.config.schema import VisionConfig
from molmo2_nemo.data import packing
from molmo2_nemo.data.encode import ROOT_SEGMENT, SamplePlan, dropped
from molmo2_nemo.data.packing import MOST_ROWS, RESOLUTION, Row, collate, enough_wait, make_row, select
from molmo2_nemo.data.processor import VisualInputs, build_processor

_spec = importlib.util.spec_from_file_location("bench_packing", REPOSITORY / "tools" / "bench" / "packing.py")
bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench)

PATCH, PAD = 7, 99
SIZES = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 16)), min_size=1, max_size=48)
NOTHING = (np.zeros((0, 4, 3), dtype=np.uint8), np.zeros((0, 9), dtype=np.int64))


SMALL = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 8)), min_size=1, max_size=9)


@settings(max_examples=300, deadline=None)
@given(SMALL, st.integers(40, 120), st.integers(8, 20), st.booleans(), st.sampled_from([0.0, 0.1]))
def test_a_selection_is_the_largest_of_the_best(sizes, max_tokens, max_crops, take_oldest, given_away):
    """By trying all subsets. Rows as short as these are planned in single tokens."""
    lengths, crops = zip(*sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "GIVEN_AWAY", given_away)
        chosen = select(lengths, crops, max_tokens, max_crops, take_oldest)
    needed = sum(crops) * max_tokens / (sum(lengths) * max_crops)
    crop_value = (1.0 if needed > 1 else 0.15 if needed > 0.5 else 0.0) * max_tokens / max_crops
    worth = [length + crop_value * count for length, count in sizes]
    fixed = [0] if take_oldest else []
    free = [i for i in range(len(sizes)) if i not in fixed]
    subsets = [fixed + list(s) for n in range(len(free) + 1) for s in itertools.combinations(free, n)]
    subsets = [s for s in subsets if sum(lengths[i] for i in s) <= max_tokens and sum(crops[i] for i in s) <= max_crops]

    def value(subset):
        return sum(worth[i] for i in subset)

    def largest(subset):
        return max((worth[i] for i in subset if i not in fixed), default=0)

    room = max_tokens - sum(lengths[i] for i in fixed)
    least = max(map(value, subsets)) - given_away * max_tokens
    assert chosen == sorted(set(chosen)) and chosen in [sorted(s) for s in subsets] and room >= 0
    assert value(chosen) >= least - 1e-6
    assert largest(chosen) == pytest.approx(max(largest(s) for s in subsets if value(s) >= least + 1e-6 or s == chosen))


@given(SIZES, st.integers(100, 20_000), st.integers(16, 40), st.booleans())
def test_a_selection_fits_and_nothing_more_would(sizes, max_tokens, max_crops, take_oldest):
    lengths, crops = zip(*[(length * max_tokens // 100, count) for length, count in sizes])
    chosen = select(lengths, crops, max_tokens, max_crops, take_oldest)
    assert chosen == sorted(set(chosen)) and (chosen[:1] == [0] or not take_oldest)
    tokens, used = sum(lengths[i] for i in chosen), sum(crops[i] for i in chosen)
    assert tokens <= max_tokens and used <= max_crops
    unit = max(1, max_tokens // RESOLUTION)  # sizes are rounded up to it
    for index in set(range(len(sizes))) - set(chosen):
        if lengths[index]:
            room = max_tokens - unit * (len(chosen) + 2)
            assert tokens + lengths[index] > room or used + crops[index] > max_crops


@settings(deadline=None)
@given(SIZES, st.integers(2, 48), st.integers(0, 9))
def test_every_sample_leaves_and_none_waits_too_long(sizes, buffer_size, most_rows):
    waiting, pool, left, row = list(enumerate(sizes)), [], [], 0
    while waiting or pool:
        while waiting and len(pool) < buffer_size:
            pool.append((*waiting.pop(0), row))
        take_oldest = row - pool[0][2] >= most_rows
        chosen = select([s[0] for _, s, _ in pool], [s[1] for _, s, _ in pool], 100, 16, take_oldest)
        assert chosen
        left += [pool[i][0] for i in chosen]
        assert all(row - pool[i][2] < most_rows + buffer_size for i in chosen)
        pool = [item for i, item in enumerate(pool) if i not in chosen]
        row += 1
    assert sorted(left) == list(range(len(sizes)))


def test_many_short_examples_fill_long_rows():
    """The buffer's 48 would fill a fifth of a row; more wait, the oldest of them go first."""
    rng = np.random.default_rng(0)
    waiting, pool, fill = [int(length) for length in rng.integers(20, 120, 5000)], [], []
    waiting = list(enumerate(waiting))
    while True:
        while waiting and not enough_wait(len(pool), sum(length for _, length in pool), 0, 16384, 128, 48):
            pool.append(waiting.pop(0))
        if not waiting:
            break
        assert sum(length for _, length in pool) < 2 * 16384 + 120
        chosen = select([length for _, length in pool], [0] * len(pool), 16384, 128, False, 48)
        oldest = len(pool) - 48
        assert chosen[0] == 0 and (
            chosen[:oldest] == list(range(oldest)) or sum(pool[i][1] for i in range(oldest)) > 16384
        )
        fill.append(sum(pool[i][1] for i in chosen) / 16384)
        assert fill[-1] <= 1
        pool = [item for i, item in enumerate(pool) if i not in set(chosen)]
    assert np.mean(fill) > 0.99


def test_equal_rows_are_made_of_the_larger_and_then_of_the_older():
    assert select([50, 30, 20, 50, 30, 20], [0] * 6, 100, 8) == [0, 3]
    assert select([30, 60, 40, 40, 60], [0] * 5, 100, 8, take_oldest=False) == [1, 2]
    assert select([10, 100], [0, 0], 100, 8) == [0] and select([10, 100], [0, 0], 100, 8, False) == [1]
    assert select([], [], 100, 8) == []


def test_what_is_hard_to_place_goes_as_soon_as_it_fits_well():
    """995 + 1 fill the row worse than 500 + 300 + 200, and better than they would later."""
    assert select([500, 300, 200, 995, 1], [0] * 5, 1000, 8, take_oldest=False) == [3, 4]
    assert select([500, 300, 200, 990, 1], [0] * 5, 1000, 8, take_oldest=False) == [0, 1, 2]


@pytest.mark.parametrize("lengths, crops", [([11], [0]), ([1, 11], [0, 0]), ([1], [3])])
def test_what_never_fits_is_refused(lengths, crops):
    with pytest.raises(ValueError, match="a row holds 10 and 2"):
        select(lengths, crops, 10, 2)


@pytest.mark.parametrize(
    "seq_length, max_crops, max_frames, video",
    [(4096, 64, 16, False), (4096, 128, 128, True), (16384, 192, 128, True), (36864, 384, 384, True)],
)
def test_rows_are_full_and_fuller_than_first_fit_makes_them(seq_length, max_crops, max_frames, video):
    sizes = bench.stream(900, seq_length, max_crops, max_frames, seed=1, video=video)
    assert bench.bound(sizes, seq_length, max_crops) > 0.99
    packers = bench.packers(seq_length, max_crops, 48, 30.0)
    packed, simple = (bench.pack(sizes, *packers[name], seq_length, max_crops) for name in ("ours", "first fit"))
    assert packed["fill"] >= 0.98 and packed["fill"] > simple["fill"]
    assert packed["delay_max"] < MOST_ROWS + 48
    assert packed["fill_all"] <= bench.bound(sizes, seq_length, max_crops)


def test_where_crops_run_out_first_they_are_used_up():
    sizes = bench.stream(900, 16384, 128, 128, seed=1)
    bound = bench.bound(sizes, 16384, 128)
    packed = bench.pack(sizes, *bench.packers(16384, 128, 48, 30.0)["ours"], 16384, 128)
    assert bound < 0.9 and packed["crops"] > 0.98 and packed["fill"] > bound - 0.02


def test_the_benchmarks_image_sizes_are_those_of_the_processor():
    tokenizer = REPOSITORY / "molmo2_nemo" / "data" / "tokenizer"
    visual = VisualInputs(build_processor(str(tokenizer), VisionConfig()))
    for rows, columns in bench.TILINGS:
        ids, crops = visual.image_tokens(266 * columns + 112, 266 * rows + 112)
        assert bench.image_size(rows, columns) == (len(ids), crops)


def make_plan(units, text, seed=0, tree=False):
    """A plan with one <im_patch> for each pooling window and `text` further tokens, and pixels to go with it."""
    rng = np.random.default_rng(seed)
    windows, crops = sum(w for _, w in units), sum(c for c, _ in units)
    ids = np.array([PATCH] * windows + list(rng.integers(10, 90, text)), dtype=np.int32)
    n = len(ids)
    segments = np.where(np.arange(n) < windows, ROOT_SEGMENT, 3) if tree else np.zeros(n, dtype=np.int32)
    plan = SamplePlan(
        ids,
        ids + 1,
        np.linspace(0, 1, n, dtype=np.float32),
        np.arange(n, dtype=np.int32),
        segments.astype(np.int32),
        units,
        Counter(examples=1, tokens=n),
    )
    pixels = rng.integers(0, 256, (crops, 4, 3), dtype=np.uint8)
    pooling = rng.integers(-1, max(crops * 4, 1), (windows, 9)) if crops else NOTHING[1]
    return plan, (pixels, pooling)


EXAMPLES = st.lists(
    st.builds(
        make_plan,
        st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), max_size=3),
        st.integers(1, 9),
        st.integers(0, 999),
        st.booleans(),
    ),
    max_size=4,
)


def row_of(examples, length=128, counters=()):
    plans, pixels = [plan for plan, _ in examples], [pixels for _, pixels in examples]
    sources = list(range(len(plans)))
    fields = make_row(plans, sources, pixels, length, PAD, NOTHING)
    counters = sum((plan.counters for plan in plans), Counter(counters))
    used = np.array([(source, 7) for source in sources], dtype=np.int64).reshape(-1, 2)
    return Row(__key__="row", __restore_key__=(), **fields, examples=used, counters={"a": counters}, errors=["a: k: x"])


@settings(max_examples=40, deadline=None)
@given(st.lists(EXAMPLES, min_size=1, max_size=3))
def test_a_batch_holds_its_examples(rows):
    batch = collate([row_of(examples) for examples in rows], np.array([PATCH]))
    crops, windows, units = 0, 0, []
    flat = batch.crops.reshape(-1, 3)
    patches = batch.input_ids == PATCH
    assert patches.sum() == len(batch.pooling) and torch.equal(patches, batch.vision_mask)
    for r, examples in enumerate(rows):
        start = 0
        for k, (plan, (pixels, pooling)) in enumerate(examples):
            here = slice(start, start + plan.num_tokens)
            assert batch.input_ids[r, here].tolist() == plan.input_ids.tolist()
            assert batch.labels[r, here].tolist() == plan.labels.tolist()
            assert batch.loss_weights[r, here].tolist() == plan.loss_weights.tolist()
            assert batch.position_ids[r, here].tolist() == plan.position_ids.tolist()
            assert batch.segment_ids[r, here].tolist() == (plan.segment_ids + 100_000 * k).tolist()
            assert (batch.source_ids[r, here] == k).all()
            # The patches that each window names are the example's own.
            own = torch.from_numpy(pixels.reshape(-1, 3))
            found = batch.pooling[windows : windows + len(pooling)]
            assert torch.equal(found < 0, torch.from_numpy(pooling < 0))
            if len(pooling):
                assert torch.equal(flat[found.clamp(min=0)][found >= 0], own[torch.from_numpy(pooling)][found >= 0])
            crops, windows, start = crops + len(pixels), windows + len(pooling), start + plan.num_tokens
            units += plan.vision_units
        rest = slice(start, None)
        assert (batch.input_ids[r, rest] == PAD).all() and (batch.segment_ids[r, rest] == -1).all()
        assert (batch.source_ids[r, rest] == -1).all()
        assert not batch.labels[r, rest].any() and not batch.loss_weights[r, rest].any()
        assert not batch.vision_mask[r, rest].any() and not batch.position_ids[r, rest].any()
    assert (len(batch.crops), len(batch.pooling)) == (crops, windows)
    assert batch.vision_units.tolist() == [list(unit) for unit in units]
    assert batch.counters.get("a", {}).get("examples", 0) == sum(map(len, rows)) == len(batch.examples)
    assert batch.errors == ["a: k: x"] * len(rows) and all(count for count in batch.counters.get("a", {}).values())


def test_types_and_shapes_without_pictures():
    batch = collate([row_of([], 16), row_of([make_plan([], 5)], 16)], np.array([PATCH]))
    expected = {
        "input_ids": (torch.int64, (2, 16)),
        "labels": (torch.int64, (2, 16)),
        "loss_weights": (torch.float32, (2, 16)),
        "position_ids": (torch.int64, (2, 16)),
        "segment_ids": (torch.int64, (2, 16)),
        "vision_mask": (torch.bool, (2, 16)),
        "source_ids": (torch.int32, (2, 16)),
        "crops": (torch.uint8, (0, 4, 3)),
        "pooling": (torch.int64, (0, 9)),
        "vision_units": (torch.int64, (0, 2)),
    }
    assert {name: (getattr(batch, name).dtype, tuple(getattr(batch, name).shape)) for name in expected} == expected


def test_a_batch_goes_to_another_process_as_it_is_and_without_a_connection_for_each_small_tensor(monkeypatch):
    batch = collate([row_of([make_plan([(1, 2)], 3)], 16)], np.array([PATCH]))
    shared = []

    class Pickler(ForkingPickler):
        def reducer_override(self, value):
            if isinstance(value, torch.Tensor):
                shared.append(value)
            return NotImplemented  # as it is done otherwise

    for most, number in ((packing.SENT_BY_PIPE, 0), (0, len(tensors_of(batch)))):
        monkeypatch.setattr(packing, "SENT_BY_PIPE", most)
        shared.clear()
        again = pickle.loads(Pickler.dumps(batch))
        assert len(shared) == number
        assert all(torch.equal(tensor, getattr(again, name)) for name, tensor in tensors_of(batch).items())
        assert (again.counters, again.errors, again.outcomes) == (batch.counters, batch.errors, batch.outcomes)
        again.labels += 1  # may be written to


def tensors_of(batch):
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


def test_a_padding_token_that_is_a_visual_one_is_not_visual():
    batch = collate([row_of([make_plan([(1, 2)], 3)], 16)], np.array([PATCH, PAD]))
    assert batch.vision_mask.sum() == 2


def test_counters_of_dropped_samples_are_kept():
    plan = dropped("too_long")
    row = row_of([make_plan([], 5)], counters=plan.counters)
    batch = collate([row, row], np.array([PATCH]))
    assert batch.counters["a"]["dropped_too_long"] == 2 and batch.counters["a"]["examples"] == 2
    assert (plan.num_tokens, plan.num_crops) == (0, 0)
