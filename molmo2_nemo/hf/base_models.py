"""A checkpoint made of a language model (Qwen3 or OLMo 3) and a vision tower (SigLIP 2) that were trained apart.

The connector and the extra vocabulary's rows are drawn, normal with `model.init_std` (biases 0), as the public
trainer does. Layouts: transformers' own folders, safetensors only, one tensor in memory at a time.
"""

import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from molmo2_nemo.byte_progress import ByteProgress
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import ConnectorConfig, ModelConfig, VisionConfig, VitConfig
from molmo2_nemo.hf.architecture import check_rope
from molmo2_nemo.hf.convert import head_is_tied, report_types, write_checkpoint
from molmo2_nemo.hf.folder import CONFIG_FILE, HuggingFaceWeights, is_there, parsed, read_config
from molmo2_nemo.hf.names import EMBEDDING_PARTS, WrongShape, base_parts, tensor_table

LANGUAGE_MODELS, VISION_MODELS = ("qwen3", "olmo3"), ("siglip", "siglip_vision_model")
# Released models read blocks 24 and 18 of SigLIP's 27: the third and the ninth from the end, and build none after.
_FEATURES_FROM_THE_END = (3, 9)


def model_type(folder: Path) -> str | None:
    """`model_type` in a Hugging Face folder's config.json; None without that file. Raises ConfigError."""
    return str(read_config(folder).get("model_type")) if is_there(folder / CONFIG_FILE) else None


def base_model_config(llm: Path, vision: Path) -> ModelConfig:
    """The architecture that two folders make together. Raises ConfigError for what is damaged or not supported."""
    from transformers import CONFIG_MAPPING

    for folder, known, what in ((llm, LANGUAGE_MODELS, "a language model"), (vision, VISION_MODELS, "a vision tower")):
        found = model_type(folder)
        if found not in known:
            saying = f"says model_type={found!r}" if found else "does not exist"
            raise ConfigError(f"{folder}/config.json {saying}: {what} is one of {', '.join(known)}.")
    text, vit = (parsed(folder, CONFIG_MAPPING[model_type(folder)], read_config(folder)) for folder in (llm, vision))
    vit = getattr(vit, "vision_config", vit)

    def require(folder, key, value, expected):
        if value != expected:
            raise ConfigError(f"{folder}/config.json: {key}={value!r} is not supported, only {expected!r}.")

    require(llm, "attention_bias", text.attention_bias, False)
    require(llm, "hidden_act", text.hidden_act, "silu")
    require(vision, "hidden_act", vit.hidden_act, "gelu_pytorch_tanh")
    require(vision, "num_channels", vit.num_channels, 3)
    # Molmo2 has no sliding windows: OLMo 3's are dropped, as in the released model.
    rope, scaled_layers = dict(text.rope_parameters or {}), None
    kinds = ("full_attention", "sliding_attention") if text.model_type == "olmo3" else ()
    if any("rope_theta" not in part for part in ([rope.get(kind) or {} for kind in kinds] or [rope])):
        raise ConfigError(f"{llm}/config.json: rope_parameters={rope} has no rope_theta: download it again.")
    if kinds:
        full = dict(rope["full_attention"])
        require(
            llm,
            "rope_parameters of sliding layers",
            dict(rope["sliding_attention"]),
            {
                "rope_type": "default",
                "rope_theta": full["rope_theta"],
            },
        )
        rope = full
        scaled_layers = [i for i, kind in enumerate(text.layer_types) if kind == "full_attention"]
    theta = rope.pop("rope_theta")
    scaled = rope.get("rope_type", "default") != "default"
    depth = vit.num_hidden_layers
    taps = [depth - n for n in _FEATURES_FROM_THE_END]
    taps = taps if min(taps) >= 0 else [depth - 1, max(0, depth - 2)]
    heads, grid = vit.num_attention_heads, vit.image_size // vit.patch_size
    model = ModelConfig(
        name=llm.name,
        tokenizer=str(llm),
        vision=VisionConfig(
            image_size=grid * vit.patch_size, patch_size=vit.patch_size, overlap_margin=min(4, (grid - 1) // 2)
        ),
        vit=VitConfig(
            num_layers=max(taps) + 1,
            hidden_size=vit.hidden_size,
            num_attention_heads=heads,
            head_dim=vit.hidden_size // heads,
            ffn_hidden_size=vit.intermediate_size,
            layernorm_epsilon=vit.layer_norm_eps,
            feature_layers=taps,
        ),
        connector=ConnectorConfig(
            hidden_size=vit.hidden_size,
            num_attention_heads=heads,
            head_dim=vit.hidden_size // heads,
            ffn_hidden_size=text.intermediate_size,
        ),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        ffn_hidden_size=text.intermediate_size,
        vocab_size=text.vocab_size,
        max_position_embeddings=text.max_position_embeddings,
        layernorm_epsilon=text.rms_norm_eps,
        qk_norm="full_width" if text.model_type == "olmo3" else "per_head",
        norm_after=text.model_type == "olmo3",
        # As in transformers, a head that is there and differs from the embedding counts, whatever config.json says.
        tie_embeddings=head_is_tied(llm, bool(text.tie_word_embeddings)) and bool(text.tie_word_embeddings),
        rope_theta=theta,
        rope_scaling=rope if scaled else None,
        rope_scaling_layers=scaled_layers if scaled else None,
    )
    check_rope(llm, model)
    HuggingFaceWeights(llm).refuse_more_layers(("model.layers.", "layers."), model.num_layers)
    HuggingFaceWeights(vision).refuse_more_layers(("vision_model.encoder.layers.", "encoder.layers."), depth)
    return model


def check_base_models(llm: Path, vision: Path, wanted: ModelConfig) -> None:
    """Raise ConfigError naming the first key in which the two folders are not parts of the model `wanted`."""
    found = base_model_config(llm, vision)
    if wanted.tie_embeddings and not found.tie_embeddings:
        raise ConfigError(
            f"model.tie_embeddings=true, but {llm} has a head of its own: use model.tie_embeddings=false."
        )
    keys = (
        "num_layers",
        "hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "head_dim",
        "ffn_hidden_size",
        "vocab_size",
        "layernorm_epsilon",
        "qk_norm",
        "norm_after",
        "rope_theta",
    )
    pairs = [(llm, f"model.{key}", getattr(found, key), getattr(wanted, key)) for key in keys]
    for key in ("hidden_size", "num_attention_heads", "head_dim", "ffn_hidden_size", "layernorm_epsilon"):
        pairs.append((vision, f"model.vit.{key}", getattr(found.vit, key), getattr(wanted.vit, key)))
    for key in ("patch_size", "patches_per_crop"):
        pairs.append((vision, f"model.vision.{key}", getattr(found.vision, key), getattr(wanted.vision, key)))
    for folder, key, has, wants in pairs:
        if has != wants:
            raise ConfigError(f"{folder} has {key}={has}, this run has {wants}: start from models of the same sizes.")


def import_base_models(
    llm: Path,
    vision: Path,
    checkpoint: Path,
    model: ModelConfig | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = print,
    info: dict | None = None,
    tokenizer: str | None = None,
) -> ModelConfig:
    """Write a checkpoint of both folders' weights and a fresh connector. Returns its architecture.

    model: of the checkpoint; None: what the two make. Raises ConfigError when they do not fit, lack a tensor, or hold
    no safetensors. Rows of the embedding beyond `model.vocab_size` are padding and are left out. tokenizer: where it
    will be found, if not in `llm`.
    """
    if model is None:
        model = base_model_config(llm, vision)
        model.tokenizer = tokenizer or model.tokenizer
    else:
        check_base_models(llm, vision, model)
    family, text, tower = model_type(llm), _Prefixed(llm, "model."), _Prefixed(vision, "vision_model.")

    def table(name: str, shape_only: bool) -> Tensor:
        rows = text.get(name, shape_only=True).shape[0]
        if rows < model.vocab_size:
            raise WrongShape(f"{llm}: {name} has {rows} rows, not {model.vocab_size}")
        return text.get(name, shape_only, None if rows == model.vocab_size else slice(0, model.vocab_size))

    def read(name: str, shape_only: bool = False) -> Tensor:
        """A released tensor that one of the folders has."""
        if name.startswith("model.vision_backbone."):
            parts = [tower.get(part, shape_only) for part in base_parts(name, "siglip")]
        elif name == EMBEDDING_PARTS[0] or (name == "lm_head.weight" and name not in text.weights):
            parts = [table("embed_tokens.weight", shape_only)]
        elif name == "lm_head.weight":
            parts = [table(name, shape_only)]
        else:
            parts = [text.get(part, shape_only) for part in base_parts(name, family)]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        # A convolution's kernel [H, channel, row, column] is a row of (row, column, channel) here.
        return tensor.permute(0, 2, 3, 1).flatten(1) if name.endswith("patch_embedding.weight") else tensor

    def fresh(entry) -> Tensor:
        if entry.key.endswith(".bias"):
            return torch.zeros(entry.shape)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {entry.key}".encode()))
        return torch.randn(entry.shape, generator=generator) * model.init_std

    state, make = {}, {}
    # Every tensor is checked before anything is written.
    for entry in tensor_table(model):
        if entry.key.startswith("vision.connector.") or entry.key == "embedding.extra_embedding":
            shape, dtype, build = entry.shape, torch.float32, lambda entry=entry: fresh(entry)
        else:
            try:
                meta = entry.join([read(name, shape_only=True) for name in entry.released])
            except KeyError as error:
                raise ConfigError(
                    f"{error.args[0]}, which its config.json asks for: it cannot be imported; download both again."
                ) from None
            except WrongShape as error:
                raise ConfigError(f"{error}: its config.json is another model's; download both again.") from None
            except (RuntimeError, IndexError) as error:
                reason = str(error).splitlines()[0]
                raise ConfigError(
                    f"{llm}, {vision}: {entry.key} does not fit config.json ({reason}): download both again."
                ) from None
            shape, dtype = tuple(meta.shape), meta.dtype

            def build(entry=entry):
                return entry.join([read(name) for name in entry.released]).contiguous()

        if tuple(shape) != entry.shape:
            raise ConfigError(
                f"{llm}, {vision}: {entry.key} is {tuple(shape)}, config.json says {entry.shape}: download both again."
            )
        state[entry.key] = torch.empty(entry.shape, dtype=dtype, device="meta")
        make[entry.key] = build
    source = {"step": 0, "stage": "imported", "source": f"{llm} + {vision}"}
    report_types(state, progress)
    told = ByteProgress(sum(tensor.nbytes for tensor in state.values()), progress)
    write_checkpoint(checkpoint, model, state, make, source | (info or {}), told)
    return model


class _Prefixed:
    """Tensors of a folder by their names without a prefix that some classes save them under."""

    def __init__(self, folder: Path, prefix: str):
        self.folder, self.prefix, self.weights = folder, prefix, HuggingFaceWeights(folder)

    def get(self, name: str, shape_only: bool, rows: slice | None = None) -> Tensor:
        """A tensor, or a meta tensor of its shape; rows: these alone."""
        for full in (self.prefix + name, name):
            if full in self.weights:
                return self.weights.shape_of(full, rows) if shape_only else self.weights(full, rows)
        raise KeyError(f"{self.folder} lacks {self.prefix}{name}")
