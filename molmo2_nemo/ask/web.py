"""A page on this machine: click through pictures and videos, ask one export or two, see the points drawn.

Python's own HTTP server, on the loopback address only. It serves the files named on the command line, by number, and
nothing else of the disk. Requests that name another host (another site's page could send them) are refused.
"""

import io
import json
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

from molmo2_nemo.ask.model import Asker, Seen, check_messages
from molmo2_nemo.ask.requests import placed
from molmo2_nemo.data.marks import colour_of, read_answer

ADDRESS = "127.0.0.1"
PAGE = Path(__file__).parent / "page.html"
# In a folder, files of these endings are shown; a file that is named itself may have any.
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif"}
VIDEOS = {".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".flv", ".wmv", ".ts", ".mpg", ".mpeg", ".3gp"}
VIDEOS |= {".h264", ".h265", ".hevc", ".mts", ".m2ts", ".ogv"}
MOST_NAMED = 10  # of the files that are left out
MAX_REQUEST = 2**20  # bytes
SHOWN_SIDE = 1600  # pixels of the longer side of a picture on the page, at most
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def find_media(
    images: Sequence[Path], videos: Sequence[Path], report: Callable[[str], None] = lambda text: None
) -> list[tuple[Path, bool]]:
    """(file, whether it is a video): those named, and in the named folders pictures and videos by their endings.

    report: is told what else is in the folders. ValueError: there are none.
    """
    found = []
    for path, is_video in [*((path, False) for path in images), *((path, True) for path in videos)]:
        if path.is_dir():
            inside = sorted(path.iterdir())
            files = [file for file in inside if file.suffix.lower() in PICTURES | VIDEOS and file.is_file()]
            if others := [file.name for file in inside if file not in files]:
                names = ", ".join([*others[:MOST_NAMED], *(["..."] if len(others) > MOST_NAMED else [])])
                report(f"{path}: not shown, since by their names they are no pictures or videos that are read: {names}")
            found += [(file, file.suffix.lower() in VIDEOS) for file in files]
        elif path.is_file():
            found.append((path, is_video))
        else:
            raise ValueError(f"{path} is not there: --web shows files and folders that exist")
    if not found:
        raise ValueError(
            "--web has nothing to show: name pictures, videos or a folder of them with --image and --video"
        )
    return found


class Page:
    """What the page asks for. One question is answered at a time."""

    def __init__(
        self, askers: Sequence[Asker], media: Sequence[tuple[Path, bool]], max_new_tokens: int, system: str | None
    ):
        self.askers, self.media, self.max_new_tokens, self.system = askers, media, max_new_tokens, system
        self.lock = threading.Lock()
        # The last file is kept for the next question; its pictures are asked for one by one.
        self.see = lru_cache(maxsize=2 * len(askers))(self._see)

    def _see(self, model: int, number: int) -> Seen:
        file, is_video = self.media[number]
        return self.askers[model].see([] if is_video else [file], file if is_video else None)

    def overview(self) -> dict:
        return {
            "models": [str(asker.folder) for asker in self.askers],
            "media": [file.name for file, _ in self.media],
            "system": self.system or "",
            "max_new_tokens": self.max_new_tokens,
        }

    def about(self, number: int) -> dict:
        """How many pictures a file has, and their seconds if it is a video."""
        with self.lock:
            seen = self.see(0, number)
        if seen.frames is None:
            height, width = seen.pictures[0].shape[:2]
            return {"size": [width, height], "times": None}
        return {"size": None, "times": [round(time, 2) for time in seen.times], "duration": seen.duration}

    def picture(self, number: int, frame: int) -> bytes:
        """PNG of a picture, or of a frame at its own proportions."""
        from molmo2_nemo.data.video import pick_frames

        with self.lock:
            seen = self.see(0, number)
        if seen.frames is None:
            pixels = seen.pictures[frame]
        else:
            (pixels,) = pick_frames(self.media[number][0].read_bytes(), [seen.times[frame]])
        image, file = Image.fromarray(pixels), io.BytesIO()
        image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        image.save(file, "PNG", compress_level=1)
        return file.getvalue()

    def answer(self, question: dict) -> dict:
        """question: model, media, messages, max_new_tokens. ValueError: it makes no sense."""
        model, number, most = (question.get(name) for name in ("model", "media", "max_new_tokens"))
        for value, limit in ((model, len(self.askers)), (number, len(self.media)), (most, 10**6)):
            if type(value) is not int or not 0 <= value < limit:
                raise ValueError(f"{value} is none of {limit}")
        messages = check_messages(question.get("messages"))
        with self.lock:
            seen = self.see(model, number)
            messages = placed(messages, len(seen.pictures), seen.frames is not None)
            reply = self.askers[model].answer(messages, seen, max(1, most))
        found = read_answer(reply.text, seen.visuals, float("inf") if seen.duration is None else seen.duration)
        marks = [
            {
                "frame": mark.visual,
                "x": mark.x,
                "y": mark.y,
                "number": found.objects[mark.object][0],
                "label": found.objects[mark.object][1],
                "colour": "#%02x%02x%02x" % colour_of(mark.object),
            }
            for mark in found.marks
        ]
        return {"text": reply.text, "cut": reply.is_cut, "marks": marks, "outside": found.num_outside}


def make_server(
    askers: Sequence[Asker],
    media: Sequence[tuple[Path, bool]],
    port: int,
    max_new_tokens: int,
    system: str | None = None,
) -> ThreadingHTTPServer:
    """A server that is bound, not yet started. OSError: the port is taken."""
    page = Page(askers, media, max_new_tokens, system)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            parts = urlsplit(self.path).path.strip("/").split("/")
            match parts:
                case [""]:
                    self.reply(PAGE.read_bytes(), "text/html; charset=utf-8")
                case ["overview"]:
                    self.reply_json(page.overview)
                case ["media", number] if number.isdecimal() and int(number) < len(media):
                    self.reply_json(lambda: page.about(int(number)))
                case ["media", number, frame] if number.isdecimal() and frame.isdecimal() and int(number) < len(media):
                    try:
                        self.reply(page.picture(int(number), int(frame)), "image/png")
                    except (ValueError, IndexError) as error:
                        self.reply_error(HTTPStatus.NOT_FOUND, str(error))
                case _:
                    self.reply_error(HTTPStatus.NOT_FOUND, "there is nothing of this name")

        def do_POST(self):
            if self.path != "/answer":
                return self.reply_error(HTTPStatus.NOT_FOUND, "there is nothing of this name")
            # A form of another site cannot send this type.
            if self.headers.get_content_type() != "application/json":
                return self.reply_error(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "questions are application/json")
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > MAX_REQUEST:
                return self.reply_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "the question is too long")
            body = self.rfile.read(int(length))

            def answered() -> dict:
                question = json.loads(body)
                if not isinstance(question, dict):
                    raise ValueError("a question is a JSON object")
                return page.answer(question)

            self.reply_json(answered)

        def parse_request(self):
            """Refuse what is not addressed to this machine: a name that leads here is another site's."""
            if not super().parse_request():
                return False
            own = {f"{host}:{self.server.server_address[1]}" for host in (ADDRESS, "localhost")}
            origin = self.headers.get("Origin")
            if self.headers.get("Host") in own and (origin is None or urlsplit(origin).netloc in own):
                return True
            self.reply_error(HTTPStatus.FORBIDDEN, "this page is for this machine alone")
            return False

        def reply_json(self, make):
            try:
                self.reply(json.dumps(make()).encode(), "application/json")
            except (ValueError, RecursionError) as error:
                self.reply_error(HTTPStatus.BAD_REQUEST, str(error))

        def reply_error(self, status: HTTPStatus, text: str):
            self.reply(json.dumps({"error": text}).encode(), "application/json", status)

        def reply(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK):
            self.send_response(status)
            for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *args):
            pass

    try:
        return ThreadingHTTPServer((ADDRESS, port), Handler)
    except OSError as error:
        raise OSError(f"--port {port}: {error.strerror}; give another, or 0 for any") from error
