"""python scale_weights.py CHECKPOINT OUT FACTOR: a weights-only checkpoint with all weights multiplied, also by nan."""

import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from molmo2_nemo import checkpoint_dir
from molmo2_nemo.hf.convert import read_tensor, write_checkpoint

source, out, factor = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
with checkpoint_dir.nothing_executed(source):
    saved = dcp.FileSystemReader(source).read_metadata().state_dict_metadata
entries = {k: v for k, v in saved.items() if not k.startswith("optimizer.") and hasattr(v, "properties")}


def scaled(key):
    return lambda: read_tensor(source, key, tuple(entries[key].size), entries[key].properties.dtype) * factor


state = {key: torch.empty(e.size, dtype=e.properties.dtype, device="meta") for key, e in entries.items()}
make = {key: scaled(key) for key in entries}
write_checkpoint(out, checkpoint_dir.read_model(source), state, make, {"step": 0, "stage": "test"})
