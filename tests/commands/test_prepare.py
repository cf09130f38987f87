"""A user's own annotations: from lines of JSON to what a loader yields."""

import dataclasses
import errno
import json
import os
import re
import shlex
import shutil
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import prepare as tool
import pytest
import yaml
from own_pictures import make_pictures
from PIL import Image
from programs import REPOSITORY, python, succeeded

from molmo2_nemo.config.schema import DataConfig
from molmo2_nemo.data import schema
from molmo2_nemo.data.blend import load_blend
from molmo2_nemo.data.points import parse
from molmo2_nemo.data.schema import read_example
from molmo2_nemo.data.shard_index import read_index
from molmo2_nemo.data.tasks import (
    COUNT_ONLY,
    COUNT_THEN_POINTS,
    POINTS_ONLY,
    POINTS_THEN_COUNT,
    TRACK_ALL,
    TRACK_ENDS,
    TRACK_ONE,
)
from molmo2_nemo.files import published
from molmo2_nemo.prepare import own_data, splits
from molmo2_nemo.prepare.sample_world.scenes import COLOURS
from molmo2_nemo.prepare.webdataset import write_shards

TURN = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("own") / "pictures")


def run_prepare(pictures, tmp_path, lines, *options):
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return python("tools/prepare.py", file, "--images", pictures, "--out", tmp_path / "shards", *options)


def stored(shards, pattern="*.tar"):
    """{key: (Example, {part: bytes})} of the shards, by an independent reader."""
    found = {}
    for shard in shards.glob(pattern):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, part = member.name.split(".", 1)
                found.setdefault(key, {})[part] = tar.extractfile(member).read()
    return {key: (read_example(parts.pop("json")), parts) for key, parts in found.items()}


def test_every_form_of_a_line(pictures, tmp_path):
    fractions = [[0.25, 0.5], [0.75, 0.5]]
    track = [[0.0, [["a", 64, 68]]], [0.4, [["a", 320, 136]]]]
    lines = [
        {
            "id": "cat-1",
            "image": "cat.jpg",
            "task": "pointing",
            "label": "eye",
            "points": fractions,
            "style": ["pointing", "counting"],
        },
        {"image": "cat.jpg", "unit": "pixels", "task": "pointing", "label": "eye", "points": [[451 / 4, 150.0]]},
        {
            "image": "deep/turned.jpg",
            "unit": "percent",
            "task": "pointing",
            "label": "cup",
            "points": [[1, [[50, 25]]]],
        },
        {"images": ["cat.jpg", "deep/turned.jpg"], "branches": [{"task": "caption", "text": "Two."}, TURN]},
        {"video": "bikes.mp4", "clip": [1, 5], "messages": TURN, "style": "vqa2"},
        {"video": "bikes.mp4", "unit": "pixels", "task": "tracking", "label": "bike", "fps": 2.5, "frames": track},
        {"id": 77, "task": "question", "question": "2 + 2?", "answers": ["4"]},
        {"video": "uneven.mkv", "task": "caption", "text": "Grey."},
    ]
    output = succeeded(
        run_prepare(pictures, tmp_path, lines, "--split", "75/25", "--shard-size", 4, "--name", "mine")
    ).stdout
    # Five of them are about two pictures and one video that two of them share, and the last two are alone.
    number = r"training samples +(\d)\n +held-out samples +(\d)\n +test samples +0\n +images, videos +5, 3\n"
    train, val = map(int, re.search(number, output).groups())
    assert train + val == 8 and train and val
    assert "branches          2 caption, 2 chat, 3 pointing, 1 question, 1 tracking".split() == sorted_branches(output)
    shards = {name: len(list((tmp_path / "shards").glob(f"{name}-*.tar"))) for name in ("train", "val", "test")}
    assert shards == {"train": -(-train // 4), "val": -(-val // 4), "test": 0}
    found = stored(tmp_path / "shards")
    assert set(found) == {"cat-1", *(f"{n:08d}" for n in (2, 3, 4, 5, 6, 8)), "77"}
    example, parts = found["cat-1"]
    [task] = example.branches
    assert task.points == [(1, [tuple(point) for point in fractions])] and task.style == ["pointing", "counting"]
    assert parts == {"img0.jpg": (pictures / "cat.jpg").read_bytes()}
    assert found["00000002"][0].branches[0].points == [(1, [(0.25, 0.5)])]
    turned = found["00000003"][0]
    assert (turned.images[0].width, turned.images[0].height) == (400, 600)  # as displayed
    assert turned.branches[0].points == [(1, [(0.5, 0.25)])]
    assert [image.part for image in found["00000004"][0].images] == ["img0.jpg", "img1.jpg"]
    video = found["00000005"][0].video
    assert (video.width, video.height, video.num_frames, video.fps, video.clip) == (640, 272, 250, 25.0, (1, 5))
    assert video.duration == pytest.approx(10.0) and found["00000005"][0].style == "vqa2"
    tracked = found["00000006"][0]
    assert tracked.branches[0].frames == [(0.0, [("a", 0.1, 0.25)]), (0.4, [("a", 0.5, 0.5)])]
    assert tracked.video.annotation_fps == 2.5
    # 2 seconds from the first stamp to the last, and the last lasts as long as usual: (40, 160, 800, 1000) -> 480 ms.
    uneven = found["00000008"][0].video
    assert (uneven.width, uneven.height, uneven.num_frames, uneven.fps) == (48, 32, 5, None)
    assert uneven.duration == pytest.approx(2.48)
    blend = tmp_path / "shards" / "blend.yaml"
    [source] = load_blend(DataConfig(blend=str(blend), root="elsewhere"))
    assert (source.name, source.num_samples, source.num_validation_samples) == ("mine", train, val)
    assert yaml.safe_load(blend.read_text())["weighting"] == "sqrt"


def sorted_branches(output):
    """["branches", "2", "caption,", ...] of the report, by task."""
    [line] = [line for line in output.splitlines() if line.strip().startswith("branches")]
    parts = sorted(line.replace("branches", "").strip().split(", "), key=lambda part: part.split()[1])
    return ["branches", *", ".join(parts).split()]


QUESTION = {"image": "cat.jpg", "task": "question", "question": "What?"}


def test_mistakes_are_listed_by_kind_and_nothing_is_written(pictures, tmp_path):
    lines = [
        {"id": "twice", "messages": TURN},
        {"id": "twice", "messages": TURN},
        *(QUESTION | {"image": f"dog{n}.jpg", "answers": ["A dog."]} for n in range(14)),
        QUESTION | {"answers": ["", "A cat.", ""]},
        '{"image": "cat.jpg"',
    ]
    result = run_prepare(pictures, tmp_path, lines, "--errors", tmp_path / "errors.jsonl")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    shown = result.stderr.splitlines()
    assert shown[:4] == [
        *(f'line {n}: image = "dog{n - 3}.jpg" is not in {pictures.resolve()}' for n in (3, 4, 5)),
        f"    and 11 more like it: {', '.join(f'line {n}' for n in range(6, 16))}, ...",
    ]
    # Two mistakes of one line count as one line.
    assert shown[4:6] == ["line 17: answers[0] is empty", "line 17: answers[2] is empty"]
    assert "line 2: id=twice is that of line 1 too" in shown and "line 18: it is not JSON" in result.stderr
    assert "17 of 18 lines cannot be used (--skip-bad leaves them out)" in result.stderr
    assert not (tmp_path / "shards").exists() and not list(tmp_path.glob(".*"))
    entries = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert len(entries) == 18 and len({entry["kind"] for entry in entries}) == 4
    assert entries[1]["place"] == "line 3" and entries[1]["mistake"].startswith('image = "dog0.jpg" is not in')
    every = run_prepare(pictures, tmp_path, lines, "--all-errors").stderr
    assert "more like it" not in every and len(re.findall(r"^line \d+: image = ", every, re.M)) == 14
    output = succeeded(run_prepare(pictures, tmp_path, lines, "--skip-bad")).stdout
    assert re.search(r"training samples +1\n +held-out samples +0\n(.*\n)+ +left out +17 lines", output)
    assert list(stored(tmp_path / "shards")) == ["twice"]
    # And once it is there it is not overwritten.
    result = run_prepare(pictures, tmp_path, [{"messages": TURN}])
    assert result.returncode == 1 and "exists already" in result.stderr


@pytest.mark.parametrize(
    "options, reason",
    [
        ([], "own.jsonl is empty"),
        (["--split", "0.9"], "--split 0.9 is not TRAIN/VAL/TEST in percent"),
        (["--split", "90/5"], "--split 90/5 has a sum of 95, not 100"),
        (["--split", "0/50/50"], "leaves nothing to train on"),
        (["--test", "none.jsonl"], "none.jsonl is no file"),
        (["--split", "80/10/10", "--test", __file__], "--split 80/10/10 has a part for the test, and so has --test"),
        (["--shard-size", "0"], "--shard-size is below 1"),
        (["--images", "none"], "is no folder"),
    ],
)
def test_no_lines_and_impossible_options(pictures, tmp_path, monkeypatch, options, reason):
    (tmp_path / "own.jsonl").touch()
    command = ["prepare.py", str(tmp_path / "own.jsonl"), "--images", str(pictures), "--out", str(tmp_path / "shards")]
    monkeypatch.setattr(sys, "argv", [*command, *options])
    with pytest.raises(SystemExit, match=reason):
        tool.main()
    assert [path.name for path in tmp_path.iterdir()] == ["own.jsonl"]


def test_a_full_disk_is_said_before_and_nothing_is_left_after(pictures, tmp_path, monkeypatch):
    picture = pictures / "cat.jpg"
    line = {"image": picture.name, "messages": TURN}
    (tmp_path / "own.jsonl").write_text(json.dumps(line) + "\n")
    command = ["prepare.py", str(tmp_path / "own.jsonl"), "--images", str(pictures), "--out", str(tmp_path / "shards")]
    monkeypatch.setattr(sys, "argv", [*command, "--repeat", "100", "--split", "100/0", "--workers", "1"])
    needed = 100 * picture.stat().st_size
    with monkeypatch.context() as small, pytest.raises(SystemExit) as ended:
        small.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed))  # none for the text
        tool.main()
    assert re.fullmatch(
        r"error: a copy of all samples needs .* free, [\d.]+ .* are missing: make room .*", ended.value.code
    )

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as small, pytest.raises(SystemExit, match="shards cannot be written .No space left"):
        small.setattr("molmo2_nemo.prepare.webdataset.add_sample", full)
        tool.main()
    assert [path.name for path in tmp_path.iterdir()] == ["own.jsonl"]
    tool.main()
    assert len(stored(tmp_path / "shards")) == 100


def test_splits_are_reported_and_training_samples_alone_are_repeated(pictures, tmp_path):
    lines = [{"id": f"s{n}", "messages": [TURN[0], {"role": "assistant", "content": f"{n} cats."}]} for n in range(60)]
    output = succeeded(run_prepare(pictures, tmp_path, lines, "--repeat", 3, "--split", "80/10/10")).stdout
    parts = {name: set(stored(tmp_path / "shards", f"{name}-*.tar")) for name in ("train", "val", "test")}
    assert all(parts.values())
    repeated = {f"{line['id']}_r{n}" for line in lines for n in range(3)}
    assert parts["train"] == {key for key in repeated if key[:-3] not in parts["val"] | parts["test"]}
    counts = {name: len(part) for name, part in parts.items()}
    assert re.search(rf"held-out samples +{counts['val']}\n +test samples +{counts['test']}\n", output)
    alone = f"{counts['train'] // 3} train, {counts['val']} val, {counts['test']} test"
    assert re.search(f"split by content +{alone}\n", output)
    found = read_index("own", tmp_path / "shards")
    assert {name: sum(shards.values()) for name, shards in found.items()} == counts


def sample(key, *contents):
    return own_data.OwnSample(key, b"", [], [], list(map(str, contents)))


def test_no_picture_is_in_two_splits_whatever_the_order_and_what_is_added():
    lines = [sample(f"k{n}", f"picture {n % 300}") for n in range(900)]
    shares = splits.Shares.read("80/12/8")
    dealt = splits.deal(lines, shares)
    assert all(dealt[f"k{n}"] == dealt[f"k{n % 300}"] for n in range(900))
    for name, share in (("train", 0.8), ("val", 0.12), ("test", 0.08)):
        assert abs(sum(value == name for value in dealt.values()) / 900 - share) < 0.06  # four deviations of 300
    # Lines that are added, left out or moved, and other names, change nothing for those that stay.
    more = [sample(f"m{n}", f"other {n}") for n in range(500)]
    later = splits.deal(more + lines[::-1][:450], shares)
    assert {key: later[key] for key in dealt if key in later} == {key: dealt[key] for key in dealt if key in later}
    # A sample with two pictures binds what is about either, here all of them.
    chain = [sample(f"c{n}", f"picture {n}", f"picture {n + 1}") for n in range(20)]
    dealt = splits.deal([*chain, *more], shares)
    assert len({dealt[line.key] for line in chain}) == 1


def test_few_pictures_leave_no_split_empty_that_was_asked_for():
    for number in range(3, 30):
        lines = [sample(f"k{n}", number, n) if n == 0 else sample(f"k{n}", n) for n in range(number)]
        assert set(splits.deal(lines, splits.Shares.read("90/5/5")).values()) == {"train", "val", "test"}
    two = [sample("a", 1), sample("b", 1), sample("c", 2)]
    with pytest.raises(ValueError, match="nothing for (val|test), since the 3 samples are about 2 picture"):
        splits.deal(two, splits.Shares.read("90/5/5"))
    assert sorted(splits.deal(two, splits.Shares.read("67/33")).values())[0] == "train"
    with pytest.raises(ValueError, match="about 1 picture.* give more of them, or leave --split out"):
        splits.deal(two[:2], splits.Shares.read("67/33"))
    # Neither chance nor a large group takes the data away from training.
    for number in range(6, 40):
        lines = [sample(f"k{n}", max(0, n - number // 2)) for n in range(number)]
        dealt = list(splits.deal(lines, splits.Shares.read("70/15/15")).values())
        assert dealt.count("val") <= max(1, 1.5 * 0.15 * number) and dealt.count("train") >= number // 2
    # Without --split one sample is enough, and no more than the share is taken for validation.
    usual = splits.Shares.read(splits.DEFAULT, asked=False)
    assert splits.deal([sample("a", 1)], usual) == {"a": "train"}
    pairs = [sample(f"{letter}{n}", n) for n in range(5) for letter in "ab"]
    assert set(splits.deal(pairs, usual).values()) == {"train"}


def test_a_test_of_its_own_shares_no_picture_with_the_rest(pictures, tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("cat.jpg", "renamed.jpg"):
        shutil.copy(pictures / "cat.jpg", tmp_path / "pictures" / name)
    tested = [{"id": "t", "image": "cat.jpg", "messages": TURN}]
    (tmp_path / "test.jsonl").write_text(json.dumps(tested[0]) + "\n")
    lines = [{"id": "a", "image": "renamed.jpg", "messages": TURN}, {"id": "b", "messages": TURN}]
    result = run_prepare(tmp_path / "pictures", tmp_path, lines, "--test", tmp_path / "test.jsonl")
    assert result.returncode == 1
    assert "own.jsonl line 1: a picture or video of it is that of the test's test.jsonl line 1, too" in result.stderr
    options = ["--test", tmp_path / "test.jsonl", "--skip-bad"]
    output = succeeded(run_prepare(tmp_path / "pictures", tmp_path, lines, *options)).stdout
    assert set(stored(tmp_path / "shards", "test-*.tar")) == {"t"}
    assert set(stored(tmp_path / "shards", "train-*.tar")) == {"b"}
    assert re.search("left out +1 lines with a mistake", output)


def test_shards_are_bounded_and_the_same_every_time(tmp_path):
    samples = [(f"k{n}", {"json": b"{}", "img0.jpg": bytes(1000)}) for n in range(10)]
    for name, limits, sizes in (
        ("a", (4, 10**9), [4, 4, 2]),
        ("b", (4, 10**9), [4, 4, 2]),
        ("c", (99, 2500), [3, 3, 3, 1]),
    ):
        (tmp_path / name).mkdir()
        assert write_shards(tmp_path / name, {"train": iter(samples)}, *limits) == {"train": 10}
        found = []
        for shard in sorted((tmp_path / name).glob("*.tar")):
            with tarfile.open(shard) as tar:
                assert {(m.mtime, m.uid, m.mode) for m in tar} == {(0, 0, 0o644)}
                found.append(len(tar.getnames()) // 2)
        assert found == sizes
    first, second = ([file.read_bytes() for file in sorted((tmp_path / n).glob("*.tar"))] for n in "ab")
    assert first == second
    with pytest.raises(ValueError, match="a.b"):
        write_shards(tmp_path / "a", {"train": [("a.b", {"json": b"{}"})]})


def test_a_folder_is_published_whole_or_not_at_all(tmp_path):
    with pytest.raises(KeyError), published(tmp_path / "out") as folder:
        (folder / "x").touch()
        raise KeyError
    assert not list(tmp_path.iterdir())
    with published(tmp_path / "out") as folder:
        (folder / "x").touch()
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="exists already"), published(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "x"]


# --- docs/own_data.md ------------------------------------------------------------------------------------------------

DOCUMENT = (REPOSITORY / "docs" / "own_data.md").read_text()
EXAMPLE = (REPOSITORY / "docs" / "own_data.jsonl").read_text().splitlines()


def test_the_document_shows_lines_of_its_example_and_names_every_field():
    shown = DOCUMENT.split("```json\n")[1].split("```")[0].splitlines()
    assert len(shown) >= 5 and set(shown) <= set(EXAMPLE) and len(EXAMPLE) == 20
    found_out = {"part", "width", "height", "duration", "fps", "num_frames", "role", "content"}
    tasks = [schema.Caption, schema.Question, schema.MultipleChoice, schema.Pointing, schema.Tracking, schema.Chat]
    names = {field.name for kind in (*tasks, schema.Example, schema.Video) for field in dataclasses.fields(kind)}
    assert [name for name in sorted(names - found_out) if f"`{name}`" not in DOCUMENT] == []
    assert [kind.task for kind in tasks if f"| `{kind.task}` |" not in DOCUMENT] == []
    styles = POINTS_ONLY | POINTS_THEN_COUNT | COUNT_THEN_POINTS | COUNT_ONLY | TRACK_ALL | TRACK_ENDS | TRACK_ONE
    assert [style for style in styles - {"cosyn_point", "count"} if f"`{style}`" not in DOCUMENT] == []


@pytest.mark.slow
def test_commands_of_the_document(sample, tmp_path):
    """From the lines to the exported model's answer, as the document has it but in other folders.

    The sample world is that of other tests; the fixture `sample` runs the command that makes it.
    """
    blocks = re.findall(r"<!-- tested -->\n```\n(.*?)```", DOCUMENT, re.DOTALL)
    commands = [line for block in blocks for line in block.strip().splitlines()]
    assert len(commands) == 6 and commands[0] == "python tools/make_sample_data.py --out data/sample"
    for command in commands[1:]:
        command = command.replace("data/sample", str(sample)).replace("runs/own_data", f"{tmp_path}/runs")
        program, *arguments = shlex.split(command)
        assert program == "python"
        output = succeeded(python(*arguments)).stdout
    listed = (tmp_path / "runs" / "inspect" / "samples.js").read_text()
    where = re.findall(
        r'"where": "own_data.jsonl, line (\d+)(?:, (?!held)[^",]*)?(, held out for validation)?"', listed
    )
    assert listed.count('"page": "samples/') == 20 and sorted(int(line) for line, _ in where) == list(range(1, 21))
    assert where == sorted(where, key=lambda entry: (entry[1], int(entry[0]))) and where[-1][1]
    [points] = parse(output)
    [(image, [point])] = points.groups
    assert (points.label, image) == ("green triangle", 1) and np.allclose(point, (0.49, 0.821), atol=0.05)
    check_example(sample / "quiz", {key: e for key, (e, _) in stored(tmp_path / "runs" / "shards").items()})


def check_example(pictures, examples):
    """The example's points are on what they name."""
    checked = 0
    for key, example in examples.items():
        record = json.loads(EXAMPLE[int(key) - 1])
        origin, named = example.origin, [record.get("image"), record.get("video"), *record.get("images", [])]
        assert (origin.file, origin.place) == ("own_data.jsonl", f"line {int(key)}")
        assert (origin.unit, origin.media) == (record.get("unit", "fraction"), [name for name in named if name])
        names = record.get("images") or [record["image"]] if "video" not in record and "messages" not in record else []
        opened = [np.asarray(Image.open(pictures / name)).astype(int) for name in names]
        for task in (branch for branch in example.branches if isinstance(branch, schema.Pointing)):
            colour = COLOURS.get(task.label.split()[0])
            for image, points in task.points:
                picture = opened[int(image) - 1]
                for x, y in points:
                    pixel = picture[int(y * picture.shape[0]), int(x * picture.shape[1])]
                    nearest = min(COLOURS.values(), key=lambda value: np.abs(pixel - value).max())
                    assert np.abs(pixel - nearest).max() < 8 and colour in (None, nearest)
                    checked += 1
    assert checked > 15
