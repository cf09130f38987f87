"""The way the tests start programs: a failure has to arrive, and nothing may be left running."""

import subprocess
import sys
from pathlib import Path

import pytest
from programs import python, run, run_ranks


@pytest.mark.parametrize(
    "code",
    [
        "import sys; print(sys.argv, __name__); print('to stderr', file=sys.stderr)",
        "raise SystemExit(3)",
        "import sys; sys.exit('a sentence')",
        "import os; os._exit(4)",
        "import os; os.kill(os.getpid(), 9)",
        "import atexit; atexit.register(print, 'at the end'); raise SystemExit",
        "import os; print(os.environ['GIVEN'], os.getcwd())",
        "import multiprocessing; print(multiprocessing.get_start_method())",
    ],
)
def test_it_is_what_a_new_process_gives(code):
    expected = run([sys.executable, "-c", code, "word"], GIVEN="x")
    found = python("-c", code, "word", GIVEN="x")
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
