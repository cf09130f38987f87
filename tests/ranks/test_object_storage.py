"""Runs whose checkpoints are in object storage, on a server that speaks S3: uploads, an empty disk, secrets."""

import json
import logging
import re
import signal
import threading
import time
from collections import Counter

import boto3
import object_store
import pytest
from programs import REPOSITORY, TINY_SETTINGS, start_ranks, succeeded
from test_training import SMALL, losses, train

from molmo2_nemo import checkpoint_dir

pytestmark = pytest.mark.slow


class Server(logging.Handler):
    """A server that speaks S3. requests: (method, path); with `hold` it stops to answer at so many PUTs from now on."""

    def __init__(self):
        super().__init__()
        self.requests, self.hold, self.go_on = [], None, threading.Event()
        self.log = logging.getLogger("werkzeug")
        self.log.setLevel(logging.INFO)
        self.log.addHandler(self)
        self.log.propagate = False
        self.server, self.endpoint = object_store.start_s3()
        key = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
        self.bucket = boto3.resource("s3", endpoint_url=self.endpoint, **key).Bucket(object_store.BUCKET)

    def emit(self, record):
        """Of a request that is done but for its answer."""
        self.requests += re.findall(r"\"(?:\x1b\[\d+m)*(\w+) (/\S*)", record.getMessage())
        if self.hold is not None and self.puts() >= self.hold:
            self.go_on.wait(300)

    def puts(self):
        return sum(method == "PUT" for method, _ in self.requests)

    def reads(self):
        return Counter(path for method, path in self.requests if method == "GET")

    def has(self, key):
        return any(one.key == key for one in self.bucket.objects.filter(Prefix=key))


@pytest.fixture(scope="module")
def s3():
    server = Server()
    yield server
    server.log.removeHandler(server)
    server.server.stop()


def test_a_run_on_an_empty_disk_goes_on_from_the_newest_whole_upload(s3, sample, export, tmp_path):
    """Two ranks that start from weights at an address; the newest upload is cut, the disk lost, the data elsewhere.

    Then training, from shards at an address, is bit for bit as without the loss and with shards on the disk; each file
    of the checkpoint is fetched once, and no credentials are written.
    """
    environment = object_store.environment(tmp_path / "home", s3.endpoint)
    run_dir, old = tmp_path / "run", tmp_path / "old"
    for path in export.iterdir():
        s3.bucket.upload_file(str(path), f"models/tiny/{path.name}")
    flags = [
        "train.init_from=s3://bucket/models/tiny",
        "train.max_steps=4",
        "train.save_every=2",
        "name=mine",
        "train.upload_to=msc://store/runs",
    ]
    first = succeeded(train(2, 2, run_dir, sample, *flags, **environment))
    for step in (2, 4):
        address = f"msc://store/runs/mine/stage2/checkpoints/step_0000000{step}"
        assert len(re.findall(f"uploaded {address}, ", first.stdout)) == 1
    assert "NOT UPLOADED" not in first.stdout
    figures = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(line["uploads"]["failed"] == 0 for line in figures if line["kind"] == "train")
    assert f"making {run_dir}/start/step_00000000 of " in first.stdout
    assert s3.reads()["/bucket/models/tiny/model.safetensors"] == 1
    run_dir.rename(old)

    place = "deep/runs/mine/stage2/checkpoints"
    marker = json.loads(s3.bucket.Object(f"{place}/step_00000002/complete.json").get()["Body"].read())
    s3.bucket.Object(f"{place}/step_00000004/complete.json").delete()
    for path in sample.rglob("*"):
        if path.is_file():
            s3.bucket.upload_file(str(path), f"data/{path.relative_to(sample)}")
    s3.requests.clear()
    cache = tmp_path / "cache"
    again = succeeded(train(2, 2, run_dir, "s3://bucket/data", *flags, f"data.cache_dir={cache}", **environment))
    assert [*cache.rglob("*.data")] and "/bucket/data/image_qa/.nv-meta/.info.json" in s3.reads()
    assert "step_00000004 has no complete.json: its upload has not ended" in again.stdout
    assert f"resumed step 2 from {run_dir}/checkpoints/step_00000002" in again.stdout
    reads = s3.reads()
    assert all(reads[f"/{object_store.BUCKET}/{place}/step_00000002/{name}"] == 1 for name in marker["files"])

    for step in (3, 4):
        assert losses(run_dir)[step]["loss"] == losses(old)[step]["loss"]
    ends = [checkpoint_dir.read_marker(folder / "checkpoints" / "step_00000004") for folder in (old, run_dir)]
    weights = [{n: sha for n, sha in end["sha256"].items() if n.endswith(".distcp")} for end in ends]
    assert weights[0] == weights[1] and weights[0]

    written = [first.stdout + first.stderr + again.stdout + again.stderr]
    for folder in (run_dir, old, cache):
        written += [path.read_bytes().decode(errors="replace") for path in folder.rglob("*") if path.is_file()]
    written += [one.get()["Body"].read().decode(errors="replace") for one in s3.bucket.objects.all()]
    for secret in (object_store.ACCESS_KEY, object_store.SECRET_KEY):
        assert not [text[:200] for text in written if secret in text]


def test_a_run_in_object_storage_is_refused_and_leaves_nothing(sample):
    result = train(1, 2, "msc://store/runs", sample, "train.max_steps=1")
    assert result.returncode == 2 and "set train.upload_to=msc://store/runs" in result.stderr
    assert not (REPOSITORY / "msc:").exists()


def test_an_upload_that_was_killed_is_finished_by_the_next_start(s3, sample, tmp_path):
    environment = object_store.environment(tmp_path / "home", s3.endpoint)
    run_dir, place = tmp_path / "run", "killed/cut/stage2/checkpoints/step_00000001"
    flags = ["train.max_steps=1", "name=cut", "train.upload_to=s3://bucket/killed"]
    recipe = ["recipes/stage2_sft.py", *TINY_SETTINGS, *SMALL, f"data.root={sample}", f"run_dir={run_dir}", *flags]
    s3.requests.clear()
    s3.hold = 3
    [program] = start_ranks(1, recipe, tmp_path / "log", **environment)
    until = time.monotonic() + 500
    while s3.puts() < s3.hold and program.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    program.send_signal(signal.SIGKILL)
    program.wait()
    s3.hold = None
    s3.go_on.set()
    assert s3.puts() and not s3.has(f"{place}/complete.json"), (tmp_path / "log").read_text()[-3000:]
    s3.requests.clear()
    again = succeeded(train(1, 2, run_dir, sample, *flags, **environment))
    assert "resumed step 1 from" in again.stdout and "uploaded s3://bucket/killed/cut/stage2/" in again.stdout
    assert s3.has(f"{place}/complete.json")
    files = checkpoint_dir.read_marker(run_dir / "checkpoints" / "step_00000001")["files"]
    assert 0 < s3.puts() <= len(files) + 1 - 3  # those that had arrived are not sent again
