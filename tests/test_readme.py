"""Every command block of README.md that says so is run, in order, as it stands there."""

import re
import shlex
import sys

import pytest
from conftest import REPOSITORY, run, succeeded

BLOCKS = re.findall(r"<!-- tested -->\n```\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)


def commands():
    return [line for block in BLOCKS for line in block.strip().splitlines()]


def as_installed(command: str) -> list[str]:
    """`python` and `torchrun` of the environment the tests run in."""
    program, *arguments = shlex.split(command)
    launcher = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"]}
    return [*launcher[program], *arguments]


@pytest.mark.slow
@pytest.mark.ranks
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


@pytest.mark.slow
@pytest.mark.ranks
def test_quickstart_from_sample_data_to_answers(tmp_path):
    """The quickstart itself, shortened: the same stages, export, questions and report; again, it keeps the stages."""
    command = ["tools/quickstart.sh", "train.max_steps=12", "train.validation_batches=1", "train.generate_max_tokens=4"]
    result = succeeded(run(command, timeout=1200, QUICKSTART_RUNS=str(tmp_path / "runs")))
    rows = re.findall(r"^(stage\d) .*? +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d,]+) +(\d+)$", result.stdout, re.M)
    assert [row[0] for row in rows] == ["stage1", "stage2", "stage3"]
    first, last = float(rows[0][2]), float(rows[2][3])
    # Twelve steps a stage: each goes on where the one before stopped.
    assert last < 0.6 * first
    assert "held-out questions answered right" in result.stdout
    assert (tmp_path / "runs" / "loss.png").stat().st_size > 10_000
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "runs" / "hf" / name).exists()
