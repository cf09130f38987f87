"""What people do to a run between two starts of it: change values, damage or move its files, start it twice."""

import json
import re
import shutil
import signal
import time

import pytest
import yaml
from programs import REPOSITORY, figures, python, run_ranks, start_ranks, succeeded
from test_training import losses, train

from molmo2_nemo import checkpoint_dir
from molmo2_nemo.training import owner

THREE = ["train.max_steps=3", "train.save_every=3"]


@pytest.fixture(scope="session")
def three_steps(sample, made_once):
    """A run of one rank with the checkpoint of step 3. Not to be changed: `copied` gives copies."""

    def make(folder):
        succeeded(train(1, 2, folder / "run", sample, *THREE))

    return made_once("three_steps", make) / "run"


@pytest.fixture
def copied(three_steps, tmp_path):
    return shutil.copytree(three_steps, tmp_path / "run")


def said(result):
    return result.stdout + result.stderr


def flip_bits(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    for place in range(middle, middle + 4):
        content[place] ^= 0xFF
    path.write_bytes(content)


def ended(run_dir):
    return json.loads((run_dir / "ended.json").read_text())


def test_changed_values_of_the_optimizer_are_used(three_steps):
    """Everything but moments and step comes from the configuration."""
    common = ["model=tiny", "data=sample", "schedule=quickstart", "optim=from_scratch"]
    changed = ["optim.llm.lr=1e-4", "optim.weight_decay=0.3", "optim.adam_beta1=0.8", "optim.adam_beta2=0.97"]
    path = three_steps / "checkpoints" / "step_00000003"
    found = figures(python("tests/ranks/resume_check.py", path, *common, *changed, "optim.adam_eps=1e-5"))
    assert set(found["groups"]) == {"vit", "connector", "llm"}
    for group in found["groups"].values():
        assert group == {"weight_decay": 0.3, "betas": [0.8, 0.97], "eps": 1e-5}
    assert found["steps"] == [3] and found["fresh"] == []
    assert set(found["moments"]) == {"kept"}


def test_an_unfrozen_component_starts_fresh_and_the_others_keep_their_state(sample, tmp_path):
    run_dir = tmp_path / "run"
    # Gate and up projection are one matrix in the optimizer and two in a checkpoint.
    frozen = ["optim.vit.freeze=true", "optim.freeze_patterns=[decoder.layers.0.mlp.linear_fc1]"]
    succeeded(train(1, 2, run_dir, sample, *THREE, *frozen))
    common = ["model=tiny", "data=sample", "schedule=quickstart", "optim=from_scratch"]
    path = run_dir / "checkpoints" / "step_00000003"
    found = figures(python("tests/ranks/resume_check.py", path, *common))
    assert set(found["moments"]) == {"kept", "fresh"}
    assert found["fresh"] == found["moments"]["fresh"]
    begins = "vision.vit.", "decoder.layers.0.mlp.linear_fc1."
    assert {next(begin for begin in begins if name.startswith(begin)) for name in found["fresh"]} == set(begins)
    assert not any(name.startswith(begins) for name in found["moments"]["kept"])
    # With another layout and a changed rate, as after an out-of-memory.
    result = succeeded(train(2, 2, run_dir, sample, "train.max_steps=4", "parallel=tp2", "optim.llm.lr=1e-4"))
    assert "optim.vit.freeze True -> False" in result.stdout
    assert re.search(r"\d+ parameters were frozen before; their optimizer state starts fresh", result.stdout)
    assert losses(run_dir)[4]["lr"]["llm"] < 1e-4 * 1.01


def test_the_data_are_dealt_anew_where_what_decides_them_has_changed(copied, sample, tmp_path):
    # What is refused leaves everything as it was: the settings, and that the run has finished the steps asked for.
    before = (copied / "config.yaml").read_bytes(), (copied / "ended.json").read_bytes()
    result = train(1, 2, copied, sample, "train.max_steps=3", "model.vision.overlap_margin=2")
    assert result.returncode == 2 and "has model.vision=" in result.stderr
    assert before == ((copied / "config.yaml").read_bytes(), (copied / "ended.json").read_bytes())
    # A checkpoint is no run's folder.
    result = train(1, 2, copied / "checkpoints" / "step_00000003", sample, "train.max_steps=4")
    assert result.returncode == 2 and f"run_dir={copied} continues from that run's newest one" in result.stderr
    checkpoint_dir.verify(copied / "checkpoints" / "step_00000003")
    blend = yaml.safe_load((REPOSITORY / "conf/blend/sample_stage2.yaml").read_text())
    del blend["sources"]["captions"]
    (tmp_path / "blend.yaml").write_text(yaml.safe_dump(blend, sort_keys=False))
    changed = ["train.micro_batch_size=1", "data.seq_length=512", f"data.blend={tmp_path / 'blend.yaml'}"]
    result = succeeded(train(1, 2, copied, sample, "train.max_steps=4", "train.save_every=4", *changed))
    [line] = [line for line in result.stdout.splitlines() if line.startswith("training data dealt anew")]
    for part in ("data.seq_length was 256 and is 512", "train.micro_batch_size was 2 and is 1"):
        assert part in line
    assert "source captions was left out" in line and "of 14 of 14 sources" in line and "[" not in line
    assert losses(copied)[4]["tokens_seen"] > losses(copied)[3]["tokens_seen"]
    # The next start goes on exactly; then once from the beginning, and only once.
    result = succeeded(train(1, 2, copied, sample, "train.max_steps=5", "train.save_every=1", *changed))
    assert "dealt anew" not in result.stdout
    changed.append("train.restart_data=true")
    for steps, times in ((6, 1), (7, 0)):
        result = succeeded(train(1, 2, copied, sample, f"train.max_steps={steps}", "train.save_every=1", *changed))
        assert result.stdout.count("training data start again from the beginning") == times


def test_a_damaged_checkpoint_is_passed_over_and_never_costs_a_good_one(copied, sample):
    """Bit flips that leave sizes alone; then pruning, which must neither count nor remove the damaged one."""
    succeeded(train(1, 2, copied, sample, "train.max_steps=5", "train.save_every=5"))
    damaged = copied / "checkpoints" / "step_00000005"
    flip_bits(next(damaged.glob("*.distcp")))
    # Ranks of another layout share the reading of the files.
    flags = ["train.keep_last=1", "train.keep_every=0", "parallel=tp2"]
    result = succeeded(train(2, 2, copied, sample, "train.max_steps=4", "train.save_every=4", *flags))
    assert f"ignored: checkpoint {damaged} is damaged: " in result.stdout and "SHA-256" in result.stdout
    assert re.search(r"resumed step 3 from .*step_00000003", result.stdout)
    assert sorted(path.name for path in copied.glob("checkpoints/step_*")) == ["step_00000004", "step_00000005"]
    assert "SHA-256" in (damaged / checkpoint_dir.DAMAGED).read_text()
    # Without one that is usable, nothing starts by itself.
    flip_bits(next((copied / "checkpoints" / "step_00000004").glob("*.distcp")))
    result = train(1, 2, copied, sample, "train.max_steps=5")
    assert result.returncode == 2 and "none of the 2 checkpoint(s)" in result.stderr and "Traceback" not in said(result)
    assert ended(copied)["reason"] == "config error"
    result = succeeded(train(1, 2, copied, sample, "train.max_steps=1", "train.start_over=true"))
    assert "weights: random" in result.stdout
    assert sorted(path.name for path in (copied / "checkpoints.1").glob("step_*")) == ["step_00000004", "step_00000005"]
    # A run whose checkpoints are gone is not begun anew either; a usable one is continued in spite of start_over.
    result = succeeded(train(1, 2, copied, sample, "train.max_steps=2", "train.start_over=true"))
    assert "resumed step 1" in result.stdout
    shutil.rmtree(copied / "checkpoints")
    result = train(1, 2, copied, sample, "train.max_steps=5")
    assert result.returncode == 2 and "has saved step 2" in result.stderr and "train.start_over=true" in result.stderr


def test_a_run_that_trained_nothing_has_not_finished(copied, sample, tmp_path):
    weights = copied / "checkpoints" / "step_00000003"
    poisoned = tmp_path / "poisoned" / "step_00000000"
    succeeded(python("tests/ranks/scale_weights.py", weights, poisoned, "nan"))
    run_dir = tmp_path / "nan"
    flags = ["train.max_steps=4", "train.save_every=2", f"train.init_from={poisoned}"]
    result = train(1, 2, run_dir, sample, *flags)
    assert result.returncode == 2, said(result)
    assert "step 1: first not finite is the weights vision.vit.position_embedding on rank 0" in result.stdout
    assert "step 2: not saved, since the last 2 step(s) were skipped" in result.stdout
    assert "the run has not finished: it was last updated at step 0" in ended(run_dir)["message"]
    assert ended(run_dir)["reason"] == "error" and not list(run_dir.glob("checkpoints/step_*"))
    # The batch that was saved can be looked at, as the message says.
    [batch] = run_dir.glob("errors/batch_*.pt")
    [advice] = re.findall(r"look at its batch: python (\S+ --batch \S+)", result.stdout)
    succeeded(python(*advice.split()))
    assert len(list(batch.with_suffix("").glob("samples/*.html"))) >= 4


def test_a_jump_of_the_loss_is_reported_and_by_key_taken_back(sample, tmp_path):
    """The loss jumps when a rate is raised much too far. Three times back is enough."""
    run_dir = tmp_path / "run"
    succeeded(train(1, 2, run_dir, sample, "train.max_steps=18", "train.save_every=18", "train.global_batch_size=2"))
    too_much = [f"optim.{component}.lr=30" for component in ("vit", "connector", "llm")]
    # The step it goes back to is one at which a run saves: going back is no new checkpoint.
    flags = ["train.max_steps=36", "train.save_every=18", "train.global_batch_size=2", *too_much]
    result = train(1, 2, run_dir, sample, *flags, "train.on_loss_jump=go_back")
    assert result.returncode == 2, said(result)
    assert re.search(r"step \d+: the loss jumped to [\d.]+ from about [\d.]+; sources: \w+", result.stdout)
    assert result.stdout.count(f"went back to {run_dir / 'checkpoints' / 'step_00000018'}") == 3
    assert "went back to" in ended(run_dir)["message"] and "optim.*.lr" in ended(run_dir)["message"]


def test_a_second_run_in_the_same_folder_is_refused_and_leaves_it_alone(sample, tmp_path):
    run_dir = tmp_path / "run"
    long = ["recipes/stage2_sft.py", "model=tiny", "data=sample", "schedule=quickstart", "optim=from_scratch"]
    long += [f"data.root={sample}", f"run_dir={run_dir}", "train.max_steps=100000", "train.save_every=100000"]
    [first] = start_ranks(1, long, tmp_path / "log")
    try:
        end = time.monotonic() + 120
        while "step 1/" not in (tmp_path / "log").read_text() and time.monotonic() < end:
            time.sleep(0.1)

        def files() -> list:
            # The owner's file is written anew with each of its beats.
            return sorted((p.name, p.name == owner.OWNER or p.stat().st_ino) for p in run_dir.iterdir())

        before = files()
        for wrong in ([], ["train.max_steps=0"]):
            result = train(1, 2, run_dir, sample, *wrong)
            assert result.returncode == 2 and "Traceback" not in said(result)
            assert ("is in use by process" in result.stderr) == (not wrong)
            assert not (run_dir / "ended.json").exists()
        assert files() == before
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    # A killed run leaves its file behind; on the same machine the next start sees at once that its process is gone.
    assert (run_dir / owner.OWNER).exists()
    result = succeeded(train(1, 2, run_dir, sample, "train.max_steps=1"))
    assert not (run_dir / owner.OWNER).exists() and "weights: random" in result.stdout


@pytest.mark.parametrize("differing", ["train.seed", "optim.llm.lr"])
def test_ranks_that_were_started_differently_do_not_train(differing, sample, tmp_path):
    run_dir = tmp_path / "run"
    rank = tmp_path / "rank.py"
    rank.write_text(
        "import os, runpy, sys\n"
        f"value = {'1e-' if differing == 'optim.llm.lr' else ''!r} + str(3 + int(os.environ['RANK']))\n"
        f"sys.argv = [{str(REPOSITORY / 'recipes/stage2_sft.py')!r}, *sys.argv[1:], {differing!r} + '=' + value]\n"
        "sys.path[0] = os.path.dirname(sys.argv[0])\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    arguments = ["model=tiny", "data=sample", "schedule=quickstart", "optim=from_scratch", "train.global_batch_size=8"]
    result = run_ranks(2, rank, *arguments, f"data.root={sample}", f"run_dir={run_dir}", "train.max_steps=2")
    assert result.returncode == 2, said(result)
    assert re.search(rf"rank 1 on \S+ has {differing}=\S+, rank 0 on \S+ has \S+: start all ranks", result.stderr)
    assert ended(run_dir)["reason"] == "config error" and not (run_dir / "checkpoints").exists()


def test_the_best_is_kept_and_a_run_that_gets_no_better_is_finished(sample, tmp_path):
    """With rates that ruin the model, the first measurement stays the best; a start after the end trains nothing."""
    run_dir = tmp_path / "run"
    ruin = [
        f"optim.{component}.{key}" for component in ("vit", "connector", "llm") for key in ("lr=3", "warmup_steps=0")
    ]
    flags = ["train.max_steps=30", "train.save_every=100", "train.keep_last=1", "train.keep_every=0"]
    flags += [
        "train.validate_every=1",
        "train.save_best=loss",
        "train.stop_when_no_better=3",
        "train.on_loss_jump=ignore",
    ]
    result = succeeded(train(1, 2, run_dir, sample, *flags, *ruin))
    measured = {step: record["loss"] for step, record in losses(run_dir, "validation").items()}
    best = min(measured, key=measured.get)
    last = max(measured)
    assert last == best + 3 < 30
    found = json.loads((run_dir / "checkpoints" / "best.json").read_text())
    assert found["step"] == best and found["value"] == measured[best]
    kept = [checkpoint_dir.step_of(path) for path in checkpoint_dir.find_checkpoints(run_dir / "checkpoints")]
    assert kept == [best, last]
    assert ended(run_dir)["reason"] == "finished" and "train.stop_when_no_better" in ended(run_dir)["message"]
    result = succeeded(train(1, 2, run_dir, sample, *flags, *ruin))
    assert f"ended at step {last} (finished" in result.stdout and max(losses(run_dir)) == last


def test_answers_and_pictures_are_in_tensorboard(sample, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tmp_path / "run"
    flags = ["train.max_steps=1", "train.generate_every=1", "train.generate_examples=6", "train.generate_max_tokens=8"]
    succeeded(train(1, 2, run_dir, sample, *flags))
    entries = json.loads((run_dir / "samples" / "step_00000001" / "answers.json").read_text())
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    pictures = [number for number, entry in enumerate(entries) if "picture" in entry]
    assert events.Tags()["images"] == [f"answers/{number:02d}" for number in pictures] and len(pictures) > 2
    [shown] = events.Images(f"answers/{pictures[0]:02d}")
    assert shown.encoded_image_string.startswith(b"\x89PNG")
    [table] = events.Tensors("answers/text_summary")
    text = table.tensor_proto.string_val[0].decode()
    assert text.count("\n") == len(entries) + 1 and entries[0]["source"] in text
