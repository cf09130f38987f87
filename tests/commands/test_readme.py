"""Every command block of README.md that says so is run, in order, as it stands there."""

import re
import shlex
import sys

import pytest
from programs import REPOSITORY, run, succeeded

BLOCKS = re.findall(r"<!-- tested -->\n```\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)


def commands():
    return [line for block in BLOCKS for line in block.strip().splitlines()]


def as_installed(command: str) -> list[str]:
    """`python` and `torchrun` of the environment the tests run in."""
    program, *arguments = shlex.split(command)
    launcher = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"]}
    return [*launcher[program], *arguments]


@pytest.mark.slow
def test_commands_of_the_readme(tmp_path_factory):
    assert len(commands()) >= 12
    run(["rm", "-rf", "runs/readme"])
    for command in commands():
        result = succeeded(run(as_installed(command)))
        assert "Traceback" not in result.stderr, command
    run(["rm", "-rf", "runs/readme"])


def test_files_named_in_the_readme_exist():
    text = (REPOSITORY / "README.md").read_text()
    for name in re.findall(r"`((?:tools|recipes|conf|molmo2_nemo|slurm|docs)/[\w./]*\w)`", text):
        assert (REPOSITORY / name).exists(), name
