"""When a loss counts as a jump, and whose last sign is oldest."""

import math
import random
import socket
import time
from types import SimpleNamespace

import pytest

from molmo2_nemo.config.checks import check_best
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import TrainConfig
from molmo2_nemo.training import loop, shutdown, trouble
from molmo2_nemo.training.run import best_so_far


@pytest.mark.parametrize("seed", range(5))
def test_a_falling_noisy_curve_has_no_jump_and_a_jump_of_a_third_is_one(seed):
    """Noise of 3 %, more than a global batch of 128 rows has; the jump is the one of weights times 1.5."""
    draw, alarm = random.Random(seed), trouble.SpikeAlarm()
    for step in range(2000):
        assert not alarm.is_jump((2 + 5 / (1 + step / 50)) * draw.gauss(1, 0.03))
    usual = alarm.usual
    assert alarm.is_jump(usual * 8.8 / 6.8)
    assert alarm.usual == usual  # what jumped is not what others are compared with
    assert not alarm.is_jump(usual)


def test_the_first_steps_and_equal_losses_raise_no_alarm():
    alarm = trouble.SpikeAlarm()
    assert not any(alarm.is_jump(loss) for loss in [7.0, 9.0] * (trouble.ENOUGH // 2))
    flat = trouble.SpikeAlarm([2.0] * trouble.WINDOW)
    assert not flat.is_jump(2.2) and flat.is_jump(2.4)


def stacks(folder, rank, step, phase, seconds, host="far", pid=1, text=b""):
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1.8e9 + seconds))
    line = f"rank {rank} on {host}, process {pid}: step {step}, {phase} since {stamp}"
    (folder / f"stacks_rank{rank:04d}.txt").write_bytes(line.ljust(199).encode() + b"\n" + text)


def test_the_ranks_that_others_wait_for_are_named(tmp_path):
    assert shutdown.missing_ranks(tmp_path) == ""
    for rank in range(4):
        stacks(tmp_path, rank, 12, "forward, backward and update", 50)
    assert "all ranks gave their last sign at the same time" in shutdown.missing_ranks(tmp_path)
    stacks(tmp_path, 2, 12, "data", 20)
    assert "the oldest sign is from rank 2 on far (step 12, data since 20" in shutdown.missing_ranks(tmp_path)
    # Clocks of nodes may differ; an earlier step counts more.
    stacks(tmp_path, 3, 11, "checkpoint", 90)
    phrase = shutdown.missing_ranks(tmp_path)
    assert "rank 3 on far (step 11, checkpoint since" in phrase and "rank 2" not in phrase
    (tmp_path / "stacks_rank0009.txt").write_bytes(b"\xff\xfe")
    assert shutdown.missing_ranks(tmp_path) == phrase
    # Ranks that work write their stacks before the time is up; one that is stopped does not.
    for rank in (0, 2, 3):
        stacks(tmp_path, rank, 12, "data", 20 + rank, text=b"Thread 0x1")
    assert "no sign of life from rank 1 on far" in shutdown.missing_ranks(tmp_path)
    # What is no longer there at all is named first.
    stacks(tmp_path, 0, 13, "data", 99, host=socket.gethostname(), pid=2**22 + 1, text=b"Thread 0x1")
    assert "ended already: rank 0 on " in shutdown.missing_ranks(tmp_path)


def test_the_file_that_ranks_write_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "5")
    dump = shutdown.StackDump(tmp_path, 10, ["SIGUSR2"])
    dump.at(3, "validation")
    stacks(tmp_path / "errors", 6, 4, "data", 1e6)
    found = shutdown.missing_ranks(tmp_path / "errors")
    assert f"oldest sign is from rank 5 on {socket.gethostname()} (step 3, validation since" in found
    dump.close()


def test_the_best_by_another_measurement_begins_anew():
    marker = {"best": {"metric": "loss", "value": 6.7, "step": 2, "worse": 1}}
    assert best_so_far(marker, "loss") == loop.Best("loss", 6.7, 2, 1)
    assert best_so_far(marker, "point_f1") == loop.Best("point_f1") and best_so_far(marker, None) == loop.Best()
    for strange in ({}, {"best": None}, {"best": {"worsd": 1}}, {"best": {"metric": "loss"}}):
        assert best_so_far(strange, "loss") == loop.Best("loss")


def test_a_score_that_no_question_gives_is_said_and_ends_the_run_as_no_better(tmp_path):
    said, train = [], TrainConfig(save_best="point_f1", stop_when_no_better=2)
    run = SimpleNamespace(
        config=SimpleNamespace(train=train),
        best=loop.Best("point_f1"),
        position=loop.Position(4),
        run_dir=tmp_path,
        log=SimpleNamespace(say=said.append),
        skipped_in_a_row=0,
    )
    for _ in range(2):
        assert not loop.is_better(run, loop.with_save_best(run, {"exact_match": 0.5, "count_exact": 1.0}))
    assert (
        len(said) == 2 and "is not measured by the held-out questions, which give count_exact, exact_match" in said[0]
    )
    assert "has never been a number" in loop.no_better(run)
    assert loop.with_save_best(run, {}) == {}  # a round that was stopped
    assert loop.is_better(run, loop.with_save_best(run, {"point_f1": 0.5})) and len(said) == 2


def test_a_measurement_that_was_never_a_number_ends_in_a_sentence(tmp_path):
    train = TrainConfig(save_best="loss", stop_when_no_better=2)
    run = SimpleNamespace(
        config=SimpleNamespace(train=train), best=loop.Best("loss"), position=loop.Position(4), run_dir=tmp_path
    )
    run.skipped_in_a_row = 1
    assert not loop.is_better(run, {"loss": 1.0}) and run.best == loop.Best("loss")
    run.skipped_in_a_row = 0
    assert not loop.is_better(run, {"loss": math.nan}) and loop.no_better(run) == ""
    assert not loop.is_better(run, {"loss": None}) and "has never been a number" in loop.no_better(run)
    assert loop.is_better(run, {"loss": 3.0}) and not loop.is_better(run, {"loss": 3.0})
    assert not loop.is_better(run, {"loss": 4.0})
    assert loop.no_better(run).endswith("than at step 4 with 3.0000")  # no word of a checkpoint that is not there


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"save_best": "accuracy"}, "train.save_best=accuracy is unknown: choose one of loss, point_precision"),
        ({"save_best": "point_f1"}, "is measured by train.generate_every, which is 0"),
        ({"save_best": "loss", "validation_batches": 0}, "is measured by train.validation_batches, which is 0"),
        ({"stop_when_no_better": 3}, "train.stop_when_no_better=3 needs train.save_best"),
        ({"stop_when_no_better": -1, "save_best": "loss"}, "train.stop_when_no_better=-1"),
    ],
)
def test_the_best_by_what_is_not_measured_is_refused(settings, sentence):
    with pytest.raises(ConfigError) as error:
        check_best(TrainConfig(**settings))
    assert sentence in str(error.value)
