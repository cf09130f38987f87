"""Object stores on this machine: a folder under msc://, and moto's server, which speaks S3."""

import contextlib
import json
import logging
from pathlib import Path

# Not to be found in anything that a program writes.
ACCESS_KEY, SECRET_KEY = "AKIAPLANTEDPLANTED00", "planted/secret+key/that+must/not+be/printed"
BUCKET = "bucket"


def environment(folder: Path, endpoint: str | None = None) -> dict[str, str]:
    """Environment variables for msc://disk/ (a folder below `folder`) and, with an endpoint, s3:// and msc://store/.

    msc://store/ is the folder deep of the bucket.
    """
    profiles = {"disk": {"storage_provider": {"type": "file", "options": {"base_path": str(folder / "disk")}}}}
    variables = {"MSC_CONFIG": str(folder / "msc.json")}
    if endpoint:
        options = {"base_path": f"{BUCKET}/deep", "endpoint_url": endpoint, "region_name": "us-east-1"}
        profiles["store"] = {"storage_provider": {"type": "s3", "options": options}}
        variables |= {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        variables |= {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    (folder / "disk").mkdir(parents=True, exist_ok=True)
    (folder / "msc.json").write_text(json.dumps({"profiles": profiles}))
    return variables


@contextlib.contextmanager
def s3():
    """The address of a server as of `start_s3` that writes no line for each request."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server, endpoint = start_s3()
    try:
        yield endpoint
    finally:
        server.stop()


def start_s3():
    """moto's server with an empty bucket, and its address; `.stop()` ends it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
    )
    client.create_bucket(Bucket=BUCKET)
    return server, endpoint
