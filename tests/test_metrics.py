"""Counts that the log's rates are made of."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from molmo2_nemo.data.encode import ROOT_SEGMENT
from molmo2_nemo.model.mask import SEGMENTS_PER_EXAMPLE, dense_mask
from molmo2_nemo.training.batches import attended_pairs

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
