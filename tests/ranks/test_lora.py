"""LoRA at several layouts against PEFT on transformers' own model, and runs that are resumed, moved and exported."""

import json

import pytest
from programs import figures, run_ranks

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
    # Frozen weights have no gradient and no optimizer state. Buffers are padded.
    assert found["trained numbers"] <= found["gradient numbers"] < 1.2 * found["trained numbers"]
    assert found["optimizer numbers"] <= found["gradient numbers"]
