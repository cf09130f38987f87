"""Runs that are stopped, that fail, or that lose a rank: what is left behind, and what the user reads."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import warm
from programs import REPOSITORY, TINY_SETTINGS, python, run_ranks, start_ranks, succeeded, with_defaults

TINY = [
    "recipes/stage1_pretrain.py",
    *TINY_SETTINGS,
    "train.validation_batches=0",
    "train.global_batch_size=2",
    "train.micro_batch_size=1",
]


def ended(run_dir) -> dict:
    return json.loads((run_dir / "ended.json").read_text())


def checkpoints(run_dir) -> list[str]:
    return sorted(path.parent.name for path in (run_dir / "checkpoints").glob("step_*/complete.json"))


class Job:
    """Ranks in the background: warm, or as torchrun starts them."""

    def __init__(self, run_dir, sample, *overrides, ranks=2, torchrun=False):
        recipe = [*TINY, f"data.root={sample}", f"run_dir={run_dir}", "train.max_steps=100000", *overrides]
        self.log = run_dir.with_suffix(".txt")
        self.torchrun = torchrun
        if torchrun:
            python = str(warm.executable())  # of the launcher and of the ranks
            launcher = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            with self.log.open("w") as log:
                self.processes = [
                    subprocess.Popen(
                        [*launcher, *recipe],
                        cwd=REPOSITORY,
                        env=with_defaults({"PYTHON_EXEC": python}),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                ]
        else:
            self.processes = start_ranks(ranks, recipe, self.log)

    def wait_for(self, text: str) -> None:
        for _ in range(3000):
            if text in self.log.read_text():
                return
            assert all(process.poll() is None for process in self.processes), self.log.read_text()[-3000:]
            time.sleep(0.1)
        raise AssertionError(f"no {text!r} in {self.log.read_text()[-3000:]}")

    def children(self, parent: int) -> list[int]:
        listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True)
        return [int(line) for line in listing.stdout.split()]

    def ranks(self) -> list[int]:
        pids = [process.pid for process in self.processes]
        return [warm.pid_behind(pid) for pid in self.children(warm.pid_behind(pids[0]))] if self.torchrun else pids

    def end(self) -> tuple[list[int], str]:
        return [process.wait() for process in self.processes], self.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("signal_name, ranks, saves", [("SIGUSR1", 2, "true"), ("SIGTERM", 1, "false")])
def test_a_signal_to_one_rank_saves_and_ends_all(sample, tmp_path, signal_name, ranks, saves):
    job = Job(tmp_path / "run", sample, f"train.async_checkpoint={saves}", "train.save_every=2", ranks=ranks)
    job.wait_for("step 3/")
    os.kill(job.ranks()[-1], getattr(signal, signal_name))
    statuses, log = job.end()
    assert statuses == [0] * ranks, log[-3000:]
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


@pytest.fixture(scope="session")
def two_steps(sample, made_once):
    """A run of two steps with a checkpoint of the second."""

    def make(folder):
        overrides = [f"data.root={sample}", f"run_dir={folder}/run", "train.save_every=2", "train.max_steps=2"]
        succeeded(python(*TINY, *overrides))
        assert checkpoints(folder / "run") == ["step_00000002"]

    return made_once("two_steps", make) / "run"


# Files of more than 2 MiB cannot be written: then the tensors of a checkpoint do not fit.
ON_A_FULL_DISK = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, 2**21))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous, reached", [("false", "step 5/6"), ("true", "step 6/6")])
def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_alive(asynchronous, reached, two_steps, sample, tmp_path):
    """The save of step 4 fails, training goes on, and the end is an error; with room again the next start goes on."""
    run_dir = tmp_path / "run"
    shutil.copytree(two_steps, run_dir)
    common = [
        f"data.root={sample}",
        f"run_dir={run_dir}",
        "train.save_every=2",
        f"train.async_checkpoint={asynchronous}",
    ]
    result = python("-c", ON_A_FULL_DISK, *TINY, *common, "train.max_steps=6")
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-3000:]
    assert "step 4 was not saved: rank 0: " in result.stdout and reached in result.stdout
    assert "error: step 6 could not be saved: rank 0: " in result.stderr
    assert checkpoints(run_dir) == ["step_00000002"] and not list((run_dir / "checkpoints").glob(".step*"))
    assert ended(run_dir)["reason"] == "error"
    if asynchronous == "false":
        resumed = succeeded(python(*TINY, *common, "train.max_steps=4"))
        assert "resumed step 2 from" in resumed.stdout and checkpoints(run_dir)[-1] == "step_00000004"


# From step 3 on, the run's folder is mounted read-only, for this process and its children alone.
BECOMES_READ_ONLY = """
import os, runpy, subprocess, sys, threading, time
os.unshare(os.CLONE_NEWNS)
folder = sys.argv[1]

def mount_read_only():
    while not os.path.exists(f"{folder}/metrics.jsonl") or '"step": 3' not in open(f"{folder}/metrics.jsonl").read():
        time.sleep(0.05)
    subprocess.run(["mount", "--bind", "--make-private", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)

threading.Thread(target=mount_read_only, daemon=True).start()
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_folder_that_becomes_read_only_ends_the_run_with_an_error(sample, tmp_path):
    """Checkpoints of before are kept, training goes on, and the end says that its last step is not saved."""
    run_dir = tmp_path / "run"
    common = [f"data.root={sample}", f"run_dir={run_dir}", "train.save_every=2", "train.log_every=1"]
    result = python("-c", BECOMES_READ_ONLY, run_dir, *TINY, *common, "train.max_steps=10")
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-3000:]
    assert "Read-only file system" in result.stderr and "step 10/10" in result.stdout
    assert result.stderr.strip().splitlines()[-1].startswith("error: step 10 could not be saved: ")
    resumed = succeeded(python(*TINY, *common, "train.max_steps=11"))
    assert "resumed step " in resumed.stdout and checkpoints(run_dir)[-1] == "step_00000011"


# The folder is empty for rank 1, as on a node where the shared file system is not mounted.
EMPTY_FOR_RANK_1 = """
import os, runpy, subprocess, sys
if os.environ["RANK"] == "1":
    os.unshare(os.CLONE_NEWNS)
    subprocess.run(["mount", "--make-private", "-t", "tmpfs", "none", sys.argv[1]], check=True)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_rank_that_does_not_see_the_checkpoints_is_named(two_steps, sample, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(two_steps, run_dir)
    common = [f"data.root={sample}", f"run_dir={run_dir}", "train.save_every=2", "train.max_steps=4"]
    result = run_ranks(2, "-c", EMPTY_FOR_RANK_1, run_dir / "checkpoints", *TINY, *common)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-3000:]
    there = run_dir / "checkpoints" / "step_00000002"
    assert f"error: {there} is there for rank 0, but not for rank 1 on {socket.gethostname()}: " in result.stderr
    # Two more steps were asked for, so that the run is not what it was before, finished.
    assert ended(run_dir)["reason"] == "config error"
    assert "run_dir must be on a file system that all nodes share" in ended(run_dir)["message"]
    assert checkpoints(run_dir) == ["step_00000002"]


@pytest.mark.slow
def test_what_only_another_rank_finds_wrong_is_said_once(sample, tmp_path):
    """Each node has a copy of the data of its own; rank 1's lacks a source."""
    run_dir, source = tmp_path / "run", sample / "captions"
    result = run_ranks(2, "-c", EMPTY_FOR_RANK_1, source, *TINY, f"data.root={sample}", f"run_dir={run_dir}")
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-3000:]
    assert line.startswith(f"error: rank 1 on {socket.gethostname()}: ") and str(source) in line
    wrong = run_ranks(2, *TINY, f"data.root={tmp_path}", f"run_dir={run_dir}")  # on both
    [line] = [line for line in wrong.stderr.splitlines() if line.startswith("error: ")]
    assert wrong.returncode == 2 and not line.startswith("error: rank ")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank", "worker"])
def test_a_dead_rank_or_worker_ends_the_job_with_one_message(sample, tmp_path, victim):
    job = Job(tmp_path / "run", sample, torchrun=True)
    job.wait_for("step 3/")
    rank = job.ranks()[1]
    workers = job.children(rank)
    killed = rank if victim == "rank" else workers[0]
    os.kill(killed, signal.SIGKILL)
    [status], log = job.end()
    # The launcher has a traceback of its own; none is ours.
    assert status != 0 and "molmo2_nemo/training/" not in log, log[-3000:]
    [line] = [line for line in log.splitlines() if line.startswith("error: rank ")]
    if victim == "worker":
        assert line.startswith("error: rank 1 on ") and "a loader worker died" in line
        assert ended(tmp_path / "run")["reason"] == "error"
    else:
        assert line.startswith("error: rank 0 on ") and "lost contact" in line
        assert "ended already: rank 1 on " in line
        assert "lost contact" in ended(tmp_path / "run")["message"]
    # Nobody outlives the job, also not the workers of a rank that was killed.
    assert workers and not [pid for pid in workers if is_alive(pid)]


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_when_the_time_is_over(sample, tmp_path):
    """In the middle of a step's sums, which go over Megatron's groups."""
    job = Job(tmp_path / "run", sample, "parallel=tp2", "train.timeout_minutes=0.25", ranks=2)
    job.wait_for("step 3/")
    os.kill(job.ranks()[1], signal.SIGSTOP)
    try:
        assert job.processes[0].wait() == 1
    finally:
        os.kill(job.ranks()[1], signal.SIGKILL)
    _, log = job.end()
    [line] = [line for line in log.splitlines() if line.startswith("error: rank ")]
    assert line.startswith("error: rank 0 on ") and "no sign of life from rank 1 on " in line
    assert "no sign of life from rank 1 on " in ended(tmp_path / "run")["message"]


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
    traceback = (tmp_path / "run" / "errors" / "rank_0000.txt").read_text()
    assert traceback.endswith(", in broken\nValueError: our own mistake\n")
