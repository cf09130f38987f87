"""Keys and values of packed rows, kept by each layer, so that a new token costs a pass of its own position alone.

The rows are whole from the start, with free positions behind each question: a token's place, segment and rotary
position are those that it has without a cache, and what it sees is said by the same rule (mask.py).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class KeyValueCache:
    """What this rank holds of a micro-batch. The first pass is of whole rows, later ones of some positions of each.

    segment_ids: int64 [B, S], vision_mask: bool [B, S], of the whole rows. positions: int64 [B, q], the places in the
    rows of what a later pass is given; None: the first pass. Under context parallelism a rank has the keys of whole
    rows, of its heads or of all of them, as its attention gathers them.
    """

    segment_ids: Tensor
    vision_mask: Tensor
    positions: Tensor | None = None
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # keys, values [S, B, G, D] of each layer

    def extended(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [S, B, G, D] of the whole rows, with the given ones, [q, B, G, D], in their places."""
        if self.positions is None:
            self.layers[layer] = (key.contiguous(), value.contiguous())
        else:
            at = (self.positions.t(), torch.arange(key.shape[1], device=key.device))
            for kept, new in zip(self.layers[layer], (key, value)):
                kept[at] = new
        return self.layers[layer]
