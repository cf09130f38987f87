"""Where the files that a row names are found, and at which rate frames are taken."""

import json
from pathlib import Path

import pytest
from published_sets import video_file

from molmo2_nemo.catalogue.raw import RawSource
from molmo2_nemo.prepare.converters.common import Clip, Draft
from molmo2_nemo.prepare.draft_to_sample import pack
from molmo2_nemo.prepare.find_media import Dropped, find_frames, find_media

TASK = {"task": "question", "question": "Q?", "answers": ["A"], "style": "s"}


@pytest.fixture
def raw(tmp_path):
    def make(*names: str) -> RawSource:
        for name in names:
            path = tmp_path / "raw/any" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        (tmp_path / "raw/any/fetched.json").write_text(json.dumps({"complete": True}))
        return RawSource(tmp_path, "any")

    return make


def test_suffixes_are_compared_without_case_and_videos_below_hub_are_found(raw):
    source = raw("manual/P01/videos/P01_01.MP4", "hub/train/videos/b.mp4", "hub/one/c.mp4", "hub/two/c.mp4")
    assert find_media(["P01_01.mp4"], source).name == "P01_01.MP4"
    assert find_media(["videos/P01_01.mp4"], source).name == "P01_01.MP4"
    assert find_media(["b.mp4"], source).parts[-3:] == ("train", "videos", "b.mp4")
    with pytest.raises(Dropped, match="several files end with .* below hub/one, hub/two: rows must name the folder"):
        find_media(["c.mp4"], source)  # of two, none is taken
    assert find_media(["two/c.mp4"], source).parts[-2] == "two"


def test_a_name_of_several_pictures_is_told_with_their_folders(raw, tmp_path, monkeypatch):
    raw("extracted/images/train/0.jpg", "extracted/images/test/0.jpg", "extracted/images/test/1.jpg")
    monkeypatch.chdir(tmp_path)
    source = RawSource(Path("."), "any")
    with pytest.raises(Dropped, match="several files .* below extracted/images/test, extracted/images/train: rows"):
        find_media("0.jpg", source)
    assert find_media("test/0.jpg", source).parts[-2] == "test"
    for name in ("1.jpg", "2.jpg", "../0.jpg"):
        with pytest.raises(Dropped, match="not on disk"):
            find_media(name, source)


def test_frames_of_a_name_are_those_of_one_folder(raw):
    source = raw(
        *(f"manual/{top}/x/{number}.{suffix}" for top, suffix in (("JPEGImages", "jpg"), ("Annotations", "png"))
          for number in (10, 9)),
        "manual/Mose/a/y/img1/1.JPG", "manual/other/y/2.jpg", "manual/only/z/notes.txt", "manual/deep/z/imgs/3.jpg",
    )  # fmt: skip
    assert [frame.name for frame in find_frames(["x"], source)] == ["9.jpg", "10.jpg"]
    with pytest.raises(Dropped, match="several folders of frames"):
        find_frames(["y"], source)
    assert [frame.name for frame in find_frames(["mose/y", "mose/**/y"], source)] == ["1.JPG"]
    assert [frame.name for frame in find_frames(["z"], source)] == ["3.jpg"]


def test_links_to_archives_that_several_sets_share_are_followed(raw, tmp_path):
    source = raw("manual/a.txt")
    (tmp_path / "raw/.shared/1/extracted/train/v").mkdir(parents=True)
    (tmp_path / "raw/.shared/1/extracted/train/v/0.jpg").write_bytes(b"x")
    (tmp_path / "raw/any/extracted").mkdir()
    (tmp_path / "raw/any/extracted/train").symlink_to("../../.shared/1/extracted/train")
    assert [frame.name for frame in find_frames(["train/v"], source)] == ["0.jpg"]


@pytest.mark.parametrize(("fps", "frames"), [(24, 6), (6, 21)])
def test_frames_at_a_native_rate_are_thinned_unless_the_video_has_the_rows_rate_already(raw, tmp_path, fps, frames):
    source = raw("manual/v.mp4")
    (tmp_path / "raw/any/manual/v.mp4").write_bytes(video_file({"video": 21, "fps": fps}, "v.mp4"))
    parts, _, _ = pack(Draft([TASK], video=Clip(["v.mp4"], fps=6.0, native_fps=24.0)), source)
    video = json.loads(parts["json"])["video"]
    assert (video["num_frames"], video["fps"]) == (frames, 6)
