"""tools/inspect_data.py: what its pages show is what is in the samples, and its counts are those of the samples."""

import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from programs import python, succeeded
from sources import chat, write_blend, write_source

from molmo2_nemo.data.marks import COLOURS, Visual, draw_marks, read_answer

HOSTILE = '</script><script>alert("x")</script> & <b>bold</b>'
POINT = (0.25, 0.75)


def jpeg(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG")
    return file.getvalue()


def sample(branches: list, picture: np.ndarray) -> dict:
    height, width = picture.shape[:2]
    return {
        "json": {"images": [{"part": "img0.jpg", "width": width, "height": height}], "branches": branches},
        "img0.jpg": jpeg(picture),
    }


@pytest.fixture(scope="module")
def blend(tmp_path_factory) -> list[str]:
    """Overrides for a blend of a source of pictures, one with hostile texts and one with broken samples."""
    root = tmp_path_factory.mktemp("shards")
    picture = skimage.data.astronaut()
    points = {
        "task": "pointing",
        "label": "eye",
        "points": [[1, [list(POINT)]]],
        "question": "Where?",
        "style": "pointing",
    }
    talk = chat(HOSTILE, "A & B < C")["branches"][0]
    write_source(root / "pictures", [sample([points, talk], picture) for _ in range(8)])
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
        self.tags, self.text, self.files = set(), "", []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.files += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_pages_show_samples_as_they_are(blend, tmp_path):
    succeeded(inspect(*blend, "--samples", "12", "--html", tmp_path))
    pages = sorted((tmp_path / "samples").glob("*.html"))
    assert len(pages) == 12
    for path in [tmp_path / "index.html", *pages]:
        page = Page(path)
        assert page.tags.isdisjoint({"script", "b" if path.name == "index.html" else "iframe"})
        assert all((path.parent / name).resolve().is_relative_to(tmp_path) for name in page.files)
        assert [name for name in page.files if not (path.parent / name).is_file()] == []
    of_pictures = next(path for path in pages if "<title>pictures" in path.read_text())
    page = Page(of_pictures)
    assert f"user\n{HOSTILE}" in page.text.replace("\n\n", "\n") and "A & B < C" in page.text
    assert '<points coords="1 1 250 750">eye</points>' in page.text and "1 points of 1 objects" in page.text

    # The whole picture is the first crop; the mark of the answer is on it where the sample has its point.
    folder = of_pictures.with_suffix("")
    shown = np.asarray(Image.open(folder / "picture0-crop0.png"))
    whole = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)[None].float()
    small = torch.nn.functional.interpolate(whole, shown.shape[:2], mode="bilinear")[0].permute(1, 2, 0)
    assert np.abs(shown.astype(float) - small.numpy()).mean() < 3  # JPEG
    [marked] = folder.glob("segment*-turn*-picture0.png")
    marked = np.asarray(Image.open(marked))
    scale = marked.shape[0] // shown.shape[0]
    rows, columns = np.nonzero(np.abs(marked.astype(int) - shown.repeat(scale, 0).repeat(scale, 1)).max(2) > 60)
    x, y = POINT[0] * marked.shape[1], POINT[1] * marked.shape[0]
    assert tuple(marked[int(y), int(x)]) == COLOURS[0]
    # Nothing else is drawn: the dot, and its number to the right of it.
    assert abs(rows - y).max() < 15 and (columns - x).min() > -15 and (columns - x).max() < 30

    # Tokens: the targets spell the answers, and only they have weights.
    targets = re.findall(
        r'weight ([\d.e-]+)"><small>\d+</small><span>.*?</span><b style=[^>]*>(.*?)</b>', of_pictures.read_text()
    )
    spelt = html.unescape("".join(token for _, token in targets))
    for answer in ('<points coords="1 1 250 750">eye</points>', "A & B < C"):
        assert answer.replace(" ", "") in spelt.replace(" ", "").replace("\u2423", "")
    assert all(float(weight) > 0 for weight, _ in targets)


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
    assert root.is_dir() and not (tmp_path / "pages" / "samples").exists()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
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
