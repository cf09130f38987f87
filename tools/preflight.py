"""Check every node of a Slurm job before it trains; end with one sentence that names the node with a fault.

    srun python tools/preflight.py stage1 [OVERRIDE...]        # every rank of the job; slurm/common.sh does it
    python tools/preflight.py --settings RANKS stage1 [OVERRIDE...]      # the settings alone, anywhere

Every node: GPUs (there, of one kind, not in use, as many as Slurm counts), driver and package versions (equal on all
nodes), data.root with the whole blend (in object storage: the address, the rights, one sample, room for the cache),
a run directory that can be written, train.upload_to that can be written, read and cleared, the clock. Then an
all-reduce over all ranks, timed, and on GPUs the memory plan of tools/plan.py.

Exit status: 0 go on; 2 a setting cannot work or something is missing everywhere; 3 a node is at fault.
RUN_DIR/slurm/preflight.json has the verdict: {"kind": "ok" | "config" | "node" | "error", "message": ...,
"nodes": [...]}; with "error", which is object storage that does not answer, a job is queued again.

From the environment: PREFLIGHT_SECONDS (60) for all of it, MIN_BANDWIDTH in GB/s (see `floor`), MAX_CLOCK_SKEW in
seconds (5), FREE_CHECKPOINTS (train.keep_last + 1) that must fit on the disk.
"""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from molmo2_nemo import nvidia, storage
from molmo2_nemo.command_line import compose, prepare
from molmo2_nemo.config.checks import check
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import Config
from molmo2_nemo.environment import rank_from_environment, world_size_from_environment
from molmo2_nemo.paths import CHECKOUT, ROOT
from molmo2_nemo.planner.parameters import adapter_parameters, parameters

PACKAGES = (
    "molmo2-nemo",
    "torch",
    "megatron-core",
    "megatron-energon",
    "transformers",
    "nemo_toolkit",
    "transformer-engine",
    "liger-kernel",
    "apex",
)
# Bytes of a parameter in a checkpoint: float32 master weight and two Adam moments, and the weight of the model.
CHECKPOINT_BYTES = 16
# GB/s of the all-reduce below which the network is not what the job needs. A GPU job whose NCCL found no InfiniBand or
# NVLink and fell back to TCP has about 1. Not measured on GPUs: put half of what healthy nodes show into MIN_BANDWIDTH.
FLOORS = {"cpu": 0.005, "cuda": 5.0}
STORAGE_SECONDS = 10.0  # for which a request to object storage is tried again
BUSY_GIB = 2.0  # of a GPU's memory in use before the job starts


class Fault(Exception):
    """One sentence, and the nodes at fault; none: it is the settings, or the same everywhere.

    kind: of the verdict. "error": object storage does not answer now, and may do so at another start.
    """

    def __init__(self, message: str, nodes: list[str], kind: str | None = None):
        super().__init__(message)
        self.nodes, self.kind = nodes, kind or ("node" if nodes else "config")


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


# The facts of a node. All of this runs on the first rank of each node and imports no torch.


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    if CHECKOUT is not None:
        found["commit"] = commit(CHECKOUT)
    return found


def commit(checkout: Path) -> str:
    """The commit of a checkout; `unknown` where git is not installed, as in a container, or fails."""
    try:
        asked = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return "unknown"
    return asked.stdout.strip() or "unknown"


def data_fault(config: Config) -> str | None:
    """What is wrong with the data. Unreachable: nothing may be; they do not answer now."""
    from molmo2_nemo.data import blend

    try:
        with storage.patience(STORAGE_SECONDS):
            sources = blend.load_blend(config.data)
            blend.check_shards(sources, config.data.max_error_rate)
            read_one_sample(sources)
    except storage.Unreachable:
        raise
    except (ValueError, OSError) as error:
        return str(error).rstrip(".")
    return None


def read_one_sample(sources: list) -> None:
    """Where data come through the node's cache, read one sample, from the storage to the cache's disk.

    ConfigError, StorageError: no right to, no room, another shard than its index says.
    """
    from molmo2_nemo.data.node_cache import check_room
    from molmo2_nemo.data.shard_index import read_index

    cached = next((source for source in sources if source.cached), None)
    if cached:
        check_room(cached.cached.cache)
        shard = next(iter(read_index(cached.name, Path(cached.path), cached.cached.address)["train"]))
        cached.cached.sample(shard, 0)


def run_dir_fault(config: Config) -> str | None:
    folder = Path(config.run_dir)
    probe = folder / f".preflight_{node_name()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("x")
        probe.unlink()
    except OSError as error:
        return f"run_dir={config.run_dir} cannot be written ({error.strerror})"
    return None


def upload_fault(config: Config) -> str | None:
    """What is wrong with the address that checkpoints are copied to, where a few bytes are written, read and removed.

    Unreachable: it does not answer now.
    """
    from molmo2_nemo import remote_checkpoints

    address = remote_checkpoints.folder_of(config)
    try:
        if address is not None:
            with storage.patience(STORAGE_SECONDS):
                remote_checkpoints.try_address(address)
    except storage.Unreachable as error:
        raise storage.Unreachable(f"train.upload_to={config.train.upload_to}: {error}") from None
    except ConfigError as error:
        return f"train.upload_to={config.train.upload_to}: {str(error).rstrip('.')}"
    return None


def warnings() -> list[str]:
    """Settings of this node that may cause trouble later and are easily changed."""
    import resource

    found = []
    shared = shutil.disk_usage("/dev/shm").free / 2**30 if os.path.isdir("/dev/shm") else 0.0
    if shared < 1:
        found.append(f"/dev/shm has {shared:.2f} GiB free; loader workers hand their rows over through it")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= files < 4096:
        found.append(f"only {files} files may be open at a time (ulimit -n)")
    return found


def look(config: Config) -> dict:
    """Facts of this node, with the faults that can be seen without the other nodes.

    unreachable: a sentence on object storage that does not answer, or None.
    """
    facts = {
        "node": node_name(),
        "faults": [],
        "unreachable": None,
        "gpus": [],
        "versions": versions(),
        "warnings": warnings(),
    }
    facts["slurm_gpus"] = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    facts["pci"] = 0 if config.train.device == "cpu" else nvidia.devices()
    if facts["pci"]:
        try:
            facts["gpus"] = nvidia.gpus()
        except ValueError as error:
            facts["faults"].append(str(error))
    for find in (data_fault, run_dir_fault, upload_fault):
        try:
            facts["faults"] += [fault for fault in [find(config)] if fault]
        except storage.Unreachable as error:
            facts["unreachable"] = str(error).rstrip(".")
    return facts


# The verdict of the first rank.


def judge(nodes: list[dict]) -> None:
    """Raise Fault if a node has a fault of its own, or differs from the others."""
    if any(node["pci"] for node in nodes):
        for node in nodes:
            if not node["pci"] and not node["faults"]:
                node["faults"].append("it has no NVIDIA device, and others have")
            wanted = node["slurm_gpus"]
            if node["gpus"] and wanted and len(node["gpus"]) < wanted:
                node["faults"].append(f"nvidia-smi shows {len(node['gpus'])} GPUs and Slurm counts {wanted}")
            for index, gpu in enumerate(node["gpus"]):
                if gpu["used_gib"] > BUSY_GIB:
                    node["faults"].append(f"GPU {index} has {gpu['used_gib']:.0f} GiB in use by another process")
                    break
    faulty = [node for node in nodes if node["faults"]]
    if faulty:
        first = faulty[0]["faults"][0]
        alike = [node for node in faulty if node["faults"][0] == first]
        names = [node["node"] for node in faulty]
        if len(alike) == len(nodes):  # the settings, or a file system that all of them share
            raise Fault(f"{'all nodes' if len(nodes) > 1 else names[0]}: {first}", [])
        more = f" ({len(faulty)} nodes have faults: {', '.join(names)})" if len(faulty) > 1 else ""
        raise Fault(f"{names[0]}: {first}{more}", names)
    away = [node for node in nodes if node["unreachable"]]
    if away:
        names = "all nodes" if len(away) == len(nodes) > 1 else ", ".join(node["node"] for node in away)
        raise Fault(f"{names}: {away[0]['unreachable']}", [], "error")
    kinds = {node["node"]: sorted({f"{gpu['name']} {gpu['gib']:.0f} GiB" for gpu in node["gpus"]}) for node in nodes}
    for name, kind in kinds.items():
        if len(kind) > 1:
            raise Fault(f"{name}: its GPUs are of {len(kind)} kinds: {', '.join(kind)}", [name])
    unlike("GPUs", {name: ", ".join(kind) or "none" for name, kind in kinds.items()})
    unlike(
        "NVIDIA driver", {n["node"]: ", ".join(sorted({gpu["driver"] for gpu in n["gpus"]})) or "none" for n in nodes}
    )
    for package in nodes[0]["versions"]:
        unlike(package, {node["node"]: node["versions"][package] for node in nodes})


def unlike(what: str, values: dict[str, str]) -> None:
    """Raise Fault if a node has another value than most nodes."""
    usual, _ = Counter(values.values()).most_common(1)[0]
    odd = [name for name, value in values.items() if value != usual]
    if odd:
        more = f" (and {len(odd) - 1} more nodes differ)" if len(odd) > 1 else ""
        raise Fault(f"{odd[0]}: {what} is {values[odd[0]]} and {usual} on most nodes{more}", odd)


def judge_clocks(offsets: dict[str, tuple[float, float]], limit: float) -> float:
    """offsets: seconds that a node's clock is ahead of the first node's, and how far that may be wrong.

    Returns the largest deviation from the median that is certain. Raises Fault if it is above the limit.
    """
    middle = statistics.median(offset for offset, _ in offsets.values())
    certain = {name: max(0.0, abs(offset - middle) - doubt) for name, (offset, doubt) in offsets.items()}
    name = max(certain, key=certain.get)
    if certain[name] > limit:
        skew = offsets[name][0] - middle
        raise Fault(f"{name}: its clock is {skew:+.1f} s off the other nodes' (MAX_CLOCK_SKEW={limit:g})", [name])
    return certain[name]


def checkpoint_bytes(config: Config) -> int:
    # With LoRA the adapters alone.
    saved = adapter_parameters(config.model, config.lora) if config.lora.rank else parameters(config.model)
    return CHECKPOINT_BYTES * sum(size for _, size, _ in saved)


def room(config: Config) -> str:
    """A line on the free space for checkpoints. Raises Fault if those that are to be kept do not fit."""
    size, count = checkpoint_bytes(config), int(os.environ.get("FREE_CHECKPOINTS") or config.train.keep_last + 1)
    folder = Path(config.run_dir)
    there = sum(1 for _ in (folder / "checkpoints").glob("step_*/complete.json"))
    needed, free = size * max(1, count - there), shutil.disk_usage(folder).free
    if free < needed:
        raise Fault(
            f"{config.run_dir} has {free / 2**30:,.1f} GiB free, and {max(1, count - there)} checkpoints of about "
            f"{size / 2**30:,.1f} GiB are to come (train.keep_last={config.train.keep_last}): make room or lower it",
            [],
        )
    return f"{free / 2**30:,.0f} GiB free for checkpoints of about {size / 2**30:,.2f} GiB"


def plan(stage: str, overrides: list[str], ranks: int, memory_gib: float, seconds: float) -> str:
    """The verdict of tools/plan.py for GPUs of so much memory. Raises Fault if the run does not fit."""
    command = [
        sys.executable,
        str(ROOT / "tools" / "plan.py"),
        "--config-name",
        stage,
        "--gpu-memory",
        f"{memory_gib:.1f}",
    ]
    # The planner is one process and not a rank of this job.
    alone = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PMI", "RANK", "WORLD_SIZE", "MASTER_"))
    }
    try:
        result = subprocess.run(
            [*command, *overrides, f"gpus={ranks}"],
            capture_output=True,
            text=True,
            env=alone,
            timeout=max(10.0, seconds),
        )
    except subprocess.TimeoutExpired:
        return "memory plan: no answer in time, not judged"
    if result.returncode:
        # Status 1 is the verdict, the last line that is printed; otherwise the reason is on standard error.
        said = result.stdout if result.returncode == 1 and result.stdout.strip() else result.stderr
        lines = said.strip().splitlines() or [f"tools/plan.py ended with exit status {result.returncode}"]
        raise Fault(f"memory plan: {lines[-1].removeprefix('error: ').rstrip('.')}", [])
    return "memory plan: fits"


# All nodes together.


def wait_for_ranks(store, names: list[str], seconds: float) -> None:
    """Raise Fault if a rank does not answer in time. names: the node of each rank."""
    end = time.monotonic() + seconds
    waiting = dict(enumerate(names))
    while waiting:
        for rank in list(waiting):
            if store.check([f"here/{rank}"]):
                del waiting[rank]
        if waiting and time.monotonic() > end:
            late = sorted(set(waiting.values()), key=list(waiting.values()).index)
            raise Fault(f"{', '.join(late)}: no answer within {seconds:.0f} s", late)
        time.sleep(0.05)


def seconds_of(action, device: str, repeats: int = 6) -> float:
    """The shortest time of several tries; the first one sets up connections."""
    import torch

    best = math.inf
    for _ in range(repeats):
        started = time.monotonic()
        action()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.monotonic() - started)
    return best


def all_reduce_bandwidth(device: str, ranks: int) -> float:
    """Bus bandwidth in GB/s, as nccl-tests counts it: bytes x 2 (n - 1) / n / seconds. Collective."""
    import torch
    import torch.distributed as dist

    data = torch.zeros(2**26 if device == "cuda" else 2**20, device=device)  # float32: 256 and 4 MiB
    seconds = torch.tensor(seconds_of(lambda: dist.all_reduce(data), device), device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return data.numel() * 4 * 2 * (ranks - 1) / ranks / float(seconds) / 1e9


def links(device: str, names: list[str], rank: int) -> dict[tuple[str, str], float]:
    """GB/s between neighbouring nodes, measured by one rank of each. Collective."""
    import torch
    import torch.distributed as dist

    nodes = list(dict.fromkeys(names))
    first = [names.index(node) for node in nodes]
    data = torch.zeros(2**24 if device == "cuda" else 2**20, device=device)  # float32: 64 and 4 MiB
    mine = {}
    for phase in (0, 1):
        for left in range(phase, len(nodes) - 1, 2):
            ends = first[left], first[left + 1]
            if rank in ends:
                action = (lambda: dist.send(data, ends[1])) if rank == ends[0] else (lambda: dist.recv(data, ends[0]))
                seconds = seconds_of(action, device)
                if rank == ends[1]:
                    mine[nodes[left], nodes[left + 1]] = data.numel() * 4 / seconds / 1e9
    gathered = [None] * len(names)
    dist.all_gather_object(gathered, mine)
    return {pair: speed for part in gathered for pair, speed in part.items()}


def slow_fault(bandwidth: float, least: float, speeds: dict[tuple[str, str], float], nodes: list[str]) -> Fault:
    """The fault of a slow network. It names a pair of nodes if their link is less than half as fast as the median."""
    said = f"the all-reduce runs at {bandwidth:.3g} GB/s, below MIN_BANDWIDTH={least:g}"
    if not speeds:
        return Fault(f"{nodes[0]}: {said}: look at the links of its GPUs (nvidia-smi topo -m), or lower the floor", [])
    pair = min(speeds, key=speeds.get)
    words = f"{' and '.join(pair)}: {said}, and theirs is the slowest link ({speeds[pair]:.3g} GB/s"
    usual = statistics.median(speeds.values())
    if speeds[pair] < usual / 2:
        return Fault(f"{words}; the usual one has {usual:.3g})", list(pair))
    return Fault(f"{words}, the others are hardly faster): look at it with NCCL_DEBUG=INFO, or lower the floor", [])


def floor(device: str) -> float:
    return float(os.environ.get("MIN_BANDWIDTH") or FLOORS[device])


def preflight(stage: str, overrides: list[str], config: Config, rank: int, ranks: int) -> list[str]:
    """Lines on what was found. Every rank calls it, and rank 0 decides. Raises Fault if the job must not train."""
    from torch.distributed import TCPStore

    started, limit = time.monotonic(), float(os.environ.get("PREFLIGHT_SECONDS") or 60)

    def left() -> float:
        return max(5.0, limit - (time.monotonic() - started))

    names = rank_nodes(ranks)
    port = int(os.environ.get("MASTER_PORT", "29500")) + 1
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    first_of_node = names.index(names[rank]) == rank
    try:
        store = TCPStore(master, port, ranks, rank == 0, datetime.timedelta(seconds=left()), wait_for_workers=False)
    except Exception as error:
        reason = str(error).splitlines()[0]
        who = (
            f"port {port} cannot be opened on {names[0]}"
            if rank == 0
            else f"{names[rank]} cannot reach {names[0]}, port {port}"
        )
        raise Fault(f"{names[rank]}: {who} ({reason})", [names[rank]]) from error
    if first_of_node:
        store.set(f"facts/{names[rank]}", json.dumps(look(config)))
    store.set(f"here/{rank}", "yes")
    verdict = {"lines": []}
    if rank == 0:
        # Later ranks wait as long as this one judges.
        verdict = first_verdict(store, stage, overrides, config, names, ranks, left)
        store.set("verdict", json.dumps(verdict))
    else:
        if first_of_node:
            store.wait([f"ask/{names[rank]}"], datetime.timedelta(seconds=2 * limit))
            store.set(f"clock/{names[rank]}", repr(time.time()))
        store.wait(["verdict"], datetime.timedelta(seconds=2 * limit))
        verdict = json.loads(store.get("verdict"))
    if "fault" in verdict:
        # The store lives on rank 0: it goes when the others have heard it.
        store.set(f"heard/{rank}", "yes")
        if rank == 0:
            wait_quietly(store, [f"heard/{other}" for other in range(ranks)])
        raise Fault(verdict["fault"], verdict["nodes"], verdict["kind"])
    lines = verdict["lines"]
    if ranks == 1:
        return [*lines, "all-reduce: one rank, nothing to measure"]
    import torch
    import torch.distributed as dist

    device, least, nodes = verdict["device"], floor(verdict["device"]), list(dict.fromkeys(names))
    try:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("SLURM_LOCALID", "0")))
        backend = "nccl" if device == "cuda" else "gloo"
        timeout = datetime.timedelta(seconds=left())
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
        bandwidth = all_reduce_bandwidth(device, ranks)
        speeds = links(device, names, rank) if bandwidth < least else {}
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Fault(f"{names[rank]}: the all-reduce failed on rank {rank}: {reason}", [names[rank]]) from error
    if bandwidth < least:
        raise slow_fault(bandwidth, least, speeds, nodes)
    return [*lines, f"all-reduce over {ranks} ranks: {bandwidth:.3g} GB/s (floor {least:g})"]


def first_verdict(store, stage: str, overrides: list[str], config: Config, names: list[str], ranks: int, left) -> dict:
    """Rank 0's judgement of the facts: {"lines", "device"} or {"fault", "nodes"}."""
    try:
        check(config, ranks)
        # Half of what is left is for the all-reduce.
        wait_for_ranks(store, names, left() / 2 + 5)
        distinct = list(dict.fromkeys(names))
        facts = [json.loads(store.get(f"facts/{name}")) for name in distinct]
        judge(facts)
        skew = judge_clocks(clocks(store, distinct), float(os.environ.get("MAX_CLOCK_SKEW") or 5))
        on_gpus = bool(facts[0]["gpus"])
        first = facts[0]
        lines = [f"warning: {fact['node']}: {text}" for fact in facts for text in fact["warnings"]]
        if on_gpus:
            lines.append(
                f"{len(facts)} node(s) with {len(first['gpus'])} x {first['gpus'][0]['name']}, driver"
                f" {first['gpus'][0]['driver']}"
            )
        else:
            counted = (
                f" (Slurm counts {first['slurm_gpus']} and no node has an NVIDIA device)" if first["slurm_gpus"] else ""
            )
            lines.append(f"{len(facts)} node(s) without GPUs{counted}: a CPU run, GPUs not checked")
        lines.append(f"versions equal, torch {first['versions']['torch']}; clocks within {skew:.1f} s; {room(config)}")
        if on_gpus:
            smallest = min(gpu["gib"] for fact in facts for gpu in fact["gpus"])
            lines.append(plan(stage, overrides, ranks, smallest, left() / 2))
        else:
            lines.append("memory plan: no GPU, not judged")
        return {"lines": lines, "device": "cuda" if on_gpus else "cpu"}
    except ConfigError as error:
        return {"fault": str(error), "nodes": [], "kind": "config"}
    except Fault as fault:
        return {"fault": str(fault), "nodes": fault.nodes, "kind": fault.kind}


def clocks(store, nodes: list[str]) -> dict[str, tuple[float, float]]:
    """What judge_clocks takes: each node is asked in turn, and its answer lies between question and answer."""
    offsets = {nodes[0]: (0.0, 0.0)}
    for node in nodes[1:]:
        asked = time.time()
        store.set(f"ask/{node}", "time")
        answer = float(store.get(f"clock/{node}"))
        heard = time.time()
        offsets[node] = (answer - (asked + heard) / 2, (heard - asked) / 2)
    return offsets


def wait_quietly(store, keys: list[str]) -> None:
    try:
        store.wait(keys, datetime.timedelta(seconds=10))
    except Exception:
        pass


def rank_nodes(ranks: int) -> list[str]:
    """The node of every rank: srun deals them in blocks, the same number to each node."""
    nodelist = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST") or node_name()
    listed = os.environ.get("JOB_NODES", "").split()
    if not listed and shutil.which("scontrol") and "SLURM_JOB_ID" in os.environ:
        command = ["scontrol", "show", "hostnames", nodelist]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split()
    listed = listed or [node_name()]
    return [listed[rank * len(listed) // ranks] for rank in range(ranks)]


def leave_verdict(config: Config, kind: str, message: str, nodes: list[str]) -> None:
    path = Path(config.run_dir) / "slurm" / "preflight.json"
    if "://" in config.run_dir:  # what the message is about
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        verdict = {"kind": kind, "message": message, "nodes": nodes}
        path.write_text(json.dumps(verdict | {"time": time.time(), "job": os.environ.get("SLURM_JOB_ID")}) + "\n")
    except OSError:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("stage1", "stage2", "stage3"))
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for the recipe")
    parser.add_argument(
        "--settings", type=int, metavar="RANKS", help="check the settings for so many ranks, and no node; prints facts"
    )
    args = parser.parse_args()
    prepare([])
    rank, started = rank_from_environment(), time.monotonic()
    config = None
    try:
        config = compose(args.stage, args.overrides)
        if args.settings is not None:
            check(config, args.settings)
            # For slurm/checks.py.
            print(json.dumps({"data_root": config.data.root, "wandb_project": config.train.wandb_project}))
            return
        lines = preflight(args.stage, args.overrides, config, rank, world_size_from_environment())
    except (ConfigError, Fault) as error:
        # Rank 0 reports what all ranks have found; a rank reports what it alone has found.
        alone = isinstance(error, Fault) and error.__cause__ is not None
        if rank == 0 or alone:
            nodes = getattr(error, "nodes", [])
            if config is not None and args.settings is None:
                leave_verdict(config, getattr(error, "kind", "config"), str(error), nodes)
            print(f"error: {'' if args.settings is not None else 'pre-flight: '}{error}", file=sys.stderr, flush=True)
        sys.stderr.flush()
        os._exit(3 if getattr(error, "nodes", []) else 2)  # not through the destructors of a broken process group
    if rank == 0:
        leave_verdict(config, "ok", "", [])
        for line in lines:
            print(f"pre-flight: {line}")
        print(f"pre-flight: passed in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
