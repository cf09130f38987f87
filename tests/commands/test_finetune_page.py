"""docs/finetune.md: from labels to a model that answers; and a run that goes on at another number of ranks."""

import json
import re
import shlex

import pytest
import yaml
from programs import REPOSITORY, python, run_ranks, succeeded

from molmo2_nemo import checkpoint_dir
from molmo2_nemo.data.shard_index import read_index

DOCUMENT = (REPOSITORY / "docs" / "finetune.md").read_text()


def records(run_dir, kind):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.mark.slow
def test_commands_of_the_document_and_a_longer_run_on_two_ranks(sample, tmp_path):
    """The sample world is that of other tests; the fixture `sample` runs the command that makes it."""
    [block] = re.findall(r"<!-- tested -->\n```\n(.*?)```", DOCUMENT, re.DOTALL)
    commands = block.strip().splitlines()
    assert commands[0] == "python tools/make_sample_data.py --out data/sample" and len(commands) == 7
    outputs, words = [], {}
    for command in commands[1:]:
        command = command.replace("data/sample", str(sample)).replace("runs/finetune", str(tmp_path))
        program, *arguments = shlex.split(command)
        assert program == "python"
        outputs.append(succeeded(python(*arguments)).stdout)
        words[arguments[-1].partition("=")[2]] = arguments
    prepared, trained, _, adapted, adapter, _ = outputs
    counts = {name: sum(shards.values()) for name, shards in read_index("own", tmp_path / "shards").items()}
    assert all(counts.values()) and sum(counts.values()) == 20
    assert f"data.shards={tmp_path / 'shards'} hardware=auto" in prepared
    assert "hardware=auto: no GPU is here; 1 rank(s) on the CPU, full fine-tuning" in trained
    said = rf"([\d.]+) epochs of {counts['train']} samples are (\d+) steps: .* expected time: not known here"
    epochs, steps = re.search(said, trained).groups()
    assert "| epoch 0." in trained and "lora" not in trained
    assert "weights beside the adapters" in adapted and "linear layers" in adapter

    # As many epochs as were asked for, up to how well the packing of so few samples is foreseen.
    run_dir = tmp_path / "mine"
    first = records(run_dir, "train")
    assert first[-1]["step"] == int(steps) and abs(first[-1]["epoch"] - float(epochs)) < 0.15 * float(epochs)

    # The same run on two ranks, half as long again: epochs are counted on, and the best of all is kept.
    longer = ["train.epochs=30", "train.micro_batch_size=2", "train.save_every=2.5 epochs", "train.keep_last=1"]
    longer.append("train.stop_when_no_better=1000")
    second = succeeded(run_ranks(2, *words[str(run_dir)], *longer)).stdout
    assert "resumed step" in second and "DP 2" in second
    after = [record for record in records(run_dir, "train") if record["step"] > int(steps)]
    assert abs(after[-1]["step"] / int(steps) - 1.5) < 0.1
    reached = [record["epoch"] for record in first + after]
    assert reached == sorted(reached) and after[0]["epoch"] - first[-1]["epoch"] < 3
    assert abs(reached[-1] / first[-1]["epoch"] - 1.5) < 0.15
    measured = {record["step"]: record["loss"] for record in records(run_dir, "validation")}
    best = min(measured, key=measured.get)
    kept = checkpoint_dir.best(run_dir / "checkpoints")
    assert checkpoint_dir.step_of(kept) == best and checkpoint_dir.is_complete(kept)
    newest = checkpoint_dir.find_checkpoints(run_dir / "checkpoints")[-1]
    marker = checkpoint_dir.read_marker(newest)
    assert marker["best"]["worse"] == sum(step > best for step in measured)
    config = yaml.safe_load((newest / "config.yaml").read_text())
    assert config["train"]["max_steps"] == after[-1]["step"] and isinstance(config["train"]["save_every"], int)
