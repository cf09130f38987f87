"""Scores of evaluations in a model card: for the Hub as model-index at its head, for people as a table.

Only those of exactly these weights are taken: an evaluation keeps a hash of its model (records.model_identity). The
keys are huggingface_hub's EvalResult; interval, number of answers and what was left out are `metric_args`.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard

from molmo2_nemo.catalogue.datasets import load_catalogue
from molmo2_nemo.evaluate.public_sets import CATALOGUE
from molmo2_nemo.evaluate.records import SCORES, model_identity
from molmo2_nemo.files import write_atomically
from molmo2_nemo.hf.model_card import USAGE, hub_repository, plain

CARD = "README.md"
BEGIN, END = "<!-- scores of tools/evaluate.py -->", "<!-- end of the scores -->"
TASK = "image-text-to-text"


def evaluations_of(folder: Path, outs: Iterable[Path]) -> list[dict]:
    """The finished evaluations among `outs` (folders of tools/evaluate.py) of the model in `folder`."""
    identity, found = model_identity(folder), []
    for out in outs:
        try:
            scores = json.loads((out / SCORES).read_text())
            if scores["settings"]["model_hash"] == identity and scores["sets"]:
                found.append(scores)
        except (OSError, ValueError, KeyError, TypeError):  # not finished, or not an evaluation
            continue
    return found


def is_of_training(scores: dict) -> bool:
    """Whether an evaluation asked about what the model was trained with."""
    return any(one["split"] == "train" for one in scores["sets"])


def add_to_card(folder: Path, evaluations: Iterable[dict]) -> tuple[int, int]:
    """Put the scores into the card of the model in `folder`: how many means, and how many gave way to more samples.

    A mean of the same set, split and metric takes the place of an older one, but not of one of more samples; all other
    text stays as it is. ValueError, one sentence: the folder has no card that can be read.
    """
    file = folder / CARD
    try:
        card = ModelCard.load(file)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is no model card ({error}): export the model again, or write one") from error
    new = [result for scores in evaluations for result in results_of(scores)]
    kept = {_key(result): result for result in card.data.eval_results or []}
    for result in new:
        if _samples_of(result) >= _samples_of(kept.get(_key(result))):
            kept[_key(result)] = result
    added = sum(kept[_key(result)] is result for result in new)
    if added:
        card.data.model_name = card.data.model_name or folder.resolve().name
        card.data.eval_results = list(kept.values())
        text = card.text
        if BEGIN not in text:  # before how it is used, in a card of ours
            before, usage, after = text.rstrip().partition(USAGE)
            text = f"{before.rstrip()}\n\n{BEGIN}\n{END}\n" + (f"\n{usage}{after}\n" if usage else "")
        section = f"{BEGIN}\n{table_of(card.data.eval_results)}\n{END}"
        text = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: section, text, flags=re.DOTALL)
        write_atomically(file, f"---\n{card.data.to_yaml()}\n---\n{text}")
    return added, len(new) - added


def _key(result: EvalResult) -> tuple:
    return result.dataset_name, result.dataset_split, result.metric_type


def _samples_of(result: EvalResult | None) -> int:
    """How many samples a mean is of; 0 where that is not said."""
    said = str(((result and result.metric_args) or {}).get("samples", "")).partition(" ")[0]
    return int(said) if said.isdecimal() else 0


def results_of(scores: dict) -> list[EvalResult]:
    """Of a scores.json, a result for each set and metric; means over several sets are left out."""
    catalogue = {entry.name: entry for entry in load_catalogue(CATALOGUE).sets}
    sets, settings, results = {one["name"]: one for one in scores["sets"]}, scores["settings"], []
    for line in scores["scores"]:
        one = sets.get(line["source"]) or (next(iter(sets.values())) if len(sets) == 1 else None)
        if one is None:
            continue
        public = catalogue.get(one["name"]) if one["public"] else None
        results.append(
            EvalResult(
                task_type=TASK,
                dataset_type=hub_repository(public) or one["name"],
                dataset_name=one["name"],
                dataset_split=one["split"],
                metric_type=line["metric"],
                metric_value=round(line["mean"], 4),
                metric_args={
                    "low": round(line["low"], 4),
                    "high": round(line["high"], 4),
                    "interval": f"95 %, {line['method']}",
                    "answers": line["number"],
                    "samples": f"{settings['samples']} of {scores['samples']}",
                    "questions_without_an_answer": sum(scores["counts"]["errors"].values()),
                    "max_crops": settings["max_crops"],
                    "max_frames": settings["max_frames"],
                },
            )
        )
    return results


def table_of(results: Iterable[EvalResult]) -> str:
    """The results in Markdown."""
    rows = ["| set | split | metric | mean | 95 % interval | answers | samples |", "|---|---|---|---|---|---|---|"]
    for one in results:
        more = one.metric_args or {}
        between = f"{more['low']:.3f} to {more['high']:.3f}" if "low" in more else ""
        failed = more.get("questions_without_an_answer")
        without = f", {failed:,} questions of the evaluation without one" if failed else ""
        cells = (one.dataset_name, one.dataset_split or "", one.metric_type, one.metric_value)
        cells = " | ".join(plain(cell) for cell in cells)
        rows.append(f"| {cells} | {between} | {more.get('answers', '')}{without} | {more.get('samples', '')} |")
    how = "Greedy answers, scored by molmo2-nemo's tools/evaluate.py; its docs/evaluate.md has the metrics."
    return "\n".join(["## Evaluations", "", *rows, "", how])
