"""A proxy in front of an HTTP server on this machine that makes it far away, slow or faulty, and counts what passes.

It can also be the server itself, for readers: a folder as a bucket of S3, with much less work than moto's server.
"""

import contextlib
import http.client
import os
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

CHUNK = 2**16


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # connections that wait to be accepted; past the usual 5, the kernel lets them try again

    def handle_error(self, request, client_address) -> None:
        """A client that has ended."""


class SlowProxy:
    """Use it in a `with`. upstream: an address, or a folder that is then served as each bucket of S3, to be read alone.

    latency: seconds before an answer; bandwidth: bytes/s of all answers together, None: any.

    quiet: seconds; requests are held until no other has come for so long, and then answered together. `round_trips`
    counts how often: the longest chain of requests of which each waited for the one before, however slow this machine.
    If it computes for longer than `quiet` between two requests, they are too many, never too few.

    fault: called with (method, path) of each request; what it returns is done instead of a plain answer:
    "503" and "403" are answered, "cut" sends half of a body, "stall" sends nothing for `stall` seconds, "refused"
    closes the connection. None: nothing. ended: S3's answer to requests that are signed with such an access key, as
    {"AKIA...": "ExpiredToken"}.
    """

    def __init__(
        self, upstream: str | Path, latency: float = 0.0, bandwidth: float | None = None, quiet: float | None = None
    ):
        self.latency, self.bandwidth, self.quiet, self.stall = latency, bandwidth, quiet, 30.0
        self.fault: Callable[[str, str], str | None] = lambda method, path: None
        self.ended: dict[str, str] = {}
        self.requests: list[tuple[str, str, int]] = []  # method, path, bytes of the answer's body
        self.round_trips = 0
        self._upstream, self._lock, self._free = upstream, threading.Lock(), 0.0
        self._held, self._waiting, self._answering, self._changed = threading.Condition(), 0, 0, 0.0
        self.server = Server(("127.0.0.1", 0), self._handler())

    def __enter__(self) -> "SlowProxy":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        if self.quiet:
            threading.Thread(target=self._let_go, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def bytes_of(self, ending: str) -> int:
        """Bytes of all answers about objects whose names end so."""
        return sum(size for _, path, size in self.requests if path.partition("?")[0].endswith(ending))

    def _wait_for_turn(self, size: int) -> None:
        """Until the line has carried so many bytes."""
        if self.bandwidth:
            with self._lock:
                self._free = max(self._free, time.monotonic()) + size / self.bandwidth
                wait = self._free - time.monotonic()
            time.sleep(max(0.0, wait))

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Hold a request until it is answered together with the others that wait."""
        if not self.quiet:
            yield
            return
        with self._held:
            self._waiting, self._changed, now = self._waiting + 1, time.monotonic(), self.round_trips
            self._held.wait_for(lambda: self.round_trips > now)
        try:
            yield
        finally:
            with self._held:
                self._answering, self._changed = self._answering - 1, time.monotonic()

    def _let_go(self) -> None:
        while True:
            time.sleep(self.quiet / 20)
            with self._held:
                if self._waiting and not self._answering and time.monotonic() - self._changed > self.quiet:
                    self._answering, self._waiting = self._waiting, 0
                    self.round_trips += 1
                    self._held.notify_all()

    def _handler(proxy):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with proxy._in_turn():
                    self.answer_now(body)

            def answer_now(self, body):
                fault = proxy.fault(self.command, self.path)
                signed = self.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0]
                time.sleep(proxy.latency)
                if signed in proxy.ended:
                    self._refuse(403, proxy.ended[signed])
                    return
                if fault == "refused":
                    self.close_connection = True
                    return
                if fault == "stall":
                    time.sleep(proxy.stall)
                if fault in ("503", "403"):
                    self._refuse(int(fault), "SlowDown" if fault == "503" else "AccessDenied")
                    return
                if isinstance(proxy._upstream, Path):
                    self._send(*from_folder(proxy._upstream, self.path, self.headers.get("Range")), fault == "cut")
                    return
                connection = http.client.HTTPConnection(urlsplit(proxy._upstream).netloc)
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                self._send(response.status, dict(response.getheaders()), response.read(), fault == "cut")
                connection.close()

            def _refuse(self, status: int, code: str) -> None:
                """As S3 does; an answer to HEAD has no body that could hold the code."""
                self._send(status, {}, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())

            def _send(self, status: int, headers: dict, content: bytes, cut: bool = False) -> None:
                self.send_response_only(status)
                length = headers.get("Content-Length", str(len(content))) if self.command == "HEAD" else len(content)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command == "HEAD":
                    content = b""
                proxy.requests.append((self.command, self.path, len(content)))
                content = content[: len(content) // 2] if cut else content
                for begin in range(0, len(content), CHUNK):
                    part = content[begin : begin + CHUNK]
                    proxy._wait_for_turn(len(part))
                    self.wfile.write(part)
                self.close_connection = self.close_connection or cut

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

            def log_message(self, *_):
                pass

        return Handler


def from_folder(folder: Path, path: str, wanted: str | None) -> tuple[int, dict, bytes]:
    """(status, headers, body) of S3's answer to GET or HEAD of /BUCKET/KEY, or to a list. wanted: the header Range."""
    address = urlsplit(path)
    _, _, key = unquote(address.path).lstrip("/").partition("/")
    query = parse_qs(address.query)
    if "list-type" in query:
        return 200, {"Content-Type": "application/xml"}, listed(folder, query.get("prefix", [""])[0])
    file = folder / key
    if not file.is_file():
        return 404, {}, b"<Error><Code>NoSuchKey</Code><Message>no</Message></Error>"
    content, found = file.read_bytes(), file.stat()
    headers = {"ETag": etag(found), "Last-Modified": formatdate(found.st_mtime, usegmt=True)}
    if wanted is None:
        return 200, headers | {"Content-Length": str(len(content))}, content
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    first, last = int(first), min(int(last), len(content) - 1)
    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    return 206, headers, content[first : last + 1]


def listed(folder: Path, prefix: str) -> bytes:
    """All objects whose keys begin so, on one page."""
    entries = []
    for file in sorted((folder / prefix.rpartition("/")[0]).rglob("*")):
        if file.is_file() and (key := str(file.relative_to(folder))).startswith(prefix):
            found = file.stat()
            when = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(found.st_mtime))
            entries.append(
                f"<Contents><Key>{key}</Key><LastModified>{when}</LastModified><ETag>{etag(found)}</ETag>"
                f"<Size>{found.st_size}</Size></Contents>"
            )
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(entries)}</ListBucketResult>".encode()


def etag(found: os.stat_result) -> str:
    return f'"{found.st_mtime_ns:x}-{found.st_size:x}"'
