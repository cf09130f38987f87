"""Servers on 127.0.0.1: one that speaks the Hub's protocol as huggingface_hub needs it, and one with bad manners."""

import base64
import contextlib
import gzip
import hashlib
import io
import json
import re
import struct
import threading
import time
import urllib.parse
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


@cache
def picture(number: int, form: str = "JPEG", side: int = 96) -> bytes:
    """A picture like no other: smooth colours of its own."""
    random = np.random.default_rng(number)
    small = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    out = io.BytesIO()
    small.resize((side, side + number % 32), Image.Resampling.BICUBIC).save(out, form, quality=85)
    return out.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes whose head promises many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self):
        with contextlib.suppress(ConnectionError):
            self.server.answer(self)

    do_HEAD = do_POST = do_PUT = do_GET

    def send(self, status: int, body: bytes = b"", length: int | None = None, **headers) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_ranged(self, body: bytes, **headers) -> None:
        """With Range and If-Range."""
        tag = f'"{hashlib.md5(body).hexdigest()}"'
        asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
        headers = {"ETag": tag, "Accept_Ranges": "bytes", **headers}
        if asked and condition in (None, tag):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                return self.send(416, Content_Range=f"bytes */{len(body)}")
            self.server.ranges.append(start)
            return self.send(206, body[start:], Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}", **headers)
        return self.send(200, body, **headers)

    def cut(self, body: bytes, length: int | None = None, **headers) -> None:
        """Promise `length` bytes, send these, and hang up."""
        self.close_connection = True
        self.send(200, body, length=length, **headers)
        self.wfile.flush()
        self.connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: Counter[str] = Counter()  # path -> requests
        self.ranges: list[int] = []  # starts of parts that were asked for
        self.stopping = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *args):
        pass

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.stopping.set()
        self.shutdown()
        self.server_close()

    def count(self, path: str) -> int:
        with self.lock:
            self.asked[path] += 1
            return self.asked[path]


@dataclass
class Repo:
    """A data set repository of the Hub."""

    files: dict[str, bytes]
    gated: bool = False
    sha: str = "a" * 40
    large: frozenset[str] = frozenset()  # names kept by Git LFS: hash in the listing, a redirect to get them
    bare: bool = False  # the listing has names alone
    faults: dict[str, list[str]] = field(default_factory=dict)  # file -> what goes wrong at each request, in turn


class Hub(_Server):
    """Repositories at /api/datasets/REPO and /datasets/REPO/resolve/COMMIT/FILE."""

    def __init__(self, repos: dict[str, Repo]):
        super().__init__()
        self.repos = repos
        self.delay = 0.0  # s for each 64 KiB

    def answer(self, request: _Handler) -> None:
        path = urllib.parse.unquote(request.path.partition("?")[0])
        parts = path.strip("/").split("/")
        self.count(path)
        if parts[:2] == ["api", "datasets"]:
            return self._info(request, "/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else None)
        if parts[:1] == ["datasets"] and parts[3:4] == ["resolve"]:
            return self._file(request, "/".join(parts[1:3]), parts[4], "/".join(parts[5:]), path)
        if parts[:1] == ["cdn"]:
            assert "Authorization" not in request.headers or "127.0.0.1" in request.headers["Host"]
            return self._body(request, "/".join(parts[1:3]), "/".join(parts[3:]), path)
        return request.send(404)

    def _repo(self, request: _Handler, name: str, files: bool = False) -> Repo | None:
        repo = self.repos.get(name)
        if repo is None:
            request.send(401, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif repo.gated and files and request.headers.get("Authorization") != "Bearer hf_right":
            request.send(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="Access to this dataset is restricted")
            return None
        return repo

    def _info(self, request, name, revision) -> None:
        repo = self._repo(request, name)
        if repo is None:
            return None
        if revision not in (None, "main", repo.sha):
            return request.send(404, b"{}", X_Error_Code="RevisionNotFound")
        siblings = []
        for file, body in repo.files.items():
            entry = {
                "rfilename": file,
                "size": len(body),
                "blobId": hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest(),
            }
            if repo.bare:
                entry = {"rfilename": file}
            elif file in repo.large:
                entry["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}
            siblings.append(entry)
        info = {
            "id": name,
            "sha": repo.sha,
            "private": False,
            "gated": repo.gated,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }
        return request.send(200, json.dumps(info).encode(), Content_Type="application/json")

    def _file(self, request, name, revision, file, path) -> None:
        repo = self._repo(request, name, files=True)
        if repo is None:
            return None
        if revision != repo.sha:
            return request.send(404, X_Error_Code="RevisionNotFound")
        if file not in repo.files:
            return request.send(404, X_Error_Code="EntryNotFound")
        if file in repo.large:
            return request.send(302, Location=f"{self.url}/cdn/{name}/{file}", X_Repo_Commit=repo.sha)
        return self._body(request, name, file, path)

    def _body(self, request, name, file, path) -> None:
        repo = self.repos[name]
        body, faults = repo.files[file], repo.faults.get(file, [])
        with self.lock:
            fault = faults.pop(0) if faults else None
        if fault == "short":
            return request.cut(body[: len(body) // 2], length=len(body))
        if fault == "html":
            return request.send(200, b"<!DOCTYPE html><html>try later</html>", Content_Type="text/html")
        if fault == "other":
            return request.send(200, bytes(len(body)))
        if fault == "503":
            return request.send(503)
        if fault == "more":
            return request.send(200, body + bytes(1_000_000))
        if fault == "drip":
            request.send(200, body[:10], length=len(body))
            while not self.stopping.wait(0.1):
                request.wfile.write(b".")
            return None
        if self.delay:
            return self._slowly(request, body)
        return request.send_ranged(body, X_Repo_Commit=repo.sha, X_Linked_Size=len(body))

    def _slowly(self, request, body: bytes) -> None:
        start = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if start:
            self.ranges.append(start)
        status = 206 if start else 200
        request.send(status, b"", length=len(body) - start, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
        for at in range(start, len(body), 2**16):
            request.wfile.write(body[at : at + 2**16])
            time.sleep(self.delay)


class Media(_Server):
    """Pictures at /ok/N.jpg, and everything that goes wrong elsewhere."""

    def __init__(self):
        super().__init__()
        self.delay = 0.0  # s before each answer
        self.files: dict[str, bytes] = {}  # path -> archive or video

    def answer(self, request: _Handler) -> None:
        path = request.path.partition("?")[0]
        time.sleep(self.delay)
        nth = self.count(path)
        kind, _, rest = path[1:].partition("/")
        if path in self.files:
            return request.send_ranged(self.files[path])
        number = int(rest.split(".")[0]) if rest.split(".")[0].isdigit() else 0
        good = picture(number)
        match kind:
            case "ok":
                form = {"png": "PNG", "webp": "WEBP"}.get(rest.rpartition(".")[2], "JPEG")
                return request.send(200, picture(number, form), Content_Type="text/html")  # a lie that does not matter
            case "big":
                return request.send_ranged(picture(number, "BMP", 1200))
            case "big-cut":  # comes whole only in parts
                body = picture(number, "BMP", 1200)
                if "Range" in request.headers:
                    return request.send_ranged(body)
                return request.cut(body[: len(body) // 3], length=len(body), ETag=f'"{hashlib.md5(body).hexdigest()}"')
            case "big-changes":  # another file by the time that the rest is asked for
                first, second = picture(number, "BMP", 1200), picture(number + 1, "BMP", 1200)
                if nth == 1:
                    return request.cut(first[: len(first) // 3], length=len(first), ETag='"first"')
                if "Range" not in request.headers:
                    return request.send(200, second, ETag='"second"')
                start = int(request.headers["Range"].removeprefix("bytes=").rstrip("-"))
                end = f"bytes {start}-{len(second) - 1}/{len(second)}"
                return request.send(206, second[start:], Content_Range=end, ETag='"second"')
            case "redirect":
                return request.send(302, Location=f"/ok/{rest}")
            case "loop":
                return request.send(302, Location=request.path)
            case "to-file":
                return request.send(302, Location="file:///etc/hostname")
            case "to-private":
                return request.send(302, Location="http://169.254.169.254/latest/meta-data")
            case "to-nowhere":
                return request.send(302)
            case "gone":
                return request.send(404, b"<html>no</html>")
            case "forbidden":
                return request.send(403)
            case "html":
                return request.send(
                    200, b"<!DOCTYPE html><html><body>Not available</body></html>", Content_Type="image/jpeg"
                )
            case "empty":
                return request.send(200, b"", Content_Type="image/jpeg")
            case "short":  # always
                return request.cut(good[: len(good) // 2], length=len(good))
            case "short-once":
                return request.cut(good[: len(good) // 2], length=len(good)) if nth == 1 else request.send(200, good)
            case "short-length":  # says less than there is
                return request.send(200, good[: len(good) // 2])
            case "half-unsaid":  # ends early without ever saying how long it is
                request.close_connection = True
                request.send_response(200)
                request.end_headers()
                return request.wfile.write(good[: len(good) // 2])
            case "huge":
                return request.cut(good, length=10**12)
            case "endless":
                request.send_response(200)
                request.send_header("Transfer-Encoding", "chunked")
                request.end_headers()
                while not self.stopping.is_set():
                    request.wfile.write(b"10000\r\n" + bytes(65536) + b"\r\n")
                return None
            case "drip":  # slow-loris: a byte now and then
                request.send(200, good[:10], length=len(good))
                while not self.stopping.wait(0.1):
                    request.wfile.write(b"\0")
                return None
            case "trickle":  # just fast enough, without end
                request.send_response(200)
                request.send_header("Transfer-Encoding", "chunked")
                request.end_headers()
                while not self.stopping.wait(0.01):
                    request.wfile.write(b"64\r\n" + bytes(100) + b"\r\n")
                return None
            case "drip-head":
                request.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                while not self.stopping.wait(0.1):
                    request.wfile.write(b"a")
                return None
            case "silent":
                self.stopping.wait()
                return None
            case "reset":
                request.close_connection = True
                return request.connection.close()
            case "busy":
                return request.send(503) if nth <= 2 else request.send(200, good)
            case "limited":
                return request.send(429, Retry_After="0") if nth == 1 else request.send(200, good)
            case "limited-far":
                return request.send(429, Retry_After="Wed, 21 Oct 2099 07:28:00 GMT")
            case "error":
                return request.send(500)
            case "bomb":
                return request.send(200, bomb(30_000, 30_000), Content_Type="image/png")
            case "tiny":
                return request.send(200, bomb(1, 1), Content_Type="image/gif")
            case "gzip":
                return request.send(200, gzip.compress(good), Content_Encoding="gzip")
            case "broken":
                return request.send(200, good[:200] + bytes(len(good) - 400) + good[-200:])
        return request.send(404)


class Uploads(_Server):
    """What huggingface_hub asks of a Hub to put files into a model repository, by Git LFS (HF_HUB_DISABLE_XET=1).

    repos: name -> {"private": bool, "files": {name: bytes}}. Only the token hf_right may write, and only to `org`.
    faults: paths' ends -> statuses that are answered first.
    """

    def __init__(self):
        super().__init__()
        self.repos: dict[str, dict] = {}
        self.faults: dict[str, list[int]] = {}
        self.stored: dict[str, bytes] = {}  # Git LFS's objects by their SHA-256

    def answer(self, request: _Handler) -> None:
        path = urllib.parse.unquote(request.path.partition("?")[0])
        self.count(path)
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        fault = next((faults.pop(0) for end, faults in self.faults.items() if path.endswith(end) and faults), None)
        if fault is not None:
            return request.send(fault, b"{}")
        if path.startswith("/objects/"):
            self.stored[path.removeprefix("/objects/")] = body
            return request.send(200)
        if request.headers.get("Authorization") != "Bearer hf_right":
            return request.send(401, b"{}")
        if path == "/api/validate-yaml":
            return self._json(request, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(request, json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._json(
                request, {"transfer": "basic", "objects": [*map(self._place, json.loads(body)["objects"])]}
            )
        repo, what = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/\w+)?.*", path).groups()
        if repo not in self.repos:
            return request.send(404, b"{}", X_Error_Code="RepoNotFound")
        if what == "/commit":
            return self._commit(request, repo, body)
        if what == "/preupload":
            files = [
                {"path": one["path"], "uploadMode": "lfs" if self._is_large(one) else "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            return self._json(request, {"files": files})
        files = self.repos[repo]["files"]
        siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
        return self._json(request, {"id": repo, "sha": "a" * 40, "siblings": siblings})

    def _is_large(self, file: dict) -> bool:
        return file["path"].endswith(".safetensors")

    def _json(self, request: _Handler, value: dict) -> None:
        request.send(200, json.dumps(value).encode(), Content_Type="application/json")

    def _place(self, wanted: dict) -> dict:
        return {**wanted, "actions": {"upload": {"href": f"{self.url}/objects/{wanted['oid']}"}}}

    def _create(self, request: _Handler, wanted: dict) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != "org":
            return request.send(403, b"{}")
        is_private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.repos[name] = {"private": is_private, "files": {".gitattributes": b"x"}}
        return self._json(request, {"url": f"{self.url}/{name}", "id": name})

    def _commit(self, request: _Handler, repo: str, body: bytes) -> None:
        files = self.repos[repo]["files"]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
        return self._json(request, {"commitUrl": f"{self.url}/{repo}/commit/{'a' * 40}", "commitOid": "a" * 40})
