"""What a fetch says of columns and media that are not there, and `list` and `plan` of files that changed."""

import os
import re
import time

import download
import prepare
import pytest
from fetch_servers import Repo, picture
from programs import run
from test_fetch import entry, fetched, hub, lines, media, write_catalogue  # noqa: F401 (fixtures)
from test_fetch_archives import make_zip

from molmo2_nemo.catalogue.datasets import load_catalogue
from molmo2_nemo.fetch import on_disk
from molmo2_nemo.fetch.inventory import doctor, state_of
from molmo2_nemo.fetch.plan import plan_downloads

ASKED = {"fields": {"image": "name", "question": "text", "answer": "text"}, "convert": {"kind": "question"}}


def test_a_missing_column_is_named_with_those_that_exist_after_the_first_file(hub, tmp_path):  # noqa: F811
    rows = [{"photo": "1.jpg", "question": "Q?", "answer": "A"}]
    files = {f"train-{n:05}-of-00009.jsonl": lines(rows) for n in range(9)} | {"pictures.zip": b"not asked for"}
    hub.repos["me/mine"] = Repo(files)
    archive = {"kind": "archive", "hf": {"repo": "me/mine", "files": ["pictures.zip"]}}
    result = fetched(tmp_path, entry(media=archive, **ASKED))
    assert result.state == "failed"
    assert "mine has no column image: it has answer, photo, question (hub/train-00000-of-00009.jsonl)" in result.reason
    assert [path for path in hub.asked if "/resolve/" in path] == [
        f"/datasets/me/mine/resolve/{'a' * 40}/train-00000-of-00009.jsonl"
    ]


def test_the_column_of_a_filter_must_be_there_too(hub, tmp_path):  # noqa: F811
    hub.repos["me/mine"] = Repo({"train.jsonl": lines([{"a": 1}])})
    source = {"kind": "hf", "hf": {"repo": "me/mine", "split": "train", "filter": "kind == x"}}
    assert "mine has no column kind: it has a (hub/train.jsonl)" in fetched(tmp_path, entry(source=source)).reason


def test_columns_of_no_known_form_are_told_before_the_first_byte(hub, tmp_path, capsys):  # noqa: F811
    file = write_catalogue(tmp_path, entry(fields={"photo": "image"}))
    assert download.main(["fetch", "mine", "--quiet", "--catalogue", str(file), "--root", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "mine has the columns photo, which are those of no known form" in said.err
    assert "mine failed" in said.out  # there is no such repository


@pytest.fixture
def mine(hub, media, tmp_path):  # noqa: F811
    """A complete set with rows, an archive and a list of addresses; the entry, the root and its folder."""
    zipped = make_zip(tmp_path / "x.zip", {"a/1.jpg": picture(1), "a/2.jpg": picture(2)}).read_bytes()
    rows = [{"u": f"{media.url}/ok/{number}.jpg"} for number in range(4)]
    hub.repos["me/mine"] = Repo({"train.jsonl": lines(rows), "more.zip": zipped})
    pictures = {"kind": "url-list", "columns": ["u"], "hf": {"repo": "me/mine", "files": ["more.zip"]}}
    assert fetched(tmp_path, entry(media=pictures, size_gb=1)).state == "complete"
    catalogue = load_catalogue(tmp_path / "datasets.yaml")
    assert state_of(catalogue.sets[0], tmp_path) == "complete"
    return catalogue, tmp_path, tmp_path / "raw" / "mine"


def _a_picture(folder):
    return next(folder.glob("media/*/*.jpg"))


def _touch_later(path):
    os.utime(path, (time.time() + 60,) * 2)


DAMAGES = {
    "rows are gone": ("damaged", lambda folder: (folder / "hub/train.jsonl").unlink()),
    "rows are cut": ("damaged", lambda folder: os.truncate(folder / "hub/train.jsonl", 9)),
    "rows are newer": ("changed", lambda folder: _touch_later(folder / "hub/train.jsonl")),
    "a picture is gone": ("damaged", lambda folder: _a_picture(folder).unlink()),
    "a picture is cut": ("damaged", lambda folder: os.truncate(_a_picture(folder), 9)),
    "a picture is newer": ("changed", lambda folder: _touch_later(_a_picture(folder))),
    "one of an archive is gone": ("damaged", lambda folder: next(folder.glob("extracted/*/a/1.jpg")).unlink()),
    "one of an archive is cut": ("damaged", lambda folder: os.truncate(next(folder.glob("extracted/*/a/1.jpg")), 9)),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_list_and_plan_do_not_call_complete_what_is_missing_or_changed(mine, name):
    (catalogue, root, folder), (state, damage) = mine, DAMAGES[name]
    damage(folder)
    assert state_of(catalogue.sets[0], root) == state
    [row] = plan_downloads(catalogue.sets, catalogue, root, 10**9, None)
    if state == "damaged":
        assert row.action == "fetch" and row.gigabytes < 1e-4 and "missing or have another size" in row.why
        assert list(doctor(catalogue.sets, root))
    else:
        assert row.action == "there" and "doctor mine --deep" in row.why


def test_what_is_newer_is_read_by_the_next_fetch_and_fetched_again_if_its_bytes_differ(mine, hub):  # noqa: F811
    catalogue, root, folder = mine
    rows = folder / "hub/train.jsonl"
    whole = rows.read_bytes()
    [same] = catalogue.datasets
    same = same.model_dump(mode="json", exclude_none=True, exclude={"catalogue"})
    for changed in (whole, whole.replace(b"ok", b"OK")):
        rows.write_bytes(changed)
        _touch_later(rows)
        assert fetched(root, same).state == "complete" and rows.read_bytes() == whole


def test_of_very_many_pictures_the_times_of_their_folders_are_compared(mine, monkeypatch):
    catalogue, root, folder = mine
    monkeypatch.setattr(on_disk, "GLANCE_BYTES", 1)
    assert state_of(catalogue.sets[0], root) == "complete"
    gone = _a_picture(folder)
    gone.unlink()
    _touch_later(gone.parent)
    assert state_of(catalogue.sets[0], root) == "changed"


def test_files_of_the_user_that_are_taken_away_are_missed(tmp_path):
    source = {"kind": "manual", "instructions": "ask", "page": "https://a.org/b", "layout": ["train.json"]}
    by_hand = entry(source=source, media={"kind": "manual", "layout": ["videos/*.mp4"]}, modality="video")
    manual = tmp_path / "raw/mine/manual"
    (manual / "videos").mkdir(parents=True)
    (manual / "train.json").write_text('[{"q": 1}]')
    (manual / "videos/1.mp4").write_bytes(b"video")
    assert fetched(tmp_path, by_hand).state == "complete"
    (manual / "videos/1.mp4").unlink()
    sets = load_catalogue(tmp_path / "datasets.yaml").sets
    assert state_of(sets[0], tmp_path) == "by hand"
    assert "manual/ lacks videos/*.mp4" in [problem.what for problem in doctor(sets, tmp_path)]
    assert fetched(tmp_path, by_hand).state == "by hand"


@pytest.mark.parametrize(("there", "warned"), [(20, False), (19, False), (10, True)])
def test_how_many_annotations_found_their_media_is_said_and_too_few_are_warned_of(
    hub,  # noqa: F811
    tmp_path,
    capsys,
    there,
    warned,
):
    rows = [{"image": f"{number}.jpg", "question": "Q?", "answer": "A"} for number in range(20)]
    zipped = make_zip(tmp_path / "x.zip", {f"{number}.jpg": picture(number) for number in range(there)}).read_bytes()
    hub.repos["me/mine"] = Repo({"train.jsonl": lines(rows), "pictures.zip": zipped})
    archive = {"kind": "archive", "hf": {"repo": "me/mine", "files": ["pictures.zip"]}}
    where = ["--catalogue", str(write_catalogue(tmp_path, entry(media=archive, **ASKED))), "--root", str(tmp_path)]
    assert download.main(["fetch", "mine", "--quiet", *where]) == 0
    said = capsys.readouterr().out
    assert "mine complete" in said and f"{there} of 20 annotations looked at have their media on disk" in said
    assert ("warning: see python tools/download.py verify mine" in said) == warned
    assert download.main(["doctor", "mine", *where]) == int(warned)
    assert ("10 of 20 annotations looked at have no media on disk" in capsys.readouterr().out) == warned
    # The same bound holds for verify.
    assert download.main(["verify", "mine", "--no-pages", *where]) == int(warned)


def test_media_of_another_set_are_taken_by_the_link_that_how_names(hub, tmp_path, capsys):  # noqa: F811
    rows = [{"image": f"a/{number}.jpg", "question": "Q?", "answer": "A"} for number in range(3)]
    hub.repos["me/mine"] = Repo({"train.jsonl": lines(rows)})
    by_hand = {"kind": "manual", "layout": ["**/*.jpg"]}
    owner = entry("owner", media=by_hand)
    file = write_catalogue(tmp_path, owner, entry(media=by_hand, media_of="owner", **ASKED))
    where = ["--catalogue", str(file), "--root", str(tmp_path)]
    (tmp_path / "raw/owner/manual/a").mkdir(parents=True)
    (tmp_path / "raw/mine").mkdir()
    for number in range(3):
        (tmp_path / f"raw/owner/manual/a/{number}.jpg").write_bytes(picture(number))
    assert download.main(["how", "mine", *where]) == 0
    [command] = [line for line in capsys.readouterr().out.splitlines() if "ln -s" in line]
    assert run(command.split()).returncode == 0
    assert download.main(["fetch", "mine", "--quiet", *where]) == 0
    assert "3 of 3 annotations looked at have their media on disk" in capsys.readouterr().out
    assert download.main(["doctor", "mine", *where]) == 0


def test_commands_that_are_printed_mean_the_same_files(hub, tmp_path, capsys):  # noqa: F811
    """Whatever says `python tools/download.py ...` says the root and the catalogue that were given, too."""
    rows = [{"image": f"{number}.jpg", "question": "Q?", "answer": "A"} for number in range(3)]
    hub.repos["me/mine"] = Repo({"train.jsonl": lines(rows)})
    file = write_catalogue(tmp_path, entry(media={"kind": "manual", "layout": ["**/*.jpg"]}, **ASKED))
    where = ["--catalogue", str(file), "--root", str(tmp_path)]
    found = set()

    def follow(*arguments: str, program=download.main) -> None:
        try:
            program([*arguments, *where])
        except SystemExit as end:
            print(end)
        said = capsys.readouterr()
        for command in re.findall(r"python tools/download\.py ([\w./ -]+)", said.out + said.err):
            words = command.rstrip(" .").split()
            options = words[words.index("--root") :]
            assert options[:4] == ["--root", str(tmp_path), "--catalogue", str(file)], command
            found.add(words[0])

    prepared = ("--stage", "2", "--out", str(tmp_path / "out"), "--no-room-check")
    (tmp_path / "out").mkdir()
    follow(*prepared, program=prepare.main_stage)  # not fetched
    assert found == {"fetch", "how"}
    for command in (["fetch", "mine", "--quiet"], ["how", "mine"], ["list"], ["doctor"]):
        follow(*command)
    found.clear()
    follow(*prepared, "mine", program=prepare.main_stage)  # fetched in part
    assert found == {"doctor", "how"}
    (tmp_path / "raw/mine/manual").mkdir()
    (tmp_path / "raw/mine/manual/0.jpg").write_bytes(picture(0))
    for command in (["fetch", "mine", "--quiet"], ["how", "mine"], ["list"], ["doctor"]):
        follow(*command)
    follow(*prepared, "mine", program=prepare.main_stage)  # 2 of 3 pictures are not there
    assert found == {"doctor", "how", "fetch", "verify"}
