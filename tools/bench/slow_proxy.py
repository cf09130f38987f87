"""A proxy in front of an HTTP server on this machine that makes it far away, slow or faulty, and counts what passes."""

import http.client
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

CHUNK = 2**16


class SlowProxy:
    """Use it in a `with`. latency: seconds before an answer; bandwidth: bytes/s of all answers together, None: any.

    fault: called with (method, path) of each request; what it returns is done instead of a plain answer:
    "503" and "403" are answered, "cut" sends half of a body, "stall" sends nothing for `stall` seconds, "refused"
    closes the connection. None: nothing.
    """

    def __init__(self, upstream: str, latency: float = 0.0, bandwidth: float | None = None):
        self.latency, self.bandwidth, self.stall = latency, bandwidth, 30.0
        self.fault: Callable[[str, str], str | None] = lambda method, path: None
        self.requests: list[tuple[str, str, int]] = []  # method, path, bytes of the answer's body
        self._upstream, self._lock, self._free = urlsplit(upstream).netloc, threading.Lock(), 0.0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True

    def __enter__(self) -> "SlowProxy":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
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

    def _handler(proxy):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fault = proxy.fault(self.command, self.path)
                time.sleep(proxy.latency)
                if fault == "refused":
                    self.close_connection = True
                    return
                if fault == "stall":
                    time.sleep(proxy.stall)
                if fault in ("503", "403"):
                    code = "SlowDown" if fault == "503" else "AccessDenied"
                    self._send(int(fault), {}, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())
                    return
                connection = http.client.HTTPConnection(proxy._upstream)
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                self._send(response.status, dict(response.getheaders()), response.read(), fault == "cut")
                connection.close()

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
