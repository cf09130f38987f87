"""FLOPs against torch's own counter over transformers' Molmo2, and the table of peaks."""

import copy

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from torch.utils.flop_counter import FlopCounterMode

from molmo2_nemo.config.schema import LoraConfig, OptimConfig
from molmo2_nemo.planner.flops import (
    PEAK_TFLOPS,
    adapter_flops,
    forward_flops,
    frozen_parts,
    peak_flops,
    training_flops,
    training_flops_by_part,
)

S, CROPS, WINDOWS, LOSS = 24, 3, 10, 7


@pytest.fixture(scope="module", params=["qwen3_gqa", "olmo3_yarn"])
def models(request, hf_models):
    """transformers' model with every product written out (no fused attention), and our configuration of it."""
    from transformers import Molmo2ForConditionalGeneration

    from molmo2_nemo.hf.architecture import model_config_from_hf

    folder = hf_models[request.param]
    reference = Molmo2ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    return reference, model_config_from_hf(folder)


def run(reference, model, backward: bool, frozen=()) -> int:
    """FLOPs of transformers' own modules on windows without padding, every pair attended. Adapters are trained."""
    parts = {
        "vit": reference.model.vision_tower,
        "connector": reference.model.multi_modal_projector,
        "llm": reference.model.language_model,
        "head": reference.lm_head,
    }
    for name, part in parts.items():
        part.requires_grad_(name not in frozen)
    if "llm" in frozen:
        parts["head"].requires_grad_(False)
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or ".lora_" in name)
    # Trained with the connector, whatever is frozen: gradients reach the decoder's input.
    extra = torch.zeros(model.hidden_size, requires_grad=True)
    crops = torch.rand(CROPS, model.vision.patches_per_crop, model.vision.patch_dim)
    pooling = torch.randint(0, CROPS * model.vision.patches_per_crop, (WINDOWS, 4))
    with FlopCounterMode(display=False) as counter:
        states = parts["vit"](crops, output_hidden_states=True).hidden_states
        layers = model.vit.feature_layers
        features = torch.cat([states[layer + 1 if layer >= 0 else layer] for layer in layers], dim=-1)
        visual = parts["connector"](features, pooling).last_hidden_state
        embeddings = torch.cat((visual, torch.rand(S - WINDOWS, model.hidden_size))) + extra
        hidden = parts["llm"](inputs_embeds=embeddings[None]).last_hidden_state
        logits = parts["head"](hidden[:, :LOSS])
        if backward:
            logits.square().sum().backward()
    return counter.get_total_flops()


def counts():
    return dict(
        crops=CROPS, visual_tokens=WINDOWS, pooled_patches=4 * WINDOWS, tokens=S, attended=S * S, loss_tokens=LOSS
    )


def test_forward_is_what_torch_counts(models):
    reference, model = models
    assert sum(forward_flops(model, **counts()).values()) == run(reference, model, backward=False)


@pytest.mark.parametrize("frozen", [(), ("head",), ("vit",), ("vit", "connector"), ("llm",), ("connector",)])
def test_training_is_what_torch_counts(models, frozen):
    reference, model = models
    patch_embedding = 2 * CROPS * model.vision.patches_per_crop * model.vision.patch_dim * model.vit.hidden_size
    # Features below the last tapped layer only: what lies above gets no gradient, and torch does not go there.
    layers = [layer % model.vit.num_layers for layer in model.vit.feature_layers]
    unread = (model.vit.num_layers - 1 - max(layers)) / model.vit.num_layers
    by_part = training_flops_by_part(model, frozen, **counts())
    vit_layers = by_part["vit"] + by_part["vit attention"] - (3 if "vit" not in frozen else 1) * patch_embedding
    expected = sum(by_part.values())
    if "vit" not in frozen:
        expected -= patch_embedding + unread * vit_layers * 2 / 3  # pixels have no gradient
    assert expected == pytest.approx(run(reference, model, backward=True, frozen=frozen), rel=1e-12)
    assert training_flops(model, frozen, **counts()) == sum(by_part.values())


def test_adapters_are_what_torch_counts_of_peft(models):
    reference, model = models
    lora = LoraConfig(rank=3)
    names = r".*language_model.*_proj"
    adapted = inject_adapter_in_model(PeftConfig(r=3, target_modules=names), copy.deepcopy(reference))
    frozen = frozen_parts(OptimConfig(), model.tie_embeddings, lora)
    expected = training_flops(model, frozen, lora, **counts())
    assert expected == run(adapted, model, backward=True, frozen=frozen)
    assert expected > 1.02 * training_flops(model, frozen, **counts())
    assert adapter_flops(model, lora, **counts()).keys() == {"decoder"}


def test_all_trained_is_three_times_forward(models):
    _, model = models
    assert training_flops(model, **counts()) == 3 * sum(forward_flops(model, **counts()).values())


def test_peaks_are_dense_and_never_guessed():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp8") == 1978.9e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp8") is None
    for name in ("NVIDIA H100", "H100", "nvidia h100 80gb hbm3", "NVIDIA GeForce RTX 4090", "", "cpu"):
        assert peak_flops(name, "bf16") is None
    assert peak_flops("NVIDIA H200", "fp32") is None
    # Where there is FP8 it is twice bf16: a sparse figure in either column would break this.
    for name, (bf16, fp8) in PEAK_TFLOPS.items():
        assert fp8 is None or fp8 / bf16 == pytest.approx(2, rel=0.02), name
