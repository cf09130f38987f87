"""Which token may attend to which: packed documents, message-tree branches, bidirectional vision tokens.

Source of the rule: public `olmo/models/molmo2/molmo2.py` of allenai/molmo2, and arXiv 2601.10611 section 3.
Nothing here knows of ranks.
"""

import functools

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

# Packed example k of a row adds k times this to its segment ids; padding has segment id -1.
SEGMENTS_PER_EXAMPLE = 100_000
# Within an example: the segment id of a message tree's root, which all branches see; branch m has segment m, and a
# plain example segment 0.
ROOT_SEGMENT = 10_000


def mask_mod(segment_ids: torch.Tensor, vision_mask: torch.Tensor, query_offset: int = 0):
    """The rule as a FlexAttention predicate `(batch, head, query, key) -> bool tensor`.

    A key is visible when it belongs to a segment not below the query's (a branch sees its root but no sibling and no
    earlier document), and either precedes the query or both are vision tokens of the same document. Padding neither
    sees nor is seen. Every token sees itself, so that rows of padding stay finite.

    segment_ids: int64 [B, S]; vision_mask: bool [B, S]; query_offset: position of query 0 in the row.
    """
    # Whatever depends on one token alone is worked out here: the rule runs for every pair of a block.
    segments = segment_ids.int()
    padding, documents = segments < 0, segments // SEGMENTS_PER_EXAMPLE
    of_query = segments.masked_fill(padding, torch.iinfo(torch.int32).max)
    # Two vision tokens of a document are the same number, everything else differs.
    visual_query, visual_key = documents.masked_fill(~vision_mask, -1), documents.masked_fill(~vision_mask, -2)

    def rule(b, h, q, k):
        q = q + query_offset
        in_sight = (k <= q) | (visual_query[b, q] == visual_key[b, k])
        return (of_query[b, q] <= segments[b, k]) & in_sight | (k == q)

    return rule


def dense_mask(
    segment_ids: torch.Tensor, vision_mask: torch.Tensor, query_offset: int = 0, num_queries: int | None = None
) -> torch.Tensor:
    """bool [B, 1, Q, S], True where attention is allowed. For the CPU and for short sequences."""
    B, S = segment_ids.shape
    device = segment_ids.device
    b = torch.arange(B, device=device).view(B, 1, 1)
    q = torch.arange(S if num_queries is None else num_queries, device=device).view(1, -1, 1)
    k = torch.arange(S, device=device).view(1, 1, S)
    return mask_mod(segment_ids, vision_mask, query_offset)(b, 0, q, k).unsqueeze(1)


def mask_at(segment_ids: torch.Tensor, vision_mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The same rule for the queries at some positions of each row, int64 [B, Q]; bool [B, 1, Q, S]."""
    B, S = segment_ids.shape
    b = torch.arange(B, device=segment_ids.device).view(B, 1, 1)
    k = torch.arange(S, device=segment_ids.device).view(1, 1, S)
    return mask_mod(segment_ids, vision_mask)(b, 0, positions.unsqueeze(-1), k).unsqueeze(1)


def block_mask(
    segment_ids: torch.Tensor, vision_mask: torch.Tensor, query_offset: int = 0, num_queries: int | None = None
) -> BlockMask:
    """The same rule as a FlexAttention BlockMask; only blocks that hold a visible pair are stored."""
    B, S = segment_ids.shape
    create = compiled_create_block_mask() if segment_ids.is_cuda else create_block_mask
    return create(
        mask_mod(segment_ids, vision_mask, query_offset),
        B,
        None,
        S if num_queries is None else num_queries,
        S,
        device=segment_ids.device,
    )


@functools.cache
def compiled_create_block_mask(backend: str = "inductor"):
    """create_block_mask as one kernel that evaluates the rule block by block: no S x S tensor is ever made.

    Compiled once for a shape: a new micro-batch's segment and vision tensors are inputs of what is compiled, though
    `mask_mod` returns another closure each time. fullgraph: an error, not a fall back to eager, if that failed.
    """
    return torch.compile(create_block_mask, backend=backend, dynamic=False, fullgraph=True)


def make_mask(segment_ids, vision_mask, query_offset: int = 0, num_queries: int | None = None):
    """A BlockMask on a GPU, a dense mask on a CPU (FlexAttention has no backward there)."""
    make = block_mask if segment_ids.is_cuda else dense_mask
    return make(segment_ids, vision_mask, query_offset, num_queries)
