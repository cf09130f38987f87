from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molmo2_nemo.data.encode import COUNTERS, ROOT_SEGMENT, Plan, dropped
from molmo2_nemo.data.packing import Row, collate, make_row, select

PATCH, PAD = 7, 99
SIZES = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 16)), min_size=1, max_size=48)
NOTHING = (np.zeros((0, 4, 3), dtype=np.uint8), np.zeros((0, 9), dtype=np.int64))


@given(SIZES, st.integers(100, 300), st.integers(16, 40))
def test_a_selection_fits_and_nothing_more_would(sizes, max_tokens, max_crops):
    lengths, crops = zip(*sizes)
    chosen = select(lengths, crops, max_tokens, max_crops)
    assert chosen == sorted(set(chosen)) and chosen[0] == 0
    tokens, used = sum(lengths[i] for i in chosen), sum(crops[i] for i in chosen)
    assert tokens <= max_tokens and used <= max_crops
    for index in set(range(len(sizes))) - set(chosen):
        assert tokens + lengths[index] > max_tokens or used + crops[index] > max_crops


@given(SIZES, st.integers(2, 48))
def test_every_sample_leaves_and_none_waits_longer_than_the_pool(sizes, buffer_size):
    waiting, pool, left = list(enumerate(sizes)), [], []
    since = {}
    for pack in range(len(sizes) + 1):
        while waiting and len(pool) < buffer_size:
            pool.append(waiting.pop(0))
            since[pool[-1][0]] = pack
        if not pool:
            break
        chosen = select([s[0] for _, s in pool], [s[1] for _, s in pool], 100, 16)
        left += [pool[i][0] for i in chosen]
        assert all(pack - since[pool[i][0]] < buffer_size for i in chosen)
        pool = [item for i, item in enumerate(pool) if i not in chosen]
    assert sorted(left) == list(range(len(sizes)))


def test_select_takes_the_oldest_then_the_largest():
    assert select([10, 30, 80, 60, 30], [1, 0, 1, 0, 0], 100, 8) == [0, 2]
    assert select([10, 30, 20, 5], [1, 1, 8, 6], 100, 8) == [0, 1, 3]  # the crops of 2 do not fit
    assert select([0, 0], [0, 0], 10, 0) == [0, 1]


@pytest.mark.parametrize("lengths, crops", [([11], [0]), ([1, 11], [0, 0]), ([1], [3])])
def test_what_never_fits_is_refused(lengths, crops):
    with pytest.raises(ValueError, match="a row holds 10 and 2"):
        select(lengths, crops, 10, 2)


def test_pools_fill_rows():
    """Lengths like those of stage 2: the rows are nearly full in one of the two budgets."""
    rng = np.random.default_rng(0)
    texts = [(int(n), 0) for n in rng.lognormal(6, 0.8, 400).clip(50, 4000)]
    images = [(int(1200 + n), 9) for n in rng.lognormal(5.5, 0.8, 1000).clip(50, 3000)]
    videos = [(int(86 * f + 300), int(f)) for f in rng.integers(8, 129, 300)]
    stream = [*texts, *images, *videos]
    rng.shuffle(stream)
    pool, fills = [], []
    while True:
        while stream and len(pool) < 48:
            pool.append(stream.pop())
        if not stream:
            break
        chosen = select([s[0] for s in pool], [s[1] for s in pool], 16384, 128)
        fills.append(max(sum(pool[i][0] for i in chosen) / 16384, sum(pool[i][1] for i in chosen) / 128))
        pool = [item for i, item in enumerate(pool) if i not in chosen]
    assert np.mean(fills) > 0.97 and np.quantile(fills, 0.05) > 0.9


def make_plan(units, text, seed=0, tree=False):
    """A plan with one <im_patch> for each pooling window and `text` further tokens, and pixels to go with it."""
    rng = np.random.default_rng(seed)
    windows, crops = sum(w for _, w in units), sum(c for c, _ in units)
    ids = np.array([PATCH] * windows + list(rng.integers(10, 90, text)), dtype=np.int32)
    n = len(ids)
    segments = np.where(np.arange(n) < windows, ROOT_SEGMENT, 3) if tree else np.zeros(n, dtype=np.int32)
    plan = Plan(
        ids, ids + 1, np.linspace(0, 1, n, dtype=np.float32), np.arange(n, dtype=np.int32), segments.astype(np.int32),
        units, Counter(examples=1, tokens=n),
    )  # fmt: skip
    pixels = rng.integers(0, 256, (crops, 4, 3), dtype=np.uint8)
    pooling = rng.integers(-1, max(crops * 4, 1), (windows, 9)) if crops else NOTHING[1]
    return plan, (pixels, pooling)


EXAMPLES = st.lists(
    st.builds(
        make_plan, st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), max_size=3), st.integers(1, 9),
        st.integers(0, 999), st.booleans(),
    ),
    max_size=4,
)  # fmt: skip


def row_of(examples, length=128, counters=()):
    plans, pixels = [plan for plan, _ in examples], [pixels for _, pixels in examples]
    sources = list(range(len(plans)))
    fields = make_row(plans, sources, pixels, length, PAD, NOTHING, Counter(counters))
    return Row(__key__="row", __restore_key__=(), **fields)


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
    assert batch.counters["examples"] == sum(map(len, rows)) and set(batch.counters) == set(COUNTERS)


def test_types_and_shapes_without_pictures():
    batch = collate([row_of([], 16), row_of([make_plan([], 5)], 16)], np.array([PATCH]))
    expected = {
        "input_ids": (torch.int64, (2, 16)), "labels": (torch.int64, (2, 16)), "loss_weights": (torch.float32, (2, 16)),
        "position_ids": (torch.int64, (2, 16)), "segment_ids": (torch.int64, (2, 16)),
        "vision_mask": (torch.bool, (2, 16)), "source_ids": (torch.int32, (2, 16)),
        "crops": (torch.uint8, (0, 4, 3)), "pooling": (torch.int64, (0, 9)), "vision_units": (torch.int64, (0, 2)),
    }  # fmt: skip
    assert {name: (getattr(batch, name).dtype, tuple(getattr(batch, name).shape)) for name in expected} == expected


def test_a_padding_token_that_is_a_visual_one_is_not_visual():
    batch = collate([row_of([make_plan([(1, 2)], 3)], 16)], np.array([PATCH, PAD]))
    assert batch.vision_mask.sum() == 2


def test_counters_of_dropped_samples_are_kept():
    plan = dropped("too_long")
    row = row_of([make_plan([], 5)], counters=plan.counters)
    batch = collate([row, row], np.array([PATCH]))
    assert batch.counters["dropped_too_long"] == 2 and batch.counters["examples"] == 2
    assert (plan.num_tokens, plan.num_crops) == (0, 0)
