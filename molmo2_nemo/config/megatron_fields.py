"""Fields of Megatron's own dataclasses that a user may set, and those that are refused with the reason.

Imports neither torch nor Megatron: names are read from Megatron's source, so that the planner starts at once.
"""

import ast
import functools
import importlib.util
from pathlib import Path

from molmo2_nemo.config.errors import refuse
from molmo2_nemo.config.schema import Config

_OWN_ATTENTION = "attention is FlexAttention or SDPA under a mask of packed rows, which does not read it"

_OWN_NORMS = "the norms are not apex's, whose kernels it chooses"

_FP8_WEIGHTS = "weights are not made inside Transformer Engine's FP8 context and checkpoints hold none in FP8"

_OTHER_MODELS = "the models are dense decoders with the attention of Qwen3 or OLMo 3"


# Fields of Megatron's dataclasses that our modules would ignore or break on when they are set, and why.
CANNOT_WORK = {
    "transformer": {
        "apply_rope_fusion": "each token has a position of its own, and the fused kernel takes one table for all rows",
        **dict.fromkeys(
            (
                "masked_softmax_fusion",
                "attention_dropout",
                "softmax_scale",
                "apply_query_key_layer_scaling",
                "window_size",
                "fp8_dot_product_attention",
                "fp8_multi_head_attention",
                "qk_clip",
                "attention_output_gate",
            ),
            _OWN_ATTENTION,
        ),
        **dict.fromkeys(
            ("persist_layer_norm", "memory_efficient_layer_norm", "layernorm_zero_centered_gamma"), _OWN_NORMS
        ),
        **dict.fromkeys(("fp8_param", "fp4", "fp4_param"), _FP8_WEIGHTS),
        "fp8_output_proj": "the head computes the losses of a chunk of tokens at a time, in bf16",
        **dict.fromkeys(("num_moe_experts", "multi_latent_attention", "mtp_num_layers"), _OTHER_MODELS),
        **dict.fromkeys(
            ("enable_cuda_graph", "external_cuda_graph", "cuda_graph_scope"),
            "the number of crops and of loss tokens differs from one micro-batch to the next",
        ),
    },
    "optimizer": {},
    "ddp": {"fp8_param_gather": _FP8_WEIGHTS},
}

# The classes of megatron-core behind `transformer.`, `optimizer.` and `ddp.`, with what they inherit, and their files.
CLASSES = {
    "transformer": {
        "TransformerConfig": "transformer/transformer_config.py",
        "ModelParallelConfig": "model_parallel_config.py",
    },
    "optimizer": {"OptimizerConfig": "optimizer/optimizer_config.py"},
    "ddp": {"DistributedDataParallelConfig": "distributed/distributed_data_parallel_config.py"},
}


@functools.cache
def names_of_fields(prefix: str) -> frozenset[str]:
    """Fields of Megatron's dataclass behind a prefix, those that it inherits included."""
    # The namespace package "megatron" is found without being imported.
    folders = [Path(folder) / "core" for folder in importlib.util.find_spec("megatron").submodule_search_locations]
    found = set()
    for name, file in CLASSES[prefix].items():
        source = next(folder / file for folder in folders if (folder / file).is_file()).read_text()
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                found |= {line.target.id for line in node.body if isinstance(line, ast.AnnAssign)}
    return frozenset(found)


def check_megatron_fields(cfg: Config) -> None:
    """Refuse names that Megatron's dataclasses lack, and those that another key already decides."""
    ours = {
        "transformer": {
            "num_layers": "model.num_layers",
            "hidden_size": "model.hidden_size",
            "num_attention_heads": "model.num_attention_heads",
            "num_query_groups": "model.num_query_groups",
            "kv_channels": "model.head_dim",
            "ffn_hidden_size": "model.ffn_hidden_size",
            "tensor_model_parallel_size": "parallel.tensor_model_parallel_size",
            "pipeline_model_parallel_size": "parallel.pipeline_model_parallel_size",
            "context_parallel_size": "parallel.context_parallel_size",
            "sequence_parallel": "parallel.sequence_parallel",
            "cp_comm_type": "parallel.cp_comm_type",
            "virtual_pipeline_model_parallel_size": "parallel.virtual_pipeline_model_parallel_size",
            "num_layers_in_first_pipeline_stage": "parallel.num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage": "parallel.num_layers_in_last_pipeline_stage",
            "transformer_impl": "parallel.layer_spec",
            "hidden_dropout": "schedule.STAGE.hidden_dropout",
            "init_method_std": "model.init_std",
            "layernorm_epsilon": "model.layernorm_epsilon",
            **dict.fromkeys(("params_dtype", "pipeline_dtype", "bf16", "fp16", "fp8"), "train.precision"),
            "calculate_per_token_loss": "the loss, which is always normalised over the global batch",
        },
        "optimizer": {
            "lr": "optim.llm.lr",
            "min_lr": "optim.min_lr_ratio",
            "clip_grad": "optim.clip_grad",
            "use_distributed_optimizer": "ddp.use_distributed_optimizer",
            "overlap_param_gather": "ddp.overlap_param_gather",
        },
        "ddp": {},
    }
    for prefix, classes in CLASSES.items():
        for key, value in getattr(cfg, prefix).items():
            if (prefix, key) == ("transformer", "recompute"):
                continue  # this project's own: auto.py
            missing = key not in names_of_fields(prefix)
            refuse(missing, f"{prefix}.{key}={value}: Megatron's {next(iter(classes))} has no field {key}.")
            decided = ours[prefix].get(key)
            refuse(decided is not None, f"{prefix}.{key}={value} is decided by {decided}: set it there.")
            refuse(
                bool(value) and key in CANNOT_WORK[prefix],
                f"{prefix}.{key}={value} does not work here, since {CANNOT_WORK[prefix].get(key)}: leave it out.",
            )
