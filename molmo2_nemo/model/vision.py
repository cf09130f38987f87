"""Vision transformer and attention-pooling connector, data-parallel inside a tensor x context parallel group.

Each rank holds the whole tower, encodes its share of a micro-batch's images and frames, pools and projects them,
and the visual tokens are gathered. Nobody encodes the same crop twice.
"""

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from molmo2_nemo.config import ModelConfig
from molmo2_nemo.model.collectives import all_gather
from molmo2_nemo.model.layers import gated_mlp, vit_block_spec


class VisionTransformer(MegatronModule):
    """SigLIP-2-style ViT: linear patch embedding, learned positions, pre-norm layers, chosen layers' outputs."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, pg_collection):
        super().__init__(config)
        vit, vision = model.vit, model.vision
        # Negative layers count from the last one, as in transformers.
        self.feature_layers = [layer % vit.num_layers for layer in vit.feature_layers]
        self.patch_embedding = nn.Linear(vision.patch_dim, vit.hidden_size, dtype=config.params_dtype)
        self.position_embedding = nn.Parameter(
            torch.empty(vision.patches_per_crop, vit.hidden_size, dtype=config.params_dtype)
        )
        for weight in (self.patch_embedding.weight, self.position_embedding):
            nn.init.normal_(weight, std=model.init_std)
        nn.init.zeros_(self.patch_embedding.bias)
        self.encoder = TransformerBlock(
            config, vit_block_spec(vit.num_layers, config), post_layer_norm=False, pg_collection=pg_collection
        )

    def forward(self, crops: Tensor) -> Tensor:
        """uint8 crops [C, P, patch_dim] -> features [C, P, feature layers x hidden]."""
        # mean = std = 0.5: bytes become [-1, 1] here, so that they travel as bytes.
        pixels = crops.to(self.patch_embedding.weight.dtype) / 127.5 - 1.0
        x = self.patch_embedding(pixels) + self.position_embedding
        taps = sorted(set(self.feature_layers))
        _, outputs = self.encoder(x.transpose(0, 1).contiguous(), None, extract_layer_indices=set(taps))
        by_layer = dict(zip(taps, outputs))
        return torch.cat([by_layer[layer] for layer in self.feature_layers], dim=-1).transpose(0, 1)


class Connector(MegatronModule):
    """Pool windows of patches by attention (the query is their mean), then project into the decoder's width."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, pg_collection):
        super().__init__(config)
        connector = model.connector
        features = model.vit.hidden_size * len(model.vit.feature_layers)
        inner = connector.num_attention_heads * connector.head_dim
        self.num_heads, self.head_dim = connector.num_attention_heads, connector.head_dim
        self.query, self.key, self.value = (
            nn.Linear(features, inner, dtype=config.params_dtype) for _ in range(3)
        )
        self.output = nn.Linear(inner, connector.hidden_size, dtype=config.params_dtype)
        for linear in (self.query, self.key, self.value, self.output):
            nn.init.normal_(linear.weight, std=model.init_std)
            nn.init.zeros_(linear.bias)
        self.projector = gated_mlp(config, connector.hidden_size, pg_collection)

    def forward(self, features: Tensor, pooling: Tensor) -> Tensor:
        """features [C, P, F]; pooling int64 [T, W], indices into the flattened (C, P), -1 invalid -> [T, H]."""
        T, W = pooling.shape
        valid = pooling >= 0
        patches = features.reshape(-1, features.shape[-1])[pooling.clamp(min=0)] * valid.unsqueeze(-1)
        mean = patches.sum(1, keepdim=True) / valid.sum(1).clamp(min=1).view(T, 1, 1)

        def heads(x):
            return x.view(T, -1, self.num_heads, self.head_dim).transpose(1, 2)

        pooled = F.scaled_dot_product_attention(
            heads(self.query(mean)), heads(self.key(patches)), heads(self.value(patches)),
            attn_mask=valid.view(T, 1, 1, W), scale=self.head_dim**-0.5,
        )  # fmt: skip
        projected, _ = self.projector(self.output(pooled.transpose(1, 2).reshape(T, 1, -1)))
        return projected.squeeze(1)


class VisionTower(MegatronModule):
    """ViT and connector with their work shared over `group` (the tensor x context parallel ranks of stage 0)."""

    def __init__(self, model: ModelConfig, vit_config, connector_config, pg_collection, group):
        super().__init__(vit_config)
        self.vit = VisionTransformer(model, vit_config, pg_collection)
        self.connector = Connector(model, connector_config, pg_collection)
        self.group = group
        for parameter in self.parameters():
            # Built by tensor-parallel layers on a group of one: whole on every rank, and counted once in norms.
            parameter.tensor_model_parallel = False
            parameter.vision_data_parallel = True

    def forward(self, crops: Tensor, pooling: Tensor, vision_units: Tensor) -> Tensor:
        """Visual tokens of a micro-batch, the same [T, H] on every rank of the group.

        crops uint8 [C, P, patch_dim]; pooling int64 [T, W]; vision_units int64 [U, 2] = (crops, windows) of each
        image or frame, in order. A rank without work encodes one blank crop, so that every rank runs the same
        collectives and every parameter gets a gradient.
        """
        ranks, rank = self.group.size(), self.group.rank()
        shares = split_units(vision_units.tolist(), ranks)
        crop_start, crop_end, window_start, window_end = shares[rank]
        patches = crops.shape[1]
        own_crops, own_pooling = crops[crop_start:crop_end], pooling[window_start:window_end]
        own_pooling = torch.where(own_pooling >= 0, own_pooling - crop_start * patches, -1)
        if crop_end == crop_start:
            own_crops = crops.new_zeros(1, *crops.shape[1:])
        padded = max(max(share[3] - share[2] for share in shares), 1)
        # Padding windows read patch 0; nothing selects them, so their gradient is zero.
        own_pooling = F.pad(own_pooling, (0, 0, 0, padded - own_pooling.shape[0]), value=0)
        tokens = self.connector(self.vit(own_crops), own_pooling)
        if ranks > 1:
            # Each context parallel rank brings the gradient of its own tokens, each tensor parallel rank a copy.
            tokens = all_gather(tokens, self.group, copies=parallel_state.get_tensor_model_parallel_world_size())
        counts = [share[3] - share[2] for share in shares]
        kept = torch.cat([torch.arange(n, device=tokens.device) + r * padded for r, n in enumerate(counts)])
        return tokens[kept]


def split_units(units: list[list[int]], ranks: int) -> list[tuple[int, int, int, int]]:
    """Deal images and frames, in order, to ranks by crops: per rank (crop start, end, window start, end).

    A unit goes to the rank in whose equal share of the crops its middle falls.
    """
    total = sum(crops for crops, _ in units)
    shares, crop, window, index = [], 0, 0, 0
    for rank in range(ranks):
        crop_start, window_start = crop, window
        limit = (rank + 1) * total / ranks
        while index < len(units) and (rank == ranks - 1 or crop + units[index][0] / 2 <= limit):
            crop, window, index = crop + units[index][0], window + units[index][1], index + 1
        shares.append((crop_start, crop, window_start, window))
    return shares

