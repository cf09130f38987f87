"""Floating point operations of the model as it is executed, and what a GPU can do at most. Imports no torch.

Counted are matrix products, 2 for each multiply and add (PaLM, arXiv 2204.02311, appendix B, counts the same way). Not
counted: norms, activation functions, softmax, optimizer, and everything that is computed twice or thrown away, such as
recomputation, padding tokens and the padded places of pooling windows.
"""

from collections.abc import Collection
from dataclasses import replace

from molmo2_nemo.config.components import COMPONENTS
from molmo2_nemo.config.lora import adapted_matrices
from molmo2_nemo.config.schema import LoraConfig, ModelConfig, OptimConfig

# TFLOP/s of dense products in bf16 and in FP8 (None: no FP8 there) by the exact name that the driver gives; never the
# figure for 2:4 sparsity, which is twice as high. NVIDIA's data sheets: A100 (June 2021), H100 (2024: SXM, NVL; white
# paper WP-10792: PCIe), H200 (2024), GH200 (2024), DGX B200 and GB200 NVL72 (2025), L40S (2023), L4 (2023).
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": (312, None),
    "NVIDIA A100-SXM4-80GB": (312, None),
    "NVIDIA A100-PCIE-40GB": (312, None),
    "NVIDIA A100 80GB PCIe": (312, None),
    "NVIDIA H100 80GB HBM3": (989.4, 1978.9),
    "NVIDIA H100 PCIe": (756, 1513),
    "NVIDIA H100 NVL": (835.5, 1671),
    "NVIDIA H200": (989.4, 1978.9),
    "NVIDIA H200 NVL": (835.5, 1671),
    "NVIDIA GH200 480GB": (989.4, 1978.9),
    "NVIDIA B200": (2250, 4500),
    "NVIDIA GB200": (2500, 5000),
    "NVIDIA L40S": (362.05, 733),
    "NVIDIA L4": (121, 242.5),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s of a device in `bf16` or `fp8`; None for a device or precision that is not in the table."""
    if device_name not in PEAK_TFLOPS or precision not in ("bf16", "fp8"):
        return None
    peak = PEAK_TFLOPS[device_name][precision == "fp8"]
    return None if peak is None else peak * 1e12


def forward_flops(
    model: ModelConfig,
    crops: float,
    visual_tokens: float,
    pooled_patches: float,
    tokens: float,
    attended: float,
    loss_tokens: float,
) -> dict[str, float]:
    """FLOPs of a forward pass by part.

    crops: encoded; visual_tokens: pooling windows; pooled_patches: patches in them; tokens: of the decoder, without
    padding; attended: pairs of query and key that the mask lets through; loss_tokens: positions that have logits.
    """
    vit, connector, P = model.vit, model.connector, model.vision.patches_per_crop
    vit_heads, inner = vit.num_attention_heads * vit.head_dim, connector.num_attention_heads * connector.head_dim
    features = vit.hidden_size * len(vit.feature_layers)
    H, queries, keys = (
        model.hidden_size,
        model.num_attention_heads * model.head_dim,
        model.num_query_groups * model.head_dim,
    )
    vit_layer = 4 * vit.hidden_size * vit_heads + 2 * vit.hidden_size * vit.ffn_hidden_size
    decoder_layer = H * (queries + 2 * keys) + queries * H + 3 * H * model.ffn_hidden_size
    projector = 2 * connector.hidden_size * connector.ffn_hidden_size + connector.ffn_hidden_size * H
    return {
        "vit": 2 * crops * P * (model.vision.patch_dim * vit.hidden_size + vit.num_layers * vit_layer),
        "vit attention": 4 * crops * P**2 * vit_heads * vit.num_layers,
        # The query is made once for each window, keys and values for each patch in it.
        "pooling": 2 * (visual_tokens + 2 * pooled_patches) * features * inner,
        "pooling attention": 4 * pooled_patches * inner,
        "projector": 2 * visual_tokens * (inner * connector.hidden_size + projector),
        "decoder": 2 * tokens * decoder_layer * model.num_layers,
        "decoder attention": 4 * attended * queries * model.num_layers,
        "head": 2 * loss_tokens * H * model.vocab_size,
    }


def adapter_flops(model: ModelConfig, lora: LoraConfig, **counts: float) -> dict[str, float]:
    """FLOPs of the adapters' forward pass by the part of `forward_flops` that they add to. counts: as there."""
    uses = {
        "vision.vit.": ("vit", counts["crops"] * model.vision.patches_per_crop),
        "vision.connector.key": ("pooling", counts["pooled_patches"]),
        "vision.connector.value": ("pooling", counts["pooled_patches"]),
        "vision.connector.query": ("pooling", counts["visual_tokens"]),
        "vision.connector.": ("projector", counts["visual_tokens"]),
        "decoder.": ("decoder", counts["tokens"]),
    }
    layers = {"vision.vit.": model.vit.num_layers, "decoder.": model.num_layers}
    found = {}
    # Layers are alike: one of each stack is counted, since a search asks thousands of times.
    for matrix in adapted_matrices(replace(model, num_layers=1, vit=replace(model.vit, num_layers=1)), lora):
        start = next(start for start in uses if matrix.name.startswith(start))
        part, times = uses[start]
        numbers = layers.get(start, 1) * lora.rank * (len(matrix.parts) * matrix.columns + matrix.rows)
        found[part] = found.get(part, 0.0) + 2 * times * numbers
    return found


def training_flops(
    model: ModelConfig, frozen: Collection[str] = (), lora: LoraConfig | None = None, **counts: float
) -> float:
    """FLOPs of forward and backward pass. counts: as for `forward_flops`. The rest: see `training_flops_by_part`."""
    return sum(training_flops_by_part(model, frozen, lora, **counts).values())


def training_flops_by_part(
    model: ModelConfig, frozen: Collection[str] = (), lora: LoraConfig | None = None, **counts: float
) -> dict[str, float]:
    """FLOPs of forward and backward pass by part: three times the forward pass where everything is trained.

    The backward pass has a product for the weights' gradient and one for the inputs'. frozen: any of "vit",
    "connector", "llm" and "head", which have no weight gradient; where nothing before a product is trained, its inputs
    need none either: a frozen ViT has no backward pass at all. (The patch embedding's input gradient is counted though
    pixels have none: 0.06 % of the released ViT's work.)
    lora: adapters, three times their forward pass; the weights beside them are in `frozen`, but gradients pass through.
    """
    parts = forward_flops(model, **counts)
    vit, connector, llm = ("vit" not in frozen, "connector" not in frozen, "llm" not in frozen)
    targets = lora.targets if lora is not None and lora.rank else ()
    through_vit = vit or "vit" in targets
    pooled = through_vit or connector or "connector" in targets
    factors = {
        "vit": 1 + vit + through_vit,
        "vit attention": 3 if through_vit else 1,
        "pooling": 1 + connector + through_vit,
        "pooling attention": 3 if pooled else 1,
        "projector": 1 + connector + pooled,
        "decoder": 2 + llm,
        "decoder attention": 3,
        "head": 2 + (llm and "head" not in frozen),
    }
    adapters = adapter_flops(model, lora, **counts) if targets else {}
    return {part: factors[part] * flops + 3 * adapters.get(part, 0.0) for part, flops in parts.items()}


def frozen_parts(optim: OptimConfig, tied: bool, lora: LoraConfig | None = None) -> tuple[str, ...]:
    """What `training_flops` takes as frozen. optim.freeze_patterns is not looked at: what it freezes counts as
    trained."""
    if lora is not None and lora.rank:
        return (*COMPONENTS, "head")
    parts = [component for component in COMPONENTS if getattr(optim, component).freeze]
    return (*parts, "head") if optim.freeze_embedding and tied else tuple(parts)
