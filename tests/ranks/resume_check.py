"""python resume_check.py CHECKPOINT key=value ...: what the optimizer is after it has been loaded from a checkpoint.

Prints one line of JSON: for each component the values of its parameter group, and by parameter whether its moments are
those of the checkpoint ("kept"), zero ("fresh"), or neither ("other"). One rank.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from molmo2_nemo import checkpoint_dir, parallel
from molmo2_nemo.command_line import compose
from molmo2_nemo.hf.convert import read_tensor
from molmo2_nemo.training import checkpoint
from molmo2_nemo.training.run import build

path, overrides = Path(sys.argv[1]), sys.argv[2:]
config = compose("stage2", overrides)
parallel.initialize(config.parallel, "cpu", 5, config.train.seed)
model, optimizer = build(config, "cpu", "fp32")
_, fresh = checkpoint.load(path, model, optimizer)
with checkpoint_dir.nothing_executed(path):
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
moments = {}


state = optimizer.sharded_state_dict(
    {f"model{n}": chunk.module.sharded_state_dict() for n, chunk in enumerate(model)},
    metadata={"distrib_optim_sharding_type": "fully_reshardable"},
)
for tensors in state["param_state"].values():
    both = [(moment, box) for moment in ("exp_avg", "exp_avg_sq") for box in tensors[moment].values()]
    for kind, tensor in both:
        name = tensor.key.removeprefix(f"optimizer.state.{kind}.")
        if tensor.key in saved:
            before = read_tensor(path, tensor.key, tuple(tensor.global_shape), tensor.dtype)
            place = tuple(slice(at, at + size) for at, size in zip(tensor.global_offset, tensor.local_shape))
            place = place if len(place) == before.dim() else ...
            found = "kept" if torch.equal(before[place].reshape(tensor.data.shape), tensor.data) else "other"
        else:
            found = "fresh" if not tensor.data.any() else "other"
        moments.setdefault(found, set()).add(name)
groups = {
    group["component"]: {key: group[key] for key in ("weight_decay", "betas", "eps")}
    for group in optimizer.param_groups
}
steps = {float(values["step"]) for part in optimizer.chained_optimizers for values in part.optimizer.state.values()}
found = {
    "groups": groups,
    "steps": sorted(steps),
    "fresh": fresh,
    "moments": {k: sorted(v) for k, v in moments.items()},
}
print(json.dumps(found))
