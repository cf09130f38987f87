"""Real runs of the tiny model: resuming, changing the layout, handing weights on, and what users do wrong."""

import json
import re
import shutil

import pytest
from programs import TINY_SETTINGS, other_tokenizer, python, run_ranks, start_ranks, succeeded
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SMALL = ["train.validation_batches=1", "train.global_batch_size=4", "train.micro_batch_size=2"]


def train(ranks, stage, run_dir, sample, *overrides, **environment):
    recipe = {1: "stage1_pretrain", 2: "stage2_sft", 3: "stage3_long_context"}[stage]
    arguments = [
        f"recipes/{recipe}.py",
        *TINY_SETTINGS,
        *SMALL,
        f"data.root={sample}",
        f"run_dir={run_dir}",
        *overrides,
    ]
    return python(*arguments, **environment) if ranks == 1 else run_ranks(ranks, *arguments, **environment)


def losses(run_dir, kind="train"):
    """Step -> record; a later record of a step replaces an earlier one."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in records if record["kind"] == kind}


@pytest.fixture(scope="session")
def uninterrupted(sample, made_once):
    """Stage 2 on two tensor parallel ranks, twelve steps, with the checkpoint of step 6 kept."""

    def make(folder):
        overrides = ["parallel=tp2", "train.max_steps=12", "train.save_every=6"]
        succeeded(train(2, 2, folder / "stage2", sample, *overrides))

    return made_once("uninterrupted", make) / "stage2"


LAYOUTS = {
    "tp2": (2, ["parallel=tp2"]),
    "pp2": (2, ["parallel=pp2", "parallel.num_layers_in_first_pipeline_stage=1"]),
    "cp2": (2, ["parallel=cp2"]),
    "one rank": (1, []),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_continues_the_curve_at_any_layout(layout, uninterrupted, sample, tmp_path):
    ranks, overrides = LAYOUTS[layout]
    run_dir = tmp_path / "stage2"
    shutil.copytree(uninterrupted, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000012")
    (run_dir / "metrics.jsonl").unlink()
    result = succeeded(train(ranks, 2, run_dir, sample, "train.max_steps=12", "train.save_every=6", *overrides))
    assert re.search(r"resumed step 6 from .*step_00000006", result.stdout)
    before, after = losses(uninterrupted), losses(run_dir)
    assert sorted(after) == list(range(7, 13))
    for step in after:
        exact = layout == "tp2"
        for key, found, expected in [
            ("loss", after[step]["loss"], before[step]["loss"]),
            *((c, after[step]["grad_norm"][c], norm) for c, norm in before[step]["grad_norm"].items()),
        ]:
            # Other layouts add in another order; rounding grows by the optimizer's square roots.
            assert abs(found - expected) <= (0 if exact else 2e-3 * expected), (layout, step, key)
        assert after[step]["tokens"] == before[step]["tokens"]
        assert after[step]["tokens_seen"] == before[step]["tokens_seen"]
    assert losses(run_dir, "validation")[12]["rows"] == losses(uninterrupted, "validation")[12]["rows"]
    # TensorBoard shows each step once, the repeated ones as they were trained last.
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    curve = [(event.step, event.value) for event in events.Scalars("train/loss")]
    newest = {step: record["loss"] for step, record in (before | after).items()}
    assert curve == [(step, pytest.approx(newest[step], rel=1e-6)) for step in range(1, 13)]


@pytest.mark.slow
def test_a_run_starts_from_base_models_and_from_hugging_face(sample, tmp_path):
    """Rank 0 makes a checkpoint in the run's folder; exported as a Molmo2, it starts another run alike."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    text = Qwen3Config(
        hidden_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        num_hidden_layers=2,
        intermediate_size=256,
        vocab_size=600,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.1,
    )
    vision = SiglipVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=84, patch_size=14
    )
    Qwen3ForCausalLM(text).save_pretrained(tmp_path / "llm")
    SiglipVisionModel(vision).save_pretrained(tmp_path / "vision")
    common = ["train.max_steps=2", "train.save_every=2"]
    base = [*common, f"train.init_from=[{tmp_path / 'llm'},{tmp_path / 'vision'}]"]
    result = succeeded(train(2, 2, tmp_path / "base", sample, *base))
    start = tmp_path / "base" / "start" / "step_00000000"
    assert f"weights from {start}" in result.stdout and result.stdout.count("making ") == 1
    succeeded(python("tools/export_hf.py", start, tmp_path / "hf"))
    succeeded(train(2, 2, tmp_path / "molmo2", sample, *common, f"train.init_from={tmp_path / 'hf'}"))
    for step, record in losses(tmp_path / "base").items():
        assert losses(tmp_path / "molmo2")[step]["loss"] == record["loss"]
        assert losses(tmp_path / "molmo2")[step]["grad_norm"] == record["grad_norm"]
    # Before a run has a checkpoint of its own, a second start finds what the first has made.
    shutil.rmtree(tmp_path / "base" / "checkpoints")
    result = succeeded(train(1, 2, tmp_path / "base", sample, *base, "train.start_over=true"))
    assert f"weights from {start}" in result.stdout and "making " not in result.stdout
    # Rank 0 alone finds what is wrong with a tensor, and all ranks end alike.
    tensors = load_file(tmp_path / "llm" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, tmp_path / "llm" / "model.safetensors")
    run_dir, log = tmp_path / "damaged", tmp_path / "log"
    command = ["recipes/stage2_sft.py", *TINY_SETTINGS, *SMALL, f"data.root={sample}", f"run_dir={run_dir}", *base]
    assert [rank.wait() for rank in start_ranks(2, command, log)] == [2, 2], log.read_text()
    assert "Traceback" not in log.read_text() and log.read_text().count("error: ") == 1
    end = json.loads((run_dir / "ended.json").read_text())
    assert end["reason"] == "config error" and "decoder.final_layernorm.weight is (95,)" in end["message"]


@pytest.mark.slow
def test_the_global_batch_does_not_depend_on_the_layout(sample, tmp_path):
    """The same weights, the same rows: the loss of step 1 is the same on any layout with one replica."""
    start = tmp_path / "start"
    succeeded(train(1, 1, start, sample, "train.max_steps=1"))
    found = {}
    for name, ranks, overrides in [
        ("one", 1, []),
        ("tp2", 2, ["parallel=tp2"]),
        ("micro_batches_of_one", 1, ["train.micro_batch_size=1"]),
    ]:
        run_dir = tmp_path / name
        succeeded(train(ranks, 2, run_dir, sample, "train.max_steps=3", f"train.init_from={start}", *overrides))
        found[name] = losses(run_dir)
    for name, records in found.items():
        for step, record in records.items():
            expected = found["one"][step]
            if name != "micro_batches_of_one":
                assert record["tokens"] == expected["tokens"]
            assert abs(record["loss"] - expected["loss"]) < 1e-4 * expected["loss"], (name, step)
            for component, norm in expected["grad_norm"].items():
                assert abs(record["grad_norm"][component] - norm) < 1e-3 * norm, (name, step, component)


def test_what_users_do_wrong_ends_in_one_sentence(sample, tmp_path):
    def message(*overrides, stage=2):
        result = train(1, stage, tmp_path / "run", sample, *overrides)
        assert result.returncode != 0, result.stdout
        assert "Traceback" not in result.stderr, result.stderr
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, result.stderr
        return errors[0]

    assert "did you mean data.seq_length" in message("data.seqlength=5")
    assert "1 rank(s) cannot be divided" in message("parallel.tensor_model_parallel_size=4")
    missing = message("data.root=/nonexistent/place")
    assert "data.root=/nonexistent/place" in missing and "make_sample_data" in missing
    assert "does not exist" in message("train.init_from=/nonexistent/step_00000001")
    end = json.loads((tmp_path / "run" / "ended.json").read_text())
    assert end["reason"] == "config error" and "/nonexistent/step_00000001" in end["message"] and end["step"] == 0
    assert "train.device=cuda, but torch sees no GPU" in message("train.device=cuda")


def test_damaged_and_foreign_checkpoints_are_refused(uninterrupted, sample, tmp_path):
    damaged = tmp_path / "step_00000012"
    shutil.copytree(uninterrupted / "checkpoints" / "step_00000012", damaged)
    data = max(damaged.glob("*.distcp"), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1000])
    result = train(1, 3, tmp_path / "a", sample, f"train.init_from={damaged}", "parallel.context_parallel_size=1")
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert re.search(r"error: checkpoint .* is damaged: .*distcp has \d+ bytes instead of \d+", result.stderr)

    other = train(
        1,
        3,
        tmp_path / "b",
        sample,
        f"train.init_from={uninterrupted}",
        "parallel.context_parallel_size=1",
        "model.hidden_size=64",
    )
    assert other.returncode != 0 and re.search(r"has model\.hidden_size=\d+, this run has 64", other.stderr)


def test_another_tokenizer_of_the_same_size_is_noticed(uninterrupted, sample, tmp_path):
    other = other_tokenizer(tmp_path / "other")
    start = [f"train.init_from={uninterrupted}", "train.max_steps=1", "train.validation_batches=0"]
    result = succeeded(train(1, 2, tmp_path / "run", sample, *start, f"model.tokenizer={other}"))
    assert f"was trained with another tokenizer than {other}" in result.stdout
    # The advice: the one that the weights came with.
    result = succeeded(train(1, 2, tmp_path / "again", sample, *start))
    assert "another tokenizer" not in result.stdout

    export = python("tools/export_hf.py", uninterrupted, tmp_path / "hf", "--tokenizer", other)
    assert export.returncode != 0 and "Traceback" not in export.stderr
    assert f"--tokenizer={other} is not what" in export.stderr and not (tmp_path / "hf").exists()


def test_an_interrupted_save_is_not_taken_for_a_checkpoint(uninterrupted, sample, tmp_path):
    run_dir = tmp_path / "stage2"
    shutil.copytree(uninterrupted, run_dir)
    (run_dir / "checkpoints" / "step_00000012" / "complete.json").unlink()
    result = succeeded(train(2, 2, run_dir, sample, "parallel=tp2", "train.max_steps=7"))
    assert "resumed step 6" in result.stdout
    assert "ignored: checkpoint" in result.stdout and "step_00000012" in result.stdout


@pytest.mark.slow
def test_a_broken_source_stops_all_ranks_and_another_number_of_them_goes_on(sample, tmp_path):
    folder, run_dir = tmp_path / "broken", tmp_path / "run"
    shutil.copytree(sample, folder)
    for shard in (folder / "captions").glob("train-*.tar"):
        shard.write_bytes(bytes(range(256)) * 4)
    every = ["train.save_every=3", "train.log_every=1"]
    result = train(2, 2, run_dir, folder, "train.max_steps=100", *every)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode != 0 and len(errors) == 1, result.stderr
    assert re.search(
        r"source captions: 2\d of 2\d samples are broken, more than data.max_error_rate=0.01 allows \(the last one: "
        r"train-00000.tar\[\d+\]: .+\); fix",
        errors[0],
    )
    assert result.stdout.count("broken sample: captions: train-00000.tar[") == 5
    step = max(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))
    before = losses(run_dir)[step]["data"]

    def go_on(last, *overrides):
        return train(1, 2, run_dir, folder, f"train.max_steps={last}", "data.max_error_rate=1", *every, *overrides)

    result = succeeded(go_on(step + 3))
    assert f"resumed step {step} " in result.stdout and result.stdout.count("training data dealt anew") == 1
    after = losses(run_dir)[step + 3]["data"]
    assert after["captions"]["dropped_unreadable"] > before["captions"]["dropped_unreadable"]
    assert after["image_qa"]["examples"] >= before["image_qa"]["examples"] and "examples" not in after["captions"]
    assert re.search(rf"step {step + 3}/{step + 3} .*\| dropped \d+ of \d+ \(captions \d+", result.stdout)
    assert f"data of captions: {after['captions']['dropped_unreadable']} dropped_unreadable" in result.stdout

    result = succeeded(go_on(step + 4))
    assert f"resumed step {step + 3} " in result.stdout and "dealt anew" not in result.stdout
    result = succeeded(go_on(step + 5, "data.seed=99"))
    assert "training data dealt anew, in another order, since data.seed was 1 and is 99" in result.stdout
