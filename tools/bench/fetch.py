"""How fast pictures come from a list of addresses: tools/download.py's way and a plain loop, from the same server.

    python tools/bench/fetch.py [--files 2000] [--kilobytes 100] [--latency 0.02] [--jobs 32]

The server runs on this machine, in a process of its own, and answers each request after --latency seconds, as a distant
host does. The plain loop is urllib, one file after the other, written under its name at once and not looked at. Ours
decodes each picture, hashes it, renames it and writes it down. Prints a table, then one line of JSON.
"""

import io
import multiprocessing
import os
import tempfile
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tables import parser, print_json, print_table

from molmo2_nemo.fetch.rules import Rules
from molmo2_nemo.fetch.url_list import Wanted, fetch_list


def picture(kilobytes: int) -> bytes:
    """A JPEG of about so many kilobytes."""
    from PIL import Image

    side = max(16, int((kilobytes * 1000 * 1.6) ** 0.5))
    image = Image.frombytes("RGB", (side // 4, side // 4), os.urandom(3 * (side // 4) ** 2)).resize((side, side))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=92)
    return out.getvalue()


def serve(body: bytes, latency: float, ready) -> None:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            time.sleep(latency)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 256

    server = Server(("127.0.0.1", 0), Handler)
    ready.put(server.server_port)
    server.serve_forever()


def plain_loop(urls: list[str], folder: Path) -> None:
    for number, url in enumerate(urls):
        with urllib.request.urlopen(url) as response:
            (folder / f"{number}.jpg").write_bytes(response.read())


def ours(urls: list[str], folder: Path, jobs: int) -> None:
    rules = Rules(jobs=jobs, per_host=jobs, allow_private=True)
    counts = fetch_list([Wanted(url) for url in urls], folder, rules)
    assert counts["fetched"] == len(urls), counts


def measure(name: str, run, urls: list[str], size: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        started, cpu = time.monotonic(), time.process_time()
        run(urls, Path(folder))
        seconds = time.monotonic() - started
        cpu = time.process_time() - cpu
    files = len(urls)
    return {
        "name": name,
        "files_per_s": files / seconds,
        "mb_per_s": files * size / seconds / 1e6,
        "seconds": seconds,
        "cpu_ms_per_file": 1000 * cpu / files,
    }


def main() -> None:
    command = parser(__doc__)
    command.add_argument("--files", type=int, default=2000)
    command.add_argument("--kilobytes", type=int, default=100, help="of a picture")
    command.add_argument("--latency", type=float, default=0.02, help="s before an answer")
    command.add_argument("--jobs", type=int, default=32)
    options = command.parse_args()
    body = picture(options.kilobytes)
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    server = context.Process(target=serve, args=(body, options.latency, ready), daemon=True)
    server.start()
    port = ready.get(timeout=60)
    urls = [f"http://127.0.0.1:{port}/{number}.jpg" for number in range(options.files)]
    # The loop gets a tenth: its rate does not depend on how many there are.
    rows = [
        measure("plain loop", plain_loop, urls[: max(1, options.files // 10)], len(body)),
        measure(f"ours, {options.jobs} jobs", lambda urls, folder: ours(urls, folder, options.jobs), urls, len(body)),
    ]
    server.terminate()
    print_table(rows)
    settings = {
        "bench": "fetch",
        "files": options.files,
        "bytes_per_file": len(body),
        "latency_s": options.latency,
        "jobs": options.jobs,
        "cores": os.cpu_count(),
    }
    print_json({**settings, "rows": rows}, options.out)


if __name__ == "__main__":
    main()
