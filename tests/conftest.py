"""Fixtures shared by tests: a way to run the project's commands as a user would, and small random models."""

import os
import subprocess
from pathlib import Path

import pytest
import warm

REPOSITORY = Path(__file__).resolve().parents[1]


def with_defaults(environment: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}


def run(command: list, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    """Run a command in the repository and return its output; never raises on a failing one."""
    return subprocess.run(
        [str(part) for part in command], cwd=REPOSITORY, text=True, capture_output=True, timeout=timeout,
        env=with_defaults(environment),
    )  # fmt: skip


def python(*arguments, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    """As `python script.py ...` or `python -c code ...`, but warm."""
    return warm.start(arguments, [with_defaults(environment)], REPOSITORY, timeout)


def run_ranks(number: int, *arguments, timeout: float = 600, **environment) -> subprocess.CompletedProcess:
    """As torchrun would start them, but warm."""
    return warm.start(arguments, warm.environments(number, with_defaults(environment)), REPOSITORY, timeout)


def succeeded(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert result.returncode == 0, f"{result.args}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result


@pytest.fixture(scope="session")
def hf_models(tmp_path_factory) -> dict[str, Path]:
    """Name -> folder of a random Molmo2 saved by transformers."""
    import hf_models

    folder = tmp_path_factory.mktemp("hf")
    return {name: hf_models.save(name, folder) for name in hf_models.configs()}


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """The sample world, a tenth of it. Tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("data") / "sample"
    succeeded(python("tools/make_sample_data.py", "--out", folder, "--scale", 0.1))
    return folder
