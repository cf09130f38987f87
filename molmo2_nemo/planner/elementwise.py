"""Bytes that everything but matrix products and attention reads and writes, from the rehearsal's counts.

`tools/rehearse.py` counts each operation as one of its own. Coefficients are its counts of molmo2_8b in bf16 with
Megatron's local layers (plain: stage 2 on 8 and 128, stage 3 on 128 GPUs; the kernels of model/fused.py: stage 2 on 8),
divided by the elements of a tensor; how near they come elsewhere is in docs/planner.md. Those of Transformer Engine's
and Megatron's fused functions were not counted: an input read and an output written. Imports no torch.
"""

from molmo2_nemo.config.schema import LAYERS, padded_vocab_size
from molmo2_nemo.planner.memory import Job, count_parameters

# Bytes for each element (forward pass, backward pass), of plain operations and of fused functions.
NORM, FUSED_NORM = (36, 97), (4, 10)
ROPE = (24, 23)
RESIDUAL, FUSED_RESIDUAL = (12, 16), (7, 5)  # dropout and sum
MLP, FUSED_MLP = (14.4, 55.5), (6, 10)
EXCHANGED = (4, 4)  # copies around the exchange of context parallelism
VIT = (17, 23.2)  # for each patch, layer and element of its two widths
# Of the kernels of model/fused.py. A norm's adds the residual's gradient; one kernel makes queries, keys and values.
KERNEL_NORM, KERNEL_RESIDUAL, KERNEL_QKV, KERNEL_ANGLES = (4, 8), (6, 4), (4, 6), (4, 4)
KERNEL_WHOLE_NORM, KERNEL_ROPE = (8, 14), (4, 8)  # OLMo 3's: norms over all heads, then RoPE
# For each patch and layer: of an element of its width, of its MLP's; with layers that are made again one by one, all
# that is read and written in forward and backward pass.
KERNEL_VIT, KERNEL_VIT_LAYERS = ((16, 28), (4, 6)), ((16, 36), (0, 8))
KERNEL_POOLING = (11, 58)  # for each patch of a window and element of its features
LOGIT, KERNEL_LOGIT = (30, 48), (2, 4)
# Bytes for each trained parameter: added to the buffer in each micro-batch, cleared once a step; Adam of torch, fused.
GRADIENT_ADDED, GRADIENT_CLEARED, ADAM, FUSED_ADAM = 10, 4, 86, 34
HEAD_GRADIENT_ONCE = 12  # a float32 sum beside the buffer; chunks of logits add to it inside of a product


def elementwise_bytes(job: Job, stage: int, again: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes of a GPU of a pipeline stage in a step by part: (forward, backward with what is computed again).

    Parts are those of flops.forward_flops, all of the vision tower as "vit". again: step_time.again.
    """
    parts = {"decoder": _decoder(job, stage), "vit": _vision(job, stage), "head": _head(job, stage)}
    counts = count_parameters(job)[1][stage]
    forward = {part: job.micro_batches * sides[0] for part, sides in parts.items()}
    # What the head makes again is in its backward pass, and so are layers of the ViT that are made again one by one.
    times = again | {"head": 0.0} | ({"vit": 0.0} if job.fused and _one_by_one(job) else {})
    backward = {part: job.micro_batches * (sides[1] + sides[0] * times[part]) for part, sides in parts.items()}
    fused = job.transformer("gradient_accumulation_fusion")
    added = counts.trained_vision + (0 if fused else counts.trained - counts.trained_vision)
    backward["decoder"] += job.micro_batches * GRADIENT_ADDED * added + GRADIENT_CLEARED * counts.trained
    return forward, backward


def adam_bytes(job: Job) -> int:
    """Of the optimizer for each parameter that it updates: torch's without Transformer Engine or apex."""
    return FUSED_ADAM if job.layer_spec == "transformer_engine" else ADAM


def _decoder(job: Job, stage: int) -> tuple[float, float]:
    m, t = job.config.model, job.t
    te = job.layer_spec == "transformer_engine"
    q, k = m.num_attention_heads * m.head_dim / t, m.num_query_groups * m.head_dim / t
    own = 2 * m.hidden_size / job.sequence
    plain_norm = FUSED_NORM if te else NORM
    residual = FUSED_RESIDUAL if job.transformer("bias_dropout_fusion") else RESIDUAL
    mlp = FUSED_MLP if job.fused or job.transformer("bias_activation_fusion") else MLP
    terms = [(m.ffn_hidden_size / t, mlp), (2 * (q + k) * (job.c > 1), EXCHANGED)]
    if not job.fused:
        terms += [(own + q + k, plain_norm), (q + k, ROPE), (own, residual)]
    else:
        terms += [(own, FUSED_NORM if te else KERNEL_NORM), (own, KERNEL_RESIDUAL)]
        if m.qk_norm == "per_head" and m.num_query_groups >= t:
            terms += [(q + 2 * k, KERNEL_QKV), (m.head_dim, KERNEL_ANGLES)]
        else:
            whole = m.qk_norm != "per_head" and t == 1
            terms += [(q + k, KERNEL_WHOLE_NORM if whole else plain_norm), (q + k, KERNEL_ROPE)]
    scale = job.layers[stage] * job.tokens * job.e / 2
    return tuple(scale * sum(elements * of[side] for elements, of in terms) for side in (0, 1))


def _vision(job: Job, stage: int) -> tuple[float, float]:
    if stage > 0:
        return 0.0, 0.0
    m, share = job.config.model, job.uneven * job.rows / (job.t * job.c)
    patches = job.busiest_crops * m.vision.patches_per_crop * m.vit.num_layers
    width, inner, pooled = m.vit.hidden_size, m.vit.ffn_hidden_size, 0.0
    of_width, of_inner = VIT, VIT  # those of pooling are among them
    if job.fused:
        of_width, of_inner = KERNEL_VIT_LAYERS if _one_by_one(job) else KERNEL_VIT
        pooled = job.work.pooled_patches * share * width * len(m.vit.feature_layers)
    trained = job.trains("vit", "connector")
    return tuple(
        (patches * (width * of_width[i] + inner * of_inner[i]) + pooled * KERNEL_POOLING[i]) * job.e / 2 * passes
        for i, passes in ((0, 1), (1, trained))
    )


def _head(job: Job, stage: int) -> tuple[float, float]:
    if stage < job.p - 1:
        return 0.0, 0.0
    m = job.config.model
    # Every context parallel rank has its own tokens, every tensor parallel rank its part of the vocabulary.
    width, tokens = padded_vocab_size(m.vocab_size) / job.t, job.work.loss_tokens * job.rows / job.c
    weights = width * m.hidden_size if count_parameters(job)[1][stage].trained_head else 0
    forward, backward = KERNEL_LOGIT if job.fused else LOGIT
    return tokens * width * forward, tokens * width * backward + weights * HEAD_GRADIENT_ONCE


def _one_by_one(job: Job) -> bool:
    return job.config.train.vision_recompute == LAYERS
