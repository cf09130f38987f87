"""Scores of evaluations in the model card."""

import json
import shutil
import sys

import pytest
from huggingface_hub import ModelCard
from programs import load
from sources import chat
from test_evaluate import asker, run, said  # noqa: F401

from molmo2_nemo.evaluate import card
from molmo2_nemo.hf import convert, model_card
from molmo2_nemo.prepare.webdataset import write_shards


@pytest.fixture
def shards(tmp_path):
    """Four questions of a text each."""
    folder = tmp_path / "mine"
    folder.mkdir()
    samples = [(f"t{n}", {"json": json.dumps(chat(f"Number {n}?", str(n))).encode()}) for n in range(4)]
    write_shards(folder, {"test": samples})
    return folder


@pytest.mark.slow
def test_the_scores_of_a_checkpoint_are_in_the_card_of_its_export(
    shards,
    export,
    said,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    convert.import_hf(export, tmp_path / "run" / "checkpoints" / "step_00000000", progress=str)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000000"
    monkeypatch.chdir(tmp_path)
    said |= {"Number 0?": "0", "Number 1?": "1"}
    command = ("--data", shards, "--device", "cpu", "--limit", 3)
    status, _, error = run(capsys, checkpoint, *command)
    assert status == 0, error
    status, _, error = run(capsys, export, *command, "--out", tmp_path / "runs/evaluate/other")
    assert status == 0, error  # of the same weights in another folder of files

    export_hf = load("tools/export_hf.py")
    monkeypatch.setattr(sys, "argv", ["export_hf.py", str(checkpoint), "released", "--tokenizer", str(export)])
    export_hf.main()
    assert "has 1 means of evaluations of exactly this model" in capsys.readouterr().out
    folder = tmp_path / "released"
    (result,) = ModelCard.load(folder / "README.md").data.eval_results
    assert (result.dataset_name, result.dataset_split, result.metric_type) == ("mine", "test", "exact_match")
    assert result.metric_value == pytest.approx(2 / 3, abs=1e-4) and result.metric_args["answers"] == 3
    assert result.metric_args["samples"] == "3 of 4" and result.metric_args["questions_without_an_answer"] == 0
    text = (folder / "README.md").read_text()
    assert "| mine | test | exact_match | 0.6667 |" in text
    assert text.index("## Scores") < text.index("## Evaluations") < text.index("## How to use it")

    # Of the export itself, on all samples: the mean takes the older one's place, and what people wrote stays.
    (folder / "README.md").write_text(text.replace("A vision-language model", "My words. A vision-language model"))
    status, shown, error = run(capsys, folder, *command[:-2], "--out", "again", "--card")
    assert status == 0 and "has 1 means" in shown, error
    (result,) = ModelCard.load(folder / "README.md").data.eval_results
    assert result.metric_value == 0.5 and result.metric_args["samples"] == "4 of 4"
    text = (folder / "README.md").read_text()
    assert "My words." in text and text.count("## Evaluations") == 1 and "0.6667" not in text
    # But a mean of fewer samples does not.
    status, shown, error = run(capsys, folder, *command, "--out", "fewer", "--card")
    assert status == 0 and "has 0 means of this evaluation; 1 of more samples stay" in shown, error
    assert (folder / "README.md").read_text() == text
    # Other weights, no card, and what is no evaluation.
    weights = next(folder.glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert card.evaluations_of(folder, [tmp_path / "again", shards]) == []
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match="is no model card"):
        card.add_to_card(folder, [])
    shutil.rmtree(folder)


def test_a_card_is_asked_for_where_there_can_be_one(shards, tmp_path, capsys):
    status, _, error = run(capsys, tmp_path, "--data", shards, "--card")
    assert status == 2 and "--card is for an export" in error
    status, _, error = run(capsys, "--compare", "a", "b", "--card")
    assert status == 2 and "leave out --compare" in error


def test_no_rate_of_what_was_frozen_is_in_the_card():
    settings = {f"optim.{name}.lr": 1e-3 for name in ("vit", "connector", "llm")} | {
        "lora.rank": 0,
        "lora.targets": ["x"],
    }
    freeze = {"optim.vit.freeze": True, "optim.connector.freeze": False, "optim.llm.freeze": True}
    told = model_card._told(settings | freeze)
    assert told == {"optim.connector.lr": 1e-3, "optim.vit.freeze": True, "optim.llm.freeze": True}
    assert model_card._told({"lora.rank": 8, "lora.targets": ["x"]}) == {"lora.rank": 8, "lora.targets": ["x"]}
