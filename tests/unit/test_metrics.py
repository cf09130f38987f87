"""Counts that the log's rates are made of."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from molmo2_nemo.command_line import compose
from molmo2_nemo.data.encode import ROOT_SEGMENT
from molmo2_nemo.model.mask import SEGMENTS_PER_EXAMPLE, dense_mask
from molmo2_nemo.planner.flops import training_flops
from molmo2_nemo.training.batches import WORK, attended_pairs
from molmo2_nemo.training.speed import Speed, impossible_mfu, speed_note

# Examples: (visual tokens, other tokens of the root or the whole, lengths of branches; none: no tree)
EXAMPLES = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 6), st.lists(st.integers(1, 7), max_size=3)), max_size=4
)


def row(examples, length):
    segments, vision = [], []
    for number, (visual, rest, branches) in enumerate(examples):
        root = ROOT_SEGMENT if branches else 0
        segments += [SEGMENTS_PER_EXAMPLE * number + root] * (visual + rest)
        vision += [False] + [True] * visual + [False] * (rest - 1)
        for branch, count in enumerate(branches):
            segments += [SEGMENTS_PER_EXAMPLE * number + branch] * count
            vision += [False] * count
    padding = length - len(segments)
    return segments + [-1] * padding, vision + [False] * padding


@given(st.lists(EXAMPLES, min_size=1, max_size=3))
def test_attended_pairs_are_the_area_of_the_mask(rows):
    length = 4 + max(sum(v + r + sum(b) for v, r, b in examples) for examples in rows)
    segments, vision = (torch.tensor(column) for column in zip(*(row(examples, length) for examples in rows)))
    mask = dense_mask(segments, vision)[:, 0]
    expected = mask[segments >= 0].sum()  # rows of the mask that belong to tokens
    assert attended_pairs(segments, vision) == expected


@pytest.fixture
def one_rank():
    """A process group of this process alone: its own, or one that another test has left here."""
    alone = not dist.is_initialized()
    if alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.get_world_size() == 1
    yield
    if alone:
        dist.destroy_process_group()


def test_speed_is_work_over_time(one_rank):
    config = compose("stage1", ["model=tiny", "data=sample", "schedule=quickstart"])
    speed = Speed(config, "cpu", "fp32")
    assert speed.peak is None
    counts = dict(crops=3, visual_tokens=20, pooled_patches=90, tokens=200, attended=4000, loss_tokens=50)
    work = torch.tensor([counts[name] for name in WORK], dtype=torch.float64)
    figures = []
    for peak in (None, 1e9, 1e3):
        speed.peak = peak
        speed.add([{"work": work}, {"work": work}])
        speed.add([{"work": work}])
        figures.append(speed.reduce(seconds=2.0, rows=3))
    flops = training_flops(config.model, **{name: 3 * count for name, count in counts.items()})
    plain, known, impossible = figures
    assert plain["mfu"] is None and plain["model_tflops_per_second"] == pytest.approx(flops / 2 / 1e12)
    assert plain["work"] == {name: 3 * count for name, count in counts.items()}
    assert plain["loss_tokens_per_second"] == 75 and plain["rows_per_second"] == 1.5
    assert plain["padded_tokens_per_second"] == 3 * config.data.seq_length / 2
    assert plain["patches_per_second"] == 9 * 36 / 2
    assert plain["imbalance"] == {"vision": 1, "decoder": 1}
    assert known["mfu"] == pytest.approx(flops / 2 / 1e9)
    assert impossible_mfu(plain) is None and speed_note(plain) == "MFU n/a"
    assert impossible_mfu(known) is None and known["mfu"] is not None
    sentence = impossible_mfu(impossible)
    assert sentence.startswith("error: an MFU of ") and "cannot be" in sentence and impossible["mfu"] is None


def test_imbalance_is_of_each_step(one_rank):
    config = compose("stage1", ["model=tiny", "data=sample", "schedule=quickstart"])
    none, some = [0.0] * len(WORK), [0.0] * len(WORK)
    for at, name in enumerate(WORK):
        if name in ("tokens", "attended"):
            none[at] = some[at] = 100.0
        elif name == "crops":
            some[at] = 10.0
    # Two ranks take turns: over both steps they did the same, and yet each step waits for one of them.
    by_rank = torch.tensor([[some, none], [none, some]])
    found = Speed(config, "cpu", "fp32")._imbalance(by_rank)
    assert found == {"vision": 2.0, "decoder": 1.0}
    assert speed_note({"mfu": 0.1234, "imbalance": found}) == "MFU 12.3% | busiest rank/mean: vision 2.00"
