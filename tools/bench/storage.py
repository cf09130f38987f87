"""The training loader on object storage that is far away, beside a local disk: speed, bytes, and the first batch.

    python tools/bench/storage.py [--samples 1600] [--latency 0.05] [--bandwidth 1e8] [--sources 100]

A server of this machine holds the shards of pictures; it answers after `--latency` seconds and sends `--bandwidth`
bytes/s at most (tools/bench/slow_proxy.py). Server and loader share the machine's cores, with whatever else runs there,
so that wall time says little on a busy machine: the CPU time of the loader's own process is beside it.

    ratio         samples/s of the storage over those of the local disk: of the first pass without its first turn, in
                  which the samples are fetched, and then, when all of them are in the cache. They are read in turns of
                  40 samples, so that all meet the same other work, and the median of the turns' ratios is taken
    of noise      the same of a second loader of the local disk over the first: as far as this is from 1, the machine
                  tells two loaders that do the same apart
    CPU ratio     samples per CPU second of the loader's worker, in the same way
    amplified     bytes of shards fetched over the shards' own, until every sample has come
    round trips   of the first batch of --sources sources, from the first look at their metadata on: how often all that
                  was asked for had to be answered before more was asked (slow_proxy.py, quiet)
"""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from data import chat, jpeg, picture
from slow_proxy import SlowProxy
from startup import cpu_seconds
from tables import parser, print_json, print_table

from molmo2_nemo import storage
from molmo2_nemo.config.schema import DataConfig, VisionConfig
from molmo2_nemo.data import blend, loader
from molmo2_nemo.paths import CONF_DIR
from molmo2_nemo.prepare.webdataset import write_shards

TOKENIZER = CONF_DIR.parent / "molmo2_nemo" / "data" / "tokenizer"
SHARD_SAMPLES = 100
SIZE = (640, 480)  # of the pictures
TURN = 40  # samples
TURNS = 40  # at least, of each phase


def main() -> None:
    args = arguments()
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        found = {}
        if args.samples:
            found |= speed(folder, args)
        if args.sources:
            found |= first_batch(folder, args)
    rows = [{"figure": name, "value": value} for name, value in found.items()]
    print_table(rows)
    print_json(found, args.out)


def arguments():
    options = parser(__doc__)
    options.add_argument("--samples", type=int, default=1600, help="of the source that is read (default %(default)s)")
    options.add_argument("--latency", type=float, default=0.05, help="seconds (default %(default)s)")
    options.add_argument("--bandwidth", type=float, default=1e8, help="bytes/s (default %(default)s)")
    options.add_argument("--sources", type=int, default=100, help="of the blend whose first batch is awaited")
    options.add_argument("--quiet", type=float, default=2.0, help="seconds without a request that end a round trip")
    return options.parse_args()


def speed(folder: Path, args) -> dict:
    """Two passes over a source of pictures: from the local disk, from the storage, and from the local disk again."""
    make(folder / "one" / "source0", args.samples)
    size = sum(path.stat().st_size for path in (folder / "one").rglob("*.tar"))
    with SlowProxy(folder, args.latency, args.bandwidth) as proxy:
        point_to(proxy.address)
        roots = {"local": str(folder / "one"), "storage": "s3://bench/one", "noise": str(folder / "one")}
        meters = {name: Meter(opened(folder, root, 1)) for name, root in roots.items()}
        for meter in meters.values():
            meter.draw(TURN)
        found, names = {}, list(meters)
        for phase in ("fetching", "cached"):
            for meter in meters.values():
                meter.turns = []
            while len(meters["storage"].turns) < TURNS or len(meters["storage"].seen) < args.samples:
                names = [*names[1:], names[0]]  # none is always behind the same other one
                for name in names:
                    meters[name].draw(TURN)
            if phase == "fetching":
                found["amplified"] = round(proxy.bytes_of(".tar") / size, 3)
            for name in ("local", "storage"):
                turns = meters[name].turns
                found[f"{name} samples/s, {phase}"] = round(1 / median(wall for wall, _ in turns), 1)
                found[f"{name} CPU ms a sample, {phase}"] = round(1e3 * median(cpu for _, cpu in turns), 1)
            for name, what in (("storage", ""), ("noise", " of noise")):
                pairs = list(zip(meters["local"].turns, meters[name].turns))
                found[f"ratio{what}, {phase}"] = round(median(near[0] / far[0] for near, far in pairs), 3)
                found[f"CPU ratio{what}, {phase}"] = round(median(near[1] / far[1] for near, far in pairs), 3)
        for meter in meters.values():
            meter.stream.close()
    return found


class Meter:
    """A stream with one worker. turns: (seconds, CPU seconds of the worker) for a sample, of each turn."""

    def __init__(self, stream):
        self.stream, self.seen, self.turns = stream, set(), []

    def draw(self, samples: int) -> None:
        """A turn of at least so many samples."""
        workers, begin, drawn = self.stream.workers, time.perf_counter(), 0
        cpu = cpu_seconds(workers[0].pid) if workers else 0.0
        while drawn < samples:
            examples = next(self.stream).examples[:, 1].tolist()
            drawn += len(examples)
            self.seen.update(examples)
        spent = time.perf_counter() - begin, cpu_seconds(self.stream.workers[0].pid) - cpu
        self.turns.append((spent[0] / drawn, spent[1] / drawn))


def first_batch(folder: Path, args) -> dict:
    """The first batch of many sources, counted in round trips and, with the latency, timed."""
    make(folder / "many" / "source0", 4)
    for number in range(1, args.sources):
        shutil.copytree(folder / "many" / "source0", folder / "many" / f"source{number}")
    found = {}
    for proxy in (SlowProxy(folder, quiet=args.quiet), SlowProxy(folder, args.latency, args.bandwidth)):
        with proxy:
            point_to(proxy.address)
            begin = time.perf_counter()
            stream = opened(folder, "s3://bench/many", args.sources)
            of_metadata = proxy.round_trips
            next(stream)
            seconds, requests, round_trips = time.perf_counter() - begin, len(proxy.requests), proxy.round_trips
            stream.close()
        if proxy.quiet:
            found["round trips"], found["of these for metadata"] = round_trips, of_metadata
            found["requests until then"] = requests
        else:
            found["first batch s"] = round(seconds, 1)
    return found


def point_to(endpoint: str) -> None:
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    storage.forget_clients()


def make(folder: Path, number: int) -> None:
    """A source of pictures with a question and an answer."""
    rng = np.random.default_rng(0)
    pictures = [jpeg(picture(*SIZE, rng)) for _ in range(min(number, 12))]

    def samples():
        for index in range(number):
            images = [{"part": "img.jpg", "width": SIZE[0], "height": SIZE[1]}]
            example = {"images": images, "branches": [chat(rng, 1, 60)]}
            yield f"{index:06d}", {"json": json.dumps(example).encode(), "img.jpg": pictures[index % len(pictures)]}

    folder.mkdir(parents=True)
    write_shards(folder, {"train": samples()}, SHARD_SAMPLES)


def opened(folder: Path, root: str, number: int):
    """The training loader of a blend of so many sources, with an empty cache; from reading metadata on."""
    sources = {f"source{n}": {"path": f"source{n}", "weight": 1} for n in range(number)}
    file = folder / f"blend{number}.yaml"
    file.write_text(str({"weighting": "fixed", "sources": sources}))
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    data = DataConfig(
        blend=str(file), root=root, tokenizer=str(TOKENIZER), seq_length=4096, max_crops=32, max_frames=32,
        cache_dir=str(cache) if storage.is_remote(root) else None, num_workers=1,
    )  # fmt: skip
    found = blend.load_blend(data)
    blend.check_shards(found, data.max_error_rate)
    return loader.train_loader(data, VisionConfig(), found, 0, 1, None, 1)


if __name__ == "__main__":
    main()
