"""tools/bench/gpu.py: made-up rows are what training gets, all sections run at toy sizes, docs/gpu.md names true
keys."""

import dataclasses
import json
import re

import gpu as bench_gpu
import pytest
import torch
import warm
from gpu_kernels import model_config
from gpu_steps import through
from programs import REPOSITORY, python, succeeded

from molmo2_nemo.config.schema import Config, vision_token_ids
from molmo2_nemo.model.mask import ROOT_SEGMENT, SEGMENTS_PER_EXAMPLE
from molmo2_nemo.random_batches import packed_row, visible_pairs

# The script starts a process for each case, which takes far longer to start than to measure.
WITH_ANOTHER_PYTHON = """
import runpy, sys
sys.executable, *sys.argv = sys.argv[1:]
sys.path[0] = "tools/bench"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_sections_run_at_toy_sizes_and_say_what_was_not_measured(tmp_path):
    out = tmp_path / "bench.jsonl"
    script = ["tools/bench/gpu.py", "--device", "cpu", "--tiny", "--out", out]
    result = succeeded(python("-c", WITH_ANOTHER_PYTHON, warm.executable(), *script))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines == [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [line["section"] for line in lines] == list(bench_gpu.SECTIONS)
    assert "failed" not in result.stdout
    rows = {line["section"]: line["rows"] for line in lines}
    for line in lines:
        assert {"device", "gpus", "torch", "transformer_engine", "tiny"} <= set(line)

    measured = {name: [row for row in rows[name] if "not_measured" not in row] for name in rows}
    reasons = {name: [row["not_measured"] for row in rows[name] if "not_measured" in row] for name in rows}
    assert [row["kernel"] for row in measured["attention"]] == ["sdpa dense", "flash causal"] * 2
    assert all(row["ms"] > 0 and 0 < row["visible_share"] < 1 for row in measured["attention"])
    assert reasons["attention"] == ["not measured: FlexAttention has no backward pass on a CPU"] * 2
    assert [row["recompute"] for row in measured["vision"]] == [False, True, "layers"]
    assert all(row["crops_per_second"] > 0 for row in measured["vision"])
    absent = "not measured: Transformer Engine is not installed"
    assert reasons["vision"] == [absent]
    # The tiny model has two layers, which is one of the two depths.
    assert [(row["layers"], row["extrapolated"]) for row in measured["step"]] == [(1, False), (2, False), (2, True)] * 2
    assert {"tokens_per_second", "mfu_percent", "peak_gib", "recipe", "recompute"} <= set(measured["step"][0])
    assert reasons["step"] == [absent] * 4
    assert len(measured["fp8_loss"]) == 1 and measured["fp8_loss"][0]["max_difference"] == 0
    assert reasons["fp8_loss"] == ["not measured: FP8 needs a GPU"] * 3
    assert reasons["nccl"] == ["not measured: needs two GPUs, here are 0"] and not measured["nccl"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_is_one_sentence():
    result = python("tools/bench/gpu.py")
    assert result.returncode == 2
    assert result.stderr == "error: --device cuda, but torch sees no GPU: use --device cpu --tiny to try the script.\n"


def test_a_failing_case_is_its_reason_and_not_the_end(tmp_path):
    class Arguments:
        device, tiny, minutes = "cpu", True, 1

    rows = bench_gpu.run_case("vision", {"layer_spec": "no such spec"}, Arguments, 100)
    assert len(rows) == 1 and rows[0]["not_measured"].startswith("failed: ")
    assert "no such spec" in rows[0]["not_measured"] or "Error" in rows[0]["not_measured"]
    rows = bench_gpu.run_case("vision", {"layer_spec": "local"}, Arguments, 5)
    assert rows[0]["not_measured"] == "not measured: the 1 minutes (--minutes) were over"


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_full_and_consistent(seed):
    model = model_config("molmo2_4b")
    batch = packed_row(model, 16384, 128, seed)
    again = packed_row(model, 16384, 128, seed)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    ids, vision = batch["input_ids"][0], batch["vision_mask"][0]
    assert (batch["segment_ids"] >= 0).all()
    assert len(batch["crops"]) == 128
    patches = int((ids == vision_token_ids(model)["image_patch_id"]).sum())
    assert patches == len(batch["pooling"]) == int(batch["vision_units"][:, 1].sum())
    assert int(batch["vision_units"][:, 0].sum()) == 128
    assert 0 <= int(batch["pooling"].amax()) < 128 * model.vision.patches_per_crop
    assert not (batch["loss_weights"][0] > 0)[vision].any() and (batch["loss_weights"] > 0).any()
    numbers = batch["segment_ids"][0] % SEGMENTS_PER_EXAMPLE
    assert (numbers == ROOT_SEGMENT).any(), "no message tree"
    # Answers start where their root ends, whichever branch they are.
    starts = (batch["loss_weights"][0] > 0) & ~torch.roll(batch["loss_weights"][0] > 0, 1)
    assert (batch["position_ids"][0][starts] > 0).all() and int(batch["position_ids"].amax()) < 16384


def test_pairs_are_those_of_the_mask():
    from molmo2_nemo.training.batches import attended_pairs

    for S in (2048, 4096):
        batch = packed_row(model_config("molmo2_4b"), S, S // 128, seed=S)
        segments, vision = batch["segment_ids"], batch["vision_mask"]
        assert visible_pairs(batch) == attended_pairs(segments, vision)


def test_the_line_through_two_depths():
    assert through((4, 8), [10.0, 14.0], 36) == 42.0
    assert through((4, 8), [None, None], 36) is None


def test_the_wheels_argument_is_taken_out_of_the_second_run():
    assert bench_gpu.without_wheels(["--wheels", "dir", "--only", "step"]) == ["--only", "step"]
    assert bench_gpu.without_wheels(["--tiny", "--wheels=dir", "--out", "x"]) == ["--tiny", "--out", "x"]


def test_every_key_of_the_page_exists():
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    known = {
        "transformer": TransformerConfig,
        "optimizer": OptimizerConfig,
        "ddp": DistributedDataParallelConfig,
        "train": type(Config().train),
        "parallel": type(Config().parallel),
    }
    page = (REPOSITORY / "docs" / "gpu.md").read_text()
    keys = re.findall(r"`(transformer|optimizer|ddp|train|parallel)\.(\w+)", page)
    assert len(set(keys)) > 30
    for prefix, name in set(keys) - {("transformer", "recompute")}:  # that one is ours (auto.py)
        assert name in {field.name for field in dataclasses.fields(known[prefix])}, f"{prefix}.{name}"


def test_no_result_of_the_page_is_made_up():
    """Until somebody measures: then this test goes, and a file with device, versions and commit comes."""
    page = (REPOSITORY / "docs" / "gpu.md").read_text()
    table = page[page.index("## Results") :].splitlines()
    rows = [line.split("|")[2:-1] for line in table if line.startswith("|")][2:]
    assert len(rows) >= 10 and all(cell.strip() == "unmeasured" for row in rows for cell in row)


def test_checksums_are_measured(tmp_path):
    result = succeeded(python("tools/bench/checkpoint.py", "--gib", "0.02", "--seconds", "0.1", "--folder", tmp_path))
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["checksum_gb_s"] > 0 and figures["seconds_100_gb"] == 100 / figures["checksum_gb_s"]
    assert "verify, cached" in result.stdout and not list(tmp_path.iterdir())
