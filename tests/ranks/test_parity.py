"""Logits, loss and the gradient of every parameter against transformers' Molmo2, at many layouts."""

import json

import pytest
from hf_models import as_released, assert_same, released_file
from programs import run_ranks, succeeded

LAYOUTS = {
    "one_rank": (1, []),
    "tp2_sp": (2, ["--tensor-parallel", 2, "--sequence-parallel"]),
    "cp2_all_gather": (2, ["--context-parallel", 2, "--cp-comm-type", "all_gather"]),
    "tp2_sp_cp2_a2a": (4, ["--tensor-parallel", 2, "--sequence-parallel", "--context-parallel", 2]),
    # 4 key/value heads or fewer over 4 ranks: some must be repeated.
    "cp4_a2a": (4, ["--context-parallel", 4]),
    "pp2_uneven_dp2_distributed": (4, ["--pipeline-parallel", 2, "--first-stage-layers", 1, "--distributed-optimizer"]),
    "pp2_interleaved": (2, ["--pipeline-parallel", 2, "--virtual-pipeline", 2, "--distributed-optimizer"]),
    "pp2_uneven_tp2_recompute": (
        4,
        ["--pipeline-parallel", 2, "--first-stage-layers", 3, "--tensor-parallel", 2, "--recompute"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients_agree_with_transformers(layout, hf_models, tmp_path):
    ranks, flags = LAYOUTS[layout]
    figures, exported = tmp_path / "figures.json", tmp_path / "exported"
    output = ["--json", figures, "--export", exported]
    succeeded(run_ranks(ranks, "tools/check/parity.py", *hf_models.values(), *flags, *output))
    by_model = json.loads(figures.read_text())
    assert set(by_model) == set(hf_models)
    for name, found in by_model.items():
        assert found["logits"] <= 1e-4, (name, found)
        assert found["gradients"] <= 1e-3, (name, found)
        # The fixture would notice a causal mask: a parity test that cannot fail proves nothing.
        assert found["causal_mask_would_differ_by"] > 1e-2, (name, found)
        # Rounding is all that separates us; a wrong term would be far larger than this.
        assert found["gradients"] <= 1e-4, (name, found)
        # Imported, dealt to this layout, gathered and exported: not a bit has changed.
        assert_same(released_file(exported / name), as_released(hf_models[name]))


@pytest.mark.slow
@pytest.mark.parametrize("ranks, flags", [(5, []), (2, ["--tensor-parallel", 2, "--sequence-parallel"])])
def test_ranks_and_micro_batches_of_different_media(ranks, flags, hf_models, tmp_path):
    """One document a row: text only, an image, three images, a video, a tree; on a rank each, or one after another."""
    models = [hf_models[name] for name in ("olmo3", "qwen3_gqa")]
    figures = tmp_path / "figures.json"
    succeeded(run_ranks(ranks, "tools/check/parity.py", *models, "--rows", 5, *flags, "--json", figures))
    for name, found in json.loads(figures.read_text()).items():
        assert found["logits"] <= 1e-4 and found["gradients"] <= 1e-4, (name, found)


def test_a_layout_that_does_not_fit_is_refused_in_one_sentence(hf_models):
    result = run_ranks(3, "tools/check/parity.py", hf_models["olmo3"], "--tensor-parallel", 3)
    assert result.returncode != 0
    assert "parallel.tensor_model_parallel_size=3 must be a power of two" in result.stderr
    assert "Traceback" not in result.stderr.split("torch/distributed")[0]
