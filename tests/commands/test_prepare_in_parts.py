"""More data than scratch: the same shards as on a large disk, within the bound, whatever is killed on the way."""

import hashlib
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import download as download_tool
import numpy as np
import object_store
import prepare as tool
import published_sets as published
import pytest
import yaml
from fetch_servers import Repo
from PIL import Image
from slow_proxy import SlowProxy

from molmo2_nemo import storage
from molmo2_nemo.catalogue.parked import Parked
from molmo2_nemo.config.schema import DataConfig
from molmo2_nemo.data.blend import load_blend
from molmo2_nemo.fetch import room as rooms
from molmo2_nemo.fetch.journal import Journal
from molmo2_nemo.files import LockHeld, locked
from molmo2_nemo.prepare import in_parts, parking, place, shard_plan

NUMBER, FILES = 48, 8  # pictures of a set, and files among which they are divided
BOUND = 2_300_000  # bytes of scratch; each set but the last has 2.8 MB, and takes more on one disk
OUT = "msc://disk/shards"
NAMES = ("inside", "listed", "zipped", "single", "fetched")


def picture(seed) -> bytes:
    """A PNG of noise, of 59 KB."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (140, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def flat_picture(seed) -> bytes:
    """A PNG of the same size in two colours, which an archive makes eight times smaller."""
    file = io.BytesIO()
    pixels = 255 * np.random.default_rng(seed).integers(0, 2, (140, 140), dtype=np.uint8)
    Image.fromarray(pixels).convert("RGB").save(file, "PNG", compress_level=0)
    return file.getvalue()


def zipped(files: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data, how)
    return file.getvalue()


def in_files(values: list) -> list[list]:
    return [values[k::FILES] for k in range(FILES)]


def the_sets() -> tuple[dict, dict[str, Repo], dict]:
    """A catalogue, the repositories of its sets and addresses of the web: media in each of the forms."""
    hub, web, entries = {}, {}, []

    def add(name, rows, media, files=None, fields=None):
        hub[f"me/{name}"] = Repo({})
        for path, some in rows.items():
            hub[f"me/{name}"].files[path] = published.rows_file(some, Path(path).suffix)
        hub[f"me/{name}"].files |= files or {}
        source = {"kind": "hf", "hf": {"repo": f"me/{name}", "files": ["data/*"]}}
        fields = fields or {"image": "name", "question": "text", "answer": "text"}
        convert = {"kind": "question"}
        entries.append({"name": name, "source": source, "media": media, "fields": fields, "convert": convert})

    def row(number, **more):
        return {"question": f"Which number, {number}?", "answer": str(number), **more}

    def named(number):
        return f"data/train-{number:05d}.parquet"

    rows = [row(n, image={"bytes": picture([0, n]), "path": None}) for n in range(NUMBER)]
    add("inside", {named(k): some for k, some in enumerate(in_files(rows))}, {"kind": "in-parquet"})
    addresses = [f"https://pictures.example/{n}.png" for n in range(NUMBER)]
    web |= {address: (picture([1, n]), None) for n, address in enumerate(addresses) if n != 7}  # one is gone
    rows = [row(n, image_url=address) for n, address in enumerate(addresses)]
    fields = {"image_url": "address", "question": "text", "answer": "text"}
    add("listed", {named(0): rows}, {"kind": "url-list", "columns": ["image_url"]}, None, fields)
    rows = [row(n, image=f"{n % FILES}/{n}.png") for n in range(NUMBER)]
    zips = {
        f"images/part{k}.zip": zipped({f"{k}/{n}.png": picture([2, n]) for n in some})
        for k, some in enumerate(in_files(list(range(NUMBER))))
    }
    add("zipped", {named(0): rows}, {"kind": "archive", "hf": {"repo": "me/zipped", "files": ["images/*"]}}, zips)
    rows = [row(n, image=f"{n % FILES}/{n}.png") for n in range(NUMBER)]
    zips = {
        f"images/part{k}.zip": zipped({f"{k}/{n}.png": flat_picture([5, n]) for n in some}, zipfile.ZIP_DEFLATED)
        for k, some in enumerate(in_files(list(range(NUMBER))))
    }
    add("squeezed", {named(0): rows}, {"kind": "archive", "hf": {"repo": "me/squeezed", "files": ["images/*"]}}, zips)
    rows = [row(n, image=f"images/{n}.png") for n in range(NUMBER)]
    single = {f"images/{n}.png": picture([3, n]) for n in range(NUMBER)}
    add("single", {named(0): rows}, {"kind": "archive", "hf": {"repo": "me/single", "files": ["images/*"]}}, single)
    rows = [row(n, image=f"{n}.png") for n in range(8)]
    add("fetched", {named(0): rows}, {"kind": "archive", "urls": ["https://pictures.example/all.zip"]})
    whole = zipped({f"{n}.png": picture([4, n]) for n in range(8)})
    web["https://pictures.example/all.zip"] = (whole, None)
    return {"datasets": entries}, hub, web


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The catalogue's file, with servers that have its sets, and the shards that a large disk makes of them."""
    folder = tmp_path_factory.mktemp("parts")
    catalogue, repositories, web_files = the_sets()
    with pytest.MonkeyPatch.context() as patch, published.servers(patch, repositories) as (hub, web):
        web.files |= web_files
        patch.setattr(shard_plan, "MIN_SAMPLES", 4)
        patch.setattr(shard_plan, "MIN_BUCKETS", 12)
        (folder / "sets.yaml").write_text(yaml.safe_dump(catalogue))
        large = folder / "large"
        large.mkdir()
        where = ["--catalogue", str(folder / "sets.yaml")]
        assert download_tool.main(["fetch", *NAMES, "--root", str(large), "--quiet", "--allow-private", *where]) == 0
        with pytest.raises(SystemExit) as ended:
            tool.main(["--stage", "2", *NAMES, "--out", str(large), "--quiet", "--jobs", "1", *where])
        assert ended.value.code == 0
        yield folder, hub, web


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """An empty storage at msc://disk/."""
    for name, value in object_store.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    storage.forget_clients()
    yield tmp_path
    storage.forget_clients()


def arguments(world, here, *more, names=NAMES, out=OUT, bound=BOUND):
    catalogue = ["--catalogue", str(world[0] / "sets.yaml")]
    where = ["--out", str(out), "--scratch", str(here / "scratch"), "--max-scratch", f"{bound}B"]
    return ["--stage", "2", *names, *where, "--quiet", "--jobs", "2", "--allow-private", *catalogue, *more]


def run(world, here, *more, **changes):
    """The tool's exit status, or what it says when it gives up."""
    with pytest.raises(SystemExit) as ended:
        tool.main(arguments(world, here, *more, **changes))
    return ended.value.code


def content(folder, names=NAMES):
    """Path -> hash of all that is there of the sets."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for name in names
        for file in sorted((folder / name).rglob("*"))
        if file.is_file()
    }


def on_disk(folder):
    """As du counts it."""
    return int(subprocess.run(["du", "-s", "--block-size=1", folder], capture_output=True, text=True).stdout.split()[0])


def asked(hub):
    """Files of data sets that the Hub was asked for."""
    return {path: number for path, number in hub.asked.items() if "/resolve/" in path}


@pytest.mark.slow
def test_the_same_shards_within_the_bound(world, here, monkeypatch, capsys):
    sizes, used = [], rooms.Room.used

    def measured(self):
        sizes.append(on_disk(here / "scratch"))
        return used(self)

    monkeypatch.setattr(rooms.Room, "used", measured)
    assert run(world, here) == 0
    expected, shards = content(world[0] / "large"), here / "disk" / "shards"
    assert content(shards) == expected
    assert len(sizes) > 50 and 0.5 * BOUND < max(sizes) <= BOUND, max(sizes)
    assert on_disk(here / "scratch") < 0.1 * BOUND
    assert not [path for path in (shards / ".prepare").rglob("*") if path.is_file()]
    blend = yaml.safe_load((shards / "stage2.yaml").read_text())
    large = yaml.safe_load((world[0] / "large" / "stage2.yaml").read_text())
    assert blend == large and list(blend["sources"]) == list(NAMES)
    assert (shards / "stage2.yaml").read_text().startswith(f"# 5 sources below data.root={OUT}. ")
    cfg = DataConfig(root=OUT, blend=f"{OUT}/stage2.yaml")
    assert [(source.name, source.num_samples) for source in load_blend(cfg)] == [
        (source.name, source.num_samples)
        for source in load_blend(
            DataConfig(root=str(world[0] / "large"), blend=str(world[0] / "large" / "stage2.yaml"))
        )
    ]
    assert {entry["status"] for entry in json.loads((shards / "stage2.report.json").read_text())} == {"prepared"}

    # What is there is looked at and left. Another scratch will do, and names may be left out.
    before, times = asked(world[1]), {path: path.stat().st_mtime_ns for path in shards.rglob("*.tar")}
    assert run(world, here, "--scratch", str(here / "other"), "--verify") == 0
    assert asked(world[1]) == before and {path: path.stat().st_mtime_ns for path in times} == times
    # What was damaged there is made again; what else lies there stays.
    [first, *_] = sorted((shards / "fetched").glob("*.tar"))
    first.write_bytes(first.read_bytes()[:-512])
    (shards / "fetched" / "notes.txt").write_text("mine")
    (shards / "fetched" / "train-00099.tar").write_bytes(b"of an older run")
    assert run(world, here, names=["fetched"]) == 0
    assert (shards / "fetched" / "notes.txt").read_text() == "mine"
    (shards / "fetched" / "notes.txt").unlink()
    assert content(shards) == expected
    assert list(yaml.safe_load((shards / "stage2.yaml").read_text())["sources"]) == list(NAMES)


def in_a_child(action, children=None):
    """The exit status of a forked process, negative if a signal ended it; it leads a process group of its own.

    children: gets its id.
    """
    if pid := os.fork():
        if children is not None:
            children.append(pid)
    else:
        os.setpgid(0, 0)
        try:
            action()
        finally:
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at(owner, name, number):
    """From now on, the call of this number of a function kills this process group."""
    calls, real = itertools.count(1), getattr(owner, name)

    def killing(*given, **more):
        if next(calls) == number:
            os.killpg(0, signal.SIGKILL)
        return real(*given, **more)

    setattr(owner, name, killing)


# In the middle of a fetch, of putting files away, of drafts, of uploads, between a note and a hole, and at the end.
MOMENTS = [
    (Journal, "append", 6),
    (storage, "write", 3),
    (parking, "hollow", 3),
    (in_parts, "write_spool", 1),
    (storage, "upload_file", 2),
    (parking, "hollow", 9),
    (in_parts, "write_spool", 3),
    (in_parts, "keep_heads", 1),
    (in_parts, "finish", 1),
    (storage, "upload_file", 4),
    (storage, "delete", 2),
]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(world, here):
    names, log, expected = ("inside", "zipped"), here / "uploads", content(world[0] / "large")
    shards, killed = here / "disk" / "shards", 0

    def work(moment):
        upload = storage.upload_file

        def logged(local, address):
            upload(local, address)
            with log.open("a") as lines:
                lines.write(f"{address}\n")

        storage.upload_file = logged
        kill_at(*moment)
        try:
            tool.main(arguments(world, here, names=names))
        except SystemExit as ended:
            os._exit(0 if ended.code == 0 else 1)

    for moment in MOMENTS:
        status = in_a_child(lambda moment=moment: work(moment))
        assert status in (0, -signal.SIGKILL), moment
        killed += status != 0
        assert on_disk(here / "scratch") <= BOUND
        for name in names:
            if (shards / name / ".nv-meta" / ".info.json").exists():
                there = content(shards, [name])
                assert there == {path: digest for path, digest in expected.items() if path in there}
                assert len(there) == sum(path.startswith(f"{name}/") for path in expected)
    assert killed > len(MOMENTS) // 2
    assert run(world, here, names=names) == 0
    assert content(shards, names) == {path: v for path, v in expected.items() if path.split("/")[0] in names}
    assert not [path for path in (shards / ".prepare").rglob("*") if path.is_file()]
    uploads = [line for line in log.read_text().split() if line.endswith(".tar")]
    assert len(uploads) == len(set(uploads)) > 8


@pytest.mark.slow
def test_storms_of_503_and_kills_in_the_middle_of_requests(world, here, monkeypatch):
    """On S3: a third of the requests fail, and some are the last thing that a run has sent.

    What is noted as uploaded is not sent again, and the set is visible when all of it is there.
    """
    moments, asked, sent = [15, 60, 110], itertools.count(1), []
    dice, children, shards, noted, killed = random.Random(20), [], set(), set(), 0

    def fault(method, path):
        """What happens to a request; children: the run that has sent it is the last one."""
        number = next(asked)
        if moments and number >= moments[0] and children:
            moments.pop(0)
            os.killpg(children.pop(), signal.SIGKILL)
        if 40 <= number < 60 or dice.random() < 0.3:
            return "503"
        found = re.fullmatch(r"/bucket/deep/shards/fetched/([^?]*).*", path)
        if found and method == "PUT":
            sent.append(found[1])
            shards.update([found[1]] if found[1].endswith(".tar") else [])
            if found[1].endswith(".idx") and not noted:  # all shards are there and noted
                noted.update(shards)
                os.killpg(children.pop(), signal.SIGKILL)
        return "cut" if method == "GET" and dice.random() < 0.1 else None

    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(storage, "LONGEST_PAUSE", 0.05)
    with object_store.s3() as endpoint, SlowProxy(endpoint) as proxy:
        proxy.fault = fault
        for name, value in object_store.environment(here, proxy.address).items():
            monkeypatch.setenv(name, value)
        storage.forget_clients()
        words = arguments(world, here, names=["fetched"], out="msc://store/shards", bound=1_300_000)
        while (status := in_a_child(lambda: os._exit(ended(words)), children)) == -signal.SIGKILL:
            killed += 1
            sent.clear()
            assert on_disk(here / "scratch") <= BOUND
        assert status == 0 and killed == 4 and noted and not noted & set(sent)
        assert sent.index(place.MARKER) == len(sent) - 1
        proxy.fault = lambda method, path: None
        there = "msc://store/shards/fetched"
        found = {
            name: hashlib.sha256(storage.read(f"{there}/{name}")).hexdigest() for name in storage.list_files(there)
        }
        assert not storage.list_files("msc://store/shards/.prepare")
    assert {f"fetched/{name}": digest for name, digest in found.items()} == content(world[0] / "large", ["fetched"])


def ended(words):
    """The exit status of the tool, in a child."""
    try:
        tool.main(words)
    except SystemExit as ended:
        print(ended.code, flush=True)
        return 0 if ended.code == 0 else 1


def test_more_may_come_out_of_archives_than_they_have(world, here):
    """What came out before is put away then, in the middle of an archive, too."""
    assert run(world, here, names=["squeezed"]) == 0
    large = here / "large"
    assert run(world, here, "--scratch", str(here / "other"), names=["squeezed"], out=large, bound=50_000_000) == 0
    found = content(here / "disk" / "shards", ["squeezed"])
    assert found == content(large, ["squeezed"]) and len(found) > 8


def test_what_cannot_be_done_in_parts_is_said_before_the_first_byte(world, here, capsys):
    before = asked(world[1])
    assert run(world, here, names=["fetched"], bound=600_000) == 1
    said = capsys.readouterr().err
    assert "fetched cannot be done in parts of --max-scratch 600KB, it needs about 9" in said
    assert "https://pictures.example/all.zip has 461.7 KiB, and what comes out of it is as large again" in said
    assert asked(world[1]) == before and not (here / "disk" / "shards" / "fetched").exists()
    advice = re.search(r"give --max-scratch (\w+)", said)[1]
    assert run(world, here, "--max-scratch", advice, names=["fetched"]) == 0
    assert content(here / "disk" / "shards", ["fetched"]) == content(world[0] / "large", ["fetched"])


def test_data_that_were_fetched_before_stay(world, here):
    root, out = world[0] / "large", here / "slow disk"
    raw = {path: (path.stat().st_ino, path.stat().st_size) for path in (root / "raw").rglob("*")}
    before = asked(world[1])
    assert run(world, here, "--root", str(root), names=["zipped", "listed"], out=out) == 0
    assert content(out, ["zipped", "listed"]) == content(root, ["zipped", "listed"])
    assert raw == {path: (path.stat().st_ino, path.stat().st_size) for path in (root / "raw").rglob("*")}
    assert asked(world[1]) == before and yaml.safe_load((out / "stage2.yaml").read_text())["sources"]
    # Something else under the name of a set is left alone.
    (out / "fetched" / ".nv-meta").mkdir(parents=True)
    (out / "fetched" / ".nv-meta" / ".info.json").write_text("{}")
    assert run(world, here, names=["fetched"], out=out) == 1
    assert content(out, ["fetched"]).keys() == {"fetched/.nv-meta/.info.json"}


def test_what_comes_by_hand_is_read_where_it_is(world, here, capsys):
    """The user's files are never moved: the annotations are fetched, the media are those of --root."""
    source = {"kind": "hf", "hf": {"repo": "me/zipped", "files": ["data/*"]}}
    media = {"kind": "manual", "layout": ["all/*/*.png"]}
    fields, convert = {"image": "name", "question": "text", "answer": "text"}, {"kind": "question"}
    entry = {"name": "brought", "source": source, "media": media, "fields": fields, "convert": convert}
    (here / "sets.yaml").write_text(yaml.safe_dump({"datasets": [entry]}))
    more = ["--catalogue", str(here / "sets.yaml")]
    assert run(world, here, *more, names=["brought"]) == 1
    assert "brought needs all/*/*.png in " in (said := capsys.readouterr().err) and "--root is the folder" in said
    manual = here / "root" / "raw" / "brought" / "manual"
    for n in range(NUMBER):
        (manual / "all" / str(n % FILES)).mkdir(parents=True, exist_ok=True)
        (manual / "all" / str(n % FILES) / f"{n}.png").write_bytes(picture([2, n]))
    before = content(here / "root", ["raw"])
    assert run(world, here, *more, "--root", str(here / "root"), names=["brought"]) == 0
    assert content(here / "root", ["raw"]) == before
    [mine, large] = (
        {path.split("/")[1]: digest for path, digest in content(folder, [name]).items() if path.endswith(".tar")}
        for folder, name in ((here / "disk" / "shards", "brought"), (world[0] / "large", "zipped"))
    )
    assert mine == large


def test_two_runs_do_not_disturb_each_other(world, here, monkeypatch):
    lock = storage.join(OUT, ".prepare", "lock.json")
    other = {"token": "x", "host": "elsewhere", "pid": 1, "home": "/scratch", "time": time.time()}
    storage.write(lock, json.dumps(other).encode())
    said = run(world, here, names=["fetched"])
    assert said.startswith("error: another tools/prepare.py (process 1 of elsewhere) is at work on msc://disk/shards")
    storage.delete(lock)  # as it advises
    with place.Place(OUT, here / "scratch" / "x").locked():
        holder = json.loads(storage.read(lock))
        assert f"process {os.getpid()} of {os.uname().nodename}" in run(world, here, names=["fetched"])
        assert json.loads(storage.read(lock)) == holder
    assert not storage.exists(lock)
    with locked(in_parts.Scratch(here / "scratch").home(OUT) / ".lock"):
        said = run(world, here, names=["fetched"])
        assert said.startswith("error: ") and "is locked by another process: wait for its end, or stop it" in said
    # A run that was killed holds nothing: it has ended, or has been silent for long.
    mine = place.Place(OUT, here / "scratch" / "x")
    for ended in ({"host": os.uname().nodename, "pid": 2**22}, {"time": time.time() - place.STALE - 1}):
        storage.write(lock, json.dumps(other | ended).encode())
        with mine.locked():
            assert json.loads(storage.read(lock))["token"] != "x"
    # Who has lost the lock stops.
    with mine.locked():
        storage.write(lock, json.dumps(other).encode())
        monkeypatch.setattr(place, "BEAT", 0)
        with pytest.raises(LockHeld, match="another tools/prepare.py"):
            mine.beat()


def test_an_upload_that_comes_back_otherwise_is_one_sentence(world, here, monkeypatch):
    monkeypatch.setattr(storage, "sha256_there", lambda address, size: "another")
    said = run(world, here, "--root", str(world[0] / "large"), names=["fetched"])
    assert re.fullmatch(
        r"error: msc://disk/shards/fetched/train-0000\d.tar was written 3 times and came back with other bytes: look at"
        r" the storage\.",
        said,
    )
    assert not (here / "disk" / "shards" / "fetched" / ".nv-meta").exists()


def test_a_file_that_was_changed_where_it_was_put_is_not_read(world, here):
    folder = here / "raw"
    (folder / "hub").mkdir(parents=True)
    names = [f"hub/{n}.png" for n in range(4)]
    for n, name in enumerate(names):
        (folder / name).write_bytes(picture([9, n]))
    times = {name: (folder / name).stat().st_mtime_ns for name in names}
    parking.park(folder, "msc://disk/parked", BOUND, False, lambda count: None)
    assert all((folder / name).stat().st_blocks == 0 for name in names)
    assert {name: (folder / name).stat().st_mtime_ns for name in names} == times
    raw = Parked.of(folder)
    assert [raw.content(folder / name).read_bytes() for name in names] == [picture([9, n]) for n in range(4)]
    [pack, *_] = sorted((here / "disk" / "parked").iterdir())
    pack.write_bytes(bytes(pack.stat().st_size))
    with pytest.raises(storage.StorageError, match="was changed after hub/"):
        for name in names:
            Parked.of(folder).content(folder / name)


def test_options_that_do_not_fit_are_one_sentence(world, here, monkeypatch):
    def said(*options):
        with pytest.raises(SystemExit) as ended:
            tool.main(["--stage", "2", *options])
        return ended.value.code

    scratch = ["--scratch", str(here / "scratch")]
    assert said("--out", OUT) == f"error: --out {OUT} needs --scratch DIR, a folder of a local disk"
    assert said("--out", "azure://x/y", *scratch).startswith("error: --out=azure://x/y has an unknown scheme")
    assert "go with --scratch DIR: add it" in said("--out", str(here), "--limit", "3")
    assert "takes no --array-count" in said("--out", OUT, *scratch, "--array-count", "2")
    told = said("--out", OUT, *scratch, "--max-scratch", "900TB")
    assert "--max-scratch 900TB is more than the " in told
    advice = re.search(r"give --max-scratch (\w+) or", told)[1]
    assert run(world, here, "--max-scratch", advice, "--root", str(world[0] / "large"), names=["fetched"]) == 0
