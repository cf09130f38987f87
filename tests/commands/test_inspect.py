"""tools/inspect_data.py: what its pages show is what is in the samples, and its counts are those of the samples."""

import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest
import skimage.data
import torch
import yaml
from media_files import film
from PIL import Image
from programs import REPOSITORY, python, succeeded
from sources import VISION, chat, config, write_blend, write_source

from molmo2_nemo.data.blend import load_blend
from molmo2_nemo.data.encode import Encoder
from molmo2_nemo.data.inspection import examples_of, samples_of
from molmo2_nemo.data.marks import COLOURS, Visual, draw_marks, read_answer
from molmo2_nemo.data.stored import StoredSamples, each_sample

HOSTILE = '</script><script>alert("x")</script> & <b>bold</b>'
POINT = (0.25, 0.75)
PICTURE = skimage.data.astronaut()[:320]
# Seconds and x of the square in the frames of media_files.film, which are 96 x 64 pixels.
TRACK = [(step / 2, (10 * step + 5) / 96) for step in range(7)]


def jpeg(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG")
    return file.getvalue()


def sample(branches: list) -> dict:
    height, width = PICTURE.shape[:2]
    origin = {"file": "mine.jsonl", "place": "line 7", "unit": "pixels", "media": ["<b>me</b>.jpg"]}
    images = [{"part": "img0.jpg", "width": width, "height": height}]
    return {"json": {"images": images, "branches": branches, "origin": origin}, "img0.jpg": jpeg(PICTURE)}


def film_sample() -> dict:
    video = {"part": "video.mp4", "width": 96, "height": 64, "duration": 3.0, "fps": 10.0}
    track = {
        "task": "tracking",
        "label": "square",
        "frames": [[seconds, [["a", x, 0.7]]] for seconds, x in TRACK],
        "fps": 2.0,
        "style": "video_point_track_per_frame",
    }
    return {"json": {"video": video, "branches": [track]}, "video.mp4": film()}


@pytest.fixture(scope="module")
def blend(tmp_path_factory) -> list[str]:
    """Overrides for a blend of a source of pictures and videos, one with hostile texts and one with broken samples."""
    root = tmp_path_factory.mktemp("shards")
    points = {
        "task": "pointing",
        "label": "eye",
        "points": [[1, [list(POINT)]]],
        "question": "Where?",
        "style": "pointing",
    }
    talk = chat(HOSTILE, "A & B < C")["branches"][0]
    write_source(root / "pictures", [sample([points, talk]), film_sample()] * 4)
    write_source(root / "texts", [{"json": chat(HOSTILE, "yes")} for _ in range(8)])
    write_source(root / "broken", [{"json": chat()}, {"json": {"branches": []}}] * 4)
    blend = write_blend(root / "blend.yaml", "pictures", "texts", "broken")
    return ["data=sample", f"data.root={root}", f"data.blend={blend}", "data.num_workers=0"]


def inspect(*arguments):
    return python("tools/inspect_data.py", "--config-name", "stage2", *arguments)


class Page(HTMLParser):
    """Its tags, its text and the files that it names."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.text, self.files = [], "", []  # tags: (name, attributes)
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.files += [value for name, value in attrs if name in ("src", "href")]

    def of_kind(self, kind: str) -> list[dict]:
        """Attributes of the tags that have this class."""
        return [attrs for _, attrs in self.tags if kind in (attrs.get("class") or "").split()]

    def handle_data(self, data):
        self.text += data


def listed(folder: Path) -> list[dict]:
    """What the list of the pages is made of."""
    text = (folder / "samples.js").read_text()
    assert text.isascii()
    return json.loads(text.removeprefix("const SAMPLES = ").rstrip().removesuffix(";"))


@pytest.fixture(scope="module")
def folder(blend, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    succeeded(inspect(*blend, "--samples", "12", "--html", folder))
    return folder


def test_pages_run_and_load_nothing_but_their_own(folder):
    pages = sorted((folder / "samples").glob("*.html"))
    assert len(pages) == 12
    for path in [folder / "index.html", *pages]:
        page = Page(path)
        scripts = [attrs for tag, attrs in page.tags if tag == "script"]
        assert [Path(script["src"]).name for script in scripts] == ["samples.js", "pages.js"]
        assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
        assert "<b>bold" not in path.read_text() and "<b>me" not in path.read_text()
        assert all((path.parent / name).resolve().is_relative_to(folder) for name in page.files)
        assert [name for name in page.files if not (path.parent / name).is_file()] == []
    assert "innerHTML" not in (folder / "pages.js").read_text() and "http" not in (folder / "pages.css").read_text()


def test_the_list_has_every_sample_and_says_what_became_of_it(folder):
    samples = listed(folder)
    used = [entry for entry in samples if entry["page"]]
    assert [entry["number"] for entry in used] == list(range(1, 13)) and all(entry["tokens"] > 10 for entry in used)
    texts = [entry for entry in used if entry["source"] == "texts"]
    assert {(*entry["tasks"], entry["question"], entry["answer"]) for entry in texts} == {("chat", HOSTILE, "yes")}
    films = [entry for entry in used if entry["tasks"] == ["tracking"]]
    pictures = [entry for entry in used if entry["tasks"] == ["pointing", "chat"]]
    assert films and pictures and all(int(entry["key"]) % 2 for entry in films)
    assert {entry["where"] for entry in pictures} == {"mine.jsonl, line 7, <b>me</b>.jpg"}
    assert films[0]["where"] == f"train-0.tar, sample {int(films[0]['key']) + 1}"
    for entry, proportions in ((pictures[0], 512 / 320), (films[0], 96 / 64)):
        small = Image.open(folder / entry["thumbnail"])
        assert small.width / small.height == pytest.approx(proportions, rel=0.02)
    dropped = [entry for entry in samples if entry["state"] == "dropped"]
    assert dropped and {entry["source"] for entry in dropped} == {"broken"}
    assert all(int(entry["key"]) % 2 and entry["changes"] == ["dropped: malformed"] for entry in dropped)
    assert all("branches" in entry["question"] for entry in dropped)
    assert {entry["state"] for entry in used} == {"whole"}


def test_pages_show_samples_as_they_are(folder):
    [of_pictures, *_] = (folder / entry["page"] for entry in listed(folder) if "pointing" in entry["tasks"])
    page = Page(of_pictures)
    assert f"user\n{HOSTILE}" in page.text.replace("\n\n", "\n") and "A & B < C" in page.text
    assert '<points coords="1 1 250 750">eye</points>' in page.text and "1 points of 1 objects" in page.text
    assert "mine.jsonl, line 7; <b>me</b>.jpg" in page.text and "512 \u00d7 320 pixels" in page.text

    # The picture of the file has its own proportions, and the mark is on it where the sample has its point.
    files = of_pictures.with_suffix("")
    whole = torch.from_numpy(PICTURE.copy()).permute(2, 0, 1)[None].float()
    shown = np.asarray(Image.open(files / "picture0.png"))
    assert np.abs(shown.astype(float) - PICTURE).mean() < 3  # JPEG
    seen = np.asarray(Image.open(files / "picture0-crop0.png"))
    small = torch.nn.functional.interpolate(whole, seen.shape[:2], mode="bilinear")[0].permute(1, 2, 0)
    assert seen.shape[0] == seen.shape[1] and np.abs(seen.astype(float) - small.numpy()).mean() < 4
    [stage], [mark] = page.of_kind("stage"), page.of_kind("mark")
    assert stage["style"] == "--width: 512; --height: 320"
    colour = "#%02x%02x%02x" % COLOURS[0]
    assert mark["style"] == f"left: 25.00%; top: 75.00%; background: {colour}" and mark["title"] == "eye"
    [units] = page.of_kind("units")
    assert units["data-unit"] == "pixels"
    cells = [(attrs["data-value"], attrs["data-side"]) for _, attrs in page.tags if "data-value" in attrs]
    assert cells == [("0.25", "512"), ("0.75", "320")]

    # Tokens: the targets spell the answers, and only they have weights.
    targets = re.findall(
        r'weight ([\d.e-]+)"><small>\d+</small><span>.*?</span><b style=[^>]*>(.*?)</b>', of_pictures.read_text()
    )
    spelt = html.unescape("".join(token for _, token in targets))
    for answer in ('<points coords="1 1 250 750">eye</points>', "A & B < C"):
        assert answer.replace(" ", "") in spelt.replace(" ", "").replace("\u2423", "")
    assert all(float(weight) > 0 for weight, _ in targets)


def test_a_video_plays_with_its_tracks(folder):
    [of_film, *_] = (folder / entry["page"] for entry in listed(folder) if "tracking" in entry["tasks"])
    page = Page(of_film)
    [player] = page.of_kind("film")
    fps, marks = float(player["data-fps"]), json.loads(player["data-marks"])
    assert marks["objects"] == [{"number": 1, "label": "square", "colour": "#%02x%02x%02x" % COLOURS[0]}]
    with av.open(str(of_film.with_suffix("") / "video.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(frames) == len(marks["frames"]) == 30 and fps == 10 and frames[0].shape == (64, 96, 3)
    for frame, places in zip(frames, marks["frames"]):
        [(_, x, y)] = places
        red, green, blue = frame[round(64 * y), round(96 * x)]  # the square is yellow
        assert min(red, green) > 150 and blue < 110
    assert len([attrs for attrs in page.of_kind("frame") if "data-seconds" in attrs]) == 2 * len(TRACK)


def test_counts_are_those_of_the_samples(blend):
    result = succeeded(inspect(*blend, "--samples", "90", "--json"))
    counts = json.loads(result.stdout)
    sources = counts["sources"]
    assert list(sources) == ["broken", "pictures", "texts"]
    assert all(set(source) == {"asked", "got", "samples"} for source in sources.values())
    samples = sum(source["samples"] for source in sources.values())
    assert samples == counts["samples"] >= 90 and sum(source["got"] for source in sources.values()) == pytest.approx(1)
    assert all(source["asked"] == pytest.approx(1 / 3) for source in sources.values())
    assert all(source["got"] == source["samples"] / samples for source in sources.values())
    # Every second sample of the third source is broken, and nothing else is.
    assert counts["errors"] == counts["dropped"] and abs(counts["errors"] - sources["broken"]["samples"] / 2) <= 6
    assert counts["truncated"] == 0 and 0.5 < counts["fill"] <= 1


def test_statistics_name_what_is_broken_and_a_stream_that_drops_everything_ends(blend, tmp_path):
    root = Path(blend[1].removeprefix("data.root="))
    write_source(tmp_path / "hopeless", [{"json": {"branches": []}}] * 8)
    only = write_blend(tmp_path / "blend.yaml", "hopeless")
    arguments = [blend[0], f"data.root={tmp_path}", f"data.blend={only}", "data.num_workers=0"]
    result = succeeded(inspect(*arguments, "--samples", "20", "--stats", "--html", tmp_path / "pages"))
    assert "malformed" in result.stdout and "broken sample: hopeless: 0000" in result.stdout
    assert Page(tmp_path / "pages" / "index.html").text.count("hopeless: 0000") >= 20
    assert [entry["state"] for entry in listed(tmp_path / "pages")] == ["dropped"] * 20
    assert root.is_dir() and not (tmp_path / "pages" / "samples").exists()


def test_each_stored_sample_comes_once_in_the_order_of_the_shards(tmp_path):
    """Held-out samples after the others, and broken ones in their places."""
    samples = [{"json": chat(f"Question {number}?", "yes")} for number in range(7)]
    samples[3] = {"json": {"branches": []}}
    write_source(tmp_path / "second", samples, shard_size=2)
    split = {"split_parts": {"train": ["train-0.tar", "train-1.tar", "train-3.tar"], "val": ["train-2.tar"]}}
    (tmp_path / "second" / ".nv-meta" / "split.yaml").write_text(yaml.safe_dump(split | {"exclude": []}))
    write_source(tmp_path / "first", [{"json": chat("One?", "yes")}])
    data = config(tmp_path, blend=write_blend(tmp_path / "blend.yaml", "first", "second"))
    sources, encoder = load_blend(data), Encoder(data, VISION)
    stored, found = StoredSamples(sources), []
    for part, batch in each_sample(data, encoder, sources):
        [sample] = samples_of(batch, sources)
        texts = [turn for example in examples_of(batch, sources, encoder) for turn in example.segments[0].turns]
        assert sample.is_example == bool(texts)
        assert not texts or json.loads(stored.read(sample.source, sample.index, sample.key, part).json)["branches"]
        found.append((sample.source, sample.key, part, re.findall(r"\w+\?", texts[0][1]) if texts else sample.changes))
    assert found == [
        ("first", "00000", "train", ["One?"]),
        *(("second", f"0000{number}", "train", [f"{number}?"]) for number in (0, 1, 2)),
        ("second", "00003", "train", ["dropped: malformed"]),
        ("second", "00006", "train", ["6?"]),
        *(("second", f"0000{number}", "val", [f"{number}?"]) for number in (4, 5)),
    ]


@pytest.mark.skipif(not shutil.which("node"), reason="node runs the page's script")
def test_the_list_is_searched_for_the_phrase_as_it_is_typed():
    fields = {"key": "", "source": "mine", "answer": "", "changes": [], "tasks": [], "tokens": 9, "state": "whole"}
    samples = [
        {"number": n, "where": f"mine.jsonl, line {n}, 10.png", "question": "What  is\nit?"} | fields
        for n in range(1, 25)
    ]
    script = (REPOSITORY / "tools" / "inspect_pages" / "pages.js").read_text().partition("function row")[0]
    found = "console.log(JSON.stringify(PHRASES.map(text => chosen(new Map([['text', text]])).map(s => s.number))))"
    phrases = ["line 10", "Line 2", "line 2,", "what is it", "10 line", ""]
    script += f"const SAMPLES = {json.dumps(samples)}, PHRASES = {json.dumps(phrases)};\n{found}"
    numbers = json.loads(subprocess.run(["node", "-e", script], check=True, capture_output=True, text=True).stdout)
    assert numbers == [[10], [2, *range(20, 25)], [2], list(range(1, 25)), [], list(range(1, 25))]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--each", "--batch", "batch.pt"], "--each is for the shards of a blend: leave it out with --batch"),
        (["--samples", "10"], "say what to make: --html DIR, --stats or --json"),
        (["--samples", "0", "--stats"], "--samples 0: it must be at least 1"),
        (["--stats", "data=sample", "data.blend=none.yaml"], "none.yaml"),
        (["--stats", "data=sample", "data.blend_x=1"], "blend_x"),
        (["--stats", "data.root=/nowhere"], "/nowhere"),
    ],
)
def test_wrong_input_is_one_sentence(arguments, sentence):
    result = inspect(*arguments)
    assert result.returncode in (1, 2) and sentence in result.stderr.splitlines()[-1], result.stderr
    assert "Traceback" not in result.stderr and not result.stdout


def test_marks_are_put_on_what_the_answer_names():
    frames = [Visual([np.zeros((70, 70, 3), np.uint8)], seconds) for seconds in (0.0, 0.5, 1.0)]
    answer = read_answer('<tracks coords="0.0 1 100 200 2 300 400;1.1 2 500 600">dog</tracks>', frames)
    assert [(mark.visual, mark.x, mark.y, answer.objects[mark.object]) for mark in answer.marks] == [
        (0, 0.1, 0.2, (1, "dog")),
        (0, 0.3, 0.4, (2, "dog")),
        (2, 0.5, 0.6, (2, "dog")),
    ]
    assert answer.largest_gap == pytest.approx(0.1)
    drawn = np.asarray(draw_marks(frames[0].crops[0], answer, 0))
    assert drawn.shape == (350, 350, 3)
    assert [tuple(drawn[70, 35]), tuple(drawn[140, 105])] == [COLOURS[0], COLOURS[1]]

    images = [Visual([np.zeros((70, 70, 3), np.uint8)]) for _ in range(2)]
    answer = read_answer('<points coords="2 1 100 200;3 2 300 400">dog</points>', images)
    assert [mark.visual for mark in answer.marks] == [1] and answer.num_outside == 1
