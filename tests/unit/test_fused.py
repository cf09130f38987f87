"""Kernels between matrix products: their values and gradients, and that layers use them on a GPU and not on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from molmo2_nemo import parallel
from molmo2_nemo.command_line import compose
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import ParallelConfig

CHECK = Path(__file__).with_name("fused_check.py")
KERNELS = {
    "add_norm",
    "attention of the ViT",
    "attention of the ViT, made again",
    "bias_add",
    "bias_gelu",
    "dropout_add",
    "head",
    "layer_norm",
    "MLP of the ViT",
    "MLP of the ViT, made again",
    "rms_norm",
    "rms_norm_and_residual",
    "rotate",
}
KERNELS |= {"split_norm_rotate", "swiglu"}


@pytest.mark.slow
def test_kernels_equal_the_plain_formulas():
    """Forward and backward, float32 and bf16, by Triton's interpreter; shapes are those of the fake operations.

    And losses and gradients of whole models, with kernels and without.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", CHECK],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    each = {f"{name}, torch.{dtype}" for name in KERNELS for dtype in ("float32", "bfloat16")}
    models = {"Qwen3 layers", "OLMo 3 layers", "layers with adapters"}
    assert set(found) == each | models
    assert all(len(found[layers]) > 40 for layers in models)
    # Two of each matrix: 4 of the decoder layer, 4 of each of two layers of the vision transformer, 6 of the connector.
    assert sum(".lora." in name for name in found["layers with adapters"]) == 36
    assert all(error < 1 for errors in found.values() for error in errors.values()), found


def configs(monkeypatch, device, has_liger, **keys):
    monkeypatch.setattr(parallel, "has_liger_kernel", lambda: has_liger)
    model = compose("stage1", ["model=tiny", "data=sample"]).model
    return parallel.transformer_configs(model, ParallelConfig(**keys), device, "bf16", {}).values()


def test_kernels_are_used_on_gpus_where_their_library_is(monkeypatch):
    assert all(c.fused_kernels and not c.bias_activation_fusion for c in configs(monkeypatch, "cuda", True))
    decoder, vit, connector = configs(monkeypatch, "cuda", False)
    assert decoder.bias_activation_fusion and decoder.bias_dropout_fusion and connector.bias_activation_fusion
    assert not any(c.fused_kernels for c in (decoder, vit, connector))
    for device, has_liger, keys in (("cpu", True, {}), ("cuda", True, {"kernels": "plain"})):
        for c in configs(monkeypatch, device, has_liger, **keys):
            assert not (c.fused_kernels or c.bias_activation_fusion or c.bias_dropout_fusion)
    for device, has_liger in (("cpu", True), ("cuda", False)):
        with pytest.raises(ConfigError, match="parallel.kernels=fused needs a GPU and liger-kernel"):
            configs(monkeypatch, device, has_liger, kernels="fused")
