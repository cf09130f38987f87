"""The attention rule against plain loops, and its sparse form against its dense form."""

import math

import numpy as np
import pytest
import torch
from programs import load

from molmo2_nemo import compat
from molmo2_nemo.model.attention import attend, compiled_flex_attention
from molmo2_nemo.model.mask import SEGMENTS_PER_EXAMPLE, block_mask, compiled_create_block_mask, dense_mask, mask_mod


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
        torch.tensor(segments + [-1] * padding)[None],
        torch.tensor(vision + [False] * padding)[None],
        documents[: length - 5],
        branches[: length - 5],
    )


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


def packed_tree(seed: int, length: int):
    """Documents of a root (text, images, frames) and branches, as lists of tokens: (document, branch or None, is
    visual).

    Of some rows the last document is cut off in the middle, of some there is padding, up to all of it.
    """
    rng = np.random.default_rng(seed)
    tokens, document = [], 0
    size = int(rng.integers(0, length + 1)) if seed % 5 == 0 else length
    while len(tokens) < size:
        for _span in range(rng.integers(0, 4)):  # nothing, images, or a video with its time stamps
            tokens += [(document, None, False)] * int(rng.integers(1, 4))
            tokens += [(document, None, True)] * int(rng.integers(1, 12))
        tokens += [(document, None, False)] * int(rng.integers(1, 9))
        branches = int(rng.choice([0, 2, 3, 5]))
        for branch in range(branches):
            tokens += [(document, branch, False)] * int(rng.integers(1, 8))
        document += 1
    return tokens[:size]


def row_of(tokens, length: int):
    """The tensors that training has of such tokens: (segment_ids, vision_mask), [1, length]."""
    trees = {document for document, branch, _ in tokens if branch is not None}
    segments = [
        100_000 * document + (branch if branch is not None else 10_000 if document in trees else 0)
        for document, branch, _ in tokens
    ]
    padding = length - len(tokens)
    vision = [visual for *_, visual in tokens] + [False] * padding
    return (
        torch.tensor(segments + [-1] * padding, dtype=torch.int64)[None],
        torch.tensor(vision, dtype=torch.bool)[None],
    )


def seen_from(tokens, i: int) -> list[int]:
    """Keys that query i sees, by the words of the rule; padding sees itself."""
    if i >= len(tokens):
        return [i]
    document, branch, visual = tokens[i]
    seen = []
    for j, (other_document, other_branch, other_visual) in enumerate(tokens):
        if j == i:
            seen.append(j)
        elif other_document != document or (other_branch is not None and other_branch != branch):
            continue
        elif j < i or (visual and other_visual):
            seen.append(j)
    return seen


def float64_attention(q, k, v, tokens, scale: float):
    """Plain loops over heads and queries in float64; query heads share key heads in groups. [N, S, D] -> [N, S, D]."""
    q, k, v = (x.detach().double().numpy() for x in (q, k, v))
    out = np.zeros((len(q), q.shape[1], v.shape[2]))
    for i in range(q.shape[1]):
        keys = seen_from(tokens, i)
        for head in range(len(q)):
            group = head // (len(q) // len(k))
            scores = [scale * float(np.dot(q[head, i], k[group, j])) for j in keys]
            top = max(scores)
            weights = [math.exp(score - top) for score in scores]
            for weight, j in zip(weights, keys):
                out[head, i] += weight / sum(weights) * v[group, j]
    return out


@pytest.mark.parametrize("seeds", [range(start, start + 30) for start in range(0, 300, 30)], ids=str)
def test_dense_mask_of_hundreds_of_trees(seeds):
    length = 64
    for seed in seeds:
        tokens = packed_tree(seed, length)
        expected = torch.zeros(length, length, dtype=torch.bool)
        for i in range(length):
            expected[i, seen_from(tokens, i)] = True
        assert torch.equal(dense_mask(*row_of(tokens, length))[0, 0], expected), seed


@pytest.mark.parametrize("seed", range(24))
def test_block_mask_holds_every_visible_pair_and_no_empty_block(seed):
    # Also the local queries of a context parallel rank against all keys, and lengths that are no multiple of a block.
    length, offset, queries = [(384, 0, 384), (400, 200, 200), (512, 384, 128), (300, 75, 75)][seed % 4]
    segments, vision = row_of(packed_tree(seed, length), length)
    visible = dense_mask(segments, vision, offset, queries)[0, 0]
    blocks = block_mask(segments, vision, offset, queries)
    stored = blocks.to_dense()[0, 0].bool()
    full = torch.zeros_like(stored)
    for row in range(len(stored)):
        full[row, blocks.full_kv_indices[0, 0, row, : blocks.full_kv_num_blocks[0, 0, row]].long()] = True
    q, k = torch.meshgrid(torch.arange(queries), torch.arange(length), indexing="ij")
    inside = blocks.mask_mod(torch.tensor(0), torch.tensor(0), q, k)
    for row in range(len(stored)):
        for column in range(stored.shape[1]):
            part = np.s_[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128]
            assert stored[row, column] == visible[part].any()
            # Of whole blocks the rule is not asked again; of the others the rule is the mask.
            assert visible[part].all() if full[row, column] else torch.equal(inside[part], visible[part])


@pytest.mark.parametrize("seed", range(3))
def test_flex_attention_equals_plain_loops(seed):
    tokens = packed_tree(seed + 1000, 160)
    torch.manual_seed(seed)
    q, k, v = torch.randn(1, 4, 160, 8), torch.randn(1, 2, 160, 8), torch.randn(1, 2, 160, 8)
    expected = torch.from_numpy(float64_attention(q[0], k[0], v[0], tokens, 0.3))
    segments, vision = row_of(tokens, 160)
    with torch.no_grad():
        whole = attend(q, k, v, block_mask(segments, vision), 0.3)
        half = attend(q[:, :, 80:], k, v, block_mask(segments, vision, 80, 80), 0.3)
    assert (whole[0].double() - expected).norm() / expected.norm() < 1e-6
    assert (half[0].double() - expected[:, 80:]).norm() / expected[:, 80:].norm() < 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_sdpa_and_its_gradients_equal_plain_loops(seed):
    tokens = packed_tree(seed + 2000, 48)
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, n, 48, 6, requires_grad=True) for n in (4, 2, 2))
    grad = torch.randn(1, 4, 48, 6)
    out = attend(q, k, v, dense_mask(*row_of(tokens, 48)), 0.4)
    expected = torch.from_numpy(float64_attention(q[0], k[0], v[0], tokens, 0.4))
    assert (out[0].double() - expected).norm() / expected.norm() < 1e-6
    out.backward(grad)
    # d loss / d v_j = sum of p_ij g_i;  d / d score_ij = p_ij (g_i . (v_j - out_i))
    by_query, by_key, by_value = (np.zeros(x.shape[1:]) for x in (q, k, v))
    Q, K, V, G = (x.detach().double().numpy()[0] for x in (q, k, v, grad))
    for i in range(48):
        keys = seen_from(tokens, i)
        for head in range(4):
            scores = np.array([0.4 * np.dot(Q[head, i], K[head // 2, j]) for j in keys])
            p = np.exp(scores - scores.max())
            p /= p.sum()
            for weight, j in zip(p, keys):
                by_value[head // 2, j] += weight * G[head, i]
                score = weight * np.dot(G[head, i], V[head // 2, j] - expected[head, i].numpy())
                by_query[head, i] += 0.4 * score * K[head // 2, j]
                by_key[head // 2, j] += 0.4 * score * Q[head, i]
    for found, plain in ((q.grad, by_query), (k.grad, by_key), (v.grad, by_value)):
        assert np.linalg.norm(found[0].double().numpy() - plain) / np.linalg.norm(plain) < 1e-5


@pytest.mark.slow
def test_another_micro_batch_compiles_nothing(monkeypatch):
    """What runs on a GPU, with a backend that needs no compiler: new tensors in a new closure, the same program."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")  # conftest.py disables it where there is no driver
    torch.compiler.reset()
    create, flex = compiled_create_block_mask("eager"), compiled_flex_attention("eager")
    graphs = []
    with compat.dynamo_config().patch(disable=False), torch.no_grad():
        for seed in range(3):
            segments, vision = row_of(packed_tree(seed, 384), 384)
            mask = create(mask_mod(segments, vision, 192), 1, None, 192, 384, device=segments.device)
            q, k = torch.randn(1, 2, 192, 16), torch.randn(1, 2, 384, 16)
            expected = attend(q, k, k, dense_mask(segments, vision, 192, 192), 0.25)
            assert (flex(q, k, k, block_mask=mask, scale=0.25) - expected).norm() / expected.norm() < 1e-5
            graphs.append(compat.compiled_graphs())
    assert graphs[0] > 0 and len(set(graphs)) == 1, graphs


def test_visible_blocks_of_a_row_are_those_of_the_block_mask():
    """The share that tools/bench/packing.py prints."""
    bench = load("tools/bench/packing.py")
    row, S = [(300, 0), (500, 2), (100, 0), (700, 1)], 2048
    segments, vision, start = torch.full((1, S), -1), torch.zeros(1, S, dtype=torch.bool), 0
    for number, (tokens, crops) in enumerate(row):
        segments[0, start : start + tokens] = number * SEGMENTS_PER_EXAMPLE
        vision[0, start : start + max(0, tokens - bench.TEXT_TOKENS) * bool(crops)] = True
        start += tokens
    blocks = block_mask(segments, vision)
    visible = (blocks.kv_num_blocks + blocks.full_kv_num_blocks).sum()
    assert bench.visible_blocks(row, S) == int(visible) / 16**2
