"""The way the tests start programs: a failure has to arrive, and nothing may be left running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from programs import python, run, run_ranks, with_defaults


@pytest.mark.parametrize("start", ["function", "stand-in"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "import sys; print(sys.argv, sys.path[0], __name__); print('to stderr', file=sys.stderr)", "word"],
        ["-c", "raise SystemExit(3)"],
        ["-c", "import sys; sys.exit('a sentence')"],
        ["-c", "import os; os._exit(4)"],
        ["-c", "import os; os.kill(os.getpid(), 9)"],
        ["-c", "import os; os.kill(os.getpid(), 10)"],
        ["-c", "import atexit; atexit.register(print, 'at the end'); raise SystemExit"],
        ["-c", "import os; print(os.environ['GIVEN'], os.getcwd())"],
        ["-c", "import multiprocessing; print(multiprocessing.get_start_method())"],
        ["-m", "this"],
        ["-u", "tests/commands/none.py"],
    ],
)
def test_it_is_what_a_new_process_gives(arguments, start):
    expected = run([sys.executable, *arguments], GIVEN="x")
    found = python(*arguments, GIVEN="x") if start == "function" else run([warm.executable(), *arguments], GIVEN="x")
    if "none.py" in arguments[-1]:  # not the same words
        assert found.returncode and "No such file" in found.stderr and "No such file" in expected.stderr
    else:
        assert (found.returncode, found.stdout, found.stderr) == (expected.returncode, expected.stdout, expected.stderr)


def test_an_exception_is_shown():
    result = python("-c", "1 / 0")
    assert result.returncode == 1 and "ZeroDivisionError" in result.stderr


def test_a_rank_that_fails_ends_the_others():
    code = "import os, time; time.sleep(300 * (os.environ['RANK'] == '0')); raise SystemExit(7)"
    assert run_ranks(2, "-c", code, timeout=100).returncode == 7


def test_after_a_timeout_nothing_runs_on(tmp_path):
    code = f"import os, time; open('{tmp_path}/pid', 'w').write(str(os.getpid())); time.sleep(300)"
    with pytest.raises(subprocess.TimeoutExpired):
        python("-c", code, timeout=3)
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


WAITS = """
import os, signal, time
signal.signal(signal.SIGUSR1, lambda *_: print("got it", flush=True))
print(os.getpid(), flush=True)
while True:
    time.sleep(1)
"""


def stand_in_that_waits() -> tuple[subprocess.Popen, int]:
    """The stand-in, and the id of the process that it stands for."""
    command = [warm.executable(), "-c", WAITS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=with_defaults({}))
    return process, int(process.stdout.readline())


def test_the_stand_in_passes_signals_on():
    process, pid = stand_in_that_waits()
    assert process.pid != pid
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "got it\n"
    process.terminate()
    assert process.wait(60) == -signal.SIGTERM and not Path(f"/proc/{pid}").exists()
    process.stdout.close()


def test_with_the_stand_in_its_program_is_killed():
    process, pid = stand_in_that_waits()
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
    process.stdout.close()


def test_what_is_ignored_stays_ignored():
    """As slurm/rank.sh has it until the trainer listens."""
    code = "import signal; print(signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN)"
    shell = f"trap '' USR1; exec {warm.executable()} -c '{code}'"
    assert run(["bash", "-c", shell]).stdout == "True\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="a host name of its own needs root")
def test_it_has_the_host_name_of_who_asks():
    code = "import socket; print(socket.gethostname())"
    shell = f"hostname node7; exec {warm.executable()} -c '{code}'"
    result = run(["unshare", "--uts", "--mount", "bash", "-c", shell])
    if "unshare" in result.stderr:
        pytest.skip(result.stderr.strip())
    assert result.stdout == "node7\n", result.stderr
