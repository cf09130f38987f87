"""Runs whose checkpoints are in object storage, on a server that speaks S3: uploads, an empty disk, secrets."""

import json
import logging
import re
from collections import Counter

import object_store
import pytest
from programs import REPOSITORY, succeeded
from test_training import losses, train

from molmo2_nemo import checkpoint_dir

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def asked():
    """(requests by method and path, the server's address)."""
    found, log = [], logging.getLogger("werkzeug")
    log.setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: found.extend(re.findall(r"\"(?:\x1b\[\d+m)*(\w+) (/\S*)", record.getMessage()))
    log.addHandler(handler)
    log.propagate = False
    server, endpoint = object_store.start_s3()
    yield found, endpoint
    server.stop()
    log.removeHandler(handler)


def test_a_run_on_an_empty_disk_goes_on_from_the_newest_whole_upload(asked, sample, export, tmp_path):
    """Two ranks that start from weights at an address; the newest upload is cut, the disk lost.

    Then training is bit for bit as without the loss, each byte is fetched once, and no credentials are written.
    """
    requests, endpoint = asked
    environment = object_store.environment(tmp_path / "home", endpoint)
    run_dir, old = tmp_path / "run", tmp_path / "old"

    import boto3

    key = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
    bucket = boto3.resource("s3", endpoint_url=endpoint, **key).Bucket(object_store.BUCKET)
    for path in export.iterdir():
        bucket.upload_file(str(path), f"models/tiny/{path.name}")
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
    reads = Counter(path for method, path in requests if method == "GET")
    assert reads["/bucket/models/tiny/model.safetensors"] == 1
    run_dir.rename(old)

    place = "deep/runs/mine/stage2/checkpoints"
    marker = json.loads(bucket.Object(f"{place}/step_00000002/complete.json").get()["Body"].read())
    bucket.Object(f"{place}/step_00000004/complete.json").delete()
    requests.clear()
    again = succeeded(train(2, 2, run_dir, sample, *flags, **environment))
    assert "step_00000004 has no complete.json: its upload has not ended" in again.stdout
    assert f"resumed step 2 from {run_dir}/checkpoints/step_00000002" in again.stdout
    reads = Counter(path for method, path in requests if method == "GET")
    assert all(reads[f"/{object_store.BUCKET}/{place}/step_00000002/{name}"] == 1 for name in marker["files"])

    for step in (3, 4):
        assert losses(run_dir)[step]["loss"] == losses(old)[step]["loss"]
    ends = [checkpoint_dir.read_marker(folder / "checkpoints" / "step_00000004") for folder in (old, run_dir)]
    weights = [{n: sha for n, sha in end["sha256"].items() if n.endswith(".distcp")} for end in ends]
    assert weights[0] == weights[1] and weights[0]

    written = [first.stdout + first.stderr + again.stdout + again.stderr]
    for folder in (run_dir, old):
        written += [path.read_bytes().decode(errors="replace") for path in folder.rglob("*") if path.is_file()]
    written += [one.get()["Body"].read().decode(errors="replace") for one in bucket.objects.all()]
    for secret in (object_store.ACCESS_KEY, object_store.SECRET_KEY):
        assert not [text[:200] for text in written if secret in text]


def test_a_run_in_object_storage_is_refused_and_leaves_nothing(sample):
    result = train(1, 2, "msc://store/runs", sample, "train.max_steps=1")
    assert result.returncode == 2 and "set train.upload_to=msc://store/runs" in result.stderr
    assert not (REPOSITORY / "msc:").exists()
