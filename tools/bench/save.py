"""Host memory and time of saving a checkpoint whose optimizer state is sharded over data-parallel ranks.

    torchrun --standalone --nproc-per-node 2 tools/bench/save.py [--layers 12] [--rounds 2] [--folder DIR] [--out FILE]

Two ways in which Megatron gathers the optimizer's shards for a save that any layout can read: on every data-parallel
rank, or on the first one alone (its `distrib_optim_fully_reshardable_mem_efficient`). On a CPU
with gloo; the model has about 100 million parameters. Prints for each way and rank by how much its resident memory grew
at most, and how long training waits and the whole save takes, and compares what was written, tensor by tensor. Exit
status 1 if the two checkpoints differ. Needs 3 GB of disk.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tables import parser, print_json, print_table
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from molmo2_nemo import gpu, parallel
from molmo2_nemo.command_line import compose
from molmo2_nemo.training import checkpoint
from molmo2_nemo.training.optimizer import build_optimizer, clip_and_step, set_learning_rates
from molmo2_nemo.training.step import build_model

KEY = "distrib_optim_fully_reshardable_mem_efficient"
SIZES = ["model.hidden_size=768", "model.num_attention_heads=12", "model.num_query_groups=4", "model.head_dim=64"]


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS, now, or VmHWM, the most since `forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def save(folder: Path, model, optimizer, on_first_alone: bool) -> dict:
    """Figures of one save on this rank."""
    checkpoint.METADATA[KEY] = on_first_alone
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    saver = checkpoint.Saver(folder, keep_last=1, asynchronous=True)
    dist.barrier()
    forget_peak()
    before, started = status("VmRSS"), time.monotonic()
    saver.begin(1, model, optimizer, None, {"stage": "bench"}, "")
    waits = time.monotonic() - started
    saved = saver.finish()
    assert saved.failure is None, saved.failure
    return dict(grew_gb=(status("VmHWM") - before) / 1e9, waits=waits, seconds=saved.seconds)


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    reader = FileSystemReader(path)
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    load(found, storage_reader=reader, no_dist=True)
    return found


def differing(first: Path, second: Path) -> list[str]:
    """Names of the tensors that differ by a bit, or that one of the checkpoints lacks."""
    a, b = tensors_of(first), tensors_of(second)
    return sorted(a.keys() ^ b.keys()) + [name for name in a if name in b and not torch.equal(a[name], b[name])]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=12, help="of the decoder, 8.7 million parameters each")
    arguments.add_argument("--rounds", type=int, default=2, help="saves each way")
    arguments.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    args = arguments.parse_args()
    words = ["model=tiny", "data=sample", "optim=from_scratch", "train.global_batch_size=64"]
    config = compose("stage1", [*words, *SIZES, "model.ffn_hidden_size=3072", f"model.num_layers={args.layers}"])
    parallel.initialize(config.parallel, "cpu", 10, 0)
    model = build_model(config.model, config.parallel, "cpu", "fp32", ddp=gpu.ddp_settings(config, "cpu"))
    optimizer = build_optimizer(config, model, "fp32")
    set_learning_rates(optimizer, config, 1)
    for chunk in model:
        for buffer in chunk.buffers:
            buffer.grad_data.normal_(generator=torch.Generator().manual_seed(0))
    clip_and_step(optimizer, 1.0)
    parameters = sum(p.numel() for chunk in model for p in chunk.parameters())
    home = [tempfile.mkdtemp(dir=args.folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(home)
    rows, wrong = [], []
    for number in range(args.rounds):
        for alone in (False, True):
            name = "first rank" if alone else "every rank"
            own = save(Path(home[0]) / name.replace(" ", "_"), model, optimizer, alone)
            everybodys = [None] * dist.get_world_size()
            dist.all_gather_object(everybodys, own)
            rows += [dict(gathered_on=name, round=number + 1, rank=r, **one) for r, one in enumerate(everybodys)]
    if dist.get_rank() == 0:
        both = [next((Path(home[0]) / name).glob("step_*")) for name in ("every_rank", "first_rank")]
        wrong = differing(*both)
        print(f"{parameters:,} parameters, {12 * parameters / 1e9:.2f} GB of optimizer state in float32")
        print_table(rows)
        print(f"tensors that differ: {', '.join(wrong) or 'none'}")
        print_json({"parameters": parameters, "differing": len(wrong), "rows": rows}, args.out)
        shutil.rmtree(home[0])
    dist.barrier()
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
