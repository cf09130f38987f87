"""Molmo2: vision tower, embeddings with an extra vocabulary, decoder, head. One instance is one pipeline stage."""

import copy

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from molmo2_nemo import compat
from molmo2_nemo.config.schema import ModelConfig, padded_vocab_size
from molmo2_nemo.hf.architecture import rope_tables
from molmo2_nemo.model.cache import KeyValueCache
from molmo2_nemo.model.collectives import context_slice
from molmo2_nemo.model.layers import decoder_block_spec
from molmo2_nemo.model.lora import put_adapters
from molmo2_nemo.model.loss import head_losses
from molmo2_nemo.model.mask import make_mask, mask_at
from molmo2_nemo.model.vision import VisionTower


class Molmo2(LanguageModule):
    """The part of Molmo2 that this rank's pipeline stage holds.

    model: the architecture. configs: Megatron's TransformerConfig for "decoder", "vit" and "connector".
    solo: process groups of one rank, for the vision tower's layers. response_dropout: the decoder's residual dropout
    is at positions that carry loss alone. vp_stage: which piece of a pipeline rank that has several.
    vision_chunk_crops, vision_recompute: see VisionTower.
    """

    def __init__(
        self,
        model: ModelConfig,
        configs: dict[str, TransformerConfig],
        solo: ProcessGroupCollection,
        response_dropout: bool = False,
        vp_stage: int | None = None,
        vision_chunk_crops: int = 32,
        vision_recompute: bool | str = True,
    ):
        config = configs["decoder"]
        super().__init__(config)
        self.vp_stage = vp_stage
        self.model, self.response_dropout = model, response_dropout
        self.model_type = ModelType.encoder_or_decoder  # read by Megatron's schedules
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.share_embeddings_and_output_weights = model.tie_embeddings
        self.rope = RotaryTables(model, config.fused_kernels)
        rows = padded_vocab_size(model.vocab_size)
        if self.pre_process:
            self.vision = VisionTower(
                model,
                configs["vit"],
                configs["connector"],
                solo,
                parallel_state.get_tensor_and_context_parallel_group(),
                vision_chunk_crops,
                vision_recompute,
            )
            self.embedding = Embedding(model, rows, config, self.tp_group)
        self.decoder = TransformerBlock(
            config,
            decoder_block_spec(model, config, self.pg_collection, vp_stage),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
        )
        for layer in self.decoder.layers:
            if self.rope.scaled and layer.layer_number - 1 in self.rope.scaled_layers:
                layer.rope_table = 1
                # YaRN multiplies rotated queries and keys by a factor: the same as scaling the scores by its square.
                layer.self_attention.core_attention.scale *= self.rope.attention_factor**2
        if self.post_process:
            head_config = copy.copy(config)
            # The losses make its weight's gradient themselves, and Megatron's own layer would ask for apex's kernel.
            head_config.gradient_accumulation_fusion = False
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                model.hidden_size,
                rows,
                config=head_config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                tp_group=self.tp_group,
                skip_weight_param_allocation=self.pre_process and model.tie_embeddings,
            )
        self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor):
        """Called by Megatron's pipeline schedules with the previous stage's output."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor | None,
        vision_mask: Tensor | None,
        crops: Tensor | None = None,
        pooling: Tensor | None = None,
        vision_units: Tensor | None = None,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        logit_positions: Tensor | None = None,
        patch_index: Tensor | None = None,
        loss_index: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Token losses, logits, or the hidden states for the next stage.

        All [B, S] inputs are whole rows on every rank; crops, pooling and vision_units (see VisionTower) matter on
        the first stage only, as does `patch_index`, which says where what the tower makes of them goes; None: there are
        no pictures. With s = S / context parallel size this returns, on the last stage, when `labels` (int64),
        `loss_weights` (float32, both [B, S]) and `loss_index` are given, float32 [2, B, s]: cross entropy and squared
        log-partition of this rank's part of the rows, 0 where the weight is 0. Both indices are those of this rank's
        part (training/batches.indices_of). Without labels, this tensor-parallel rank's slice of the logits,
        [B, s, padded V / tensor parallel size]; with `logit_positions` (int64 [N, 2], rows and positions in them) only
        of these, float32 [N, padded V / tensor parallel size], all N on every context parallel rank. On other stages
        [s, B, H].

        With a `cache` that has positions, the inputs are what stands at these positions of its rows, S of each; segment
        ids and vision mask are the cache's. With one that has none they are whole rows, which fill it.
        """
        local = context_slice(input_ids.shape[1], self.cp_group)
        hidden = None
        if self.pre_process:
            visual_tokens = None if patch_index is None else self.vision(crops, pooling, vision_units)
            hidden = self.embedding(input_ids, visual_tokens, patch_index, local)
            if torch.is_grad_enabled() and self.config.recompute_granularity is not None and not hidden.requires_grad:
                # All before the decoder is frozen: Megatron makes no gradients of a layer that is computed again
                # unless one of its inputs has one.
                hidden = hidden.detach().requires_grad_()
            if self.config.sequence_parallel:
                hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        mask = self._mask(segment_ids, vision_mask, cache, local)
        hidden = self.decoder(
            hidden,
            attention_mask=None,
            attention_bias=(mask, self._dropout_positions(loss_weights, local), cache),
            rotary_pos_emb=self.rope(position_ids[:, local]),
        )
        if not self.post_process:
            return hidden
        tied = self.embedding.word_embeddings.weight if self.pre_process and self.model.tie_embeddings else None
        if logit_positions is not None:
            weight = self.output_layer.weight if tied is None else tied
            return self._mask_padding((self._chosen(hidden, logit_positions, local) @ weight.t()).float())
        if labels is None:
            logits, _ = self.output_layer(hidden, weight=tied)
            return self._mask_padding(logits.float()).transpose(0, 1)
        # Logits are computed for positions that carry loss only.
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        weight = self.output_layer.weight if tied is None else tied
        losses = head_losses(
            hidden.flatten(0, 1).index_select(0, loss_index),
            weight,
            labels[:, local].t().flatten().index_select(0, loss_index),
            self.model.vocab_size,
            self.tp_group,
            reduce_input_grad=not self.config.sequence_parallel,
            fused=self.config.fused_kernels,
        )
        result = torch.zeros(2, hidden.shape[0] * hidden.shape[1], dtype=torch.float32, device=hidden.device)
        result = result.index_copy(1, loss_index, torch.stack(losses))
        return result.view(2, *hidden.shape[:2]).transpose(1, 2)

    def _mask(
        self, segment_ids: Tensor | None, vision_mask: Tensor | None, cache: KeyValueCache | None, local: slice
    ) -> Tensor | BlockMask:
        """What this rank's queries see: those of its part of the rows if it gathers keys, otherwise all."""
        gathers_keys = self.cp_group.size() > 1 and self.config.cp_comm_type == "all_gather"
        if cache is not None and cache.positions is not None:
            asked = cache.positions[:, local] if gathers_keys else cache.positions
            return mask_at(cache.segment_ids, cache.vision_mask, asked)
        own = (local.start, local.stop - local.start) if gathers_keys else (0, segment_ids.shape[1])
        return make_mask(segment_ids, vision_mask, *own)

    def _chosen(self, hidden: Tensor, positions: Tensor, local: slice) -> Tensor:
        """Hidden states at (row, position), [N, 2] -> [N, H], out of those of all ranks that share the rows."""
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        rows, at = positions.unbind(1)
        own = (at >= local.start) & (at < local.stop)
        chosen = hidden[torch.where(own, at - local.start, 0), rows].masked_fill(~own[:, None], 0)
        if self.cp_group.size() > 1:
            torch.distributed.all_reduce(chosen, group=self.cp_group)
        return chosen

    def _dropout_positions(self, loss_weights: Tensor | None, local: slice) -> Tensor | None:
        """bool [s, B, 1] of this rank's hidden states where residuals are dropped out; None: everywhere."""
        if loss_weights is None or not self.response_dropout:
            return None
        positions = loss_weights[:, local].t().unsqueeze(-1) > 0
        if self.config.sequence_parallel:
            positions = positions.chunk(self.tp_group.size())[self.tp_group.rank()]
        return positions

    def _mask_padding(self, logits: Tensor) -> Tensor:
        """Padding columns of the head get no probability: losses are over the base vocabulary only."""
        width = logits.shape[-1]
        column = torch.arange(width, device=logits.device) + self.tp_group.rank() * width
        return logits.masked_fill(column >= self.model.vocab_size, torch.finfo(logits.dtype).min)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None):
        """Every tensor under its own key, one key per layer, so that a checkpoint does not know its layout."""
        metadata = {**(metadata or {}), "non_homogeneous_layers": True}
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        tp_rank = self.tp_group.rank()
        dp_cp_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        parameters = dict(self.named_parameters(prefix=prefix.rstrip(".")))
        # Layers keep FP8 scaling history as extra state; it is rebuilt within steps and would tie a checkpoint to
        # its layer spec.
        state = {name: entry for name, entry in state.items() if compat.EXTRA_STATE not in name}
        put_adapters(state, self, prefix)
        for name, entry in state.items():
            parameter = parameters.get(name)
            if parameter is not None and not getattr(parameter, "tensor_model_parallel", False):
                # Whole on every rank: the first of the tensor x data parallel ranks writes it.
                entry.replica_id = (0, tp_rank, dp_cp_rank)
        return state


class Embedding(nn.Module):
    """Base table, split over tensor parallel ranks and padded; the extra rows, whole on every rank.

    The first extra id equals the base vocabulary's size, so padding rows of the base table are never looked up.
    """

    def __init__(self, model: ModelConfig, rows: int, config: TransformerConfig, tp_group):
        super().__init__()
        self.vocab_size = model.vocab_size
        self.word_embeddings = tensor_parallel.VocabParallelEmbedding(
            rows, model.hidden_size, init_method=config.init_method, config=config, tp_group=tp_group
        )
        self.extra_embedding = nn.Parameter(
            torch.empty(model.additional_vocab_size, model.hidden_size, dtype=config.params_dtype)
        )
        nn.init.normal_(self.extra_embedding, std=model.init_std)

    def forward(
        self, input_ids: Tensor, visual_tokens: Tensor | None, patch_index: Tensor | None, local: slice
    ) -> Tensor:
        """input_ids [B, S], visual_tokens [T, H] for the row-major <im_patch> of all rows -> [s, B, H] of `local`.

        patch_index: int64 [2, t], places in [s, B] and the visual token of each; None: there are none.
        """
        ids = input_ids[:, local]
        extra = ids >= self.vocab_size
        base = self.word_embeddings(ids.masked_fill(extra, 0))
        rows = self.extra_embedding[(ids - self.vocab_size).clamp(min=0)]
        hidden = torch.where(extra.unsqueeze(-1), rows, base).transpose(0, 1).contiguous()
        if patch_index is None:
            return hidden
        places, tokens = patch_index
        # Added to the placeholder's embedding, not put in its place.
        added = visual_tokens.index_select(0, tokens).to(hidden.dtype)
        return hidden.flatten(0, 1).index_add(0, places, added).view_as(hidden)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None):
        from megatron.core.utils import make_sharded_tensor_for_checkpoint

        state = self.word_embeddings.sharded_state_dict(f"{prefix}word_embeddings.", sharded_offsets, metadata)
        key = f"{prefix}extra_embedding"
        state[key] = make_sharded_tensor_for_checkpoint(self.extra_embedding, key, sharded_offsets)
        return state


class RotaryTables(nn.Module):
    """Angles of rotary embeddings at given positions; a scaled table beside the plain one where layers differ.

    cos_sin: give what the fused kernel takes, their cosines and sines.
    """

    def __init__(self, model: ModelConfig, cos_sin: bool = False):
        super().__init__()
        self.cos_sin = cos_sin
        plain, scaled, self.attention_factor = rope_tables(model)
        self.scaled = scaled is not None
        self.scaled_layers = set(
            range(model.num_layers) if model.rope_scaling_layers is None else model.rope_scaling_layers
        )
        tables = torch.stack([plain] if scaled is None else [plain, scaled])
        self.register_buffer("inverse_frequencies", tables, persistent=False)  # float32 [R, D/2]

    def forward(self, position_ids: Tensor) -> Tensor:
        """int64 [B, s] -> float32 angles [R, s, B, 1, D], or cosines and sines [R, 2, s * B, D / 2]."""
        angles = position_ids.t()[None, :, :, None].float() * self.inverse_frequencies[:, None, None, :].float()
        if self.cos_sin:
            return torch.stack((angles.cos(), angles.sin()), dim=1).flatten(2, 3)
        return torch.cat((angles, angles), dim=-1).unsqueeze(3)
