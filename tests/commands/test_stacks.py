"""A rank that hangs says where: on SIGUSR2 and by itself before a collective would time out."""

import signal
import subprocess
import time

import pytest
import warm
from programs import REPOSITORY, python, succeeded, with_defaults

HANGS = """
import sys, threading, time
from pathlib import Path
from molmo2_nemo.training.shutdown import StackDump

def wait_for_ever_in_c():
    lock = threading.Lock()
    lock.acquire()
    print("ready", flush=True)
    lock.acquire()

stacks = StackDump(Path(sys.argv[1]), float(sys.argv[2]), ["SIGTERM"])
stacks.at(7, "validation")
stacks.at(8, "checkpoint")
wait_for_ever_in_c()
"""


@pytest.mark.parametrize("timeout_minutes", [20, 0.005])
def test_a_hanging_rank_writes_its_stacks(tmp_path, timeout_minutes):
    process = subprocess.Popen(
        [warm.executable(), "-c", HANGS, str(tmp_path), str(timeout_minutes)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        env=with_defaults({"RANK": "3"}),
    )
    try:
        assert process.stdout.readline() == "ready\n"
        path = tmp_path / "errors" / "stacks_rank0003.txt"
        if timeout_minutes == 20:
            assert len(path.read_text()) == 200
            process.send_signal(signal.SIGUSR2)
        while "wait_for_ever_in_c" not in path.read_text():
            time.sleep(0.05)  # the test's own time limit ends this
        assert process.poll() is None, "it goes on"
        first, *rest = path.read_text().splitlines()
        assert first.startswith("rank 3 on ") and ": step 8, checkpoint since " in first
        assert any("most recent call first" in line for line in rest)
    finally:
        process.kill()
        process.communicate()


def test_nothing_is_left_of_a_run_without_trouble(tmp_path):
    code = HANGS.replace("\nwait_for_ever_in_c()", "\nstacks.close()")
    succeeded(python("-c", code, tmp_path, 20))
    assert not list((tmp_path / "errors").iterdir())
