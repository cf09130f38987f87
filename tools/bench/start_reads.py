"""What the ranks of a node ask a shared file system for at the start of a run, counted with strace.

    python tools/bench/start_reads.py [--sources 100] [--shards 4] [--ranks 2] [--cache]

Makes a blend in a folder that stands for Lustre or NFS, and starts ranks as a launcher does, one after the other: each
reads the blend's metadata, builds the loaders of training and validation (one worker), and takes its first batch. The
table says for each rank how often it has opened, looked at (stat and others), listed and read something there, and how
many bytes. strace has to be installed.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from tables import parser, print_json, print_table

SHARD_SAMPLES = 32
# System calls by what they ask a file system for.
KINDS = {
    "opens": ("open", "openat", "openat2"),
    "stats": ("stat", "lstat", "fstat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "readlink"),
    "lists": ("getdents64",),
    "reads": ("read", "pread64", "readv", "preadv"),
    "writes": ("write", "pwrite64", "mkdir", "rename", "unlink", "unlinkat", "fsync", "fdatasync"),
}
KIND_OF = {call: kind for kind, calls in KINDS.items() for call in calls}
WHAT = {".nv-meta": r"/\.nv-meta", "indexes": r"\.idx$", "shards": r"\.tar$", "folders": ""}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--sources", type=int, default=100, help="of the blend (default %(default)s)")
    options.add_argument("--shards", type=int, default=4, help="of each source (default %(default)s)")
    options.add_argument("--ranks", type=int, default=2, help="of the node (default %(default)s)")
    options.add_argument("--cache", action="store_true", help="with data.cache_dir, a folder on the node's disk")
    options.add_argument("--launch", type=Path, help="start the ranks on what this folder has; the program does it")
    options.add_argument("--rank", type=Path, help="be a rank; the program does it")
    args = options.parse_args()
    if args.rank:
        be_rank(args.rank, args.cache)
    elif args.launch:
        for rank in range(args.ranks):
            os.access(args.launch / f"rank{rank}", os.F_OK)  # a mark in the trace
            environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(args.ranks), "LOCAL_RANK": str(rank)}
            subprocess.run(again(args, "--rank", args.launch), env=environment, check=True)
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = count(Path(folder), args)
        print_table(rows)
        print_json({"sources": args.sources, "shards": args.shards, "cache": args.cache, "rows": rows}, args.out)


def again(args, role: str, folder: Path) -> list[str]:
    """The command that starts this program for another part of the work."""
    cache = ["--cache"] if args.cache else []
    return [sys.executable, __file__, role, str(folder), "--ranks", str(args.ranks), *cache]


def count(folder: Path, args) -> list[dict]:
    """A row for each rank and kind of file."""
    make(folder, args.sources, args.shards)
    trace, node = folder / "trace", folder / "node"
    node.mkdir()
    calls = ",".join(f"?{call}" for call in KIND_OF)
    strace = ["strace", "-f", "-y", "--seccomp-bpf", "-s", "0", "-e", f"trace={calls}", "-o", str(trace)]
    subprocess.run([*strace, *again(args, "--launch", folder)], env=os.environ | {"TMPDIR": str(node)}, check=True)
    return rows_of(trace, folder)


def rows_of(trace: Path, folder: Path) -> list[dict]:
    """What each rank has asked the folder `shared` for, by kind of file and of request."""
    counts, sizes, rank, pending = Counter(), Counter(), None, {}
    mark = re.compile(rf'"{re.escape(str(folder))}/rank(\d+)"')
    shared = re.compile(rf'{re.escape(str(folder))}/shared[^">]*')
    for line in trace.open(errors="replace"):
        process, _, line = line.partition(" ")
        if "<unfinished ...>" in line:
            pending[process] = line.partition(" <unfinished")[0].strip()
            continue
        if resumed := re.match(r"\s*<\.\.\. \w+ resumed>(.*)", line):
            line = pending.pop(process, "") + resumed[1]
        line = line.strip()
        if found := mark.search(line):
            rank = int(found[1])
        call, place = re.match(r"(\w+)\(", line), shared.search(line)
        if rank is None or not call or not place:
            continue
        kind = KIND_OF[call[1]]
        what = next(name for name, pattern in WHAT.items() if re.search(pattern, place[0]))
        for of in (what, "all"):
            counts[rank, of, kind] += 1
            if kind == "reads" and (size := re.search(r"= (\d+)$", line)):
                sizes[rank, of] += int(size[1])
    return [
        {"rank": number, "of": of} | {kind: counts[number, of, kind] for kind in KINDS} | {"bytes": sizes[number, of]}
        for number in sorted({key[0] for key in counts})
        for of in (*WHAT, "all")
    ]


def make(folder: Path, sources: int, shards: int) -> None:
    """Small sources below `shared`, of the same number of shards each, and their blend."""
    from molmo2_nemo.prepare.webdataset import write_shards

    rng = np.random.default_rng(0)

    def samples(first, end):
        for index in range(first, end):
            turns = [{"role": "user", "content": f"Number {index}?"}, {"role": "assistant", "content": "yes " * 60}]
            yield f"{index:06d}", {"json": json.dumps({"branches": [turns]}).encode(), "bin": rng.bytes(1000)}

    for number in range(sources):
        place = folder / "shared" / f"source{number}"
        place.mkdir(parents=True)
        write_shards(place, {"train": samples(4, 4 + shards * SHARD_SAMPLES), "val": samples(0, 4)}, SHARD_SAMPLES)
    entries = {f"source{n}": {"path": f"source{n}", "weight": 1} for n in range(sources)}
    (folder / "blend.yaml").write_text(json.dumps({"weighting": "fixed", "sources": entries}))


def be_rank(folder: Path, cache: bool) -> None:
    """What a rank does with its data until it has its first batch."""
    from molmo2_nemo.config.schema import DataConfig, VisionConfig
    from molmo2_nemo.data import blend, loader
    from molmo2_nemo.environment import rank_from_environment, world_size_from_environment
    from molmo2_nemo.paths import CONF_DIR

    tokenizer, vision = CONF_DIR.parent / "molmo2_nemo" / "data" / "tokenizer", VisionConfig(image_size=70)
    data = DataConfig(
        blend=str(folder / "blend.yaml"), root=str(folder / "shared"), tokenizer=str(tokenizer), seq_length=1024,
        max_crops=8, max_frames=8, num_workers=1, cache_dir=str(folder / "node" / "cache") if cache else None,
    )  # fmt: skip
    sources = blend.load_blend(data)
    blend.check_shards(sources, data.max_error_rate)
    rank, ranks = rank_from_environment(), world_size_from_environment()
    held_out = loader.validation_loader(data, vision, sources, rank, ranks, 1)
    stream = loader.train_loader(data, vision, sources, rank, ranks, None, 1)
    next(stream)
    stream.close()
    held_out.close()


if __name__ == "__main__":
    main()
