"""Does everything work with this object storage? All that the project does there, against OpenStack Swift or yours.

    python tools/check/object_storage.py                                   # Swift, which is started here
    python tools/check/object_storage.py --at s3://bucket/folder --endpoint https://s3.example.org
    python tools/check/object_storage.py --at msc://profile/folder         # or gs://bucket/folder
    python tools/check/object_storage.py --only objects pages large        # some of the checks

Of a storage of yours, credentials come from the environment, multi-storage-client's file or the machine's role, as in
training. The bucket must be there. Everything is written into a new folder below --at, and removed at the end: about
200 MB, twice that are read. Swift is OpenStack's object storage with its S3 interface; it runs as processes of its own
on 127.0.0.1 and in a temporary folder, which has to be on a file system with extended attributes. It takes

    apt-get install --no-install-recommends swift swift-proxy swift-account swift-container swift-object

A line for each check; exit status 1 if one has failed. Needs two cores, some minutes, and 2 GB in the temporary folder.
"""

import argparse
import contextlib
import http.server
import io
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import swift_server
import yaml
from PIL import Image

from molmo2_nemo import remote_checkpoints, storage
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.files import readable_size, sha256_of
from molmo2_nemo.paths import ROOT

BUCKET = "check"
# More objects than a server lists at once, and bytes of an object that is sent and fetched in parts.
MANY, LARGE = 1050, 70 * 2**20
TRAIN = [
    "model=tiny",
    "data=sample",
    "schedule=quickstart",
    "optim=from_scratch",
    "train.log_every=1",
    "train.report=false",
    "train.validation_batches=1",
    "train.max_steps=4",
    "train.save_every=2",
    "name=check",
]
# Of the data set that is prepared in parts: samples, archives with their pictures, and bytes of scratch.
SAMPLES, ARCHIVES, SCRATCH = 420, 8, "9MB"


class Failed(Exception):
    """What is not as it should be."""


def expect(is_right: bool, otherwise: str) -> None:
    if not is_right:
        raise Failed(otherwise)


@dataclass
class Check:
    """at: the address below which everything is written. folder: for what is on the disk. said: by all commands.

    many: more objects than the server lists at once.
    """

    at: str
    folder: Path
    many: int = MANY
    said: str = ""

    def of(self, *parts: str) -> str:
        return storage.join(self.at, *parts)

    def run(self, *command, status: int = 0, **environment: str) -> str:
        """What a command of this project prints. Failed: it ends with another status."""
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            capture_output=True,
            text=True,
        )
        self.said += done.stdout + done.stderr
        expect(done.returncode == status, f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-700:]}")
        return done.stdout + done.stderr

    def train(self, name: str, *settings: str, status: int = 0) -> str:
        return self.run("recipes/stage2_sft.py", *TRAIN, f"run_dir={self.folder / name}", *settings, status=status)

    def losses(self, name: str) -> dict[int, float]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return {one["step"]: one["loss"] for one in map(json.loads, lines) if one["kind"] == "train"}


# -- single objects ---------------------------------------------------------------------------------------------------


def objects(check: Check) -> str:
    """Objects are written, read, listed, replaced and removed."""
    names = ("a/b.bin", ".hidden/c", "a name/with blanks, ü & 100%+.bin")
    for name in names:
        storage.write(check.of("objects", name), name.encode())
    found = storage.list_files(check.of("objects"))
    expect(sorted(found) == sorted(names), f"{sorted(found)} is listed instead of {sorted(names)}")
    for name in names:
        expect(storage.read(check.of("objects", name)) == name.encode(), f"{name} comes back otherwise")
        if check.at.startswith("s3"):
            seen = storage.info(check.of("objects", name))
            expect(seen == found[name], f"{name} is {found[name]} in a list and {seen} by itself")
    first = check.of("objects", "a/b.bin")
    expect(storage.read(first, 2, 3) == b"b.b", "a part of an object comes back otherwise")
    before = storage.info(first).version
    storage.write(first, b"A/B.BIN")
    expect(storage.info(first).version != before, "an object that was replaced has the version that it had")
    expect(not storage.exists(check.of("objects", "a")), "a folder counts as an object")
    storage.delete(first)
    storage.delete(first)
    expect(not storage.exists(first), "an object that was removed is there")
    storage.delete_folder(check.of("objects"))
    expect(not storage.list_files(check.of("objects")), "a folder that was removed is listed")
    return f"{len(names)} names"


def pages(check: Check) -> str:
    """A folder with more objects than a server lists at once."""
    names = {f"{number:05d}" for number in range(check.many)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: storage.write(check.of("pages", name), b"x"), names))
    found = storage.list_files(check.of("pages"))
    expect(found.keys() == names, f"{len(found):,} of {check.many:,} objects are listed")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: storage.delete(check.of("pages", name)), names))
    return f"{check.many:,} objects"


def large(check: Check) -> str:
    """An object that is sent and fetched in parts."""
    file, back, address = check.folder / "large", check.folder / "back", check.of("large")
    file.write_bytes(np.random.default_rng(0).bytes(LARGE))
    storage.upload_file(file, address)
    expect(storage.info(address).size == LARGE, f"it has {storage.info(address).size:,} bytes instead of {LARGE:,}")
    expect(storage.sha256_there(address, LARGE) == sha256_of(file), "it was read with other bytes")
    storage.download_file(address, back)
    expect(sha256_of(back) == sha256_of(file), "it was fetched with other bytes")
    storage.delete(address)
    return readable_size(LARGE)


def missing(check: Check) -> str:
    """What is not there is told in one sentence."""
    said = sentence(lambda: storage.read(check.of("nothing")), storage.Missing)
    expect("it is not there: correct the address" in said, said)
    if check.at.startswith("s3://"):
        said = sentence(lambda: storage.list_files(f"s3://{secrets.token_hex(16)}/x"))
        expect("there is no such bucket: correct the address, or create it" in said or "no right to" in said, said)
    return said


def wrong_key(check: Check) -> str:
    """Another secret key is refused at once, in a sentence without it."""
    if not check.at.startswith("s3://") or "AWS_SECRET_ACCESS_KEY" not in os.environ:
        return "NOT TRIED: it takes an s3:// address and AWS_SECRET_ACCESS_KEY"
    right, wrong = os.environ["AWS_SECRET_ACCESS_KEY"], secrets.token_hex(20)
    os.environ["AWS_SECRET_ACCESS_KEY"] = wrong
    storage.forget_clients()
    try:
        for ask in (
            lambda: storage.list_files(check.at),
            lambda: storage.write(check.of("x"), b"x"),
            lambda: storage.info(check.of("x")),
        ):
            said = sentence(ask)
            expect("the credentials are refused" in said and wrong not in said, said)
    finally:
        os.environ["AWS_SECRET_ACCESS_KEY"] = right
        storage.forget_clients()
    return said


def sentence(ask: Callable[[], object], kind: type = storage.StorageError) -> str:
    """The error that `ask` ends with. Failed: it ends with none, or tries for more than a few seconds."""
    begun = time.monotonic()
    try:
        ask()
    except kind as error:
        expect(time.monotonic() - begun < storage.PATIENCE / 2, f"only after {time.monotonic() - begun:.0f} s: {error}")
        return str(error)
    raise Failed("no error was raised")


# -- training ---------------------------------------------------------------------------------------------------------


def training(check: Check) -> str:
    """Shards at the address through the cache, uploads, an empty disk, pruning: the losses are those of a disk."""
    data, run = check.folder / "data", check.of("runs", "check", "stage2", "checkpoints")
    check.run("tools/make_sample_data.py", "--out", data, "--scale", "0.01")
    for path in data.rglob("*"):
        if path.is_file():
            storage.upload_file(path, check.of("data", path.relative_to(data).as_posix()))
    check.train("on_disk", f"data.root={data}")
    there = [f"data.root={check.of('data')}", f"data.cache_dir={check.folder / 'cache'}"]
    there += [f"train.upload_to={check.of('runs')}"]
    said = check.train("run", *there, "train.keep_last=2")
    expect("NOT UPLOADED" not in said and said.count(f"uploaded {run}/step_") == 2, said[-700:])
    expect(list(remote_checkpoints.listed(run)) == [2, 4], f"uploaded are steps {[*remote_checkpoints.listed(run)]}")
    expect(check.losses("run") == check.losses("on_disk"), "with shards at the address, losses are others")
    # The newest is half an upload, and the disk is empty.
    storage.delete(storage.join(run, "step_00000004", "complete.json"))
    (check.folder / "run").rename(check.folder / "lost")
    said = check.train("run", *there, "train.keep_last=1", "train.keep_every=0")
    expect("resumed step 2 from" in said and "its upload has not ended" in said, said[-700:])
    before, after = check.losses("on_disk"), check.losses("run")
    expect(after == {step: before[step] for step in (3, 4)}, f"after the resume, losses are {after}, not {before}")
    expect(list(remote_checkpoints.listed(run)) == [4], f"after pruning, {[*remote_checkpoints.listed(run)]} are there")
    expect(any((check.folder / "cache").rglob("*.data")), "the cache is empty")
    return f"losses of 4 steps, {', '.join(f'{loss:.4f}' for loss in before.values())}, are the same"


def missing_shard(check: Check) -> str:
    """A shard that is not there is named before training begins. After `training`, whose shards it takes."""
    shards = [name for name in storage.list_files(check.of("data")) if re.fullmatch(r"image_qa/train-.*\.tar", name)]
    expect(bool(shards), "there are no shards: `training` comes first")
    for name in shards:
        storage.delete(check.of("data", name))
    said = check.train("refused", f"data.root={check.of('data')}", f"data.cache_dir={check.folder / 'cache'}", status=2)
    expect("image_qa lacks" in said and shards[0] in said and "Traceback" not in said, said[-700:])
    return next(line for line in said.splitlines() if "lacks" in line)


# -- preparing --------------------------------------------------------------------------------------------------------


def in_parts(check: Check) -> str:
    """A data set that is prepared in parts and killed: the same bytes as on a disk, finished shards are kept."""
    folder, raw = check.folder / "prepare", check.folder / "published"
    make_set(raw)
    with served(raw) as server:
        catalogue = folder / "sets.yaml"
        folder.mkdir()
        catalogue.write_text(yaml.safe_dump(entry_of(server)))
        common = ["--catalogue", catalogue, "--quiet", "--allow-private"]
        check.run("tools/download.py", "fetch", "check-set", "--root", folder / "disk", *common)
        names = ["tools/prepare.py", "--stage", "2", "check-set", "--jobs", "1"]
        check.run(*names, "--out", folder / "disk", "--catalogue", catalogue, "--quiet")
        there = [*names, "--out", check.of("shards"), "--scratch", folder / "scratch", "--max-scratch", SCRATCH]
        before = killed_at_an_upload(check, [*there, *common])
        check.run(*there, *common)
    expected = {path.relative_to(folder / "disk" / "check-set").as_posix(): path for path in files_of(folder / "disk")}
    found = storage.list_files(check.of("shards", "check-set"))
    expect(found.keys() == expected.keys(), f"{sorted(found)} is there instead of {sorted(expected)}")
    for name, path in expected.items():
        same = storage.sha256_there(check.of("shards", "check-set", name), found[name].size) == sha256_of(path)
        expect(same, f"{name} has other bytes")
    kept = {name: found[name].version for name in before}
    expect(kept == before, f"of {sorted(before)}, some were uploaded again")
    left = storage.list_files(check.of("shards", ".prepare"))
    expect(not left, f"{sorted(left)} was left")
    return f"{sum(name.endswith('.tar') for name in found)} shards, {len(before)} of them before the kill"


def killed_at_an_upload(check: Check, command: list) -> dict[str, str]:
    """Start a command, kill it once a shard is noted as uploaded, and return the versions of those that are."""
    with (check.folder / "killed.log").open("w") as log:
        program = subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    noted: list[str] = []
    while not noted and program.poll() is None:
        time.sleep(0.02)
        noted = [path.stem for path in check.folder.glob("prepare/scratch/*/shards/.prepare/check-set/uploaded/*.json")]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)
    program.wait()
    said = (check.folder / "killed.log").read_text().strip()[-700:]
    expect(bool(noted) and program.returncode == -signal.SIGKILL, f"it ended before it could be killed: {said}")
    found = storage.list_files(check.of("shards", "check-set"))
    expect(".nv-meta/.info.json" not in found, "half a data set is visible")
    return {f"{name}.tar": found[f"{name}.tar"].version for name in noted if f"{name}.tar" in found}


def make_set(folder: Path) -> None:
    """Rows with questions about pictures of noise, which are in archives."""
    folder.mkdir()
    rows, pictures = [], [zipfile.ZipFile(folder / f"part{k}.zip", "w") for k in range(ARCHIVES)]
    for number in range(SAMPLES):
        name, file = f"{number % ARCHIVES}/{number}.png", io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (100, 100, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file, "PNG")
        pictures[number % ARCHIVES].writestr(zipfile.ZipInfo(name), file.getvalue())
        rows.append({"image": name, "question": f"Which number, {number}?", "answer": str(number)})
    for archive in pictures:
        archive.close()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def entry_of(server: str) -> dict:
    """The catalogue that has the set alone."""
    archives = [f"{server}/part{k}.zip" for k in range(ARCHIVES)]
    entry = {
        "name": "check-set",
        "source": {"kind": "url", "urls": [f"{server}/rows.jsonl"]},
        "media": {"kind": "archive", "urls": archives},
        "fields": {"image": "name", "question": "text", "answer": "text"},
        "convert": {"kind": "question"},
        "counts": {"paper_examples": SAMPLES},
    }
    return {"datasets": [entry]}


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given, **more):
            super().__init__(*given, directory=str(folder), **more)

        def log_message(self, *_):
            pass

        def copyfile(self, source, outputfile):
            with contextlib.suppress(ConnectionError):  # of whom the head was enough
                super().copyfile(source, outputfile)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def files_of(root: Path) -> list[Path]:
    return [path for path in (root / "check-set").rglob("*") if path.is_file()]


# -- afterwards -------------------------------------------------------------------------------------------------------


def no_secret(check: Check) -> str:
    """The secret key is in nothing that was printed, written or uploaded. Last."""
    secret = os.environ.get("AWS_SECRET_ACCESS_KEY")
    if not secret:
        return "NOT TRIED: AWS_SECRET_ACCESS_KEY is not set"
    expect(secret not in check.said, "a command has printed it")
    files = [path for path in check.folder.rglob("*") if path.is_file() and path.name != "large"]
    for path in files:
        expect(secret.encode() not in path.read_bytes(), f"{path} has it")
    found = storage.list_files(check.at)
    for name in found:
        expect(secret.encode() not in storage.read(check.of(name)), f"{name} there has it")
    return f"{len(files):,} files, {len(found):,} objects"


CHECKS = (objects, pages, large, missing, wrong_key, training, missing_shard, in_parts, no_secret)


def main() -> None:
    args = arguments()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="object-storage-")))
        try:
            at, what = where(args, stack, scratch)
        except ConfigError as error:
            sys.exit(f"error: {error}")
        (scratch / "files").mkdir()
        many = MANY if args.at else swift_server.LISTED_AT_ONCE + 20
        check = Check(storage.join(at, f"check-{secrets.token_hex(4)}"), scratch / "files", many)
        print(f"{what}: {storage.shown(check.at)}", flush=True)
        failed = [one.__name__ for one in CHECKS if one.__name__ in args.only and not passed(one, check)]
        if args.keep:
            print(f"what was uploaded stays in {storage.shown(check.at)}")
        else:
            storage.delete_folder(check.at)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def passed(one: Callable[[Check], str], check: Check) -> bool:
    begun = time.monotonic()
    try:
        state, said = "passed", one(check)
    except (Failed, ConfigError, OSError) as error:
        state, said = "FAILED", f"{type(error).__name__}: {error}"
    state = "" if said.startswith("NOT TRIED") else state
    print(f"{one.__name__:<14}{state:<8}{time.monotonic() - begun:>6.1f} s  {said}", flush=True)
    return state != "FAILED"


def where(args: argparse.Namespace, stack: contextlib.ExitStack, folder: Path) -> tuple[str, str]:
    """The address to work below, and what is there; Swift is started if none was given. ConfigError."""
    if args.at:
        storage.check(args.at, "--at")
        if args.endpoint:
            os.environ["AWS_ENDPOINT_URL"] = args.endpoint
        storage.forget_clients()
        remote_checkpoints.try_address(args.at)
        return args.at, args.endpoint or "the storage"
    import boto3

    (folder / "swift").mkdir()
    endpoint, key, secret, version = stack.enter_context(swift_server.swift(folder / "swift"))
    os.environ |= {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
    for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE", "MSC_CONFIG"):
        os.environ.pop(name, None)
    boto3.client("s3").create_bucket(Bucket=BUCKET)
    return f"s3://{BUCKET}", version


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [one.__name__ for one in CHECKS]
    parser.add_argument("--at", metavar="ADDRESS", help="an address of a storage of yours (default: Swift)")
    parser.add_argument("--endpoint", metavar="URL", help="of a server that speaks S3, for --at s3://...")
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="CHECK", help=", ".join(names))
    parser.add_argument("--keep", action="store_true", help="do not remove what was uploaded")
    given = parser.parse_args()
    if given.endpoint and not (given.at or "").startswith("s3://"):
        parser.error("--endpoint goes with --at s3://BUCKET/FOLDER: add it")
    return given


if __name__ == "__main__":
    main()
