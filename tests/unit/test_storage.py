"""Addresses of object storage: every function on a folder under msc://, on S3 and on a local path, and its errors."""

import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor

import object_store
import pytest
from slow_proxy import SlowProxy

from molmo2_nemo import storage

ADDRESSES = {"a folder": "msc://disk/x", "S3 by a profile": "msc://store/x", "S3": "s3://bucket/x", "local": "{}/x"}


@pytest.fixture(scope="module")
def s3():
    with object_store.s3() as endpoint:
        yield endpoint


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder under msc://disk/, in the place of other configurations."""
    for name, value in object_store.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    storage.forget_clients()
    yield tmp_path
    storage.forget_clients()


@pytest.mark.slow
@pytest.mark.parametrize("address", ADDRESSES.values(), ids=ADDRESSES)
def test_files_come_back_as_they_were_written(address, s3, tmp_path, monkeypatch):
    for name, value in object_store.environment(tmp_path, s3).items():
        monkeypatch.setenv(name, value)
    storage.forget_clients()
    root, local = address.format(tmp_path), tmp_path / "local"
    first, second = storage.join(root, "a/b.bin"), storage.join(root, ".hidden", "c")
    local.write_bytes(bytes(range(256)))
    storage.write(first, b"hello world")
    storage.upload_file(local, second)
    assert storage.read(first) == b"hello world"
    assert storage.read(first, 6, 3) == b"wor" and storage.read(second, 250) == bytes(range(250, 256))
    found = storage.list_files(root)
    assert {name: entry.size for name, entry in found.items()} == {"a/b.bin": 11, ".hidden/c": 256}
    assert storage.info(first) == found["a/b.bin"]
    assert storage.download_file(second, tmp_path / "back").size == 256
    assert (tmp_path / "back").read_bytes() == bytes(range(256))
    storage.write(first, b"HELLO WORLD")  # of the same length
    assert storage.info(first).version != found["a/b.bin"].version
    assert storage.exists(first) and not storage.exists(storage.join(root, "a"))
    storage.delete(first)
    storage.delete(first)
    assert not storage.exists(first)
    for ask in (storage.read, storage.info, lambda gone: storage.download_file(gone, tmp_path / "none")):
        with pytest.raises(storage.Missing, match="b.bin: it is not there"):
            ask(first)
    assert not (tmp_path / "none").exists()
    storage.delete_folder(root, first=("c",))
    assert storage.list_files(root) == {} == storage.list_files(f"{root}/never")


def test_parts_of_a_large_object_may_arrive_in_any_order(s3, here, monkeypatch):
    """The first one comes last here, as it happens by itself with objects of more than 64 MB."""
    with SlowProxy(s3) as proxy:
        for name, value in object_store.environment(here, proxy.address).items():
            monkeypatch.setenv(name, value)
        profiles = json.loads((here / "msc.json").read_text())
        part = {"multipart_threshold": 2**16, "multipart_chunksize": 2**16, "io_chunksize": 2**16}
        profiles["profiles"]["store"]["storage_provider"]["options"] |= part
        (here / "msc.json").write_text(json.dumps(profiles))
        storage.forget_clients()
        content = b"".join(number.to_bytes(4) for number in range(2**16))
        storage.write("s3://bucket/deep/large", content)
        gets = itertools.count()
        proxy.fault = lambda method, path: time.sleep(0.7) if method == "GET" and next(gets) == 0 else None
        with storage.patience(0.0):
            assert storage.download_file("msc://store/large", here / "large").size == len(content)
        assert (here / "large").read_bytes() == content and next(gets) > 3


def test_a_disk_that_takes_no_file_is_no_error_of_the_storage(here):
    storage.write("msc://disk/x", b"x")
    with pytest.raises(FileNotFoundError) as raised:
        storage.download_file("msc://disk/x", here / "no such folder" / "x")
    assert not isinstance(raised.value, storage.StorageError)


@pytest.mark.parametrize(
    ("address", "message"),
    {
        "https://user:secret@host/x?key=secret": "data.root=https://host/x has an unknown scheme: write s3://BUCKET",
        "azure://box/x": "msc://PROFILE/PATH with a profile of multi-storage-client, which knows Azure and OCI",
        "s3://user:secret@bucket/x": "data.root=s3://bucket/x, of which a part is not shown here, has more in it than",
        "s3://user:of/a+secret@bucket/x": "data.root=s3://bucket/x, of which a part is not shown here, has more",
        "s3://bucket/x?token=secret": "data.root=s3://bucket/x, of which a part is not shown here, has more",
        "s3://host:9000/bucket/x": "credentials and the server's address belong into the environment",
        "msc:/store/x": "data.root=msc:/store/x is not msc://PROFILE/PATH: correct it.",
        "s3:bucket/x": "data.root=s3:bucket/x is not s3://BUCKET/PATH: correct it.",
        "s3:///x": "is not s3://BUCKET/PATH",
    }.items(),
)
def test_an_address_that_cannot_work_is_refused_without_its_secrets(address, message):
    with pytest.raises(storage.StorageError) as raised:
        storage.check(address, "data.root")
    assert message in str(raised.value) and "secret" not in str(raised.value)


def test_addresses_are_told_from_paths():
    assert all(map(storage.is_remote, ("msc://p/x", "s3://b", "S3://b", "gs://b/x", "msc:/p/x", "s3:b")))
    assert not any(map(storage.is_remote, ("data", "/data/x:/y", "./s3", "~/x", "file:///x", "./s3:b", "s3x:b")))
    assert storage.join("s3://b/root", "x/../y", "z") == "s3://b/root/y/z"
    assert storage.join("s3://b/root", "/disk/x") == "/disk/x" and storage.join("/root", "s3://b/x") == "s3://b/x"
    assert storage.parent("s3://b/x/y/") == "s3://b/x" and storage.parent("s3://b") == "s3://b"
    assert storage.name("s3://b/x/y/") == "y"


def test_a_client_is_made_once_however_many_threads_ask(here, monkeypatch):
    storage.write("msc://disk/x", b"1")
    storage.forget_clients()
    library, made = storage._library(), []

    class Client(library.StorageClient):
        def __init__(self, *args, **kwargs):
            made.append(1)
            time.sleep(0.05)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(library, "StorageClient", Client)
    with ThreadPoolExecutor(16) as threads:
        assert list(threads.map(storage.read, ["msc://disk/x"] * 16)) == [b"1"] * 16
    assert made == [1]


def test_a_name_that_no_bucket_can_have_is_refused_at_once(here):
    with pytest.raises(storage.StorageError, match="cannot read s3://No!/x: no bucket can have this name"):
        storage.read("s3://No!/x")


def test_a_profile_that_is_not_there_is_named(here):
    with pytest.raises(storage.StorageError, match=r"no valid profile nope in .*msc.json \(MSC_CONFIG\)"):
        storage.read("msc://nope/x")


def test_a_damaged_configuration_is_not_quoted(here):
    (here / "msc.json").write_text('{"profiles": {"disk": {"storage_provider": "planted"}}}')
    with pytest.raises(storage.StorageError, match="msc.json .MSC_CONFIG. is no valid file of multi-storage-client"):
        storage.read("s3://b/x")
    with pytest.raises(storage.StorageError, match="no valid profile disk") as raised:
        storage.read("msc://disk/x")
    assert "planted" not in str(raised.value)


def test_what_may_go_away_is_tried_again_and_not_for_ever(here, monkeypatch, capsys):
    pauses, failures = [], []

    def failing(client, path):
        failures.append(path)
        raise RuntimeError("for a while")

    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    monkeypatch.setattr(storage.time, "monotonic", lambda: sum(pauses))
    storage.write("msc://disk/x", b"x")
    client, _ = storage._client("msc://disk/x")
    monkeypatch.setattr(type(client), "read", failing)
    with pytest.raises(storage.StorageError, match=r"cannot read msc://disk/x for \d+ s: RuntimeError"):
        storage.read("msc://disk/x")
    assert capsys.readouterr().err == "msc://disk: RuntimeError; it is tried again for up to 120 s\n"
    assert 8 <= len(failures) <= 30 and sum(pauses) <= storage.PATIENCE + storage.LONGEST_PAUSE
    assert pauses[0] < pauses[-1] <= 1.5 * storage.LONGEST_PAUSE
