"""The quickstart of README.md; a file of its own, so that it runs beside README's other commands."""

import re
import sys

import pytest
from programs import run, succeeded


@pytest.mark.slow
def test_quickstart_from_sample_data_to_answers(sample, tmp_path):
    """The quickstart itself, shortened: the same stages, export, questions and report. Fewer samples, fewer steps."""
    command = [
        "tools/quickstart.sh",
        "train.max_steps=12",
        "train.log_every=4",
        "train.validation_batches=1",
        "train.generate_max_tokens=4",
    ]
    own = {"RUNS": tmp_path / "runs", "DATA": sample, "SCALE": 0.01, "PYTHON": sys.executable}
    result = succeeded(run(command, **{f"QUICKSTART_{key}": str(value) for key, value in own.items()}))
    rows = re.findall(r"^(stage\d) .*? +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d,]+) +(\d+)$", result.stdout, re.M)
    assert [row[0] for row in rows] == ["stage1", "stage2", "stage3"]
    first, last = float(rows[0][2]), float(rows[2][3])
    # Twelve steps a stage: each goes on where the one before stopped.
    assert last < 0.8 * first
    assert "held-out questions answered right" in result.stdout
    # What the end names is there.
    for name in ("report.html", "loss.png", "stage2/samples/", "answers.jsonl", "hf", "stage1"):
        assert re.search(rf" {re.escape(f'{tmp_path}/runs/{name}')}(,| |$)", result.stdout, re.M), name
        assert (tmp_path / "runs" / name).exists(), name
    assert f"tools/ask.py {tmp_path / 'runs' / 'hf'} --image {sample}/quiz/image0.png" in result.stdout
    assert (tmp_path / "runs" / "loss.png").stat().st_size > 10_000
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "runs" / "hf" / name).exists()
    # What the quickstart forks from a process that has imported everything works from nothing, too.
    again = tmp_path / "again"
    succeeded(run([sys.executable, "tools/export_hf.py", tmp_path / "runs" / "stage3", again]))
    command = [sys.executable, "tools/ask.py", again, "--image", sample / "quiz" / "image0.png", "What colour is it?"]
    succeeded(run([*command, "--max-new-tokens", "2"]))


@pytest.mark.slow
def test_an_error_of_a_stage_is_shown_kept_and_ends_the_quickstart(sample, tmp_path):
    own = {"RUNS": tmp_path / "runs", "DATA": sample, "SCALE": 0.01, "PYTHON": sys.executable}
    environment = {f"QUICKSTART_{key}": str(value) for key, value in own.items()}
    result = run(["tools/quickstart.sh", "optim.vit.lrr=3"], **environment)
    said = "error: optim.vit.lrr=3: optim.vit has no key lrr; did you mean optim.vit.lr."
    assert result.returncode == 1 and said in result.stderr and "Traceback" not in result.stderr
    assert (tmp_path / "runs" / "stage1.err").read_text().strip() == said
    assert f"stage 1 failed. Its error is above and in {tmp_path}/runs/stage1.err" in result.stderr
