"""Indices of visual tokens and losses pick what boolean masks would, for any number of context parallel ranks."""

import pytest
import torch

from molmo2_nemo.training.batches import edges_of, indices_of

PATCH = 9


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_indices_pick_what_masks_would(ranks):
    generator = torch.Generator().manual_seed(ranks)
    B, S, H = 3, 16, 2
    input_ids = torch.where(torch.rand(B, S, generator=generator) < 0.4, PATCH, 1)
    weights = (torch.rand(B, S, generator=generator) - 0.5).clamp(min=0)
    hidden = torch.randn(S, B, H, generator=generator)
    is_patch = input_ids == PATCH
    visual = torch.randn(int(is_patch.sum()), H, generator=generator)
    merged = hidden.transpose(0, 1).clone()
    merged[is_patch] += visual
    indices = indices_of(input_ids, weights, PATCH)
    edges = edges_of(indices, B, S, ranks)
    assert [edge[-1] for edge in edges.values()] == [len(visual), int((weights > 0).sum())]
    for rank in range(ranks):
        local = slice(rank * S // ranks, (rank + 1) * S // ranks)
        own, first = hidden[local].flatten(0, 1), local.start * B
        places, tokens = indices["patch_index"][:, edges["patch_index"][rank] : edges["patch_index"][rank + 1]]
        found = own.index_add(0, places - first, visual[tokens]).view(-1, B, H)
        assert torch.equal(found, merged.transpose(0, 1)[local])
        losses = indices["loss_index"][edges["loss_index"][rank] : edges["loss_index"][rank + 1]]
        assert torch.equal(own[losses - first], hidden[local][weights.t()[local] > 0])
