"""Host memory and time of saving and loading a checkpoint whose optimizer state is sharded over data-parallel ranks.

    torchrun --standalone --nproc-per-node 2 tools/bench/save.py [--layers 12] [--rounds 1] [--folder DIR] [--out FILE]

Three ways: this project's, in which each rank writes and reads its own shards; and Megatron's two, which gather the
shards on every rank, or on the first alone (`distrib_optim_fully_reshardable_mem_efficient`). On a CPU with gloo; the
model has about 100 million parameters in bf16. Prints for each way and rank by how much its resident memory grew at
most while it saved and while it loaded, how long training waited for the save, and how long all of it took. Then
compares what was written, tensor by tensor, and what each way loads from each other's checkpoint. Exit status 1 if
anything differs. Needs 5 GB of disk.
"""

import gc
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

from molmo2_nemo import compat, gpu, parallel
from molmo2_nemo.command_line import compose
from molmo2_nemo.training import checkpoint
from molmo2_nemo.training.optimizer import build_optimizer, clip_and_step, set_learning_rates
from molmo2_nemo.training.optimizer_shards import save_shards
from molmo2_nemo.training.step import build_model

KEY = "distrib_optim_fully_reshardable_mem_efficient"
WAYS = ("own shards", "every rank", "first rank")
SIZES = ["model.hidden_size=768", "model.num_attention_heads=12", "model.num_query_groups=4", "model.head_dim=64"]


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS, now, or VmHWM, the most since `forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def use(way: str, optimizer) -> None:
    """Let the optimizer's state be saved and loaded in one of WAYS."""
    checkpoint.METADATA[KEY] = way == "first rank"
    for part in optimizer.chained_optimizers:
        for name in ("sharded_param_state_fully_reshardable", "load_parameter_state_from_fully_reshardable"):
            vars(part).pop(name, None)
        if way == "own shards":
            save_shards(part)


def grown(action) -> dict:
    """Seconds that `action` took, and bytes by which this rank's memory grew at most."""
    gc.collect()
    dist.barrier()
    forget_peak()
    before, started = status("VmRSS"), time.monotonic()
    result = action()
    return dict(gb=(status("VmHWM") - before) / 1e9, seconds=time.monotonic() - started, result=result)


def save(folder: Path, model, optimizer, asynchronous: bool) -> dict:
    """Figures of one save on this rank."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    saver = checkpoint.Saver(folder, keep_last=1, asynchronous=asynchronous)
    waits = []

    def action():
        started = time.monotonic()
        saver.begin(1, model, optimizer, None, {"stage": "bench"}, "")
        waits.append(time.monotonic() - started)
        saved = saver.finish()
        assert saved.failure is None, saved.failure

    found = grown(action)
    return dict(save_gb=found["gb"], waits=waits[0], save_s=found["seconds"])


def sums(optimizer) -> list[float]:
    """Of this rank's optimizer state, to see whether it is the same."""
    return [
        float(state[kind].double().square().sum())
        for part in optimizer.chained_optimizers
        for *_, state in compat.optimizer_shards(part)
        for kind in ("param", "exp_avg", "exp_avg_sq")
    ]


def forget(optimizer) -> None:
    """Zero the state, so that what is there later was loaded."""
    with torch.no_grad():
        for part in optimizer.chained_optimizers:
            for *_, state in compat.optimizer_shards(part):
                for kind in ("param", "exp_avg", "exp_avg_sq"):
                    state[kind].zero_()


def load_all(home: Path, way: str, model, optimizer) -> tuple[dict, list[str]]:
    """Figures of loading one's own checkpoint, and the ways whose checkpoints were not loaded as they were saved."""
    wanted, figures, wrong = sums(optimizer), {}, []
    for other in WAYS:
        forget(optimizer)
        path = next((home / other.replace(" ", "_")).glob("step_*"))
        found = grown(lambda: checkpoint.load(path, model, optimizer))
        if other == way:
            figures = dict(load_gb=found["gb"], load_s=found["seconds"])
        if sums(optimizer) != wanted:
            wrong.append(f"{other} by {way}")
    return figures, wrong


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


def everybodys(own) -> list:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=12, help="of the decoder, 8.7 million parameters each")
    arguments.add_argument("--rounds", type=int, default=1, help="saves and loads each way")
    arguments.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    arguments.add_argument("--asynchronous", action="store_true", help="save while training could go on, from copies")
    args = arguments.parse_args()
    words = ["model=tiny", "data=sample", "optim=from_scratch", "train.global_batch_size=64"]
    config = compose("stage1", [*words, *SIZES, "model.ffn_hidden_size=3072", f"model.num_layers={args.layers}"])
    parallel.initialize(config.parallel, "cpu", 10, 0)
    model = build_model(config.model, config.parallel, "cpu", "bf16", ddp=gpu.ddp_settings(config, "cpu"))
    optimizer = build_optimizer(config, model, "bf16")
    set_learning_rates(optimizer, config, 1)
    for chunk in model:
        for buffer in chunk.buffers:
            buffer.grad_data.normal_(generator=torch.Generator().manual_seed(0))
    clip_and_step(optimizer, 1.0)
    parameters = sum(p.numel() for chunk in model for p in chunk.parameters())
    home = [tempfile.mkdtemp(dir=args.folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(home)
    home, rows, wrong = Path(home[0]), [], []
    for number in range(args.rounds):
        found = {}
        for way in WAYS:
            use(way, optimizer)
            found[way] = save(home / way.replace(" ", "_"), model, optimizer, args.asynchronous)
        for way in WAYS:
            use(way, optimizer)
            figures, differ = load_all(home, way, model, optimizer)
            wrong += differ
            for rank, one in enumerate(everybodys(found[way] | figures)):
                rows.append(dict(way=way, round=number + 1, rank=rank, **one))
    wrong = sorted({name for names in everybodys(wrong) for name in names})
    if dist.get_rank() == 0:
        first, *others = (next((home / way.replace(" ", "_")).glob("step_*")) for way in WAYS)
        wrong += [name for other in others for name in differing(first, other)]
        print(f"{parameters:,} parameters, {12 * parameters / 1e9:.2f} GB of optimizer state in float32")
        print_table(rows)
        print(f"what differs: {', '.join(wrong) or 'nothing'}")
        print_json({"parameters": parameters, "differing": len(wrong), "rows": rows}, args.out)
        shutil.rmtree(home)
    failed = [bool(wrong)]
    dist.broadcast_object_list(failed)
    sys.exit(failed[0])


if __name__ == "__main__":
    main()
