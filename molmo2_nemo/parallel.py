"""Process groups, the accelerator, and Megatron's configuration objects."""

import datetime
import importlib.util
import os
import random
import shutil
import subprocess

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import FP8_RECIPE, ModelConfig, ParallelConfig, TrainConfig
from molmo2_nemo.environment import local_rank, rank_from_environment, world_size_from_environment
from molmo2_nemo.model.layers import LayerConfig, gelu_tanh

# What the extra `gpu` of pyproject.toml installs; so named, it can be installed beside a checkout and beside a wheel.
LIGER_KERNEL = "liger-kernel>=0.8.5,<0.9"
TRANSFORMER_ENGINE = "transformer-engine[pytorch,core_cu13]"
# In isolation, pip's default, its extension would be compiled against the newest torch instead of the installed one.
INSTALL_TRANSFORMER_ENGINE = (
    f'tools/install_gpu.sh (without a checkout: pip install --no-build-isolation "{TRANSFORMER_ENGINE}")'
)
# Fields of TransformerConfig that say how FP8 is done: the same for the decoder and for the ViT, if that is in FP8.
FP8_FIELDS = (
    "fp8_recipe",
    "fp8_margin",
    "fp8_amax_history_len",
    "fp8_amax_compute_algo",
    "fp8_wgrad",
    "tp_only_amax_red",
    "first_last_layers_bf16",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
)


def resolve_device(train: TrainConfig) -> str:
    """`cpu` or `cuda`. Raises ConfigError when a GPU is asked for and none is there."""
    if train.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device=cuda, but torch sees no GPU: use train.device=cpu or check the driver.")
    device = train.device if train.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu" and train.precision not in ("auto", "fp32"):
        raise ConfigError(f"train.precision={train.precision} needs a GPU: use train.precision=fp32 on a CPU.")
    return device


def resolve_precision(train: TrainConfig, device: str) -> str:
    """`fp32`, `bf16` or `fp8`; auto means fp32 on a CPU and bf16 on a GPU."""
    return ("fp32" if device == "cpu" else "bf16") if train.precision == "auto" else train.precision


def initialize(parallel: ParallelConfig, device: str, timeout_minutes: float, seed: int) -> None:
    """Join the ranks, then make Megatron's groups. Raises ConfigError as `join_ranks` does."""
    join_ranks(device, timeout_minutes)
    make_groups(parallel, timeout_minutes, seed)


def join_ranks(device: str, timeout_minutes: float) -> None:
    """Start torch.distributed, as the environment of torchrun or srun says or with one rank.

    Raises ConfigError when the environment has no address for the ranks to meet at.
    """
    rank = rank_from_environment()
    world_size = world_size_from_environment()
    alone = world_size == 1
    if not alone:
        set_rendezvous()
    if device == "cpu":
        from molmo2_nemo import cpu

        cpu.install()
    else:
        torch.cuda.set_device(local_rank())
    if not dist.is_initialized():
        dist.init_process_group(
            "gloo" if device == "cpu" else "nccl",
            store=dist.HashStore() if alone else None,
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(minutes=timeout_minutes),
        )


def make_groups(parallel: ParallelConfig, timeout_minutes: float, seed: int) -> None:
    """Megatron's process groups, then the seeds. Collective.

    timeout_minutes: a group has a limit of its own, of half an hour where none is given.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
    )
    seed_everything(seed)


def set_rendezvous() -> None:
    """Set MASTER_ADDR and MASTER_PORT if the launcher has not: the first host of a Slurm job, a port made of its id.

    Raises ConfigError when there is no Slurm job either.
    """
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return
    if "SLURM_JOB_ID" not in os.environ:
        raise ConfigError(
            f"WORLD_SIZE={os.environ.get('WORLD_SIZE')} but MASTER_ADDR or MASTER_PORT is not set: start the ranks with"
            " torchrun or srun."
        )
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST", ""))
    if "MASTER_ADDR" not in os.environ and os.environ.get("SLURM_STEP_NUM_NODES", "1") == "1":
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    elif "MASTER_ADDR" not in os.environ:
        if shutil.which("scontrol") is None:
            raise ConfigError(
                f"MASTER_ADDR is not set and scontrol is not here to name the first of {nodes}: export it."
            )
        command = ["scontrol", "show", "hostnames", nodes]
        hosts = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        os.environ["MASTER_ADDR"] = hosts.stdout.split()[0]
    # One port per step: two steps of a job may run side by side on a node. All lie below 32768, where the ports begin
    # that Linux hands out to outgoing connections.
    number = int(os.environ["SLURM_JOB_ID"]) * 10 + int(os.environ.get("SLURM_STEP_ID", "0"))
    os.environ.setdefault("MASTER_PORT", str(20000 + number % 12000))


def seed_everything(seed: int) -> None:
    """The same seed on all data-parallel ranks; Megatron offsets it by tensor parallel rank where it must differ."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def solo_groups() -> ProcessGroupCollection:
    """Groups of one rank, for Megatron layers that are not split: the vision tower's. Collective."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    own = groups[dist.get_rank()]
    solo = ProcessGroupCollection()
    solo.tp = solo.cp = solo.pp = own
    return solo


def model_replica_group(timeout_minutes: float) -> dist.ProcessGroup:
    """All tensor x context x pipeline parallel ranks that work on the same rows. Collective."""
    replica = parallel_state.get_data_parallel_rank()
    replicas = [None] * dist.get_world_size()
    dist.all_gather_object(replicas, replica)
    own = None
    for index in sorted(set(replicas)):
        ranks = [rank for rank, r in enumerate(replicas) if r == index]
        group = dist.new_group(ranks, timeout=datetime.timedelta(minutes=timeout_minutes))
        own = group if index == replica else own
    return own


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed; nothing of it is imported."""
    return importlib.util.find_spec("transformer_engine") is not None


def has_liger_kernel() -> bool:
    """Whether liger-kernel is installed; nothing of it is imported."""
    return importlib.util.find_spec("liger_kernel") is not None


def uses_fused_kernels(parallel: ParallelConfig, device: str) -> bool:
    """Whether the kernels of model/fused.py are used. Raises ConfigError when they are asked for and cannot be."""
    possible = device == "cuda" and has_liger_kernel()
    if parallel.kernels == "fused" and not possible:
        raise ConfigError(
            f'parallel.kernels=fused needs a GPU and liger-kernel installed: pip install "{LIGER_KERNEL}", or use'
            " parallel.kernels=plain."
        )
    return possible and parallel.kernels != "plain"


def attention_kernel(parallel: ParallelConfig, device: str) -> str:
    """FlexAttention's back end. Raises ConfigError when `flash` is asked for and cannot be."""
    if parallel.attention_kernel != "flash":
        return parallel.attention_kernel
    # To look for flash_attn.cute is to import flash_attn.
    has_flash = importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute")
    if not (device == "cuda" and has_flash):
        raise ConfigError(
            "parallel.attention_kernel=flash needs a GPU and FlashAttention 4 (flash_attn.cute) installed: use"
            " parallel.attention_kernel=triton."
        )
    return parallel.attention_kernel


def layer_spec(parallel: ParallelConfig, device: str) -> str:
    """`local` or `transformer_engine`. Raises ConfigError when the latter is asked for and not there."""
    if parallel.layer_spec == "transformer_engine" and not (device == "cuda" and has_transformer_engine()):
        raise ConfigError(
            "parallel.layer_spec=transformer_engine needs a GPU and Transformer Engine installed: "
            f"{INSTALL_TRANSFORMER_ENGINE}, or use parallel.layer_spec=local."
        )
    if parallel.layer_spec != "auto":
        return parallel.layer_spec
    return "transformer_engine" if device == "cuda" and has_transformer_engine() else "local"


def between_products(parallel: ParallelConfig, device: str) -> dict:
    """Fields of LayerConfig: kernels of model/fused.py on a GPU, or else Megatron's compiled SwiGLU and residual sum.

    A CPU, and `parallel.kernels=plain`, have the plain formulas.
    """
    fused = uses_fused_kernels(parallel, device)
    compiled = device == "cuda" and not fused and parallel.kernels == "auto"
    return dict(
        fused_kernels=fused,
        bias_activation_fusion=compiled,
        bias_dropout_fusion=compiled,
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )


def transformer_configs(
    model: ModelConfig,
    parallel: ParallelConfig,
    device: str,
    precision: str,
    overrides: dict,
    dropout: float = 0.0,
    vit_fp8: bool = False,
) -> dict[str, LayerConfig]:
    """Megatron's TransformerConfig for the decoder, the ViT and the connector's projector.

    overrides: fields of the decoder's TransformerConfig set by the user; the ViT takes those of FP8 alone, if vit_fp8.
    Raises ConfigError with Megatron's own reason when it refuses the combination.
    """
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    impl = layer_spec(parallel, device)
    common = dict(
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **between_products(parallel, device),
        transformer_impl=impl,
        use_cpu_initialization=device == "cpu",
        gradient_accumulation_fusion=False,
        attention_dropout=0.0,
        calculate_per_token_loss=True,
        init_method_std=model.init_std,
    )
    decoder = dict(
        common,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        # Transformer Engine's matrix products add to the float32 gradients themselves; Megatron's need apex for it.
        gradient_accumulation_fusion=impl == "transformer_engine" and device == "cuda",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        qk_layernorm=True,
        attention_kernel=attention_kernel(parallel, device),
        hidden_dropout=dropout,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        cp_comm_type=parallel.cp_comm_type,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
    )
    if parallel.virtual_pipeline_model_parallel_size is not None:
        # With two stages, each is the other's next and previous one: batched messages would be mixed up.
        decoder.update(overlap_p2p_comm=True, batch_p2p_comm=False)
    if precision == "fp8":
        overrides = {"fp8_recipe": FP8_RECIPE, **overrides}
        decoder.update(fp8="hybrid")
    vit = dict(
        common,
        num_layers=model.vit.num_layers,
        hidden_size=model.vit.hidden_size,
        ffn_hidden_size=model.vit.ffn_hidden_size,
        num_attention_heads=model.vit.num_attention_heads,
        kv_channels=model.vit.head_dim,
        normalization="LayerNorm",
        layernorm_epsilon=model.vit.layernorm_epsilon,
        add_bias_linear=True,
        activation_func=gelu_tanh,
        bias_activation_fusion=False,  # Megatron's is for another form of GELU by its name
        hidden_dropout=0.0,
    )
    if common["fused_kernels"] and not (precision == "fp8" and vit_fp8):
        vit.update(transformer_impl="local")  # model/fused_vit.py; Transformer Engine would keep and move more
    if precision == "fp8" and vit_fp8:
        vit.update(fp8="hybrid", **{key: value for key, value in overrides.items() if key in FP8_FIELDS})
    connector = dict(
        common,
        num_layers=1,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.connector.ffn_hidden_size,
        num_attention_heads=1,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
    )
    try:
        return {
            "decoder": LayerConfig(**{**decoder, **overrides}),
            "vit": LayerConfig(**vit),
            "connector": LayerConfig(**connector),
        }
    except (ValueError, AssertionError, TypeError) as error:
        set_by_user = ", ".join(f"transformer.{k}={v}" for k, v in overrides.items()) or "this configuration"
        raise ConfigError(f"Megatron refuses {set_by_user}: {error}") from error
