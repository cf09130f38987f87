"""Ways to run the project's commands as a user would."""

import json
import os
import subprocess
from pathlib import Path

import warm

REPOSITORY = Path(__file__).resolve().parents[1]


def with_defaults(environment: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}


def run(command: list, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    """Run a command in the repository and return its output; never raises on a failing one."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        timeout=timeout,
        env=with_defaults(environment),
    )


def python(*arguments, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    """As `python script.py ...` or `python -c code ...`, but warm."""
    return warm.start(arguments, [with_defaults(environment)], REPOSITORY, timeout)


def run_ranks(number: int, *arguments, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    """As torchrun would start them, but warm."""
    return warm.start(arguments, warm.environments(number, with_defaults(environment)), REPOSITORY, timeout)


def succeeded(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert result.returncode == 0, f"{result.args}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result


def figures(result: subprocess.CompletedProcess) -> dict:
    """The last JSON line that a program printed; it must have ended well."""
    return json.loads([line for line in succeeded(result).stdout.splitlines() if line.startswith("{")][-1])
