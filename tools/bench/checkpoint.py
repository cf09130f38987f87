"""What checksums of a checkpoint cost: while it is written beside training, and before it is loaded.

    python tools/bench/checkpoint.py --gib 2 --folder /scratch

write            a file of --gib GiB, flushed to the disk
checksum         SHA-256 of it as the system gives it back, which is what saving adds in the thread that writes
verify, cached   the same once more: what reading adds where the file is in memory
alone            matrix products a second of a training thread while nothing else runs
beside a thread  the same while another thread computes checksums, as saving does
beside a process the same while another process does it, which shares the machine but not Python's lock

The limit is the disk: a checksum that is faster than the disk writes holds nothing up. For 100 GB, `seconds_100_gb` is
what one rank needs to compare all of it; N ranks share it (checkpoint_dir.verify), and wait for the file system alone.
"""

import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path

import torch
from tables import parser, print_json, print_table

from molmo2_nemo.files import sha256_of

CHUNK = 2**24


def products_per_second(seconds: float) -> float:
    """Of matrices of 512 x 512 on one thread."""
    a = torch.randn(512, 512)
    count, started = 0, time.monotonic()
    while time.monotonic() - started < seconds:
        a @ a
        count += 1
    return count / (time.monotonic() - started)


def hash_until(done: threading.Event, path: Path) -> None:
    while not done.is_set():
        sha256_of(path)


def products_beside(worker, done, path: Path, seconds: float) -> float:
    """While `worker`, a class of threads or of processes, computes checksums of a file."""
    other = worker(target=hash_until, args=(done, path))
    other.start()
    time.sleep(0.5)  # a process has to be started first
    speed = products_per_second(seconds)
    done.set()
    other.join()
    return speed


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--gib", type=float, default=1.0, help="size of the file (default 1)")
    arguments.add_argument("--seconds", type=float, default=3.0, help="of each of the three measurements of training")
    arguments.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to write it")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    path, chunk, size = given.folder / f"checksum_{os.getpid()}", os.urandom(CHUNK), int(given.gib * 2**30)
    try:
        started = time.monotonic()
        with path.open("wb") as file:
            for _ in range(size // CHUNK):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        written = time.monotonic() - started
        rows = [{"what": "write", "seconds": written, "GB/s": size / written / 1e9}]
        for what in ("checksum", "verify, cached"):
            started = time.process_time()
            sha256_of(path)
            seconds = time.process_time() - started
            rows.append({"what": what, "seconds": seconds, "GB/s": size / seconds / 1e9})
        alone = products_per_second(given.seconds)
        thread = products_beside(threading.Thread, threading.Event(), path, given.seconds)
        context = multiprocessing.get_context("fork")
        process = products_beside(context.Process, context.Event(), path, given.seconds)
    finally:
        path.unlink(missing_ok=True)
    print_table(rows)
    print(f"  matrix products a second: {alone:,.0f} alone, {thread:,.0f} beside a thread that computes checksums")
    print(f"  ({thread / alone:.0%}), {process:,.0f} beside a process that does ({process / alone:.0%})")
    speed = rows[-1]["GB/s"]
    figures = {"gib": given.gib, "cores": os.cpu_count(), "write_gb_s": rows[0]["GB/s"], "checksum_gb_s": speed}
    figures |= {"beside_thread_over_alone": thread / alone, "beside_process_over_alone": process / alone}
    print_json(figures | {"seconds_100_gb": 100 / speed}, given.out)


if __name__ == "__main__":
    main()
