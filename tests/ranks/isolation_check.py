"""Run by test_isolation.py in a process of its own: change one token or pixel, see whose logits move."""

import sys
import tempfile
from pathlib import Path

import torch

from molmo2_nemo import checkpoint_dir, parallel
from molmo2_nemo.config.schema import ParallelConfig
from molmo2_nemo.hf import convert
from molmo2_nemo.paths import REPOSITORY
from molmo2_nemo.training.step import MODEL_INPUTS, build_model, load_weights

sys.path.insert(0, str(REPOSITORY / "tools" / "check"))
import parity


def main(folder: Path) -> None:
    parallel.initialize(ParallelConfig(), "cpu", timeout_minutes=5, seed=0)
    checkpoint = Path(tempfile.mkdtemp()) / "step_00000000"
    convert.import_hf(folder, checkpoint, progress=lambda line: None)
    config = checkpoint_dir.read_model(checkpoint)
    model = build_model(config, ParallelConfig(), "cpu", "fp32")
    load_weights(model, checkpoint)
    documents = parity.random_documents(config, seed=0)
    (batch,), places = parity.pack(documents, 1, config, 0, 1)

    owner = torch.full((batch["input_ids"].shape[1],), -1)
    for number, (_, _, spans) in enumerate(places):
        for span in spans:
            owner[span] = number

    def logits(batch):
        with torch.no_grad():
            # What padding positions compute is nobody's business.
            return model[0](**{name: batch[name] for name in MODEL_INPUTS})[0] * (owner >= 0).unsqueeze(-1)

    base = logits(batch)
    for number, (_, document, (root, *branches)) in enumerate(places):
        # A token of the first branch: nothing but the rest of that branch may move.
        changed = dict(batch, input_ids=batch["input_ids"].clone())
        at = branches[0].start + 1
        changed["input_ids"][0, at] = (changed["input_ids"][0, at] + 1) % 100
        moved = (logits(changed) != base).any(-1)
        allowed = torch.zeros_like(moved)
        allowed[at : branches[0].stop] = True
        assert moved[at : branches[0].stop].all(), f"document {number} does not see its own token"
        assert not (moved & ~allowed).any(), (
            f"document {number}, branch token: {(moved & ~allowed).nonzero().flatten().tolist()}"
        )
        if document.crops:
            # A pixel: the document's own tokens move, its neighbours' do not.
            before = sum(c.shape[0] for _, d, _ in places[:number] for c in d.crops)
            changed = dict(batch, crops=batch["crops"].clone())
            changed["crops"][before] ^= 255
            moved = (logits(changed) != base).any(-1)
            assert moved[branches[-1].stop - 1], f"document {number} does not see its picture"
            assert not (moved & (owner != number)).any(), f"document {number}, pixel"
            # Vision tokens see later ones: the first visual token of a document feels its last crop.
            last = before + sum(c.shape[0] for c in document.crops) - 1
            changed = dict(batch, crops=batch["crops"].clone())
            changed["crops"][last] ^= 255
            first = root.start + document.root_vision.index(1)
            assert (logits(changed)[first] != base[first]).any(), f"document {number} is causal"
    print("isolated")


main(Path(sys.argv[1]))
