"""The attention rule against plain loops, and its sparse form against its dense form."""

import numpy as np
import pytest
import torch

from molmo2_nemo.model.attention import attend
from molmo2_nemo.model.mask import block_mask, dense_mask


def random_row(seed: int, length: int):
    """Packed documents with roots, branches and vision spans: (segment_ids, vision_mask, document, branch)."""
    rng = np.random.default_rng(seed)
    segments, vision, documents, branches = [], [], [], []
    k = 0
    while len(segments) < length - 12:
        tree = rng.random() < 0.5
        parts = [None, *range(rng.integers(2, 4))] if tree else [None]
        for branch in parts:
            for _ in range(rng.integers(3, 14)):
                root_segment = 10_000 if tree else 0
                segments.append(100_000 * k + (root_segment if branch is None else branch))
                # Branches are text; a root mixes text and vision tokens.
                vision.append(branch is None and rng.random() < 0.6)
                documents.append(k)
                branches.append(branch)
        k += 1
    segments, vision = segments[: length - 5], vision[: length - 5]
    padding = length - len(segments)
    return (
        torch.tensor(segments + [-1] * padding)[None], torch.tensor(vision + [False] * padding)[None],
        documents[: length - 5], branches[: length - 5],
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_dense_mask_equals_plain_loops(seed):
    length = 96
    segments, vision, documents, branches = random_row(seed, length)
    mask = dense_mask(segments, vision)[0, 0]
    for i in range(len(documents)):
        for j in range(len(documents)):
            same_document = documents[i] == documents[j]
            sees_branch = branches[j] is None or branches[i] == branches[j]
            in_order = j <= i or (bool(vision[0, i]) and bool(vision[0, j]))
            expected = (same_document and sees_branch and in_order) or i == j
            assert mask[i, j] == expected, (seed, i, j)


def test_the_rule_is_not_causal():
    segments, vision, *_ = random_row(0, 96)
    assert dense_mask(segments, vision)[0, 0].triu(1).any()


@pytest.mark.parametrize("offset, queries", [(0, 256), (128, 128)])
def test_block_mask_equals_dense_mask(offset, queries):
    rows = [random_row(seed, 256) for seed in (1, 2)]
    segments, vision = torch.cat([r[0] for r in rows]), torch.cat([r[1] for r in rows])
    dense = dense_mask(segments, vision, offset, queries)
    blocks = block_mask(segments, vision, offset, queries)
    found = torch.zeros_like(dense)
    q, k = torch.meshgrid(torch.arange(queries), torch.arange(256), indexing="ij")
    for b in range(2):
        found[b, 0] = blocks.mask_mod(torch.tensor(b), torch.tensor(0), q, k)
    assert torch.equal(found, dense)
    # Blocks without a visible pair are not stored.
    stored = blocks.to_dense().bool()
    visible = dense.unfold(2, 128, 128).unfold(3, 128, 128).any(-1).any(-1)
    assert torch.equal(stored, visible)


def test_flex_attention_equals_float64_attention():
    torch.manual_seed(0)
    segments, vision, *_ = random_row(3, 256)
    q, k, v = torch.randn(1, 4, 256, 16), torch.randn(1, 2, 256, 16), torch.randn(1, 2, 256, 16)
    with torch.no_grad():
        flex = attend(q, k, v, block_mask(segments, vision), 0.25)
    scores = (q.double() @ k.double().repeat_interleave(2, 1).transpose(-1, -2)) * 0.25
    scores = scores.masked_fill(~dense_mask(segments, vision), float("-inf"))
    expected = scores.softmax(-1) @ v.double().repeat_interleave(2, 1)
    assert (flex.double() - expected).norm() / expected.norm() < 1e-6
    dense = attend(q, k, v, dense_mask(segments, vision), 0.25)
    assert (dense.double() - expected).norm() / expected.norm() < 1e-6
