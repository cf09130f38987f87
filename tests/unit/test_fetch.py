"""Fetching from servers on 127.0.0.1: the Hub's protocol through the real client, and hosts with bad manners."""

import hashlib
import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import pytest
import warm
import yaml
from fetch_servers import Hub, Media, Repo, picture
from PIL import Image
from programs import REPOSITORY, python, run

from molmo2_nemo.catalogue.datasets import HubFiles, load_catalogue
from molmo2_nemo.catalogue.raw import RawSource, media_name, size_on_disk
from molmo2_nemo.fetch.data_set import FetchOptions, Meter, fetch_set
from molmo2_nemo.fetch.hub import HubFile, Repository, choose_files, read_card
from molmo2_nemo.fetch.inventory import doctor, state_of
from molmo2_nemo.fetch.journal import Journal
from molmo2_nemo.fetch.media_check import BadContent, check_image
from molmo2_nemo.fetch.on_disk import broken_files
from molmo2_nemo.fetch.plan import plan_downloads
from molmo2_nemo.fetch.rules import Rules
from molmo2_nemo.fetch.url_list import DownloadProgress, NoNetwork, Wanted, fetch_list, remove_duplicates
from molmo2_nemo.fetch.web import Lost, check_address, is_private

# Short, so that what hangs is given up soon; 127.0.0.1 must be allowed.
RULES = Rules(jobs=16, per_host=16, tries=3, timeout=0.6, backoff=0.01, allow_private=True)


@pytest.fixture
def media():
    with Media() as server:
        yield server


@pytest.fixture
def hub(monkeypatch):
    """Serves the repositories that a test adds to `hub.repos`."""
    with Hub({}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        for name in ("HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield server


def entry(name="mine", **changes) -> dict:
    return {
        "name": name,
        "source": {"kind": "hf", "hf": {"repo": "me/mine", "split": "train"}},
        "media": {"kind": "in-parquet"},
        "fields": {"image": "image"},
        **changes,
    }


def write_catalogue(folder: Path, *entries: dict, **more) -> Path:
    path = folder / "datasets.yaml"
    path.write_text(yaml.safe_dump({"datasets": list(entries), **more}))
    return path


def fetched(root: Path, *entries: dict, name="mine", meter=None, held_out=(), **options):
    """Fetch one set in this process."""
    catalogue = load_catalogue(write_catalogue(root, *entries, held_out=list(held_out)))
    options = FetchOptions(root, **{"rules": RULES, **options})
    return fetch_set(catalogue.find([name])[0], catalogue, options, meter or Meter(), DownloadProgress())


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def tree(folder: Path) -> dict[str, bytes]:
    """Files that must not depend on what happened on the way."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("fetched.json", "lost.jsonl", ".lock")
    }


def in_media(root: Path, name="mine") -> set[str]:
    return {
        path.stem for path in (root / "raw" / name / "media").rglob("*.*") if path.suffix in (".jpg", ".png", ".bmp")
    }


def make_video(path: Path) -> Path:
    import av
    import numpy as np

    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        for n in range(16):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), n * 9, np.uint8))))
        container.mux(stream.encode())
    return path


# The Hub


def test_a_repository_comes_whole_at_a_commit_that_stays_pinned(hub, tmp_path):
    files = {
        "README.md": (
            b"---\nlicense: odc-by\nconfigs:\n- config_name: default\n  data_files:\n"
            b"  - {split: train, path: rows/part*}\n---\n"
        ),
        "rows/part-0.jsonl": lines([{"a": 1}]),
        "rows/part-1.jsonl": lines([{"a": 2}]),
        "rows/test-0.jsonl": lines([{"a": 3}]),
        "notes.txt": b"x",
    }
    hub.repos["me/mine"] = Repo(dict(files), large=frozenset(["rows/part-1.jsonl"]))
    assert fetched(tmp_path, entry()).state == "complete"
    source = RawSource(tmp_path, "mine")
    assert [row["a"] for row in source.rows("train")] == [1, 2]
    assert source.info["revision"] == "a" * 40 and source.info["license"] == "odc-by"
    assert json.loads((tmp_path / "raw/revisions.json").read_text()) == {"me/mine": "a" * 40}
    assert not list((tmp_path / "raw/mine").rglob(".part"))
    # A second fetch asks for nothing; a repaired one for what is broken, at the old commit.
    asked = hub.asked.total()
    assert fetched(tmp_path, entry()).reason == "is already complete" and hub.asked.total() == asked
    (tmp_path / "raw/mine/hub/rows/part-0.jsonl").write_bytes(lines([{"a": 9}]))
    assert [what for _, what in broken_files(tmp_path / "raw/mine", deep=True)] == ["has changed"]
    assert fetched(tmp_path, entry(), verify=True).state == "complete"
    assert [row["a"] for row in source.rows("train")] == [1, 2]
    hub.repos["me/mine"] = replace(hub.repos["me/mine"], sha="b" * 40)
    (tmp_path / "raw/mine/fetched.json").unlink()
    result = fetched(tmp_path, entry())
    assert result.state == "failed" and "has no commit aaaa" in result.reason


@pytest.mark.slow
def test_a_file_that_comes_wrong_is_never_taken(hub, tmp_path):
    rows = {
        f"data/train-{kind}.jsonl": lines([{"kind": kind}] * 999) for kind in ("short", "html", "other", "503", "drip")
    }
    faults = {f"data/train-{kind}.jsonl": [kind] for kind in ("short", "html", "other", "503", "drip")}
    hub.repos["me/mine"] = Repo(rows, large=frozenset(rows), faults=faults)
    assert fetched(tmp_path, entry()).state == "complete"
    for name, body in rows.items():
        assert (tmp_path / "raw/mine/hub" / name).read_bytes() == body
    hub.repos["me/mine"].faults = {"data/train-other.jsonl": ["other"] * 99}
    (tmp_path / "raw/mine/hub/data/train-other.jsonl").unlink()
    result = fetched(tmp_path, entry())
    assert result.state == "failed" and "bytes that do not match the checksum on the Hub" in result.reason
    assert not (tmp_path / "raw/mine/hub/data/train-other.jsonl").exists()
    assert RawSource(tmp_path, "mine").info["complete"] is False


def test_gated_and_missing_repositories_end_in_a_sentence_with_the_page(hub, tmp_path, monkeypatch):
    hub.repos["me/mine"] = Repo({"train.jsonl": lines([{"a": 1}])}, gated=True)
    result = fetched(tmp_path, entry())
    assert result.state == "failed" and f"agree to its terms at {hub.url}/datasets/me/mine" in result.reason
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert fetched(tmp_path, entry()).state == "complete"
    other = entry("other", source={"kind": "hf", "hf": {"repo": "me/other"}})
    result = fetched(tmp_path, other, name="other")
    assert result.state == "failed" and "me/other is not on the Hub" in result.reason


def test_what_is_not_known_is_refused_not_guessed(hub, tmp_path):
    files = {"a/train-0.jsonl": lines([{"a": 1}]), "a/test-0.jsonl": lines([{}]), "b/train-0.jsonl": lines([{"a": 2}])}
    hub.repos["me/mine"] = Repo(files)
    for changes, said in (
        ({"confidence": "unsure", "note": "two sets have this name"}, "two sets have this name"),
        ({"fields": None}, "its columns are not known"),
    ):
        result = fetched(tmp_path, entry(**changes))
        assert result.state == "refused" and said in result.reason and not (tmp_path / "raw/mine").exists()
    for spec, said in (
        ({"split": "validation"}, "no files of the split validation: it holds a/test-0.jsonl"),
        ({"config": "c"}, "no files of the config c"),
        ({"files": ["a/*.csv"]}, r"no file of me/mine matches a/*.csv"),
    ):
        result = fetched(tmp_path, entry(source={"kind": "hf", "hf": {"repo": "me/mine", **spec}}))
        assert result.state == "failed" and said in result.reason
    hub_of = lambda **spec: {"kind": "hf", "hf": {"repo": "me/mine", **spec}}  # noqa: E731
    assert fetched(tmp_path, entry(source=hub_of(config=["b"]))).state == "complete"
    assert [row["a"] for row in RawSource(tmp_path, "mine").rows()] == [2]


def test_no_more_comes_than_the_hub_lists_and_odd_listings_end_in_a_sentence(hub, tmp_path):
    hub.repos["me/mine"] = Repo({"train.jsonl": lines([{"a": 1}])}, faults={"train.jsonl": ["more"] * 99})
    result = fetched(tmp_path, entry(), rules=replace(RULES, timeout=30))
    assert result.state == "failed" and "more than the 9 bytes that the Hub lists" in result.reason
    assert sum(path.stat().st_size for path in (tmp_path / "raw/mine/hub/.part").iterdir()) < 100
    for sha, said in (("../../../up", "answered with the commit ../../../up"), ("", "answered with the commit")):
        hub.repos["me/mine"] = Repo({"train.jsonl": b"{}"}, sha=sha)
        (tmp_path / "raw/revisions.json").unlink(missing_ok=True)
        result = fetched(tmp_path, entry())
        assert result.state == "failed" and said in result.reason
    assert not list(tmp_path.glob("*.md"))


def test_without_its_line_in_revisions_a_set_moves_on_and_old_files_go(hub, tmp_path):
    old, new = {"train-0.jsonl": lines([{"a": 1}]), "train-1.jsonl": lines([{"a": 2}])}, lines([{"a": 3}])
    hub.repos["me/mine"] = Repo(old)
    assert fetched(tmp_path, entry()).state == "complete"
    hub.repos["me/mine"] = Repo({"train-0.jsonl": new}, sha="b" * 40)
    assert fetched(tmp_path, entry()).reason == "is already complete"
    (tmp_path / "raw/revisions.json").write_text("{}")
    sets = load_catalogue(tmp_path / "datasets.yaml").sets
    assert [problem.what for problem in doctor(sets, tmp_path)] == [
        "is of the commit aaaaaaaaaaaa, none is pinned any more"
    ]
    assert fetched(tmp_path, entry()).state == "complete" and not list(doctor(sets, tmp_path))
    assert list(RawSource(tmp_path, "mine").rows()) == [{"a": 3}]
    assert not (tmp_path / "raw/mine/hub/train-1.jsonl").exists()


def test_a_repository_cannot_write_outside_its_folder(hub, tmp_path):
    hub.repos["me/mine"] = Repo({"train.jsonl": lines([{}]), "../../../escaped": b"x"})
    result = fetched(tmp_path, entry())
    assert result.state == "failed" and "leads out of its folder: refused" in result.reason


# Lists of addresses

GOOD = ("ok", "redirect", "short-once", "busy", "limited", "big", "big-cut")
BAD = {
    "loop": ("gone", "more than 6 redirects"),
    "to-file": ("gone", "of the type file:"),
    "to-private": ("gone", "private address"),
    "to-nowhere": ("gone", "without a Location"),
    "gone": ("gone", "status 404"),
    "forbidden": ("forbidden", "status 403"),
    "html": ("content", "a web page"),
    "empty": ("content", "an empty file"),
    "short": ("later", "ended before its length"),
    "short-length": ("content", "truncated"),
    "half-unsaid": ("content", "truncated"),
    "huge": ("content", "1,000,000,000,000 bytes"),
    "endless": ("content", "more than 8,388,608 bytes"),
    "reset": ("later", ""),
    "limited-far": ("later", "asks to wait"),
    "error": ("later", "status 500"),
    "bomb": ("content", "pixels"),
    "tiny": ("content", "placeholder"),
    "gzip": ("content", "compressed as gzip"),
    "broken": ("content", "broken picture"),
}
# Given up when their time is over, and nothing else is: short for these, long for the others.
HANGING = {
    "drip": ("later", "slower than"),
    "drip-head": ("later", "no answer"),
    "silent": ("later", "no answer"),
    "trickle": ("later", "not complete after 1 s"),
}


@pytest.mark.slow
def test_every_bad_manner_of_a_server_is_named_and_leaves_nothing_behind(media, tmp_path, monkeypatch):
    """Private addresses are refused here but for this server's, which HF_ENDPOINT names."""
    monkeypatch.setenv("HF_ENDPOINT", media.url)
    rules = replace(RULES, allow_private=False, max_file_bytes=8 * 2**20, timeout=60)
    urls = {kind: f"{media.url}/{kind}/{number}.jpg" for number, kind in enumerate([*GOOD, *BAD, *HANGING])}
    odd = {
        "file:///etc/hostname": "of the type file:",
        "http://[::1/x": "not an address",
        "no address": "of the type none:",
        "http://10.0.0.1/x": "private",
        "http://[::ffff:10.0.0.2]/x": "private",
        "http://192.168.0.1/x": "private",
    }
    hanging = [Wanted(urls[kind]) for kind in HANGING]
    fetch_list(hanging, tmp_path, replace(rules, tries=1, timeout=2, max_seconds=1))
    # Not asked again while the others are fetched.
    given_up = Journal(tmp_path / "lost.jsonl", "url").records.values()
    (tmp_path / "lost.jsonl").write_bytes(lines([record | {"not_before": "2999-01-01"} for record in given_up]))
    counts = fetch_list([Wanted(url) for url in (*urls.values(), *odd)], tmp_path, rules)
    index = {r["url"]: r for r in map(json.loads, (tmp_path / "index.jsonl").read_text().splitlines())}
    lost = {r["url"]: r for r in map(json.loads, (tmp_path / "lost.jsonl").read_text().splitlines())}
    assert set(index) == {urls[kind] for kind in GOOD}
    for kind in GOOD:
        record, number = index[urls[kind]], int(urls[kind].rpartition("/")[2][:-4])
        content = (tmp_path / record["file"]).read_bytes()
        assert content == (picture(number, "BMP", 1200) if kind.startswith("big") else picture(number))
        assert record["sha256"] == hashlib.sha256(content).hexdigest() and record["bytes"] == len(content)
        assert record["file"].startswith(media_name(urls[kind]))
    for kind, (why, said) in (BAD | HANGING).items():
        assert lost[urls[kind]]["kind"] == why and said in lost[urls[kind]]["reason"], (kind, lost[urls[kind]])
    for url, said in odd.items():
        assert lost[url]["kind"] == "gone" and said in lost[url]["reason"], lost[url]
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) == len(GOOD) + 3 and not (tmp_path / ".part").exists()
    assert counts["urls"] == len(urls) + len(odd) and counts["fetched"] == len(GOOD)
    assert media.ranges, "a file that was cut off goes on where it ended"


def test_a_part_goes_on_only_with_the_rest_of_the_same_file(media, tmp_path):
    fetch_list([Wanted(f"{media.url}/big-changes/1.jpg")], tmp_path, replace(RULES, timeout=30))
    record = next(iter(Journal(tmp_path / "index.jsonl", "url").records.values()))
    assert (tmp_path / record["file"]).read_bytes() == picture(2, "BMP", 1200)


@pytest.mark.parametrize("form", ["GIF", "PNG", "JPEG"])
def test_a_picture_without_its_end_is_none(tmp_path, form):
    """Pillow decodes these: a GIF of which the first frame is there, a PNG and many a JPEG without the last bytes."""
    frames = [Image.open(io.BytesIO(picture(n, side=64))).convert("RGB").resize((64, 64)) for n in range(3)]
    frames[0].save(tmp_path / "x", form, **({"save_all": True, "append_images": frames[1:]} if form == "GIF" else {}))
    assert check_image(tmp_path / "x")["width"] == 64
    whole = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(whole + b"\0" * 9)
    assert check_image(tmp_path / "x")["width"] == 64
    for cut in (1, 2, 12, 40):
        (tmp_path / "x").write_bytes(whole[:-cut])
        with pytest.raises(BadContent):
            check_image(tmp_path / "x")


def test_a_picture_that_was_published_without_its_end_is_taken(media, tmp_path):
    media.files["/published/1"] = data = picture(13)[:-2]  # one of those that Pillow decodes
    url = f"{media.url}/published/1"
    assert fetch_list([Wanted(url)], tmp_path / "unknown", RULES)["lost: content"] == 1
    assert fetch_list([Wanted(url, hashlib.sha256(data).hexdigest())], tmp_path / "known", RULES)["fetched"] == 1


def test_pictures_that_are_held_out_later_go(hub, media, tmp_path):
    urls = [f"{media.url}/ok/{n}.jpg" for n in range(3)]
    wanted, sha = [Wanted(url) for url in urls], hashlib.sha256(picture(1)).hexdigest()
    assert fetch_list(wanted, tmp_path, RULES)["fetched"] == 3
    counts = fetch_list(wanted, tmp_path, RULES, held_out=({urls[0]}, {sha}))
    assert counts["fetched"] == 1 and counts["held_out"] == 2 and counts["lost"] == 0
    assert len(list(tmp_path.rglob("*.jpg"))) == 1


def test_a_column_without_addresses_is_a_mistake(hub, tmp_path):
    hub.repos["me/mine"] = Repo({"train.jsonl": lines([{"u": 5}, {"u": None}])})
    result = fetched(tmp_path, entry(media={"kind": "url-list", "columns": ["u"]}))
    assert result.state == "failed" and "mine has no address in the column u" in result.reason


def test_dead_addresses_are_asked_again_on_their_date_and_passing_faults_at_once(media, tmp_path):
    kinds, today = ("gone/1.jpg", "html/2.jpg", "error/3.jpg", "ok/4.jpg"), date(2026, 1, 1)

    def asked(day: date, **options) -> set[str]:
        media.asked.clear()
        fetch_list([Wanted(f"{media.url}/{kind}") for kind in kinds], tmp_path, RULES, today=day, **options)
        return {path[1:] for path in media.asked}

    assert asked(today) == set(kinds)
    assert asked(today) == {"error/3.jpg"}
    assert asked(today + timedelta(days=91)) == {"html/2.jpg", "error/3.jpg"}
    assert asked(today + timedelta(days=181)) == {"gone/1.jpg", "html/2.jpg", "error/3.jpg"}
    assert asked(today, retry_lost=True) == {"gone/1.jpg", "html/2.jpg", "error/3.jpg"}


def test_a_host_that_asks_to_wait_until_next_century_is_left_alone(media, tmp_path):
    counts = fetch_list(
        [Wanted(f"{media.url}/limited-far/{n}.jpg") for n in range(200)], tmp_path, replace(RULES, jobs=2)
    )
    assert counts["lost: later"] == 200 and media.asked.total() < 20


def test_pictures_of_another_hash_and_held_out_ones_are_left_out(hub, media, tmp_path):
    url = lambda n: f"{media.url}/ok/{n}.jpg"  # noqa: E731
    digest = lambda n: hashlib.sha256(picture(n)).hexdigest()  # noqa: E731
    rows = [{"image_url": url(n), "sha": digest(n if n != 3 else 99), "s": "ab"[n // 6]} for n in range(8)]
    hub.repos["me/mine"] = Repo({"data/train.jsonl": lines(rows)})
    held = {"repo": "me/eval", "split": "test", "sha256": "sha"}
    hub.repos["me/eval"] = Repo(
        {"test.jsonl": lines([{"image_url": url(1), "sha": ""}, {"image_url": "http://x.org/2", "sha": digest(2)}])}
    )
    source = {"kind": "hf", "hf": {"repo": "me/mine", "filter": "s == a"}}
    pictures = entry(source=source, media={"kind": "url-list", "columns": ["image_url"], "sha256": "sha"})
    result = fetched(tmp_path, pictures, held_out=[held])
    assert result.state == "complete" and result.counts["held_out"] == 2 and result.counts["lost: content"] == 1
    source = RawSource(tmp_path, "mine")
    assert [source.media(row["image_url"]) is not None for row in source.rows()] == [
        True,
        False,
        False,
        False,
        True,
        True,
    ]
    assert in_media(tmp_path) == {media_name(url(n))[3:] for n in (0, 4, 5)}
    # A list that is not on the Hub is reported, and one without its column is an error.
    del hub.repos["me/eval"]
    other = tmp_path / "other"
    other.mkdir()
    assert fetched(other, pictures, held_out=[held]).state == "complete"
    catalogue = load_catalogue(other / "datasets.yaml")
    assert any("held-out" in problem.what for problem in doctor(catalogue.sets, other))
    result = fetched(other, {**pictures, "media": {"kind": "url-list", "columns": ["url"]}}, retry_lost=True)
    assert result.state == "failed" and "mine has no column url: it has image_url, s, sha" in result.reason


def test_nobody_answers_is_not_a_list_of_dead_addresses(tmp_path):
    with pytest.raises(NoNetwork, match="none of 30 addresses answered"):
        fetch_list([Wanted(f"http://127.0.0.1:1/{n}.jpg") for n in range(30)], tmp_path, RULES)
    assert not (tmp_path / "lost.jsonl").exists()


def test_a_sample_has_the_media_of_its_rows_alone(hub, media, tmp_path):
    rows = [
        [
            {"image_urls": [f"{media.url}/ok/{2 * n}.jpg", f"{media.url}/ok/{2 * n + 1}.jpg"], "n": n}
            for n in range(k, k + 5)
        ]
        for k in (0, 5, 10)
    ]
    hub.repos["me/mine"] = Repo({f"train-{k}.jsonl": lines(part) for k, part in enumerate(rows)})
    pictures = entry(media={"kind": "url-list", "columns": ["image_urls"]})
    assert fetched(tmp_path, pictures, limit=7).state == "sample"
    source = RawSource(tmp_path, "mine")
    assert [row["n"] for row in source.rows()] == list(range(7)) and len(in_media(tmp_path)) == 14
    assert not (tmp_path / "raw/mine/hub/train-2.jsonl").exists() and source.info["complete"] is False
    result = fetched(tmp_path, pictures)
    assert result.state == "complete" and len(in_media(tmp_path)) == 30, result


def test_pictures_that_look_alike_are_removed_when_asked(media, tmp_path):
    for n, quality in enumerate((90, 60)):
        out = io.BytesIO()
        Image.open(io.BytesIO(picture(7))).save(out, "JPEG", quality=quality)
        media.files[f"/twin/{n}.jpg"] = out.getvalue()
    urls = [f"{media.url}/twin/0.jpg", f"{media.url}/twin/1.jpg", f"{media.url}/ok/1.jpg", f"{media.url}/ok/2.jpg"]
    assert fetch_list([Wanted(url) for url in urls], tmp_path, RULES)["fetched"] == 4
    assert remove_duplicates(tmp_path) == 1
    assert fetch_list([Wanted(url) for url in urls], tmp_path, RULES)["lost: duplicate"] == 1
    assert set(Journal(tmp_path / "index.jsonl", "url").records) == {*urls} - {urls[1]}


def test_videos_are_decoded_and_their_ends_missed(media, tmp_path):
    body = make_video(tmp_path / "made.mp4").read_bytes()
    media.files |= {"/v/whole.mp4": body, "/v/cut.mp4": body[: len(body) * 2 // 3], "/v/picture.mp4": picture(1)}
    fetch_list([Wanted(f"{media.url}/v/{name}.mp4") for name in ("whole", "cut", "picture")], tmp_path, RULES, "video")
    index = Journal(tmp_path / "index.jsonl", "url").records
    assert set(index) == {f"{media.url}/v/whole.mp4"} and index[f"{media.url}/v/whole.mp4"]["file"].endswith(".mp4")


def test_this_machine_is_asked_only_where_the_user_named_it(media, tmp_path, monkeypatch):
    rules, urls = (
        replace(RULES, allow_private=False),
        [f"{media.url}/ok/1.jpg", f"{media.url}/ok/2.jpg".replace("127.0.0.1", "localhost")],
    )
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.org")
    assert fetch_list([Wanted(url) for url in urls], tmp_path, rules)["lost: gone"] == 2 and not media.asked
    monkeypatch.setenv("HF_ENDPOINT", "http://localhost:1")
    assert fetch_list([Wanted(url) for url in urls], tmp_path, rules, retry_lost=True)["fetched"] == 2


def test_a_listing_of_names_alone_is_checked_by_what_the_files_say_of_themselves(hub, tmp_path):
    body = lines([{"a": n} for n in range(99)])
    hub.repos["me/mine"] = Repo(
        {"train.jsonl": body, "x.txt": b"x"}, faults={"train.jsonl": ["", "html", "short"]}, bare=True
    )
    assert fetched(tmp_path, entry()).state == "complete"
    assert (tmp_path / "raw/mine/hub/train.jsonl").read_bytes() == body


@pytest.mark.parametrize(
    ("address", "private"),
    [
        ("8.8.8.8", False),
        ("2606:4700::1", False),
        ("127.0.0.1", True),
        ("10.1.2.3", True),
        ("169.254.169.254", True),
        ("::1", True),
        ("fe80::1%eth0", True),
        ("::ffff:10.0.0.1", True),
        ("0.0.0.0", True),
        ("224.0.0.1", True),
        ("100.64.0.1", True),
    ],
)
def test_private_addresses(address, private):
    assert is_private(address) is private


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1", "2130706433", "0", "017700000001", "[::1]", "[::ffff:7f00:1]"])
def test_this_machine_in_any_figures_is_private(host, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.org")
    with pytest.raises(Lost, match="private address"):
        check_address(f"http://{host}:8080/x", Rules())


# Sets by hand, and YouTube


def test_a_set_by_hand_waits_for_its_files_and_doctor_looks_at_them(tmp_path):
    source = {
        "kind": "manual",
        "instructions": "sign the form",
        "page": "https://a.org/b",
        "layout": ["train.json", "videos/*.mp4"],
    }
    by_hand = entry(source=source, media={"kind": "manual"}, modality="video")
    result = fetched(tmp_path, by_hand)
    assert result.state == "by hand" and "train.json, videos/*.mp4 must be put into" in result.reason
    sets = load_catalogue(tmp_path / "datasets.yaml").sets
    problem = list(doctor(sets, tmp_path))[0]
    assert "manual/ lacks train.json, videos/*.mp4" in problem.what and "download.py how mine --root" in problem.fix
    manual = tmp_path / "raw/mine/manual"
    (manual / "videos").mkdir(parents=True)
    (manual / "train.json").write_text('[{"q": 1}]')
    (manual / "videos/1.mp4").touch()
    assert fetched(tmp_path, by_hand).state == "by hand"
    (manual / "videos/1.mp4").write_bytes(b"<html>log in</html>")
    assert fetched(tmp_path, by_hand).state == "complete"
    assert list(RawSource(tmp_path, "mine").rows()) == [{"q": 1}]
    assert [problem.what for problem in doctor(sets, tmp_path)] == ["manual/videos/1.mp4 is a web page"]
    (manual / "train.json").unlink()
    assert any("manual/ lacks train.json" in problem.what for problem in doctor(sets, tmp_path))
    page = python(
        "tools/download.py", "how", "mine", "--catalogue", tmp_path / "datasets.yaml", "--root", tmp_path
    ).stdout
    assert "sign the form" in page and "manual/videos/*.mp4" in page and "https://a.org/b" in page


def test_youtube_ids_go_to_an_installed_yt_dlp_alone(hub, tmp_path, monkeypatch):
    ids = ["abcdefghijk", "-bcdefghij0", "gone_video_", "busy_video_", "$(touch x)!"]
    hub.repos["me/mine"] = Repo({"train.jsonl": lines([{"video_id": video} for video in ids])})
    videos = entry(media={"kind": "youtube-ids", "columns": ["video_id"]}, modality="video")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert fetched(tmp_path, videos).state == "by hand"
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/yt-dlp"
    program.write_text(
        f"#!{sys.executable}\nimport shutil, sys\nurl = sys.argv[-1]\nassert sys.argv[-2] == '--'\n"
        f"source = {str(make_video(tmp_path / 'made.mp4'))!r} if '-bcd' not in url else __file__\n"
        "if 'gone' in url:\n    sys.exit('ERROR: Video unavailable')\n"
        "if 'busy' in url:\n    sys.exit('HTTP Error 429')\n"
        "shutil.copy(source, sys.argv[sys.argv.index('--output') + 1])\n"
    )
    program.chmod(0o755)
    result = fetched(tmp_path, videos)
    assert result.state == "complete" and result.counts == {"videos": 4, "fetched": 1, "lost": 3, "later": 1}
    source = RawSource(tmp_path, "mine")
    assert [source.media(f"{video}.mp4") is not None for video in ids] == [True, False, False, False, False]


# Stops


def start(root: Path, hub, *options) -> subprocess.Popen:
    command = [
        warm.executable(),
        "tools/download.py",
        "fetch",
        "mine",
        "--root",
        root,
        "--catalogue",
        root / "datasets.yaml",
    ]
    command += ["--timeout", "5", "--per-host", "16", "--quiet", *options]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(list(map(str, command)), cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)


def kill(process: subprocess.Popen) -> None:
    """Kill the program itself; the process that stands for it ends as it ends."""
    os.kill(warm.pid_behind(process.pid), signal.SIGKILL)
    process.wait()


def big_set(hub, media, root: Path, pictures: int = 240) -> None:
    """A Hub file of 25 MB and pictures, so that a kill hits either."""
    root.mkdir(exist_ok=True)
    asked = {"question": "What is it?", "answer": "A picture."}
    rows = [{"image_url": f"{media.url}/{'busy' if n % 9 == 4 else 'ok'}/{n}.jpg", **asked} for n in range(pictures)]
    filler = random.Random(0).randbytes(25_000_000)
    hub.repos["me/mine"] = Repo({"train.jsonl": lines(rows), "more.bin": filler}, large=frozenset(["more.bin"]))
    media.files["/archive.zip"] = zip_of({f"a/{n}.bin": filler[n * 50_000 : (n + 1) * 50_000] for n in range(60)})
    source = {"kind": "hf", "hf": {"repo": "me/mine", "files": ["more.bin", "train.jsonl"]}}
    listed = {"kind": "url-list", "columns": ["image_url"], "urls": [f"{media.url}/archive.zip"]}
    fields = dict.fromkeys(rows[0], "text")
    write_catalogue(root, entry(source=source, media=listed, fields=fields))


def zip_of(files: dict[str, bytes]) -> bytes:
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, body in files.items():
            archive.writestr(zipfile.ZipInfo(name), body)
    return out.getvalue()


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bytes(hub, media, tmp_path):
    hub.delay, media.delay = 0.002, 0.02
    big_set(hub, media, tmp_path / "calm")
    assert start(tmp_path / "calm", hub).wait(120) == 0
    big_set(hub, media, tmp_path / "killed")
    folder, chance = tmp_path / "killed/raw/mine", random.Random(time.time_ns())
    # Moments by progress, whatever the machine's speed: in the large file, around the archive, among the pictures.
    moments = [(chance.randint(1, 24_000_000), 0), (chance.randint(25_000_000, 29_000_000), 0)]
    moments += [(0, chance.randint(1, 90)), (0, chance.randint(91, 180))]
    kills = 0
    for size, pictures in moments:
        process = start(tmp_path / "killed", hub)
        while process.poll() is None:
            time.sleep(0.01)
            if size_on_disk(folder) >= size and len(in_media(tmp_path / "killed")) >= pictures and folder.exists():
                kill(process)
                kills += process.returncode == -signal.SIGKILL
                assert (
                    state_of(load_catalogue(tmp_path / "killed/datasets.yaml").sets[0], tmp_path / "killed")
                    != "complete"
                )
        if process.returncode == 0:
            break  # faster than the eye
    assert kills >= 2, "moments are within a run"
    assert start(tmp_path / "killed", hub).wait(120) == 0
    assert tree(tmp_path / "killed/raw") == tree(tmp_path / "calm/raw"), moments
    assert not list(broken_files(folder, deep=True))


@pytest.mark.slow
def test_a_large_file_goes_on_where_a_kill_left_it(hub, media, tmp_path):
    hub.delay = 0.02
    big_set(hub, media, tmp_path, pictures=1)
    process = start(tmp_path, hub)
    part = tmp_path / "raw/mine/hub/.part"
    deadline = time.monotonic() + 30
    while not any(path.stat().st_size > 5_000_000 for path in part.glob("*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    kill(process)
    hub.delay = 0.0005
    assert start(tmp_path, hub).wait(60) == 0
    assert hub.ranges and min(hub.ranges) > 5_000_000
    assert (tmp_path / "raw/mine/hub/more.bin").read_bytes() == hub.repos["me/mine"].files["more.bin"]


@pytest.mark.slow
def test_a_full_disk_and_used_up_bytes_stop_the_run_and_the_next_goes_on(hub, media, tmp_path):
    big_set(hub, media, tmp_path, pictures=20)
    limited = [
        sys.executable,
        "tools/download.py",
        "fetch",
        "mine",
        "--root",
        tmp_path,
        "--catalogue",
        tmp_path / "datasets.yaml",
        "--timeout",
        "5",
    ]
    result = run(["bash", "-c", 'ulimit -f 12000 && exec "$@"', "-", *limited])
    assert result.returncode == 3 and "cannot write under" in result.stdout and "Traceback" not in result.stderr
    assert state_of(load_catalogue(tmp_path / "datasets.yaml").sets[0], tmp_path) == "part"
    # A file of the disk's fault is no dead address.
    assert not (tmp_path / "raw/mine/media/lost.jsonl").exists()
    result = python(*limited[1:], "--max-bytes", "5MB")
    assert result.returncode == 4 and "--max-bytes 5,000,000 is used up" in result.stdout
    result = python(*limited[1:], "--json")
    assert result.returncode == 0 and json.loads(result.stdout)[0]["state"] == "complete"
    assert len(in_media(tmp_path)) == 20


def test_two_fetches_of_a_set_do_not_meet(hub, media, tmp_path):
    hub.delay = 0.02
    big_set(hub, media, tmp_path, pictures=1)
    first = start(tmp_path, hub)
    while not (tmp_path / "raw/mine/hub/.part").exists() and first.poll() is None:
        time.sleep(0.02)
    catalogue = load_catalogue(tmp_path / "datasets.yaml")
    second = fetch_set(catalogue.sets[0], catalogue, FetchOptions(tmp_path, RULES), Meter(), DownloadProgress())
    kill(first)
    assert second.state == "failed" and second.reason == "another fetch of mine is running"


def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path):
    journal = Journal(tmp_path / "j.jsonl", "k")
    journal.append({"k": "a", "v": 1})
    journal.append({"k": "b", "v": 2})
    journal.remove("b")
    journal.close()
    whole = (tmp_path / "j.jsonl").read_bytes()
    for cut in range(len(whole)):
        (tmp_path / "j.jsonl").write_bytes(whole[:cut])
        journal = Journal(tmp_path / "j.jsonl", "k")
        assert set(journal.records) <= {"a", "b"}
        journal.append({"k": "c", "v": 3})
        journal.close()
        assert Journal(tmp_path / "j.jsonl", "k").records["c"] == {"k": "c", "v": 3}


# Mending


def flip(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)


def one_of(folder: Path, pattern: str) -> Path:
    return sorted(path for path in folder.glob(pattern) if path.is_file())[0]


DAMAGES = {
    "fetched.json": lambda raw: (raw / "fetched.json").write_text("{"),
    "of another form": lambda raw: (raw / "fetched.json").write_text('{"complete": true, "counts": 3}'),
    "files.jsonl": lambda raw: (raw / "files.jsonl").write_bytes(b'\xff{"file": "x"}\nnull\n{"file": 5}\n'),
    "index.jsonl": lambda raw: (raw / "media/index.jsonl").write_text('{"url": "x"}\n'),
    "a picture": lambda raw: one_of(raw, "media/*/*.jpg").unlink(),
    "a bit of a picture": lambda raw: flip(one_of(raw, "media/*/*.jpg")),
    "rows": lambda raw: (raw / "hub/train.jsonl").unlink(),
    "a file from an archive": lambda raw: (raw / "extracted/archive/a/1.bin").unlink(),
    "a bit of one": lambda raw: flip(raw / "extracted/archive/a/1.bin"),
    "all from an archive": lambda raw: shutil.rmtree(raw / "extracted"),
}


@pytest.mark.slow
def test_the_command_that_doctor_prints_fixes_what_it_found(hub, media, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    from download import main

    root = tmp_path / "a root"
    big_set(hub, media, root, pictures=6)
    hub.repos["me/mine"].files["more.bin"] = b"small"
    more = ["--root", str(root), "--catalogue", str(root / "datasets.yaml")]

    def problems() -> list[dict]:
        capsys.readouterr()
        assert main(["doctor", "--deep", "--json", *more]) in (0, 1)
        return json.loads(capsys.readouterr().out)

    assert main(["fetch", "mine", "--quiet", *more]) == 0 and problems() == []
    whole = tree(root / "raw")
    for name, damage in DAMAGES.items():
        damage(root / "raw/mine")
        found = problems()
        assert found, name
        words = shlex.split(found[0]["fix"])
        assert words[:4] == ["python", "tools/download.py", "fetch", "mine"]
        assert main([*words[2:], "--quiet"]) == 0, name
        assert problems() == [] and tree(root / "raw") == whole, name


def test_doctor_names_a_root_and_folders_that_cannot_be_used(hub, tmp_path, monkeypatch):
    write_catalogue(tmp_path, entry())
    sets = load_catalogue(tmp_path / "datasets.yaml").sets
    (tmp_path / "link").symlink_to(tmp_path / "away")
    (tmp_path / "file").touch()
    for name, said in (("none", "does not exist"), ("link", "which does not exist"), ("file", "is a file")):
        problems = list(doctor(sets, tmp_path / name))
        assert len(problems) == 1 and said in problems[0].what
        assert run(["bash", "-c", problems[0].fix]).returncode == 0
        (tmp_path / name).mkdir(exist_ok=True)
        assert not list(doctor(sets, tmp_path / name))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/mine").touch()
    assert fetched(tmp_path, entry()).state == "failed"
    assert "is not a folder" in list(doctor(sets, tmp_path))[0].what
    (tmp_path / "raw/mine").unlink()
    (tmp_path / "raw/mine/files.jsonl").mkdir(parents=True)
    problem = list(doctor(sets, tmp_path))[0]
    assert "cannot be read (Is a directory)" in problem.what and problem.fix.startswith("mv ")
    assert fetched(tmp_path, entry()).state == "failed"


def test_plan_counts_what_a_stopped_fetch_left(hub, media, tmp_path):
    pictures = entry(media={"kind": "url-list", "columns": ["u"]}, size_gb=0.001)
    hub.repos["me/mine"] = Repo({"train.jsonl": lines([{"u": f"{media.url}/ok/{n}.jpg"} for n in range(9)])})
    assert fetched(tmp_path, pictures).state == "complete"
    catalogue, note = load_catalogue(tmp_path / "datasets.yaml"), tmp_path / "raw/mine/fetched.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"complete": False, "stopped": "x", "bytes": None}))
    there = sum(path.stat().st_size for path in (tmp_path / "raw/mine").rglob("*.jpg"))
    there += (tmp_path / "raw/mine/hub/train.jsonl").stat().st_size
    [row] = plan_downloads(catalogue.sets, catalogue, tmp_path, 10**9, None)
    assert row.action == "fetch" and row.gigabytes == pytest.approx(0.001 - there / 1e9)


def test_plan_counts_an_archive_that_sets_share_once(tmp_path):
    media = {"kind": "archive", "urls": ["http://a.org/coco.zip"]}
    write_catalogue(tmp_path, *(entry(name, media=media, disk_gb=30, examples=1000) for name in ("one", "two")))
    catalogue = load_catalogue(tmp_path / "datasets.yaml")
    rows = plan_downloads(catalogue.sets, catalogue, tmp_path, 40 * 10**9, None)
    assert [(row.name, row.action, row.gigabytes) for row in rows] == [("one", "fetch", 30), ("two", "fetch", 0.005)]


# Commands


def test_stage_3_needs_nothing_and_a_wrong_name_ends_in_a_sentence(tmp_path):
    result = run(["tools/download_by_stage.sh", "stage3"])
    assert result.returncode == 0 and "nothing more is needed" in result.stdout
    assert run(["tools/download_by_stage.sh", "stage9"]).returncode == 2
    result = python("tools/download.py", "fetch", "nothing-like-it", "--root", tmp_path)
    assert result.returncode == 1 and result.stderr.startswith("error: there is no data set nothing-like-it")
    result = python("tools/download_stage1_pretraining.py", "--only-license", "mit", "--root", tmp_path)
    assert result.returncode == 1 and "no data set is selected" in result.stderr


# The forms of https://huggingface.co/docs/hub/datasets-manual-configuration, and what people make of them.
CARDS = {
    "one pattern": ("configs: [{data_files: 'a/*'}]", ["a/test.parquet", "a/train.parquet"]),
    "a list of patterns": ("configs: [{data_files: ['a/train*', 'b/train*']}]", ["a/train.parquet", "b/train.parquet"]),
    "splits": (
        "configs: [{data_files: [{split: train, path: 'b/*'}, {split: test, path: 'a/*'}]}]",
        ["b/train.parquet"],
    ),
    "splits as a mapping": ("configs: [{data_files: {train: 'b/*', test: 'a/*'}}]", ["b/train.parquet"]),
    "a folder": ("configs: [{data_dir: b, data_files: [{split: train, path: ['*.parquet']}]}]", ["b/train.parquet"]),
    "the default one": (
        "configs: [{config_name: x, data_files: 'a/*'}, {config_name: y, default: true, data_files: 'b/*'}]",
        ["b/train.parquet"],
    ),
    "one of another form": ("configs: [7, {config_name: [x]}, {data_files: 'b/*'}]", ["b/train.parquet"]),
    "none of a known form": ("configs: 3", ["a/train.parquet", "b/train.parquet"]),  # by their names
    "a list": ("[1, 2]", ["a/train.parquet", "b/train.parquet"]),
    "no YAML": ("a: [", ["a/train.parquet", "b/train.parquet"]),
    "nothing": ("", ["a/train.parquet", "b/train.parquet"]),
}


@pytest.mark.parametrize("card", CARDS)
def test_the_card_of_a_repository_says_which_files_are_of_a_split(card, tmp_path):
    header, expected = CARDS[card]
    (tmp_path / "README.md").write_text(f"---\nlicense: odc-by\n{header}\n---\n# A data set\n")
    names = ("a/train.parquet", "a/test.parquet", "b/train.parquet")
    files = {name: HubFile(name, 1, None, None) for name in names}
    repository = Repository("a/b", "5" * 40, files, read_card(tmp_path / "README.md"))
    assert choose_files(repository, HubFiles(repo="a/b")) == {"train": expected}
    assert repository.license == (None if card in ("a list", "no YAML") else "odc-by")
