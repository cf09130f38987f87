"""Run by test_isolation.py in a process of its own: change one token or pixel, see whose logits move.

    python isolation_check.py HF_DIR

Prints one JSON line: for each document of a packed row, how many positions moved of those that must and of those that
must not.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

from molmo2_nemo import checkpoint_dir, parallel
from molmo2_nemo.config.schema import ParallelConfig
from molmo2_nemo.hf import convert
from molmo2_nemo.random_batches import pack, random_documents
from molmo2_nemo.training.batches import own_part
from molmo2_nemo.training.step import MODEL_INPUTS, build_model, load_weights


def main(folder: Path) -> None:
    parallel.initialize(ParallelConfig(), "cpu", timeout_minutes=5, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / checkpoint_dir.step_name(0)
        convert.import_hf(folder, checkpoint, progress=lambda line: None)
        config = checkpoint_dir.read_model(checkpoint)
        model = build_model(config, ParallelConfig(), "cpu", "fp32")
        load_weights(model, checkpoint)
    documents = random_documents(config, seed=0)
    (batch,), places = pack(documents, 1, config, 0, 1)
    batch = own_part(batch, config)

    owner = torch.full((batch["input_ids"].shape[1],), -1)
    for number, (_, _, spans) in enumerate(places):
        for span in spans:
            owner[span] = number

    def logits(batch):
        with torch.no_grad():
            # What padding positions compute is of no account.
            return model[0](**{name: batch[name] for name in MODEL_INPUTS})[0] * (owner >= 0).unsqueeze(-1)

    base = logits(batch)

    def moved(field: str, at, change) -> torch.Tensor:
        """Positions whose logits differ, bool [S], when change(value) takes the place of one value of the batch."""
        values = batch[field].clone()
        values[at] = change(values[at])
        return (logits(dict(batch, **{field: values})) != base).any(-1)

    found = []
    for number, (_, document, (root, *branches)) in enumerate(places):
        # A token of the first branch: nothing but the rest of that branch may move.
        at = branches[0].start + 1
        rest = slice(at, branches[0].stop)
        by_token = moved("input_ids", (0, at), lambda token: (token + 1) % 100)
        figures = {
            "rest_of_the_branch": rest.stop - rest.start,
            "rest_moved_by_a_token": int(by_token[rest].sum()),
            "others_moved_by_a_token": int(by_token.sum() - by_token[rest].sum()),
        }
        if document.crops:
            # A crop: the document's own tokens move, its neighbours' do not.
            first = sum(len(crops) for _, other, _ in places[:number] for crops in other.crops)
            by_crop = moved("crops", first, lambda crop: crop ^ 255)
            # Vision tokens see later ones: the first visual token of a document feels its last crop.
            last = first + sum(len(crops) for crops in document.crops) - 1
            by_last_crop = moved("crops", last, lambda crop: crop ^ 255)
            figures |= {
                "last_token_moved_by_a_crop": bool(by_crop[branches[-1].stop - 1]),
                "neighbours_moved_by_a_crop": int((by_crop & (owner != number)).sum()),
                "first_visual_token_moved_by_the_last_crop": bool(
                    by_last_crop[root.start + document.root_vision.index(1)]
                ),
            }
        found.append(figures)
    print(json.dumps({"documents": found}))


main(Path(sys.argv[1]))
