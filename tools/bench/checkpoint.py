"""What checksums of a checkpoint cost: while it is written beside training, and before it is loaded.

    python tools/bench/checkpoint.py --gib 2 --folder /scratch

write            a file of --gib GiB, flushed to the disk
checksum         SHA-256 of it as the system gives it back, which is what saving adds in the thread that writes
verify, cached   the same once more: what reading adds where the file is in memory
alone, beside    matrix products a second of a training thread, alone and while another thread computes checksums

The limit is the disk: a checksum that is faster than the disk writes holds nothing up. For 100 GB, `seconds_100_gb` is
what one rank needs to compare all of it; N ranks share it (checkpoint_dir.verify), and wait for the file system alone.
"""

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


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--gib", type=float, default=1.0, help="size of the file (default 1)")
    arguments.add_argument("--seconds", type=float, default=3.0, help="of each of the two measurements of training")
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
        done = threading.Event()

        def hash_until_done() -> None:
            while not done.is_set():
                sha256_of(path)

        thread = threading.Thread(target=hash_until_done)
        thread.start()
        beside = products_per_second(given.seconds)
        done.set()
        thread.join()
    finally:
        path.unlink(missing_ok=True)
    print_table(rows)
    print(f"  matrix products a second: {alone:,.0f} alone, {beside:,.0f} beside a checksum ({beside / alone:.0%})")
    speed = rows[-1]["GB/s"]
    figures = {"gib": given.gib, "cores": os.cpu_count(), "write_gb_s": rows[0]["GB/s"], "checksum_gb_s": speed}
    print_json(figures | {"seconds_100_gb": 100 / speed, "beside_over_alone": beside / alone}, given.out)


if __name__ == "__main__":
    main()
