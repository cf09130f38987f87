"""What `download.py verify` says of a set on disk, and which sets `prepare.py` refuses by a sample of them."""

import json

import download
import numpy as np
import pytest
import yaml
from published_sets import picture_file

from molmo2_nemo.catalogue.datasets import load_catalogue
from molmo2_nemo.catalogue.raw import media_name
from molmo2_nemo.data.pictures import read_image
from molmo2_nemo.fetch.data_set import FetchResult
from molmo2_nemo.fetch.inventory import doctor
from molmo2_nemo.fetch.journal import Journal
from molmo2_nemo.fetch.on_disk import remove_broken
from molmo2_nemo.files import sha256_of
from molmo2_nemo.prepare.converters.common import Converter, Draft, Drop, pointing
from molmo2_nemo.prepare.stage_datasets import StageOptions, prepare_stage
from molmo2_nemo.prepare.trial import try_rows
from molmo2_nemo.prepare.verify import REMOVED, refusal, report, take

ENTRY = {
    "name": "mine",
    "source": {"kind": "hf", "hf": {"repo": "me/mine", "split": "train"}},
    "media": {"kind": "archive", "hf": {"repo": "me/mine", "files": ["pictures.zip"]}},
    "fields": {"image": "name", "label": "text", "points": "list"},
    "convert": {"kind": "pointing", "unit": "percent"},
    "license": "mit",
}


@pytest.fixture
def mine(tmp_path):
    """A function that puts rows and pictures onto the disk and returns the entry and the catalogue's file."""

    def put(rows: list[dict], pictures: int, media: dict | None = None):
        folder = tmp_path / "raw" / "mine"
        (folder / "hub").mkdir(parents=True)
        (folder / "extracted" / "pictures").mkdir(parents=True)
        (folder / "hub" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for number in range(pictures):
            data = picture_file({"picture": [320, 180], "squares": [[40, 30]]}, "x.jpg")
            (folder / "extracted" / "pictures" / f"{number}.jpg").write_bytes(data)
        note = {"name": "mine", "complete": True, "splits": {"train": ["hub/train.jsonl"]}, "counts": {}, "media": {}}
        (folder / "fetched.json").write_text(json.dumps(note))
        file = tmp_path / "datasets.yaml"
        file.write_text(yaml.safe_dump({"datasets": [ENTRY | ({"media": media} if media else {})]}))
        return load_catalogue(file).sets[0], file

    return put


def row(number: int, x: float = 12.5, y: float = 16.7, **changes) -> dict:
    return {"image": f"{number}.jpg", "label": "square", "points": [{"x": x, "y": y}], **changes}


def test_what_fits_is_said_with_its_range(mine, tmp_path):
    entry, _ = mine([row(n) for n in range(6)], pictures=6)
    found = take(entry.model_dump(), tmp_path)
    lines, fits = report(entry, tmp_path, found)
    assert fits and found.share_lost == 0 and len(found.samples) == 6
    assert any("from 12.5 to 16.7 (percent)" in line for line in lines)
    pixels = read_image(next(data for name, data in found.samples[0].items() if name.startswith("img")))
    assert np.all(pixels[30, 40] > (200, 200, -1))


@pytest.mark.parametrize(
    "wrong, kind, said",
    [
        (row(99), "layout", "its picture or video is not on disk"),
        ({"image": "0.jpg", "label": "square"}, "columns", "no column 'points'"),
        (row(0, x=1250), "coordinates", "far outside of its picture, if its unit is percent"),
    ],
)
def test_what_does_not_fit_is_named_by_what_it_is_about(mine, tmp_path, wrong, kind, said):
    entry, _ = mine([*(row(n) for n in range(6)), wrong], pictures=6)
    lines, fits = report(entry, tmp_path, found := take(entry.model_dump(), tmp_path))
    assert not fits
    [line] = [line for line in lines if "DOES NOT FIT" in line]
    assert line.strip().startswith(kind) and said in line
    assert "mine loses 14% of a sample (1 of 7 annotations), more than --max-dropped 0.05" in refusal(
        found, "mine", 0.05
    )
    assert refusal(found, "mine", 0.2) is None


def test_fractions_that_are_called_percent_are_doubted(mine, tmp_path):
    entry, _ = mine([row(n, x=0.125, y=0.167) for n in range(6)], pictures=6)
    found = take(entry.model_dump(), tmp_path)
    lines, fits = report(entry, tmp_path, found)
    doubt = found.coordinates.doubt
    assert "at most 1, as fractions are, and the unit is percent: correct `unit`" in doubt
    assert not fits and any(doubt in line for line in lines)


def test_prepare_refuses_the_unit_that_verify_refuses_and_fetch_warns_of_it(mine, tmp_path):
    gone = {"kind": "url-list", "columns": ["image"]}
    entry, file = mine([row(n, x=0.125, y=0.167) for n in range(6)], pictures=6, media=gone)
    options = {"stage": 2, "out": tmp_path, "catalogue": file, "shards": 1, "check_room": False, "quiet": True}
    doubt = take(entry.model_dump(), tmp_path).coordinates.doubt
    [state] = prepare_stage(StageOptions(**options)).states
    assert state.problem == f"mine does not fit: {doubt}, or take it as it is with --max-dropped 1"
    fetched = FetchResult("mine", "complete")
    download.check_use(fetched, entry, tmp_path)
    assert fetched.state == "complete" and f"warning: {doubt}" in fetched.reason
    (tmp_path / "raw/mine/hub/train.jsonl").write_text(
        "".join(json.dumps(row(n, x=n + 1, y=1)) + "\n" for n in range(6))
    )
    assert try_rows(entry.model_dump(), tmp_path).doubt is None  # the first row alone would be doubted
    assert prepare_stage(StageOptions(**options)).succeeded


@pytest.mark.parametrize("outside, fits", [(1, True), (2, False)])
def test_more_than_a_few_points_outside_of_their_picture_are_of_another_unit(mine, tmp_path, outside, fits):
    """Both coordinates of a point that is moved are outside, and it counts once."""
    rows = [row(0, x=110, y=120) for _ in range(outside)] + [row(0, x=10 + n, y=16.7) for n in range(29 - outside)]
    entry, file = mine(rows, pictures=1)
    found = take(entry.model_dump(), tmp_path)
    lines, does_fit = report(entry, tmp_path, found)
    assert (does_fit, found.points, found.moved) == (fits, 29, outside)
    assert any(f"{outside} of 29 points moved to the border" in line for line in lines)
    if fits:
        assert refusal(found, "mine", 0) is None
        return
    said = "2 of 29 points lie outside of their picture, as those of another unit than percent do: correct `unit`"
    assert any("DOES NOT FIT" in line and said in line for line in lines)
    assert refusal(found, "mine", 0.05).startswith(f"mine does not fit: {said}")
    assert refusal(found, "mine", 0.1) is None and report(entry, tmp_path, found, 0.1)[1]


def test_addresses_that_are_gone_say_nothing_about_the_form(mine, tmp_path):
    entry, _ = mine([row(n) for n in range(8)], pictures=6, media={"kind": "url-list", "columns": ["image"]})
    found = take(entry.model_dump(), tmp_path)
    assert (found.gone, found.share_lost) == (2, 0)


@pytest.mark.parametrize("partial", [False, True])
def test_pictures_that_were_fetched_and_removed_are_lost(mine, tmp_path, partial):
    addresses = [f"https://there/{number}.jpg" for number in range(9)]
    of_list = {"kind": "url-list", "columns": ["image"]}
    entry, _ = mine([row(0, image=address) for address in addresses], pictures=0, media=of_list)
    data = picture_file({"picture": [320, 180], "squares": [[40, 30]]}, "x.jpg")
    media, lines = tmp_path / "raw/mine/media", []
    for address in addresses[:6]:  # what the other three had is gone
        path = media / f"{media_name(address)}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        file = str(path.relative_to(media))
        lines.append(json.dumps({"url": address, "file": file, "bytes": len(data), "sha256": sha256_of(path)}) + "\n")
    (media / "index.jsonl").write_text("".join(lines))
    removed = [media / f"{media_name(address)}.jpg" for address in addresses[:2]]
    for path in removed:
        path.unlink()
    found = take(entry.model_dump(), tmp_path, partial=partial)
    assert (found.gone, found.lost, found.kept) == (3, {REMOVED: 2}, 4)
    lines, fits = report(entry, tmp_path, found)
    assert not fits and any("layout" in line and f"DOES NOT FIT: 2 x {REMOVED}" in line for line in lines)
    assert "mine loses 33% of a sample (2 of 6 annotations)" in refusal(found, "mine", 0.05)
    # What the sentence says of doctor and of fetch --verify.
    problems = [problem for problem in doctor([entry], tmp_path, False) if "is missing" in problem.what]
    assert sorted(problem.what.split()[0] for problem in problems) == sorted(
        str(path.relative_to(tmp_path / "raw/mine")) for path in removed
    )
    for problem in problems:
        assert problem.fix.startswith("python tools/download.py fetch mine ") and "--verify" in problem.fix
    assert remove_broken(media.parent) == 2
    assert sorted(Journal(media / "index.jsonl", "url").records) == addresses[2:6]


def test_what_a_rule_leaves_out_is_not_lost_and_rows_are_spread(mine, tmp_path, monkeypatch):
    def convert(of_row):
        if of_row["image"] == "1.jpg":
            yield Drop("a rule")
        else:
            yield Draft([pointing("square", [[1, [[12.5, 16.7]]]], "pointing")], [of_row["image"]], unit="percent")

    rule = Converter(convert)
    for module in ("verify", "spool"):
        monkeypatch.setattr(f"molmo2_nemo.prepare.{module}.converter_of", lambda entry: rule)
    entry, _ = mine([row(n % 6) for n in range(60)], pictures=6)
    found = take(entry.model_dump(), tmp_path, wanted=12)
    assert found.share_lost == 0 and found.left_out == {"a rule": 2} and found.rows == 12


def test_prepare_refuses_a_set_that_loses_much_unless_told_otherwise(mine, tmp_path):
    _, file = mine([row(n) for n in range(12)], pictures=10)
    options = {"stage": 2, "out": tmp_path, "catalogue": file, "shards": 1, "check_room": False, "quiet": True}
    refused = prepare_stage(StageOptions(**options))
    assert not refused.succeeded and not (tmp_path / "mine").exists()
    assert "2 x its picture or video is not on disk" in refused.states[0].problem
    taken = prepare_stage(StageOptions(**options, max_dropped=0.2))
    assert taken.succeeded and taken.states[0].made.train_samples + taken.states[0].made.val_samples == 10
    with pytest.raises(ValueError, match="--max-dropped 5 is not from 0 to 1"):
        StageOptions(**options, max_dropped=5)


def test_verify_and_prepare_have_one_bound(mine, tmp_path, capsys):
    """A loss of 4 % is taken by both, and one of 8 % by neither, unless they are told another bound."""
    _, file = mine([row(n % 24 if n else 99) for n in range(25)], pictures=24)
    given = ["verify", "mine", "--root", str(tmp_path), "--catalogue", str(file), "--no-pages"]
    assert download.main(given) == 0
    assert "lost:        4.0% of 25 annotations, within --max-dropped 0.05" in capsys.readouterr().out
    assert download.main([*given, "--max-dropped", "0.03"]) == 1
    entry = load_catalogue(file).sets[0].model_dump()
    assert refusal(take(entry, tmp_path), "mine", 0.05) is None and refusal(take(entry, tmp_path), "mine", 0.03)


def test_the_command_writes_pages_and_its_status_says_whether_all_fits(mine, tmp_path, capsys):
    _, file = mine([row(n) for n in range(3)], pictures=3)
    given = ["verify", "mine", "--root", str(tmp_path), "--catalogue", str(file), "--html", str(tmp_path / "pages")]
    assert download.main([*given, "--samples", "2"]) == 0
    assert "lost:        0.0% of 2 annotations" in capsys.readouterr().out
    page = (tmp_path / "pages" / "samples" / "00001.html").read_text()
    assert "square" in page and (tmp_path / "pages" / "samples" / "00001" / "picture0.png").is_file()
    (tmp_path / "raw/mine/extracted/pictures/0.jpg").unlink()
    assert download.main([*given, "--no-pages"]) == 1
