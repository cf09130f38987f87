"""The training loader on object storage that is far away, beside a local disk: speed, bytes, and the first batch.

    python tools/bench/storage.py [--samples 1500] [--latency 0.05] [--bandwidth 1e8] [--sources 100]

moto's server holds the shards, behind a proxy of this machine that answers after `--latency` seconds and sends
`--bandwidth` bytes/s at most (tools/bench/slow_proxy.py). Server, proxy and loader share the machine's cores, so that
the loader is slower by what they compute, too: with --latency 0 and no limit that is all there is.

    ratio        batches/s after the first tenth of a pass, from the storage over from the local disk
    amplified    bytes of shards fetched over the shards' own, until every sample has come
    first batch  of --sources sources, from the first look at their metadata on: seconds, and round trips, which are the
                 seconds beyond those with --latency 0
"""

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from slow_proxy import SlowProxy
from tables import parser, print_json, print_table

from molmo2_nemo import storage
from molmo2_nemo.config.schema import DataConfig, VisionConfig
from molmo2_nemo.data import blend, loader
from molmo2_nemo.paths import CONF_DIR
from molmo2_nemo.prepare.webdataset import write_shards

TOKENIZER = CONF_DIR.parent / "molmo2_nemo" / "data" / "tokenizer"
VISION = VisionConfig(image_size=70, overlap_margin=1)
BUCKET = "bench"
SHARD_SAMPLES = 250
PADDING = 50_000  # bytes of a sample beside its JSON, as of a small picture


def main() -> None:
    args = arguments()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, s3_server() as server:
        folder = Path(folder)
        make(folder / "one" / "source0", args.samples)
        for number in range(args.sources):
            make(folder / "many" / f"source{number}", 4)
        upload(folder, server)
        size = sum(path.stat().st_size for path in (folder / "one").rglob("*.tar"))
        local, batches = one_pass(folder, str(folder / "one"), args.samples)
        with SlowProxy(server, args.latency, args.bandwidth) as proxy:
            point_to(proxy.address)
            far, _ = one_pass(folder, f"s3://{BUCKET}/one", args.samples)
            fetched = proxy.bytes_of(".tar")
            first, requests = first_batch(folder, args.sources, proxy)
        with SlowProxy(server) as proxy:
            point_to(proxy.address)
            near, _ = first_batch(folder, args.sources, proxy)
        found = {
            "batches of a pass": batches,
            "local batches/s": round(local, 2),
            "storage batches/s": round(far, 2),
            "ratio": round(far / local, 3),
            "amplified": round(fetched / size, 3),
            "first batch s": round(first, 2),
            "first batch s without latency": round(near, 2),
            "round trips": round((first - near) / args.latency, 1) if args.latency else None,
            "requests until then": requests,
        }
        print_table([found])
        print_json(found, args.out)


def arguments():
    options = parser(__doc__)
    options.add_argument("--samples", type=int, default=1500, help="of the source that is read (default %(default)s)")
    options.add_argument("--latency", type=float, default=0.05, help="seconds (default %(default)s)")
    options.add_argument("--bandwidth", type=float, default=1e8, help="bytes/s (default %(default)s)")
    options.add_argument("--sources", type=int, default=100, help="of the blend whose first batch is awaited")
    return options.parse_args()


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The address of moto's server, with an empty bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    point_to(f"http://{host}:{port}")
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket=BUCKET)
    yield f"http://{host}:{port}"
    server.stop()


def point_to(endpoint: str) -> None:
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    storage.forget_clients()


def make(folder: Path, number: int) -> None:
    """A source of chats, each with some bytes that nothing looks at."""
    rng = np.random.default_rng(0)

    def samples():
        for index in range(number):
            turns = [{"role": "user", "content": f"Number {index}?"}, {"role": "assistant", "content": "yes " * 60}]
            yield f"{index:06d}", {"json": json.dumps({"branches": [turns]}).encode(), "bin": rng.bytes(PADDING)}

    folder.mkdir(parents=True)
    write_shards(folder, {"train": samples()}, SHARD_SAMPLES)


def upload(folder: Path, server: str) -> None:
    point_to(server)
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "index.sqlite":
            storage.upload_file(path, f"s3://{BUCKET}/{path.relative_to(folder)}")


def opened(folder: Path, root: str, number: int):
    """The training loader of a blend of so many sources, with an empty cache; from reading metadata on."""
    sources = {f"source{n}": {"path": f"source{n}", "weight": 1} for n in range(number)}
    file = folder / f"blend{number}.yaml"
    file.write_text(str({"weighting": "fixed", "sources": sources}))
    cache = folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    data = DataConfig(
        blend=str(file), root=root, tokenizer=str(TOKENIZER), seq_length=1024, max_crops=8, max_frames=8,
        cache_dir=str(cache) if storage.is_remote(root) else None, num_workers=1,
    )  # fmt: skip
    found = blend.load_blend(data)
    blend.check_shards(found, data.max_error_rate)
    return loader.train_loader(data, VISION, found, 0, 1, None, 1)


def one_pass(folder: Path, root: str, samples: int) -> tuple[float, int]:
    """(batches/s after the first tenth, batches) until every sample has come."""
    stream, seen, times = opened(folder, root, 1), set(), []
    while len(seen) < samples:
        seen |= set(next(stream).examples[:, 1].tolist())
        times.append(time.perf_counter())
    stream.close()
    warm = len(times) // 10
    return (len(times) - 1 - warm) / (times[-1] - times[warm]), len(times)


def first_batch(folder: Path, number: int, proxy: SlowProxy) -> tuple[float, int]:
    before, begin = len(proxy.requests), time.perf_counter()
    stream = opened(folder, f"s3://{BUCKET}/many", number)
    next(stream)
    seconds = time.perf_counter() - begin
    stream.close()
    return seconds, len(proxy.requests) - before


if __name__ == "__main__":
    main()
