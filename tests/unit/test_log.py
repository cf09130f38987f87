"""What TensorBoard shows of a run that was started several times, and what Weights & Biases keeps of a run."""

import json
import time

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from molmo2_nemo.training.metrics import RunLog


@pytest.fixture
def one_rank():
    if not dist.is_initialized():  # another test of this process may have left its group
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def shown(run_dir, tag: str) -> list[tuple[int, float]]:
    """(step, value) of every point of a curve, in the order of the files."""
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def log_steps(run_dir, start: int, first: int, last: int) -> None:
    """One start of a run, whose losses tell which start they are of."""
    log = RunLog(run_dir)
    log.begin(first, "test", "name: test\n")
    for step in range(first, last + 1):
        log.write("train", step, {"loss": 1000 * start + step, "grad_norm": {"llm": start}})
        if step % 20 == 0:
            log.write("validation", step, {"loss": start})
    log.close()


def test_tensorboard_shows_every_step_of_all_starts_once(one_rank, tmp_path):
    """Each start resumes a checkpoint, the second and the third one from before the last step that was logged."""
    log_steps(tmp_path, 1, 1, 58)
    log_steps(tmp_path, 2, 41, 103)
    log_steps(tmp_path, 3, 101, 150)
    newest = dict.fromkeys(range(1, 41), 1) | dict.fromkeys(range(41, 101), 2) | dict.fromkeys(range(101, 151), 3)
    assert shown(tmp_path, "train/loss") == [(step, 1000 * start + step) for step, start in newest.items()]
    assert shown(tmp_path, "train/grad_norm/llm") == list(newest.items())
    assert shown(tmp_path, "validation/loss") == [(step, newest[step]) for step in range(20, 141, 20)]


def test_a_run_that_ended_before_its_first_checkpoint_starts_its_curves_anew(one_rank, tmp_path):
    log_steps(tmp_path, 1, 1, 9)
    log_steps(tmp_path, 2, 1, 4)
    assert shown(tmp_path, "train/loss") == [(step, 2000 + step) for step in range(1, 5)]


@pytest.mark.slow
def test_weights_and_biases_keeps_scalars_answers_and_pictures_for_a_later_sync(one_rank, tmp_path, monkeypatch):
    """In the real client's offline files, all of which lie in the run's folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    samples = tmp_path / "samples"
    samples.mkdir()
    entries = [
        {"source": "a", "question": "What?", "label": "this", "answer": "that", "picture": "00.png"},
        {"source": "b", "question": "Who?", "label": "she", "answer": "he"},
    ]
    (samples / "answers.json").write_text(json.dumps(entries))
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)).save(samples / "00.png")
    log = RunLog(tmp_path)
    log.begin(1, "test", "name: test\n", wandb_project="project")
    log.write("train", 1, {"loss": 2.5, "grad_norm": {"llm": 0.5}})
    log.show_answers(1, samples)
    log.close()
    [run] = (tmp_path / "wandb").glob("offline-run-*")  # the pattern in docs/training.md
    # The client's own process writes the file, and on a busy machine is still about it.
    records, give_up = b"", time.monotonic() + 60
    while b"train/grad_norm/llm" not in records and time.monotonic() < give_up:
        time.sleep(0.1)
        records = next(run.glob("run-*.wandb")).read_bytes()
    assert b"train/loss" in records and b"train/grad_norm/llm" in records
    [picture] = (run / "files" / "media" / "images" / "answers").glob("00_1_*.png")
    assert np.array_equal(Image.open(picture), Image.open(samples / "00.png"))
    [table] = (run / "files" / "media" / "table").glob("answers_1_*.table.json")
    assert json.loads(table.read_text())["data"] == [["a", "What?", "this", "that"], ["b", "Who?", "she", "he"]]
