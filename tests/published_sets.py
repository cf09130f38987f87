"""Data sets as they are published, in small: the files of tests/published/NAME.yaml, served, fetched, prepared, shown.

docs/datasets.md, "A data set as it is published", describes the format. Pictures and videos are made here. Each holds a
yellow square: frame number i, counted from 0, has its centre at `centre(i)`, which is (20 + 4 i, 15 + 2 i) pixels until
it reaches the right or the lower edge and begins again. So a row's points can be written by hand, and what training
shows can be compared with what it says.
"""

import contextlib
import csv
import functools
import hashlib
import io
import json
import re
import tarfile
import urllib.parse
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath

import aiohttp
import av
import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import yaml
from fetch_servers import Hub, Repo, _Handler, _Server
from PIL import Image, ImageDraw
from programs import REPOSITORY

from molmo2_nemo.catalogue.datasets import Catalogue, DataSet
from molmo2_nemo.config.schema import DataConfig, VisionConfig
from molmo2_nemo.data.encode import Encoder, SamplePlan
from molmo2_nemo.data.pictures import read_image
from molmo2_nemo.data.points import Points, parse
from molmo2_nemo.data.schema import read_example
from molmo2_nemo.data.tasks import COMMON_MARKERS, UNUSUAL_MARKERS
from molmo2_nemo.data.video import pick_frames
from molmo2_nemo.fetch.data_set import FetchOptions, FetchResult, Meter, fetch_set
from molmo2_nemo.fetch.file_names import direct
from molmo2_nemo.fetch.rules import Rules
from molmo2_nemo.fetch.url_list import DownloadProgress
from molmo2_nemo.prepare.dataset_shards import write_shard
from molmo2_nemo.prepare.records import RowCounts
from molmo2_nemo.prepare.shard_plan import make_plan
from molmo2_nemo.prepare.spool import write_spool

FOLDER = REPOSITORY / "tests" / "published"
KEYS = {"evidence", "notes", "hub", "urls", "manual", "expected"}
SIZE = (320, 180)  # of pictures and frames, unless said
SIDE = 9  # pixels of the yellow square
# Pixels by which the square that is seen may be away from where an answer says it is. The next frame's is 4.5 away.
NEAR = 2.0
# Frames whose squares are told apart when a picture is read back; at SIZE, 1,050 in a row differ.
NUMBERS = 1050
RULES = Rules(jobs=4, per_host=4, tries=2, timeout=5, backoff=0.01, allow_private=True)


# -- pictures and videos ----------------------------------------------------------------------------------------------


def centre(number: int, size: tuple[int, int] = SIZE) -> tuple[int, int]:
    """Pixels from the upper left corner to the centre of the square in frame `number`."""
    return 20 + 4 * number % (size[0] - 40), 15 + 2 * number % (size[1] - 30)


def picture(size: tuple[int, int], squares: list[tuple[float, float]]) -> Image.Image:
    image = Image.new("RGB", size, (30, 30, 90))
    for x, y in squares:
        ImageDraw.Draw(image).rectangle([x - SIDE // 2, y - SIDE // 2, x + SIDE // 2, y + SIDE // 2], (255, 255, 0))
    return image


def squares_of(content: dict, number: int, size: tuple[int, int]) -> list[tuple[float, float]]:
    """`objects` squares, one below the other; number 0 is the one of `centre`."""
    x, y = centre(number + content.get("shift", 0), size)
    return [(x, y + 40 * k) for k in range(content.get("objects", 1))]


@functools.cache
def _saved(size: tuple[int, int], squares: tuple, suffix: str) -> bytes:
    file = io.BytesIO()
    picture(size, list(squares)).save(file, Image.registered_extensions()[suffix], quality=90)
    return file.getvalue()


def picture_file(content: dict, name: str) -> bytes:
    squares = tuple(map(tuple, content.get("squares", [])))
    return _saved(tuple(content["picture"]), squares, PurePosixPath(name).suffix.lower() or ".jpg")


def video_file(content: dict, name: str) -> bytes:
    """content: {video: number of frames, fps, size, shift, objects}. MPEG-4 at a quality that keeps the square."""
    size, file = tuple(content.get("size", SIZE)), io.BytesIO()
    if name.lower().endswith(".gif"):
        images = [picture(size, squares_of(content, number, size)) for number in range(content["video"])]
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=1000 / content["fps"])
        return file.getvalue()
    form = {".mkv": "matroska", ".webm": "matroska", ".avi": "avi"}.get(PurePosixPath(name).suffix.lower(), "mp4")
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream("mpeg4", rate=Fraction(content["fps"]).limit_denominator(1001))
        stream.width, stream.height = size
        stream.codec_context.thread_count = 1
        stream.options = {"qmin": "2", "qmax": "3"}
        for number in range(content["video"]):
            image = picture(size, squares_of(content, number, size))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(image), "rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


# -- files ------------------------------------------------------------------------------------------------------------


def files_of(tree: dict) -> Iterator[tuple[str, bytes]]:
    """The files of a tree {path: content}. A path that ends with a slash is a folder of frames, or of a tree; "/" is
    the tree itself."""
    for path, content in tree.items():
        folder = path.removeprefix("/")
        if path.endswith("/") and "frames" in content:
            size, first = tuple(content.get("size", SIZE)), content.get("first", 0)
            for number in range(content["frames"]):
                name = content.get("name", "%05d.jpg") % (number + first)
                squares = tuple(squares_of(content, number, size))
                yield folder + name, _saved(size, squares, PurePosixPath(name).suffix.lower())
        elif path.endswith("/"):
            yield from ((folder + inner, data) for inner, data in files_of(content))
        else:
            yield path, file_of(content, path)


def mask_file(content: dict) -> bytes:
    """content: {mask: [width, height], boxes: [[left, top, right, bottom, number], ...]}: a PNG of numbers, 0 outside
    of the boxes. With `palette`, the numbers are those of colours."""
    image, file = Image.new("P" if content.get("palette") else "L", tuple(content["mask"])), io.BytesIO()
    if content.get("palette"):
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    for *corners, number in content["boxes"]:
        ImageDraw.Draw(image).rectangle(corners, number)
    image.save(file, "PNG")
    return file.getvalue()


def file_of(content: dict, name: str) -> bytes:
    """Bytes of one file. Its kind is a key of `content`; of rows, the suffix of its name decides."""
    if "picture" in content:
        return picture_file(content, name)
    if "mask" in content:
        return mask_file(content)
    if "video" in content:
        return video_file(content, name)
    if "zip" in content or "tar" in content:
        return archive_of(content)
    if "text" in content:
        return content["text"].encode()
    if "json" in content:
        return json.dumps(content["json"]).encode()
    return rows_file([_with_pictures(row) for row in content["rows"]], PurePosixPath(name).suffix.lower())


def _with_pictures(value):
    """Pictures in a row, as the Hub has them in a column of images."""
    if isinstance(value, dict) and "picture" in value:
        name = value.get("path", "picture.jpg")
        return {"bytes": picture_file(value, name), "path": value.get("path")}
    if isinstance(value, dict):
        return {key: _with_pictures(item) for key, item in value.items()}
    return [_with_pictures(item) for item in value] if isinstance(value, list) else value


def rows_file(rows: list[dict], suffix: str) -> bytes:
    if suffix == ".parquet":
        file = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return file.getvalue()
    if suffix == ".arrow":
        table, file = pyarrow.Table.from_pylist(rows), io.BytesIO()
        with pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
        return file.getvalue()
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".json":
        return json.dumps(rows).encode()
    assert suffix in (".csv", ".tsv"), f"rows in a file of the suffix {suffix}"
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if suffix == ".tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def archive_of(content: dict) -> bytes:
    """{zip: tree} or {tar: tree, compressed: gz}."""
    file = io.BytesIO()
    if "zip" in content:
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in files_of(content["zip"]):
                archive.writestr(name, data)
        return file.getvalue()
    with tarfile.open(fileobj=file, mode=f"w:{content.get('compressed', '')}") as archive:
        for name, data in files_of(content["tar"]):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


# -- fixtures and servers ---------------------------------------------------------------------------------------------


def names(folder: Path = FOLDER) -> list[str]:
    """Data sets that have a file in tests/published, or in another folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load(name: str, folder: Path = FOLDER) -> dict:
    fixture = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    assert set(fixture) <= KEYS and {"evidence", "expected"} <= set(fixture), f"keys of {name}.yaml"
    return _with_hashes(fixture, fixture.get("urls", {}))


def _with_hashes(value, urls: dict):
    """{sha256_of: address} becomes the hash of the bytes that the address has."""
    if isinstance(value, dict) and set(value) == {"sha256_of"}:
        return hashlib.sha256(file_of(urls[value["sha256_of"]], value["sha256_of"])).hexdigest()
    if isinstance(value, dict):
        return {key: _with_hashes(item, urls) for key, item in value.items()}
    return [_with_hashes(item, urls) for item in value] if isinstance(value, list) else value


class Web(_Server):
    """All servers that are no Hub: the file of an address is at the path that is the quoted address."""

    def __init__(self):
        super().__init__()
        self.files: dict[str, tuple[bytes, str | None]] = {}  # address -> bytes, and the name that the server says

    def answer(self, request: _Handler) -> None:
        found = self.files.get(urllib.parse.unquote(request.path[1:]))
        if found is None:
            return request.send(404)
        says = {"Content_Disposition": f'attachment; filename="{found[1]}"'} if found[1] else {}
        return request.send_ranged(found[0], **says)

    def redirect(self, url) -> str:
        """Where this server has the file of an address of the web."""
        text = str(url)
        return text if text.startswith(self.url) else f"{self.url}/{urllib.parse.quote(text, safe='')}"


PROXIES = ("HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy")


@contextlib.contextmanager
def servers(patch, repositories: dict):
    """A Hub with these repositories, and a web to which every other address leads. patch: a pytest.MonkeyPatch."""
    with Hub(repositories) as hub, Web() as web:
        for key, value in {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}.items():
            patch.setenv(key, value)
        for name in PROXIES:
            patch.delenv(name, raising=False)
        get = aiohttp.ClientSession.get
        patch.setattr(
            aiohttp.ClientSession,
            "get",
            lambda client, url, **options: get(
                client, url if str(url).startswith(hub.url) else web.redirect(url), **options
            ),
        )
        yield hub, web


def serve(fixture: dict, hub: Hub, web: Web, root: Path, name: str) -> None:
    """Put a fixture's files onto the servers, and those that come by hand into manual/."""
    hub.repos.clear()
    for repo, tree in fixture.get("hub", {}).items():
        hub.repos[repo] = Repo(dict(files_of(tree)))
    web.files.clear()
    for url, content in fixture.get("urls", {}).items():
        path = urllib.parse.urlsplit(url).path
        web.files[direct(url)] = file_of(content, content.get("name") or path), content.get("name")
    for path, data in files_of(fixture.get("manual", {})):
        target = root / "raw" / name / "manual" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


# -- what becomes of a set --------------------------------------------------------------------------------------------


@dataclass
class Shown:
    """One sample as training sees it."""

    plan: SamplePlan
    pictures: list[np.ndarray]  # of its images, or the frames that are shown
    context: str  # text before the questions, such as subtitles
    turns: list[tuple[str, str]]  # questions and answers, of all conversations

    def described(self) -> dict:
        """In the form of `expected`, to be read where a test fails."""
        seen = [[_seen(image) for image in self.pictures]] if not self.plan.video else []
        found = {"pictures": [squares for group in seen for squares in group]} if seen else {}
        if self.plan.video:
            found["frames"] = [_number(image) for image in self.pictures]
        return found | {"turns": [list(turn) for turn in self.turns]}


@functools.cache
def encoder() -> Encoder:
    """Of a row that holds everything, so that nothing is left out for want of room."""
    tokenizer = str(REPOSITORY / "molmo2_nemo" / "data" / "tokenizer")
    room = {"seq_length": 36864, "max_crops": 384, "max_frames": 384, "max_crops_per_image": 1, "max_images": 64}
    data = DataConfig(blend="", root="", tokenizer=tokenizer, **room)
    return Encoder(data, VisionConfig(image_size=70, overlap_margin=1))


def fetched(entry: DataSet, catalogue: Catalogue, root: Path) -> FetchResult:
    return fetch_set(entry, catalogue, FetchOptions(root, RULES), Meter(), DownloadProgress())


def prepared(entry: DataSet, root: Path) -> tuple[list[dict[str, bytes]], Counter]:
    """The parts of all samples, training and held out, by name, and how many annotations were dropped, by reason."""
    plan = make_plan(entry.model_dump(), root, root / "out", 1)
    spool = plan.work / "spool"
    for folder in (plan.work / "shards", plan.work / "records", spool):
        folder.mkdir(parents=True)
    write_spool(plan, spool, plan.shards)
    dropped, samples = Counter(RowCounts.read(plan.work / "rows.json").dropped), []
    for shard in plan.shards:
        dropped.update(write_shard(plan, spool, shard).dropped)
        if (plan.work / "shards" / f"{shard}.tar").exists():
            samples += _read(plan.work / "shards" / f"{shard}.tar")
    return samples, dropped


def _read(shard: Path) -> list[dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, part = member.name.partition(".")
            samples.setdefault(key, {})[part] = tar.extractfile(member).read()
    return list(samples.values())


TURN = re.compile(
    r"<\|im_start\|>user\n(.*?)<\|im_end\|>\n<\|im_start\|>assistant\n(.*?)(?=<\|im_end\|>|<\|im_start\|>|$)", re.DOTALL
)


def shown(parts: dict[str, bytes]) -> Shown:
    """A sample as the encoder writes it, and the pictures that it reads for it."""
    plan = encoder().plan(read_example(parts["json"]), np.random.default_rng(0))
    lost = {name: plan.counters[name] for name in ("unseen_branches", "dropped_branches", "truncated", "unseen_points")}
    assert plan.num_tokens and not any(lost.values()), plan.counters
    text = encoder().tokenizer.decode(plan.input_ids)
    context, start, talk = text.partition("<|im_start|>user")
    if plan.video:
        video = plan.video
        pictures = list(pick_frames(parts[video.part], plan.times, video.num_frames, start=video.start))
    else:
        pictures = [read_image(parts[image.part]) for image in plan.images]
    return Shown(plan, pictures, context, TURN.findall(start + talk))


# -- comparisons ------------------------------------------------------------------------------------------------------


def _yellow(image: np.ndarray) -> np.ndarray:
    red, green, blue = (image[..., k].astype(int) for k in range(3))
    return (red > 150) & (green > 150) & (blue < 130)


def _number(image: np.ndarray) -> int | None:
    """The number of a frame, by its first square."""
    ys, xs = np.nonzero(_yellow(image))
    if not len(xs):
        return None
    top = ys < ys.min() + SIDE + 2
    return _numbers((image.shape[1], image.shape[0])).get((round(xs[top].mean() / 2), round(ys[top].mean())))


@functools.cache
def _numbers(size: tuple[int, int]) -> dict[tuple[int, int], int]:
    """Number by place of the square, in steps of two and one pixels, and the places beside."""
    found: dict[tuple[int, int], int] = {}
    for number in range(NUMBERS):
        x, y = centre(number, size)
        for dy in (0, -1, 1):
            found.setdefault((x // 2, y + dy), number)
    return found


def _seen(image: np.ndarray) -> list[list[int]]:
    """Centres of the squares of a picture, from top to bottom; squares that touch are taken for one."""
    yellow, places = _yellow(image), []
    while yellow.any():
        y, x = (int(values[0]) for values in np.nonzero(yellow))
        window = (slice(y, y + SIDE + 2), slice(max(0, x - SIDE), x + SIDE + 2))
        ys, xs = np.nonzero(yellow[window])
        places.append([round(xs.mean()) + window[1].start, round(ys.mean()) + y])
        yellow[window] = False
    return places


def is_square_at(image: np.ndarray, x: float, y: float) -> bool:
    """Whether a yellow square has its centre within NEAR pixels of the point."""
    left, top = max(0, round(x) - SIDE), max(0, round(y) - SIDE)
    ys, xs = np.nonzero(_yellow(image[top : round(y) + SIDE + 1, left : round(x) + SIDE + 1]))
    return len(xs) > SIDE * SIDE // 2 and np.hypot(xs.mean() + left - x, ys.mean() + top - y) <= NEAR


def misplaced(sample: Shown) -> list[str]:
    """The points of answers that lie on no yellow square of the picture or frame that they name."""
    wrong = []
    for _, answer in sample.turns:
        for found in parse(answer):
            groups = found.groups if isinstance(found, Points) else found.frames
            for place, points in groups:
                if sample.plan.video:
                    index = int(np.abs(np.array(sample.plan.times) - float(place)).argmin())
                    if abs(sample.plan.times[index] - float(place)) > 0.06:  # times are written to a tenth
                        wrong.append(f"no frame at {place} s is shown")
                        continue
                else:
                    index = int(place) - 1
                image = sample.pictures[index]
                for *_, x, y in points:
                    x, y = x * image.shape[1], y * image.shape[0]
                    if not is_square_at(image, x, y):
                        wrong.append(f"nothing at ({x:.0f}, {y:.0f}) of {place}, which shows {_seen(image)}")
    return wrong


def differences(sample: Shown, expected: dict) -> list[str]:
    """What is otherwise than expected of a sample; nothing: it is as expected."""
    found = []
    strange = set(expected) - {"pictures", "size", "frames", "seconds", "context", "turns", "points_anywhere"}
    assert not strange, f"unknown keys of an expected sample: {sorted(strange)}"
    left = list(expected["turns"])
    for question, answer in sample.turns:
        match = next((turn for turn in left if _is_said(question, answer, turn)), None)
        if match is None:
            found.append(f"the turn {[question, answer]}")
        else:
            left.remove(match)
    found += [f"no turn {turn}" for turn in left]
    height, width = sample.pictures[0].shape[:2] if sample.pictures else (0, 0)
    if "size" in expected and (width, height) != tuple(expected["size"]):
        found.append(f"the size {width} x {height}")
    if "seconds" in expected and abs(sample.plan.video.seconds - expected["seconds"]) > 0.02:
        found.append(f"{sample.plan.video.seconds} seconds")
    if "frames" in expected:
        numbers = [_number(image) for image in sample.pictures]
        if numbers != numbers_of(expected["frames"]):
            found.append(f"the frames {numbers}")
    if "pictures" in expected:
        places = [sorted(_seen(image)) for image in sample.pictures]
        wanted = [sorted(map(list, squares)) for squares in expected["pictures"]]
        if len(places) != len(wanted) or not all(map(_alike, places, wanted)):
            found.append(f"the pictures {places}")
    found += [f"no context {text!r}" for text in expected.get("context", []) if text not in sample.context]
    return found + ([] if expected.get("points_anywhere") else misplaced(sample))


def _is_said(question: str, answer: str, turn: list | dict) -> bool:
    """Whether a turn is [a part of the question or {all: the question}, an answer, a list of those allowed, or
    {choice: right, of: [others]}], or one of {either: turns}."""
    if isinstance(turn, dict):
        return any(_is_said(question, answer, one) for one in turn["either"])
    asked, wanted = turn
    if asked["all"] != question if isinstance(asked, dict) else asked not in question:
        return False
    if isinstance(wanted, dict):
        return _is_chosen(question, answer, wanted["choice"], wanted["of"])
    return answer in (wanted if isinstance(wanted, list) else [wanted])


def _is_chosen(question: str, answer: str, right: str, others: Iterable[str]) -> bool:
    """Whether all options are asked and the answer is the right one, its label as the question has it, or both."""
    if not all(option in question for option in (right, *others)):
        return False
    if answer.endswith(right):
        return answer in question
    return any(marker.format(answer) + right in question for marker in COMMON_MARKERS + UNUSUAL_MARKERS)


def _alike(places: list, wanted: list) -> bool:
    return len(places) == len(wanted) and all(
        np.hypot(a[0] - b[0], a[1] - b[1]) <= NEAR for a, b in zip(places, wanted, strict=True)
    )


def numbers_of(value: list[int] | str) -> list[int]:
    """[0, 5, 10], or "0 to 10 by 5"."""
    if isinstance(value, list):
        return value
    first, last, step = map(int, re.fullmatch(r"(\d+) to (\d+) by (\d+)", value).groups())
    return list(range(first, last + 1, step))
