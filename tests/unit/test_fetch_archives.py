"""Archives from strangers: contents come out whole, and nothing else does."""

import io
import os
import shutil
import stat
import tarfile
import zipfile

import pytest
from fetch_servers import Repo
from test_fetch import entry, fetched, hub, lines, media, tree  # noqa: F401 (fixtures)

from molmo2_nemo.catalogue.raw import RawSource
from molmo2_nemo.fetch.archives import BadArchive, Bounds, extract
from molmo2_nemo.fetch.on_disk import broken_files
from molmo2_nemo.files import sha256_of

ROOMY = Bounds(keep_free=0)


def make_zip(path, members: dict, compression=zipfile.ZIP_STORED, links=()):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, body in members.items():
            archive.writestr(zipfile.ZipInfo(name), body, compression)
        for name, target in links:
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(info, target)
    return path


def make_tar(path, members: dict, links=(), mode="w:gz", kinds=()):
    with tarfile.open(path, mode) as archive:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
        for name, kind in kinds:
            info = tarfile.TarInfo(name)
            info.type = kind
            archive.addfile(info)
    return path


FILES = {"a/1.txt": b"one", "a/b/2.bin": os.urandom(300_000), "3": b""}


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_contents_come_out_whole(tmp_path, make):
    archive = make(tmp_path / "x.archive", FILES, links=[("a/link", "1.txt")])
    found = extract(archive, tmp_path / "out/x", sha256_of(archive), ROOMY)
    assert tree(tmp_path / "out/x") == FILES and found.files == 3 and found.links == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize("name", ["../up", "/abs", "a/../../up", "..\\up", "C:\\x", "a/" + "n" * 300])
def test_a_name_that_leads_out_is_refused_and_nothing_is_left(tmp_path, make, name):
    archive = make(tmp_path / "x.archive", {"good": b"1", name: b"2"})
    with pytest.raises(BadArchive):
        extract(archive, tmp_path / "deep/er/out", sha256_of(archive), ROOMY)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"x.archive", "deep", "deep/er"}


@pytest.mark.parametrize("make", [make_zip, make_tar])
@pytest.mark.parametrize("target", ["/etc", "../..", "a/../../../x"])
def test_a_link_that_leads_out_is_refused(tmp_path, make, target):
    archive = make(tmp_path / "x.archive", {"good": b"1"}, links=[("a", target)])
    with pytest.raises(BadArchive):
        extract(archive, tmp_path / "out", sha256_of(archive), ROOMY)
    assert not (tmp_path / "out").exists()


def test_devices_and_locked_archives_are_refused(tmp_path):
    archive = make_tar(tmp_path / "x.tar", {}, kinds=[("dev", tarfile.CHRTYPE)])
    with pytest.raises(BadArchive, match="refused"):
        extract(archive, tmp_path / "out", "0" * 64, ROOMY)
    locked = bytearray(make_zip(tmp_path / "x.zip", {"a": b"1"}).read_bytes())
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "x.zip").write_bytes(locked)
    with pytest.raises(BadArchive, match="encrypted"):
        extract(tmp_path / "x.zip", tmp_path / "out", "0" * 64, ROOMY)


def test_what_explodes_is_stopped_before_it_does(tmp_path):
    bounds = Bounds(keep_free=0, free_ratio_bytes=2**20, max_files=50)
    zeros = make_zip(tmp_path / "zeros.zip", {"zeros": bytes(20 * 2**20)}, zipfile.ZIP_DEFLATED)
    tar = make_tar(tmp_path / "zeros.tar.gz", {"zeros": bytes(20 * 2**20)})
    many = make_zip(tmp_path / "many.zip", {str(n): b"" for n in range(51)})
    for archive, said in ((zeros, "explodes"), (tar, "explodes"), (many, "more than 50 files")):
        with pytest.raises(BadArchive, match=said):
            extract(archive, tmp_path / "out", sha256_of(archive), bounds)
    # A head that lies about the length of a member.
    lying = bytearray(make_zip(tmp_path / "l.zip", {"zeros": bytes(20 * 2**20)}, zipfile.ZIP_DEFLATED).read_bytes())
    at = lying.index(b"PK\x01\x02") + 24
    lying[at : at + 4] = (10).to_bytes(4, "little")
    (tmp_path / "l.zip").write_bytes(lying)
    with pytest.raises(BadArchive):
        extract(tmp_path / "l.zip", tmp_path / "out", "0" * 64, bounds)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".part*"))


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_a_stopped_extraction_goes_on(tmp_path, make):
    archive = make(tmp_path / "x.archive", FILES)

    class Stop(Exception):
        pass

    def stop(count):
        if count > 3:
            raise Stop

    with pytest.raises(Stop):
        extract(archive, tmp_path / "x", sha256_of(archive), ROOMY, stop)
    assert not (tmp_path / "x").exists()
    written = []
    extract(archive, tmp_path / "x", sha256_of(archive), ROOMY, written.append)
    assert tree(tmp_path / "x") == FILES and 3 not in written, "the first member was there already"


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_a_cut_archive_is_broken(tmp_path, make):
    whole = make(tmp_path / "x.archive", FILES).read_bytes()
    for share in (0.3, 0.9):
        (tmp_path / "cut").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(BadArchive):
            extract(tmp_path / "cut", tmp_path / "out", "0" * 64, ROOMY)
        assert not (tmp_path / "out").exists()


def test_an_archive_of_two_sets_is_fetched_once(hub, media, tmp_path):  # noqa: F811
    media.files["/train2014.zip"] = make_zip(tmp_path / "z", {"train2014/1.jpg": b"jpg"}).read_bytes()
    url = f"{media.url}/train2014.zip"
    hub.repos["me/mine"] = Repo({"train.jsonl": lines([{"image": "coco/train2014/1.jpg"}])})
    sets = [entry(name, media={"kind": "archive", "urls": [url]}) for name in ("one", "two")]
    for name in ("one", "two"):
        assert fetched(tmp_path, *sets, name=name).state == "complete"
        source = RawSource(tmp_path, name)
        assert source.media(next(source.rows())["image"]).read_bytes() == b"jpg"
    assert media.asked["/train2014.zip"] == 1
    # What is gone from the shared folder is noticed, and comes again.
    shutil.rmtree(next((tmp_path / "raw/.shared").iterdir()))
    assert list(broken_files(tmp_path / "raw/one")) == [("extracted/train2014", "is missing in raw/.shared")]
    assert fetched(tmp_path, *sets, name="one").state == "complete"
    assert media.asked["/train2014.zip"] == 2 and not list(broken_files(tmp_path / "raw/two"))


def test_archives_in_a_repository_are_unpacked_and_may_be_removed(hub, media, tmp_path):  # noqa: F811
    body = make_zip(tmp_path / "z", {"v/1.mp4": b"mp4"}).read_bytes()
    hub.repos["me/mine"] = Repo({"train.jsonl": lines([{"video": "v/1.mp4"}]), "videos.zip": body})
    videos = entry(media={"kind": "archive", "hf": {"repo": "me/mine", "files": ["*.zip"]}})
    assert fetched(tmp_path, videos, remove_archives=True).state == "complete"
    assert RawSource(tmp_path, "mine").media("v/1.mp4").read_bytes() == b"mp4"
    assert not (tmp_path / "raw/mine/hub/videos.zip").exists()
    asked = hub.asked.total()
    assert fetched(tmp_path, videos).reason == "was there already" and hub.asked.total() == asked


def test_files_of_plain_addresses_are_checked(hub, media, tmp_path):  # noqa: F811
    media.files |= {
        "/rows.json": b'[{"q": 1}]',
        "/cut.json": b'[{"q": 1}',
        "/page.zip": b"<html>quota</html>",
        "/text.zip": b"text",
    }
    source = lambda name: {"kind": "url", "urls": [f"{media.url}/{name}"]}  # noqa: E731
    nothing = {"kind": "none"}
    assert fetched(tmp_path, entry("a", source=source("rows.json"), media=nothing), name="a").state == "complete"
    assert list(RawSource(tmp_path, "a").rows()) == [{"q": 1}]
    for name, said in (
        ("cut.json", "a broken .json file"),
        ("page.zip", "a web page"),
        ("text.zip", "no archive"),
        ("none", "status 404"),
    ):
        result = fetched(tmp_path, entry("b", source=source(name), media=nothing), name="b")
        assert result.state == "failed" and said in result.reason, result


# Archives inside

INNER = {"J/v0/0.jpg": b"first", "J/v0/1.jpg": b"second"}


def packed(make, tmp_path, members: dict) -> bytes:
    return make(tmp_path / "packing", members).read_bytes()


def test_an_archive_inside_becomes_a_folder_of_its_name(tmp_path):
    """As the frames of MeViS come: MeViS_release.zip holds train/JPEGImages.tar. A third level stays packed."""
    deepest = packed(make_zip, tmp_path, {"deep": b"d"})
    third = packed(make_zip, tmp_path, {"three.zip": deepest, "x": b"1"})
    second = packed(make_tar, tmp_path, {"two.zip": third, **INNER})
    broken = packed(make_zip, tmp_path, INNER)[:-9]
    files = {
        "M/a.json": b"{}",
        "M/J.tar": second,
        "M/bad.zip": broken,
        "M/x.rar": b"Rar!\x1a\x07",
        "M/no.tar": b"no",
        "M/w.npz": deepest,
    }
    archive = make_zip(tmp_path / "x.archive", files)
    found = extract(archive, tmp_path / "out/x", sha256_of(archive), ROOMY)
    inside = {f"M/J.tar/{name}": body for name, body in INNER.items()}
    inside |= {"M/J.tar/two.zip/x": b"1", "M/J.tar/two.zip/three.zip": deepest}
    files.pop("M/J.tar")
    assert tree(tmp_path / "out/x") == files | inside
    assert (found.inside, found.packed, found.files) == (2, 3, len(files) + len(inside))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]


def test_bounds_hold_across_levels(tmp_path):
    bounds = Bounds(keep_free=0, free_ratio_bytes=2**20, max_files=20)
    zeros = make_zip(tmp_path / "z", {str(n): bytes(2**18) for n in range(3)}, zipfile.ZIP_DEFLATED).read_bytes()
    bomb = make_zip(tmp_path / "bomb", {f"{n}.zip": zeros for n in range(2)}, zipfile.ZIP_DEFLATED)
    many = packed(make_zip, tmp_path, {str(n): b"" for n in range(12)})
    crowd = make_zip(tmp_path / "crowd", {"a.zip": many, "b.zip": many})
    for archive, said in ((bomb, "explodes"), (crowd, "more than 20 files")):
        with pytest.raises(BadArchive, match=said):
            extract(archive, tmp_path / "out/x", sha256_of(archive), bounds)
    hostile = make_zip(tmp_path / "h", {"a": b"1", "b.zip": packed(make_zip, tmp_path, {"../up": b"1"})})
    with pytest.raises(BadArchive, match="leads out"):
        extract(hostile, tmp_path / "out/x", sha256_of(hostile), ROOMY)
    assert not list((tmp_path / "out").iterdir())


def test_stopped_anywhere_it_ends_with_the_same(tmp_path):
    inner = packed(make_tar, tmp_path, INNER | {"J/link": b""})
    twice = packed(make_zip, tmp_path, {"c.zip": packed(make_zip, tmp_path, INNER)})
    files = {"a/1": b"one", "J.tar": inner, "b.zip": twice}
    archive = make_zip(tmp_path / "x.archive", files)
    calm, steps = extract(archive, tmp_path / "calm/x", sha256_of(archive), ROOMY), []
    extract(archive, tmp_path / "steps/x", sha256_of(archive), ROOMY, steps.append)

    class Stop(Exception):
        pass

    for moment in range(len(steps)):
        left = [moment]

        def stop(count):
            left[0] -= 1
            if left[0] < 0:
                raise Stop

        for _ in range(2):
            left[0] = moment
            with pytest.raises(Stop):
                extract(archive, tmp_path / f"{moment}/x", sha256_of(archive), ROOMY, stop)
                raise Stop  # what was left took no more steps
            if (tmp_path / f"{moment}/x").exists():
                break
        assert extract(archive, tmp_path / f"{moment}/x", sha256_of(archive), ROOMY) == calm
        assert tree(tmp_path / f"{moment}") == tree(tmp_path / "calm")


def tar_head(name: bytes, size: int, kind: bytes = b"0") -> bytes:
    head = bytearray(512)
    head[: len(name)], head[257:265], head[156:157] = name, b"ustar\x0000", kind
    head[100:108] = b"0000644\0"
    head[124:136] = (b"\x80" if size >= 0 else b"\xff") + size.to_bytes(11, "big", signed=size < 0)
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


ODD_TARS = {
    "a name of 10 GB": (tar_head(b"x", 10 * 2**30, b"L") + bytes(9000), "a head of"),
    "a pax head of 10 GB": (tar_head(b"x", 10 * 2**30, b"x") + bytes(9000), "a head of"),
    "a size below 0": (tar_head(b"x", -512) + bytes(9000), "below 0"),
    "a petabyte": (tar_head(b"x", 10**15) + bytes(9000), "explodes"),
    "no end": (tar_head(b"x", 3) + bytes(512), "no end at byte 1,024"),
    "damaged amid": (tar_head(b"x", 3) + bytes(512) + b"G" * 512 + tar_head(b"y", 3) + bytes(2000), "no end at"),
    "nothing": (bytes(1024), "empty"),
}


@pytest.mark.parametrize("name", ODD_TARS)
def test_a_tar_that_lies_about_itself_is_refused(tmp_path, name):
    body, said = ODD_TARS[name]
    (tmp_path / "x.tar").write_bytes(body)
    with pytest.raises(BadArchive, match=said):
        extract(tmp_path / "x.tar", tmp_path / "out/x", "0" * 64, ROOMY)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_what_follows_the_last_member_is_checked_too(tmp_path):
    whole = bytearray(make_tar(tmp_path / "x.tar.gz", FILES).read_bytes())
    whole[-6] ^= 1  # of gzip's checksum
    (tmp_path / "x.tar.gz").write_bytes(whole)
    with pytest.raises(BadArchive, match="CRC"):
        extract(tmp_path / "x.tar.gz", tmp_path / "out", "0" * 64, ROOMY)


def test_members_of_odd_names_come_out(tmp_path):
    files = {".aside": b"1", "12:30.jpg": b"2", "new\nline": b"3", "./dot": b"4", "b" * 255: b"5"}
    archive = make_tar(tmp_path / "x.tar", files)
    found = extract(archive, tmp_path / "x", sha256_of(archive), ROOMY)
    assert found.files == 5 and {path.read_bytes() for path in (tmp_path / "x").iterdir()} == set(files.values())


def test_archives_of_one_name_do_not_meet(hub, media, tmp_path):  # noqa: F811
    bodies = [packed(make_zip, tmp_path, {f"{n}.jpg": b"%d" % n}) for n in range(4)]
    hub.repos["me/mine"] = Repo({"train.jsonl": b"{}", "a/images.zip": bodies[0], "b/images.zip": bodies[1]})
    media.files |= {"/a/images.zip": bodies[2], "/b/images.zip": bodies[3]}
    urls = [f"{media.url}/{folder}/images.zip" for folder in "ab"]
    sets = [
        entry(media={"kind": "archive", "hf": {"repo": "me/mine", "files": ["*/images.zip"]}, "urls": urls}),
        entry("other", media={"kind": "archive", "urls": urls[1:]}),
    ]
    assert fetched(tmp_path, *sets).state == "complete" and fetched(tmp_path, *sets, name="other").state == "complete"
    source = RawSource(tmp_path, "mine")
    assert [source.media(f"{n}.jpg").read_bytes() for n in range(4)] == [b"0", b"1", b"2", b"3"]
    before = tree(tmp_path / "raw")
    (tmp_path / "raw/mine/fetched.json").unlink()
    assert fetched(tmp_path, *sets).state == "complete" and tree(tmp_path / "raw") == before
    # Links to what sets share, and what is there, are looked at.
    link = next(path for path in (tmp_path / "raw/mine/extracted").iterdir() if path.is_symlink())
    (link / "3.jpg").write_bytes(b"9")
    assert [what for _, what in broken_files(tmp_path / "raw/other", deep=True)] == ["has changed"]
    assert fetched(tmp_path, *sets, name="other", verify=True).state == "complete"
    link.unlink()
    assert [what for _, what in broken_files(tmp_path / "raw/mine")] == ["is missing"]
    assert fetched(tmp_path, *sets, verify=True).state == "complete" and tree(tmp_path / "raw") == before
