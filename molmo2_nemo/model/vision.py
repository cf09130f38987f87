"""Vision transformer and attention-pooling connector, data-parallel inside a tensor x context parallel group.

Each rank holds the whole tower, encodes its share of a micro-batch's images and frames, pools and projects them,
and the visual tokens are gathered. No crop is encoded on two ranks. A rank encodes its share in chunks of whole images
and frames. In the backward pass it encodes each again, and of a chunk only its visual tokens are kept; or it makes each
layer again, of which its input (with fused kernels its middle, too) is kept.
"""

import bisect
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from molmo2_nemo.config.schema import FP8_MULTIPLES, LAYERS, ModelConfig, VisionConfig
from molmo2_nemo.model.collectives import all_gather
from molmo2_nemo.model.fused_vit import run_layers
from molmo2_nemo.model.layers import gated_mlp, gives_weights, vit_block_spec
from molmo2_nemo.model.lora import has_dropout


class VisionTransformer(MegatronModule):
    """SigLIP-2-style ViT: linear patch embedding, learned positions, pre-norm layers, chosen layers' outputs.

    again: make each layer again in the backward pass.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, pg_collection, again: bool = False):
        super().__init__(config)
        vit, vision = model.vit, model.vision
        # Negative layers count from the last one, as in transformers.
        self.feature_layers = [layer % vit.num_layers for layer in vit.feature_layers]
        self.patch_embedding = nn.Linear(vision.patch_dim, vit.hidden_size, dtype=config.params_dtype)
        self.position_embedding = nn.Parameter(
            torch.empty(vision.patches_per_crop, vit.hidden_size, dtype=config.params_dtype)
        )
        nn.init.normal_(self.patch_embedding.weight, std=model.init_std)
        nn.init.zeros_(self.patch_embedding.bias)
        first_embeddings(self.patch_embedding.weight, self.position_embedding, vision, model.init_std)
        self.encoder = TransformerBlock(
            config, vit_block_spec(vit.num_layers, config), post_layer_norm=False, pg_collection=pg_collection
        )
        self.again, self.gives_weights = again, gives_weights(config)
        # FP8 matrix products need a multiple of 16 patches or more, and a crop has an odd number: 729.
        align = FP8_MULTIPLES[config.fp8_recipe] if config.fp8 else 1
        self.crop_multiple = align // math.gcd(align, vision.patches_per_crop)

    def forward(self, crops: Tensor) -> Tensor:
        """uint8 crops [C, P, patch_dim] -> features [C, P, feature layers x hidden]."""
        count = len(crops)
        if count % self.crop_multiple:
            crops = F.pad(crops, (0, 0, 0, 0, 0, -count % self.crop_multiple))  # blank crops
        # mean = std = 0.5: bytes become [-1, 1] here, so that they travel as bytes.
        pixels = crops.to(self.patch_embedding.weight.dtype) / 127.5 - 1.0
        x = self.patch_embedding(pixels) + self.position_embedding
        taps = sorted(set(self.feature_layers))
        again = self.again and torch.is_grad_enabled()
        if self.gives_weights:
            outputs = run_layers(self.encoder.layers, x, set(taps), again)
        elif again:
            outputs = []
            for number, layer in enumerate(self.encoder.layers):
                x, _ = checkpoint(layer, x, None, use_reentrant=False, preserve_rng_state=has_dropout(layer))
                outputs += [x] if number in taps else []
        else:
            # Crops stand first, where Megatron has positions: nothing in a layer but CropAttention tells the two apart.
            _, outputs = self.encoder(x, None, extract_layer_indices=set(taps))
        by_layer = dict(zip(taps, outputs))
        return torch.cat([by_layer[layer] for layer in self.feature_layers], dim=-1)[:count]


class Connector(MegatronModule):
    """Pool windows of patches by attention (the query is their mean), then project into the decoder's width."""

    def __init__(self, model: ModelConfig, config: TransformerConfig, pg_collection):
        super().__init__(config)
        connector = model.connector
        features = model.vit.hidden_size * len(model.vit.feature_layers)
        inner = connector.num_attention_heads * connector.head_dim
        self.num_heads, self.head_dim = connector.num_attention_heads, connector.head_dim
        self.query, self.key, self.value = (nn.Linear(features, inner, dtype=config.params_dtype) for _ in range(3))
        self.output = nn.Linear(inner, connector.hidden_size, dtype=config.params_dtype)
        for linear in (self.query, self.key, self.value, self.output):
            nn.init.normal_(linear.weight, std=model.init_std)
            nn.init.zeros_(linear.bias)
        self.projector = gated_mlp(config, connector.hidden_size, pg_collection)

    def forward(self, features: Tensor, pooling: Tensor) -> Tensor:
        """features [C, P, F]; pooling int64 [T, W], indices into the flattened (C, P), -1 invalid -> [T, H]."""
        T, W = pooling.shape
        valid = pooling >= 0
        patches = features.reshape(-1, features.shape[-1])[pooling.clamp(min=0)]
        # A product with ones and zeros is the sum of the valid ones. The mask keeps the others from keys and values.
        total = valid.to(patches.dtype).unsqueeze(1) @ patches
        mean = total / valid.sum(1).clamp(min=1).view(T, 1, 1)

        def heads(x):
            return x.view(T, -1, self.num_heads, self.head_dim).transpose(1, 2)

        pooled = F.scaled_dot_product_attention(
            heads(self.query(mean)),
            heads(self.key(patches)),
            heads(self.value(patches)),
            attn_mask=valid.view(T, 1, 1, W),
            scale=self.head_dim**-0.5,
        )
        projected, _ = self.projector(self.output(pooled.transpose(1, 2).reshape(T, 1, -1)))
        return projected.squeeze(1)


class VisionTower(MegatronModule):
    """ViT and connector with their work shared over `group` (the tensor x context parallel ranks of stage 0).

    chunk_crops: crops encoded at a time, as whole images and frames; 0: all at once. recompute: the backward pass
    encodes a chunk again, so that no more than one chunk's activations are alive; "layers": it makes each layer of the
    ViT again, and the connector; False: all activations wait for it.
    """

    def __init__(
        self,
        model: ModelConfig,
        vit_config,
        connector_config,
        pg_collection,
        group,
        chunk_crops: int = 0,
        recompute: bool | str = False,
    ):
        super().__init__(vit_config)
        self.vit = VisionTransformer(model, vit_config, pg_collection, recompute == LAYERS)
        self.connector = Connector(model, connector_config, pg_collection)
        self.group, self.chunk_crops, self.recompute = group, chunk_crops, recompute
        for parameter in self.parameters():
            # Built by tensor-parallel layers on a group of one: whole on every rank, and counted once in norms.
            parameter.tensor_model_parallel = False
            parameter.vision_data_parallel = True

    def forward(self, crops: Tensor, pooling: Tensor, vision_units: Tensor) -> Tensor:
        """Visual tokens of a micro-batch, the same [T, H] on every rank of the group.

        crops uint8 [c, P, patch_dim], this rank's share alone (`crops_of_ranks`); pooling int64 [T, W], into all crops;
        vision_units int64 [U, 2], on the host, = (crops, windows) of each image or frame, in order. A rank without work
        encodes one blank crop, so that every parameter gets a gradient (of zero). Ranks may have different numbers of
        chunks: the only collective comes after the last.
        """
        # What dropout takes of the random numbers for a rank's own crops must not move the decoder's, which have to be
        # the same on all tensor parallel ranks.
        with torch.random.fork_rng([crops.device] if crops.is_cuda else [], enabled=has_dropout(self)):
            return self._forward(crops, pooling, vision_units)

    def _forward(self, crops: Tensor, pooling: Tensor, vision_units: Tensor) -> Tensor:
        ranks, rank = self.group.size(), self.group.rank()
        shares = split_units(vision_units.tolist(), ranks)
        counts = [sum(windows for _, windows in share) for share in shares]
        before = sum(n for share in shares[:rank] for n, _ in share)  # crops of earlier ranks
        crop, window = 0, sum(counts[:rank])
        parts = []
        for num_crops, num_windows in chunks_of(shares[rank], self.chunk_crops):
            indices = pooling[window : window + num_windows]
            indices = torch.where(indices >= 0, indices - (before + crop) * crops.shape[1], -1)
            parts.append(self._encode(crops[crop : crop + num_crops], indices))
            crop, window = crop + num_crops, window + num_windows
        if not parts:
            parts = [self._encode(crops.new_zeros(1, *crops.shape[1:]), pooling.new_zeros(1, pooling.shape[1]))]
        tokens = torch.cat(parts)
        padded = max(*counts, 1)
        tokens = F.pad(tokens, (0, 0, 0, padded - len(tokens)))
        if ranks > 1:
            # Each context parallel rank brings the gradient of its own tokens, each tensor parallel rank a copy.
            tokens = all_gather(tokens, self.group, copies=parallel_state.get_tensor_model_parallel_world_size())
        kept = torch.cat([torch.arange(n, device=tokens.device) + r * padded for r, n in enumerate(counts)])
        return tokens[kept]

    def _encode(self, crops: Tensor, pooling: Tensor) -> Tensor:
        """Visual tokens of one chunk; pooling counts from its first crop."""
        size = self.chunk_crops or len(crops)
        if len(crops) <= size and not self.vit.again:
            return self._run(lambda crops, pooling: self.connector(self.vit(crops), pooling), crops, pooling)
        # An image of more crops than that: its windows mix crops, so its features wait until all are there.
        encode = self.vit if self.vit.again else functools.partial(self._run, self.vit)
        features = [encode(part) for part in crops.split(size)]
        features = torch.cat(features) if len(features) > 1 else features[0]
        return self._run(self.connector, features, pooling)

    def _run(self, function: Callable, *tensors: Tensor) -> Tensor:
        if not self.recompute or not torch.is_grad_enabled():
            return function(*tensors)
        if self.vit.config.fp8:
            # Transformer Engine's own: scales must not be updated twice.
            from transformer_engine.pytorch import checkpoint as checkpoint_fp8

            return checkpoint_fp8(function, *tensors, use_reentrant=False)
        return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=has_dropout(self))


@torch.no_grad()
def first_embeddings(weight: Tensor, positions: Tensor, vision: VisionConfig, init_std: float) -> None:
    """Set the first patch embedding [width, patch_dim], random so far, and the first positions [patches, width].

    Places have three of sixteen dimensions of their own, so that what is seen and where it is do not hide each other;
    the others have waves, and stay random where there are more dimensions than waves. The amplitude of places is a
    compromise for the tiny model: with less it cannot tell places, with more it loses shapes (docs/tried.md).
    """
    of_places = len(weight) * 3 // 16
    of_pictures = len(weight) - of_places
    waves = cosine_waves(vision.patch_size)[:of_pictures]
    weight[: len(waves)] = waves * init_std * vision.patch_dim**0.5
    weight[of_pictures:] = 0
    places = F.pad(sines_of_places(vision.image_size // vision.patch_size, of_places), (of_pictures, 0))
    positions.copy_(places * 26 * init_std)


def cosine_waves(side: int) -> Tensor:
    """First weights of a patch embedding, float32 [3 x side^2, 3 x side^2] for pixels in the order (row, column, RGB).

    The two-dimensional discrete cosine transform (type II) of each colour, the lowest frequencies first. A wave has the
    norm 0.7, the mean 0.7 / 6, for most of what a picture varies in is its brightness and colour: with more of it, a
    small model finds things by their colours alone. With random weights, which are sums over hundreds of pixels that
    are much alike, it takes twice the steps to learn shapes (docs/tried.md).
    """
    places = torch.arange(side)
    basis = torch.cos(math.pi * (places + 0.5) * places.unsqueeze(1) / side) * (2 / side) ** 0.5  # [frequency, place]
    basis[0] /= 2**0.5
    waves = torch.einsum("uy,vx,cd->uvcyxd", basis, basis, torch.eye(3)).reshape(side**2, 3, -1)
    frequencies = (places.unsqueeze(1) ** 2 + places**2).flatten()
    waves[0] /= 6
    return 0.7 * waves[frequencies.argsort(stable=True)].flatten(0, 1)


def sines_of_places(side: int, width: int) -> Tensor:
    """First position embeddings of a square of patches in row-major order, float32 [side^2, width] in [-1, 1].

    Sines and cosines of the row, then of the column, at wavelengths from 4 to 25 patches; columns beyond the last
    multiple of 4 are 0. As in arXiv 2205.01580, with wavelengths for the few patches of a small picture.
    """
    frequencies = 1.5 / 6 ** (torch.arange(width // 4) / max(1, width // 4))
    angles = torch.arange(side).unsqueeze(1) * frequencies  # [side, width / 4]
    rows, columns = angles.repeat_interleave(side, 0), angles.repeat(side, 1)
    sines = torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], dim=1)
    return F.pad(sines, (0, width % 4))


def split_units(units: list[list[int]], ranks: int) -> list[list[list[int]]]:
    """Deal images and frames, [crops, windows] each, in order to ranks so that the most crops of a rank are fewest.

    Units stay whole: the pooling windows of an image mix its crops. The most loaded rank has at most
    total / ranks + the largest unit, since filling ranks one after the other up to that bound uses up all units.
    """
    sizes = [crops for crops, _ in units]

    def deal(limit: int) -> list[list[list[int]]]:
        shares, load = [[]], 0
        for unit in units:
            if load + unit[0] > limit:
                shares.append([])
                load = 0
            shares[-1].append(unit)
            load += unit[0]
        return shares

    lowest = max(max(sizes, default=0), -(-sum(sizes) // ranks))
    limit = bisect.bisect_left(range(sum(sizes)), True, lo=lowest, key=lambda limit: len(deal(limit)) <= ranks)
    shares = deal(limit)
    return shares + [[] for _ in range(ranks - len(shares))]


def crops_of_ranks(vision_units: Tensor, ranks: int) -> list[int]:
    """How many of a micro-batch's crops each rank encodes: the first ones the first rank, and so on."""
    return [sum(crops for crops, _ in share) for share in split_units(vision_units.tolist(), ranks)]


def chunks_of(units: list[list[int]], size: int) -> list[tuple[int, int]]:
    """(crops, windows) of runs of whole units with at most `size` crops, or one larger unit; size 0: all in one."""
    chunks = []
    for crops, windows in units:
        if chunks and (size == 0 or chunks[-1][0] + crops <= size):
            chunks[-1] = (chunks[-1][0] + crops, chunks[-1][1] + windows)
        else:
            chunks.append((crops, windows))
    return chunks
