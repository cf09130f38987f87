"""Which matrices have low-rank adapters (LoRA, arXiv 2106.09685), their sizes and their checks. Imports no torch.

A matrix W [out, in] becomes W + scale B A with A [rank, in] and B [out, rank]; W is not trained. Megatron joins several
projections in one matrix, such as queries, keys and values: each of them, a part, has an A and a B of its own, as in
transformers, where they are apart. An adapter then holds the As one below the other, [parts x rank, in], and the rows
of the Bs as W has its rows, [out, rank].
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from molmo2_nemo.config.components import COMPONENTS
from molmo2_nemo.config.errors import refuse
from molmo2_nemo.config.schema import LORA_TARGETS, LoraConfig, ModelConfig, OptimConfig

# The component, as in components.py, whose switch freezes a target.
COMPONENT_OF_TARGET = {"attention": "llm", "mlp": "llm", "connector": "connector", "vit": "vit"}


@dataclass(frozen=True)
class Matrix:
    """A matrix that has an adapter. name: of its module, with the layer's number in the whole model.

    split: how tensor parallel ranks share it, by `rows`, by `columns`, or not at all (None). parts: rows of each part,
    one below the other; `repeats` times, once for each key/value head.
    """

    name: str
    columns: int
    parts: tuple[int, ...]
    split: str | None = None
    repeats: int = 1

    @property
    def rows(self) -> int:
        return sum(self.parts) * self.repeats

    def part_of_row(self, ranks: int) -> list[int]:
        """The part of each row that one of `ranks` tensor parallel ranks holds."""
        ranks = ranks if self.split == "rows" else 1
        repeats, widths = self.repeats // ranks, self.parts
        if repeats == 0:  # nothing repeats: a rank holds a share of each part
            repeats, widths = 1, [width // ranks for width in self.parts]
        return [part for part, width in enumerate(widths) for _ in range(width)] * repeats


def adapted_matrices(m: ModelConfig, lora: LoraConfig) -> Iterator[Matrix]:
    """All matrices that have an adapter; none with lora.rank=0."""
    if lora.rank == 0:
        return
    vit, connector, targets = m.vit, m.connector, lora.targets
    if "vit" in targets:
        heads, D, v, f = vit.num_attention_heads, vit.head_dim, vit.hidden_size, vit.ffn_hidden_size
        for layer in range(vit.num_layers):
            at = f"vision.vit.encoder.layers.{layer}"
            yield Matrix(f"{at}.self_attention.linear_qkv", v, (D, D, D), repeats=heads)
            yield Matrix(f"{at}.self_attention.linear_proj", heads * D, (v,))
            yield Matrix(f"{at}.mlp.linear_fc1", v, (f,))
            yield Matrix(f"{at}.mlp.linear_fc2", f, (v,))
    if "connector" in targets:
        inner, at = connector.num_attention_heads * connector.head_dim, "vision.connector"
        for name in ("query", "key", "value"):
            yield Matrix(f"{at}.{name}", vit.hidden_size * len(vit.feature_layers), (inner,))
        yield Matrix(f"{at}.output", inner, (connector.hidden_size,))
        yield Matrix(f"{at}.projector.linear_fc1", connector.hidden_size, (connector.ffn_hidden_size,) * 2)
        yield Matrix(f"{at}.projector.linear_fc2", connector.ffn_hidden_size, (m.hidden_size,))
    G, D, H, F = m.num_query_groups, m.head_dim, m.hidden_size, m.ffn_hidden_size
    for layer in range(m.num_layers):
        at = f"decoder.layers.{layer}"
        if "attention" in targets:
            parts = (m.num_attention_heads // G * D, D, D)
            yield Matrix(f"{at}.self_attention.linear_qkv", H, parts, "rows", repeats=G)
            yield Matrix(f"{at}.self_attention.linear_proj", m.num_attention_heads * D, (H,), "columns")
        if "mlp" in targets:
            yield Matrix(f"{at}.mlp.linear_fc1", H, (F, F), "rows")
            yield Matrix(f"{at}.mlp.linear_fc2", F, (H,), "columns")


def scale(lora: LoraConfig) -> float:
    """What the product of B and A is multiplied by: alpha / rank, or alpha / sqrt(rank) (arXiv 2312.03732)."""
    return lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)


def trained_components(optim: OptimConfig, lora: LoraConfig) -> list[str]:
    """Those of COMPONENTS of which anything is trained; optim.freeze_patterns is not looked at."""
    if lora.rank:
        adapted = {COMPONENT_OF_TARGET[target] for target in lora.targets}
        return [component for component in COMPONENTS if component in adapted]
    return [component for component in COMPONENTS if not getattr(optim, component).freeze]


def check_lora(lora: LoraConfig, m: ModelConfig, optim: OptimConfig) -> None:
    """Refuse adapters that cannot be, or that would not be trained. Raises ConfigError."""
    refuse(lora.rank < 0, f"lora.rank={lora.rank} must not be negative: 16 is usual, 0 is no LoRA.")
    refuse(not lora.alpha > 0, f"lora.alpha={lora.alpha} must be above 0: twice lora.rank is usual.")
    refuse(not 0 <= lora.dropout < 1, f"lora.dropout={lora.dropout} must be from 0 to below 1: use 0.05, or 0.")
    for target in lora.targets:
        refuse(
            target not in LORA_TARGETS,
            f"lora.targets: {target} is unknown; choose of {', '.join(LORA_TARGETS)}, as in lora.targets=[attention].",
        )
    if lora.rank == 0:
        return
    refuse(not lora.targets, f"lora.targets=[] adapts nothing: choose of {', '.join(LORA_TARGETS)}, or lora.rank=0.")
    for target in lora.targets:
        component = COMPONENT_OF_TARGET[target]
        refuse(
            getattr(optim, component).freeze,
            f"lora.targets names {target}, but optim.{component}.freeze=true: take one of them back (with LoRA all "
            "weights but the adapters are frozen in any case).",
        )
    # Layers are alike, so that the first ones tell.
    for matrix in adapted_matrices(replace(m, num_layers=1, vit=replace(m.vit, num_layers=1)), lora):
        widest = min(matrix.columns, *(width * matrix.repeats for width in matrix.parts))
        refuse(
            lora.rank > widest,
            f"lora.rank={lora.rank} is above {widest}, the smaller side of {matrix.name}: make it smaller.",
        )
