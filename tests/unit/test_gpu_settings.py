"""What a GPU needs, as far as it can be seen without one."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch
from programs import REPOSITORY
from test_config import build

from molmo2_nemo import environment, gpu, parallel
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.model.attention import flex_options
from molmo2_nemo.model.layers import gives_weights


@pytest.mark.parametrize(
    "device, user, expected",
    [
        ("cpu", {}, (True, False, False)),
        ("cuda", {}, (True, True, True)),
        ("cuda", {"overlap_grad_reduce": False}, (True, False, False)),
        ("cuda", {"overlap_param_gather": False}, (True, True, False)),
        ("cuda", {"use_distributed_optimizer": False}, (False, True, False)),
        # One key is enough.
        ("cpu", {"overlap_param_gather": True}, (True, True, True)),
    ],
)
def test_overlap_settings_agree(device, user, expected):
    from megatron.core.distributed import DistributedDataParallelConfig

    settings = gpu.ddp_settings(build("stage2", *[f"ddp.{key}={value}" for key, value in user.items()]), device)
    found = DistributedDataParallelConfig(**settings)
    assert (found.use_distributed_optimizer, found.overlap_grad_reduce, found.overlap_param_gather) == expected


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["transformer.gradient_accumulation_fusion=true"], "needs a GPU with transformer_engine or NVIDIA's apex"),
        (
            ["transformer.cpu_offloading=true", "transformer.cpu_offloading_num_layers=2"],
            "cpu_offloading=true needs transformer_",
        ),
        (["transformer.recompute_granularity=most"], "Megatron refuses transformer.recompute_granularity=most"),
        (
            ["ddp.num_distributed_optimizer_instances=1", "ddp.reuse_grad_buf_for_mxfp8_param_ag=true"],
            "Megatron refuses ddp",
        ),
        (["optimizer.use_precision_aware_optimizer=true"], "Megatron refuses optimizer settings"),
    ],
)
def test_what_this_machine_or_megatron_cannot_do_is_refused_before_anything_starts(overrides, expected):
    with pytest.raises(ConfigError) as error:
        gpu.check_device(build("stage2", "model=tiny", *overrides), "cpu")
    assert expected in str(error.value)


def test_shipped_settings_pass_and_are_described():
    for stage in ("stage1", "stage2", "stage3"):
        gpu.check_device(build(stage), "cpu")
    line = gpu.description(build("stage3"), "fp32", "cpu")
    assert line == "layers local, kernels plain, Adam torch's; row length in multiples of 8 (context parallel 8)"


def test_a_run_on_a_gpu_says_what_it_lacks(monkeypatch):
    """Memory as the plan has it: without recomputation the plain formulas keep more for the backward pass."""
    cfg = build("stage2", "model=molmo2_4b", "train.vision_chunk_crops=8")
    for library in ("has_transformer_engine", "has_liger_kernel"):
        monkeypatch.setattr(parallel, library, lambda: False)
    liger, engine, apex = gpu.missing_libraries(cfg, "cuda", 64)
    assert "tools/install_gpu.sh" in engine and "FP8 is not possible" in engine and "torch's Adam" in apex
    assert 'pip install "liger-kernel' in liger and any("plain" in line for line in gpu.installed())
    for line in (liger, engine):
        more, fused = (float(figure) for figure in re.search(r"(\d+\.\d) GiB more than (\d+\.\d)", line).groups())
        assert 1 < more < fused
    assert gpu.missing_libraries(cfg, "cpu", 64) == []
    assert any("local" in line and "tools/install_gpu.sh" in line for line in gpu.installed())
    monkeypatch.setattr(parallel, "has_liger_kernel", lambda: True)
    engine, apex = gpu.missing_libraries(cfg, "cuda", 64)
    assert "Transformer Engine is not installed" in engine and "by the plan the same" in engine
    monkeypatch.setattr(parallel, "has_transformer_engine", lambda: True)
    assert gpu.missing_libraries(cfg, "cuda", 64) == []
    versions = {"transformer-engine": "2.20.2", "liger-kernel": "0.8.5"}
    monkeypatch.setattr(gpu.importlib.metadata, "version", versions.__getitem__)
    assert "between matrix products: fused kernels, with liger-kernel 0.8.5" in gpu.installed()
    assert "layers: Transformer Engine 2.20.2" in gpu.installed() and "Adam: torch's" in gpu.installed()


def test_the_vision_transformer_takes_the_fp8_settings_when_asked():
    overrides = {
        "fp8_recipe": "blockwise",
        "first_last_layers_bf16": True,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    cfg = build("stage2")
    for vit_fp8 in (False, True):
        configs = parallel.transformer_configs(cfg.model, cfg.parallel, "cpu", "fp8", overrides, vit_fp8=vit_fp8)
        assert configs["decoder"].fp8 == "hybrid" and configs["decoder"].fp8_recipe == "blockwise"
        assert configs["connector"].fp8 is None
        assert configs["vit"].fp8 == ("hybrid" if vit_fp8 else None)
        assert configs["vit"].first_last_layers_bf16 == vit_fp8 and configs["vit"].recompute_granularity is None
    # Without a recipe it is the one that keeps no state.
    configs = parallel.transformer_configs(cfg.model, cfg.parallel, "cpu", "fp8", {}, vit_fp8=True)
    assert {configs[part].fp8_recipe for part in ("decoder", "vit")} == {"tensorwise"}


def test_first_and_last_layers_are_those_of_the_whole_model():
    """Megatron's own choice of layers, with the numbers that its block hands over."""
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    cfg = build("stage2")
    overrides = {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 1}
    decoder = parallel.transformer_configs(cfg.model, cfg.parallel, "cpu", "fp8", overrides)["decoder"]
    kept = [number for number in range(36) if is_first_last_bf16_layer(decoder, number)]
    assert cfg.model.num_layers == 36 and kept == [0, 1, 35]


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, "expandable_segments:True None 1"),
        ({"PYTORCH_ALLOC_CONF": "x:1"}, "x:1 None 1"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "x:1", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}, "None x:1 8"),
    ],
)
def test_variables_that_cuda_reads_are_set_before_it_starts_and_those_of_the_user_stay(environment, expected):
    code = (
        "import sys, os; from molmo2_nemo.command_line import set_gpu_environment; set_gpu_environment();assert 'torch'"
        " not in sys.modules;print(*[os.environ.get(n) for n in ('PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF',"
        " 'CUDA_DEVICE_MAX_CONNECTIONS')])"
    )
    clean = {key: value for key, value in os.environ.items() if "ALLOC_CONF" not in key and "CONNECTIONS" not in key}
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.stdout.strip() == expected, found.stderr


@pytest.mark.parametrize("driver, given, expected", [(True, None, None), (False, None, "1"), (False, "0", "0")])
def test_without_a_driver_the_compiler_is_not_imported(monkeypatch, driver, given, expected):
    def load(name):
        if not driver:
            raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(environment.ctypes, "CDLL", load)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", given or "")
    if given is None:
        monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    environment.set_cpu_environment()
    assert os.environ.get("TORCHDYNAMO_DISABLE") == expected


def test_the_vision_transformer_has_its_own_layers_unless_it_is_in_fp8(monkeypatch):
    monkeypatch.setattr(parallel, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(parallel, "has_liger_kernel", lambda: True)
    cfg = build("stage2")
    for precision, vit_fp8, kernels, impl in (
        ("bf16", False, "auto", "local"),
        ("fp8", False, "auto", "local"),
        ("fp8", True, "auto", "transformer_engine"),
        ("bf16", False, "plain", "transformer_engine"),
    ):
        layout = dataclasses.replace(cfg.parallel, kernels=kernels)
        configs = parallel.transformer_configs(cfg.model, layout, "cuda", precision, {}, vit_fp8=vit_fp8)
        assert configs["decoder"].transformer_impl == "transformer_engine"
        assert configs["vit"].transformer_impl == impl and gives_weights(configs["vit"]) == (impl == "local")


def test_attentions_back_end_is_what_was_asked_for_or_refused():
    layout = dataclasses.replace(build("stage2").parallel, attention_kernel="flash")
    with pytest.raises(ConfigError, match="parallel.attention_kernel=flash needs a GPU and FlashAttention 4"):
        parallel.attention_kernel(layout, "cuda")
    assert flex_options("tma", 128, torch.bfloat16) == {**flex_options("triton", 128, torch.bfloat16), "USE_TMA": True}
    assert flex_options("flash", 128, torch.bfloat16) == {"BACKEND": "FLASH"}
    assert flex_options("triton", 128, torch.float32) == {}
