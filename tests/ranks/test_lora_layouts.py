"""LoRA at several layouts against PEFT on transformers' own model, and runs that are resumed, moved and exported."""

import json
import re
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from programs import figures, python, run_ranks, succeeded
from safetensors.torch import load_file, save_file
from test_training import train

from molmo2_nemo.hf import convert

LAYOUTS = {
    "tp2_sp_pp2_recompute": (4, dict(sequence_parallel=True, pipeline_model_parallel_size=2), "qwen3_gqa"),
    "tp2_cp2": (4, dict(context_parallel_size=2), "qwen3_tied"),
    "dp2_cp2_gathered": (
        4,
        dict(tensor_model_parallel_size=1, context_parallel_size=2, cp_comm_type="all_gather"),
        "olmo3_yarn",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_agree_with_peft_at_a_layout(layout, hf_models, tmp_path):
    ranks, fields, name = LAYOUTS[layout]
    fields = json.dumps({"tensor_model_parallel_size": 2, **fields})
    recompute = ["--recompute"] if "recompute" in layout else []
    found = figures(run_ranks(ranks, "tests/ranks/lora_check.py", hf_models[name], tmp_path, fields, *recompute))
    assert found["same layers"] and found["layers"] == 4 * 7 + 3 * 6 + 4 + 3
    assert found["logits"] < 1e-4 and found["loss"] < 1e-5 and found["gradients"] < 1e-4, found
    assert found["norm"] < 1e-4 and found["updated"]  # a matrix that is split or copied counts once
    assert found["without adapters"] > 0.01  # else this would show nothing
    assert found["copies apart"] < 1e-5  # else copies of a matrix would part for ever
    # Frozen weights have no gradient and no optimizer state. Buffers are padded.
    assert found["trained numbers"] <= found["gradient numbers"] < 1.2 * found["trained numbers"]
    assert found["optimizer numbers"] <= found["gradient numbers"]


ADAPTERS = ["lora.rank=4", "lora.alpha=8", "lora.dropout=0.1", "lora.targets=[attention,mlp,connector,vit]"]
ADAPTERS += ["optim.llm.lr=1e-2", "train.save_every=2", "transformer.recompute=full"]


def tensors(checkpoint):
    """Everything that a checkpoint holds, by key."""
    shapes = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    shapes = {key: entry for key, entry in shapes.items() if hasattr(entry, "size")}
    return convert.read_tensors(checkpoint, {k: (tuple(x.size), x.properties.dtype) for k, x in shapes.items()})


@pytest.mark.slow
def test_a_run_of_adapters_resumes_exactly_changes_its_layout_and_exports(sample, export, tmp_path):
    """From a Hugging Face folder, with dropout, whose weights are converted again where they are gone."""
    given = [*ADAPTERS, f"train.init_from={export}"]
    whole = tmp_path / "whole"
    result = succeeded(train(1, 2, whole, sample, *given, "train.max_steps=3"))
    assert "trained: 28,544 of 586,976 (4.86%) of all parameters" in result.stdout
    assert re.search(r"llm: 16,128 of 397,728 \(4\.06%\): .*decoder.layers.\*.mlp.linear_fc2.lora 2,816", result.stdout)
    last = whole / "checkpoints" / "step_00000003"
    held = tensors(last)
    assert held and all(".lora." in key for key in held)
    assert {kind for kind in ("exp_avg", "exp_avg_sq") if any(kind in key for key in held)} == {"exp_avg", "exp_avg_sq"}

    def resumed(name, ranks, *changes):
        folder = shutil.copytree(whole, tmp_path / name)
        shutil.rmtree(folder / "checkpoints" / "step_00000003")
        shutil.rmtree(folder / "start")
        succeeded(train(ranks, 2, folder, sample, *given, *changes, "train.max_steps=3"))
        return tensors(folder / "checkpoints" / "step_00000003")

    again = resumed("again", 1)
    assert set(again) == set(held) and all(torch.equal(again[key], held[key]) for key in held)
    # Without dropout, whose numbers differ where ranks have parts of an input.
    two, one = resumed("tp2", 2, "parallel=tp2", "lora.dropout=0"), resumed("one", 1, "lora.dropout=0")
    assert set(two) == set(one)
    for key, expected in one.items():
        assert (two[key] - expected).norm() <= 1e-3 * expected.norm(), key
    assert any((one[key] - held[key]).norm() > 1e-2 * held[key].norm() for key in held)  # what dropout changes

    # Merged and apart, what is exported says the same.
    merge, apart = (tmp_path / name for name in ("merged", "adapter"))
    succeeded(python("tools/export_hf.py", whole, merge))
    succeeded(python("tools/export_hf.py", whole, apart, "--adapter"))
    from peft import PeftModel
    from transformers import Molmo2ForConditionalGeneration

    expected = PeftModel.from_pretrained(Molmo2ForConditionalGeneration.from_pretrained(export), apart)
    expected = dict(expected.merge_and_unload().named_parameters())
    found = dict(Molmo2ForConditionalGeneration.from_pretrained(merge).named_parameters())
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in found)

    # Adapters of one run begin another; without LoRA, and beside other weights, they are refused.
    shutil.rmtree(tmp_path / "again" / "checkpoints")
    more = [*ADAPTERS, "train.max_steps=1", "train.start_over=true"]
    result = succeeded(train(1, 2, tmp_path / "again", sample, *more, f"train.init_from={last}"))
    assert f"adapters: {last}" in result.stdout and "weights beside the adapters" in result.stdout
    result = train(1, 2, tmp_path / "plain", sample, f"train.init_from={last}")
    assert result.returncode == 2 and "holds adapters alone, but lora.rank=0: set lora.rank=4" in result.stderr
    other = shutil.copytree(export, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: x + 1 for name, x in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(whole / "start")  # else it would go on with the weights that it has
    result = train(1, 2, whole, sample, *ADAPTERS, f"train.init_from={other}", "train.max_steps=4")
    assert result.returncode == 2 and "holds adapters of other weights than those of" in result.stderr


@pytest.mark.slow
def test_a_pipeline_stage_without_adapters_goes_on_beside_one_with_some(sample, export, tmp_path):
    """Those of the vision tower are on the first stage alone; the checkpoint still holds adapters and nothing else."""
    given = ["lora.rank=4", "lora.targets=[connector,vit]", f"train.init_from={export}"]
    run = tmp_path / "run"
    succeeded(train(1, 1, run, sample, *given, "train.max_steps=1"))
    two_stages = ["parallel=pp2", "parallel.num_layers_in_first_pipeline_stage=1"]
    result = succeeded(train(2, 1, run, sample, *given, *two_stages, "train.max_steps=2"))
    assert "resumed step 1" in result.stdout
    first, second = (tensors(run / "checkpoints" / f"step_0000000{step}") for step in (1, 2))
    assert set(second) == set(first) and all(".lora." in key for key in second)
    assert any(not torch.equal(first[key], second[key]) for key in second)
