"""Runs that are stopped, that fail, or that lose a rank: what is left behind, and what the user reads."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch.distributed as dist
from programs import REPOSITORY, python, run, succeeded

from molmo2_nemo.data.loader import WorkerDied
from molmo2_nemo.training.shutdown import describe, lost_contact

TINY = [
    "recipes/stage1_pretrain.py",
    "model=tiny",
    "data=sample",
    "schedule=quickstart",
    "optim=from_scratch",
    "train.log_every=1",
    "train.validation_batches=0",
    "train.global_batch_size=2",
    "train.micro_batch_size=1",
]


def ended(run_dir) -> dict:
    return json.loads((run_dir / "ended.json").read_text())


def checkpoints(run_dir) -> list[str]:
    return sorted(path.parent.name for path in (run_dir / "checkpoints").glob("step_*/complete.json"))


class Job:
    """Ranks in the background."""

    def __init__(self, run_dir, sample, *overrides, ranks=2):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
            *TINY,
            f"data.root={sample}",
            f"run_dir={run_dir}",
            "train.max_steps=100000",
            *overrides,
        ]
        self.log = run_dir.with_suffix(".txt")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, stdout=self.log.open("w"), stderr=subprocess.STDOUT
        )

    def wait_for(self, text: str) -> None:
        for _ in range(3000):
            if text in self.log.read_text():
                return
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.1)
        raise AssertionError(f"no {text!r} in {self.log.read_text()[-3000:]}")

    def children(self, parent: int) -> list[int]:
        listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True)
        return [int(line) for line in listing.stdout.split()]

    def ranks(self) -> list[int]:
        return self.children(self.process.pid)

    def end(self) -> tuple[int, str]:
        return self.process.wait(300), self.log.read_text()


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("signal_name, ranks, saves", [("SIGUSR1", 2, "true"), ("SIGTERM", 1, "false")])
def test_a_signal_to_one_rank_saves_and_ends_all(sample, tmp_path, signal_name, ranks, saves):
    job = Job(tmp_path / "run", sample, f"train.async_checkpoint={saves}", "train.save_every=2", ranks=ranks)
    job.wait_for("step 3/")
    os.kill(job.ranks()[-1], getattr(signal, signal_name))
    status, log = job.end()
    assert status == 0, log[-3000:]
    end = ended(tmp_path / "run")
    assert end["reason"] == signal_name and checkpoints(tmp_path / "run")[-1] == f"step_{end['step']:08d}"
    assert not list((tmp_path / "run" / "checkpoints").glob(".step*"))
    assert f"ended at step {end['step']} ({signal_name})" in log and "Traceback" not in log


@pytest.mark.slow
def test_the_time_limit_saves_and_ends_and_the_next_start_goes_on(sample, tmp_path):
    overrides = [
        f"data.root={sample}",
        f"run_dir={tmp_path}/run",
        "train.max_steps=100000",
        "train.stop_after_minutes=0.1",
    ]
    first = succeeded(python(*TINY, *overrides))
    end = ended(tmp_path / "run")
    assert end["reason"] == "time limit" and checkpoints(tmp_path / "run") == [f"step_{end['step']:08d}"]
    second = succeeded(python(*TINY, *overrides, f"train.max_steps={end['step'] + 2}", "train.stop_after_minutes=null"))
    assert f"resumed step {end['step']} from" in second.stdout
    assert ended(tmp_path / "run")["reason"] == "finished" and "time limit" in first.stdout


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run(sample, tmp_path):
    """A first step of absurd size makes every later loss infinite or not a number."""
    result = python(
        *TINY,
        f"data.root={sample}",
        f"run_dir={tmp_path}/run",
        "train.max_steps=50",
        "train.max_skipped_steps=3",
        "optim.llm.lr=1e30",
        "optim.llm.warmup_steps=0",
        "optim.decay=constant",
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-3000:]
    assert "skipped 3 in a row, 3 in all" in result.stdout
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("error: step 4: loss or gradient was not finite in 3 steps in a row")
    assert "captions" in message and not checkpoints(tmp_path / "run")
    assert ended(tmp_path / "run")["reason"] == "error"


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_alive(sample, tmp_path):
    """Files of more than 2 MiB cannot be written from step 4 on: then the tensors of a checkpoint do not fit."""
    run_dir = tmp_path / "run"
    common = [f"data.root={sample}", f"run_dir={run_dir}", "train.save_every=2"]
    succeeded(python(*TINY, *common, "train.max_steps=2"))
    assert checkpoints(run_dir) == ["step_00000002"]
    command = " ".join(map(str, [sys.executable, *TINY, *common, "train.max_steps=6"]))
    result = run(["bash", "-c", f"ulimit -f 2048; exec {command}"])
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-3000:]
    assert "step 4 was not saved: rank 0: " in result.stdout and "step 5/6" in result.stdout
    assert "error: step 6 could not be saved: rank 0: " in result.stderr
    assert checkpoints(run_dir) == ["step_00000002"] and not list((run_dir / "checkpoints").glob(".step*"))
    resumed = succeeded(python(*TINY, *common, "train.max_steps=4"))
    assert "resumed step 2 from" in resumed.stdout and checkpoints(run_dir)[-1] == "step_00000004"


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("victim", ["rank", "worker"])
def test_a_dead_rank_or_worker_ends_the_job_with_one_message(sample, tmp_path, victim):
    job = Job(tmp_path / "run", sample)
    job.wait_for("step 3/")
    rank = job.ranks()[1]
    killed = rank if victim == "rank" else job.children(rank)[0]
    os.kill(killed, signal.SIGKILL)
    status, log = job.end()
    # The launcher has a traceback of its own; none is ours.
    assert status != 0 and "molmo2_nemo/training/" not in log, log[-3000:]
    [line] = [line for line in log.splitlines() if line.startswith("error: rank ")]
    if victim == "worker":
        assert line.startswith("error: rank 1 on ") and "a loader worker died" in line
        assert ended(tmp_path / "run")["reason"] == "error"
    else:
        assert line.startswith("error: rank 0 on ") and "lost contact" in line


def test_what_errors_are_called():
    gone = "[/__w/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:2"
    for error in (RuntimeError(gone), dist.DistBackendError("NCCL communicator was aborted"), dist.DistStoreError("x")):
        assert lost_contact(error) and str(error) in describe(error)
    # Words alone do not make another rank's error of it.
    for error in (RuntimeError("timed out"), ValueError(gone), WorkerDied(7)):
        assert not lost_contact(error)
    assert "process 7" in describe(WorkerDied(7)) and "lower data.num_workers" in describe(WorkerDied(7))
    assert describe(RuntimeError("DataLoader worker")) == "RuntimeError: DataLoader worker"
    assert describe(ValueError("no")) == "ValueError: no" and describe(KeyboardInterrupt()) == "interrupted"


OUR_MISTAKE = """
import runpy, sys
from molmo2_nemo.training import run

def broken(**settings):
    raise ValueError("our own mistake")

run.train_loader = broken
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_error_of_ours_is_not_taken_for_the_users(sample, tmp_path):
    result = python("-c", OUR_MISTAKE, *TINY, f"data.root={sample}", f"run_dir={tmp_path}/run")
    assert result.returncode == 1 and "ValueError: our own mistake" in result.stderr.splitlines()[-1]
    assert ended(tmp_path / "run")["reason"] == "error"
    assert 'raise ValueError("our own mistake")' in (tmp_path / "run" / "errors" / "rank_0000.txt").read_text()
