"""The node's cache of shards: what is read is right, whatever happens to storage, disk and processes on the way."""

import errno
import json
import logging
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import object_store
import pytest
import sources as world
import torch
from slow_proxy import SlowProxy

from molmo2_nemo import storage
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.data import blend, loader, node_cache
from molmo2_nemo.data.cached_reader import CachedTar, Stream
from molmo2_nemo.storage import Missing, StorageError

SHARD = "train-0.tar"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with sources below msc://disk/data."""
    for name, value in object_store.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    storage.forget_clients()
    write(tmp_path / "disk" / "data" / "a", 50)
    yield tmp_path
    storage.forget_clients()


def write(folder: Path, number: int, name: str = "a") -> None:
    world.write_source(folder, [{"json": world.chat(f"Q {name}{i}", "word " * i)} for i in range(number)], 20)


def cached(here: Path, size: str = "1GB", address: str = "msc://disk/data/a") -> node_cache.CachedSource:
    return node_cache.open_cache(str(here / "cache"), size).source(address)


def stored(here: Path, index: np.ndarray, first: int, end: int | None = None, name: str = SHARD) -> bytes:
    content = (here / "disk" / "data" / "a" / name).read_bytes()
    return content[int(index[first]) : int(index[end or first + 1])]


def test_samples_are_those_of_the_shard_and_are_fetched_once(here, monkeypatch):
    reads, read = [], storage.read
    monkeypatch.setattr(storage, "read", lambda *args: reads.append(args) or read(*args))
    source = cached(here)
    source.load(SHARD, 3, 9)
    index, fetched = source.index(SHARD), len(reads)
    assert [source.sample(SHARD, number) for number in range(3, 9)] == [stored(here, index, n) for n in range(3, 9)]
    assert len(reads) == fetched
    assert source.sample(SHARD, 9) == stored(here, index, 9)
    assert reads[-1][1:] == (index[9], index[10] - index[9])  # no more than this sample
    again = cached(here)  # as another process, or a later run
    reads.clear()
    assert again.sample(SHARD, 5) == stored(here, index, 5) and reads == []


def test_the_cache_keeps_its_bound_and_what_is_in_use(here):
    whole = cached(here, "50KB")
    sizes = []
    for shard in (SHARD, "train-1.tar", "train-2.tar"):
        for number in range(10):
            index = whole.index(shard)
            assert whole.sample(shard, number) == stored(here, index, number, name=shard)
            sizes.append(whole.cache.used())
    assert max(sizes) <= 50_000
    assert not (whole.folder / f"{SHARD}.map").exists()  # the oldest has gone
    with whole._opened("train-2.tar"):
        whole.cache.evict(0)
        assert [path.name for path in whole.folder.glob("*.map")] == ["train-2.tar.map"]
    whole.cache.evict(0)
    assert list(whole.folder.glob("*.data")) == []
    with pytest.raises(StorageError, match="data.cache_size=.* is less than the .* that one slice"):
        whole.cache.count(60_000)


@pytest.mark.parametrize("damage", ["bytes of a sample", "the map", "the index", "cut short", "no data"])
def test_a_damaged_cache_file_is_fetched_again(here, damage):
    source = cached(here)
    source.load(SHARD, 0, 6)
    index = source.index(SHARD)
    paths = {end: source.folder / f"{SHARD}.{end}" for end in ("data", "map", "idx")}
    if damage == "no data":
        paths["data"].unlink()
        paths["data"].touch()
    elif damage == "cut short":
        os.truncate(paths["map"], 100)
    else:
        where = {"bytes of a sample": ("data", int(index[2]) + 600), "the map": ("map", 5), "the index": ("idx", 20)}
        end, place = where[damage]
        content = bytearray(paths[end].read_bytes())
        content[place] ^= 0xFF
        paths[end].write_bytes(content)
    source = cached(here)
    assert [source.sample(SHARD, number) for number in range(6)] == [stored(here, index, n) for n in range(6)]


def test_a_process_that_is_killed_while_it_writes_leaves_nothing_wrong(here, monkeypatch):
    source = cached(here)
    index = source.index(SHARD)

    def dies(file, content, offset):
        os.pwrite(file, content[: len(content) // 2], offset)
        os.kill(os.getpid(), signal.SIGKILL)

    def child():
        monkeypatch.setattr(node_cache, "_write_all", dies)
        source.load(SHARD, 0, 5)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [source.sample(SHARD, number) for number in range(5)] == [stored(here, index, n) for n in range(5)]


def test_processes_that_want_the_same_samples_fetch_them_once(here, monkeypatch):
    log, read = here / "reads", storage.read

    def logged(address, *range):
        with log.open("a") as file:
            file.write(f"{address} {range}\n")
        return read(address, *range)

    monkeypatch.setattr(storage, "read", logged)
    processes = [
        multiprocessing.get_context("fork").Process(target=lambda: cached(here).load(SHARD, 0, 8)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(log.read_text().splitlines()) == 2  # the index and the samples


def test_a_shard_that_was_replaced_is_refused_while_it_is_in_use_and_read_anew_by_the_next_run(here):
    source = cached(here)
    source.sample(SHARD, 0)
    shutil.rmtree(here / "disk" / "data" / "a")
    write(here / "disk" / "data" / "a", 50, "b")  # as long, other bytes
    with pytest.raises(node_cache.Replaced, match=f"a/{SHARD} was replaced while it is in use"):
        source.sample(SHARD, 1)
    later = cached(here)
    assert later.sample(SHARD, 0) == stored(here, later.index(SHARD), 0) and b"b0" in later.sample(SHARD, 0)


def test_a_shard_that_does_not_fit_its_index_is_refused(here):
    folder = here / "disk" / "data" / "a"
    with pytest.raises(node_cache.Replaced, match="has 10 samples and .nv-meta says 7"):
        CachedTar(cached(here), "train-2.tar", 7).index()
    os.truncate(folder / SHARD, 2048)
    with pytest.raises(node_cache.Replaced, match=f"has 2,048 bytes and does not fit its index, {SHARD}.idx"):
        cached(here).sample(SHARD, 0)
    (folder / SHARD).unlink()
    with pytest.raises(Missing, match=f"data/a/{SHARD}: it is not there"):
        cached(here).sample(SHARD, 0)


def test_a_full_disk_is_named_after_the_cache_was_emptied(here, monkeypatch):
    source = cached(here)
    source.sample("train-1.tar", 0)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(node_cache, "_write_all", full)
    with pytest.raises(StorageError, match=r"the cache .* cannot be written \(No space left on device\): make room"):
        source.sample(SHARD, 0)
    assert not (source.folder / "train-1.tar.map").exists()


def test_a_cache_folder_of_somebody_else_is_refused(here):
    folder = here / "cache" / f"molmo2-nemo-cache-{os.getuid()}"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match=r"data.cache_dir=.*: .* is no folder that only you can write to"):
        cached(here)
    folder.chmod(0o700)
    with pytest.raises(ConfigError, match="data.cache_size=much: much is not a size like 500GB"):
        cached(here, "much")
    (here / "file").touch()
    with pytest.raises(
        ConfigError, match="^data.cache_dir=.*/file: .*/file cannot be written .File exists.; name another"
    ):
        node_cache.open_cache(str(here / "file"), None)


# -- the training stream ----------------------------------------------------------------------------------------------


def batches(here, root, number, saved=None, save_at=None, **changes):
    """Batches of a training loader, and its state after `save_at` of them."""
    data = world.config(root, blend=str(here / "blend.yaml"), **changes)
    found = blend.load_blend(data)
    blend.check_shards(found, data.max_error_rate)
    stream = loader.train_loader(data, world.VISION, found, 0, 1, None, 1, saved=[saved] if saved else ())
    got, state = [], here / f"state of {str(root).partition(':')[0].replace('/', '_')}"
    for turn in range(number):
        got.append(next(stream))
        if turn + 1 == save_at:
            state.write_bytes(loader.save_state(stream))
    stream.close()
    return got, state


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second):
        for key, value in vars(one).items():
            if key != "__sources__":  # the folders
                same = value == getattr(other, key)
                assert torch.as_tensor(same).all() if not isinstance(same, bool) else same, key


@pytest.fixture
def blended(here):
    write(here / "disk" / "data" / "b", 13, "b")
    write(here / "disk" / "data" / "c", 3, "c")
    world.write_blend(here / "blend.yaml", "a", "b", "c")
    return here


@pytest.mark.slow
def test_the_stream_and_its_states_are_those_of_the_disk(blended, monkeypatch):
    """Also through a cache that holds next to nothing, and from one to the other in the middle."""
    hits, look = [], Stream.look

    def watched(self, now, wanted):
        hits.append(now is None or bool(self.coming) and self.coming[0] == now)
        return look(self, now, wanted)

    monkeypatch.setattr(Stream, "look", watched)
    folder, address = blended / "disk" / "data", "msc://disk/data"
    local, of_disk = batches(blended, folder, 9, save_at=4)
    assert hits == []
    remote, of_storage = batches(blended, address, 9, save_at=4, cache_dir=str(blended / "one"))
    assert_same(local, remote)
    assert hits.count(False) <= 3  # the copy of each stream says what it reads next
    assert_same(local[4:], batches(blended, address, 5, of_disk, cache_dir=str(blended / "two"))[0])
    assert_same(local[4:], batches(blended, folder, 5, of_storage)[0])
    tiny = dict(cache_dir=str(blended / "three"), cache_size="60KB", num_workers=1)
    assert_same(local, batches(blended, folder, 9, **tiny)[0])  # staged from a file system, by a worker process


def test_a_storage_that_fails_ends_the_stream_with_its_sentence(blended, monkeypatch):
    (blended / "disk" / "data" / "a" / "train-1.tar").write_bytes(b"x" * 4096)
    with pytest.raises(StorageError) as raised:
        batches(blended, "msc://disk/data", 9, cache_dir=str(blended / "cache"), num_workers=1)
    message = str(raised.value)
    assert message.startswith("msc://disk/data/a/train-1.tar has 4,096 bytes and does not fit its index")
    assert "\n" not in message and message.endswith(".")


def test_a_missing_shard_is_refused_at_the_start_and_its_samples_counted_later(blended):
    lost = blended / "disk" / "data" / "a" / "train-1.tar"
    lost.unlink()
    with pytest.raises(
        ConfigError, match="lacks 1 of 3 shards with 40.0% .* the first of them msc://disk/data/a/train-1"
    ):
        batches(blended, "msc://disk/data", 1, cache_dir=str(blended / "cache"))
    got, _ = batches(blended, "msc://disk/data", 9, cache_dir=str(blended / "cache"), max_error_rate=1.0)
    assert sum(batch.counters["a"].get("dropped_unreadable", 0) for batch in got) > 0
    assert any("it is not there" in error for batch in got for error in batch.errors)


@pytest.mark.slow
def test_sources_that_are_not_there_are_named(blended):
    data = world.config("msc://disk/other", blend=str(blended / "blend.yaml"), cache_dir=str(blended / "cache"))
    with pytest.raises(ConfigError, match="3 of the 3 sources .* are not there under data.root=msc://disk/other"):
        blend.load_blend(data)
    world.write_blend(blended / "both.yaml", "chartqa", "mine")
    root = "data.root to the address that holds them"
    for name, advice in (
        ("sample_stage1", f"--out data/sample and upload that folder there .*, or set {root}"),
        (
            str(blended / "both.yaml"),
            "upload with python tools/prepare.py --stage 2 chartqa --out msc://disk/other --scratch FOLDER, or prepare"
            f" .*, and upload them there, or set {root}",
        ),
        (str(blended / "blend.yaml"), f"prepare.py .*, and upload them there, or set {root}"),
    ):
        with pytest.raises(ConfigError, match=advice):
            blend.load_blend(replace(data, blend=name))


# -- a server that speaks S3, behind a proxy that makes faults --------------------------------------------------------


@pytest.fixture(scope="module")
def s3():
    with object_store.s3() as endpoint:
        yield endpoint


@pytest.fixture
def proxied(s3, here, monkeypatch):
    """The source on S3, at s3://bucket/a, and the proxy in front of it."""
    with SlowProxy(s3) as proxy:
        for name, value in object_store.environment(here, proxy.address).items():
            monkeypatch.setenv(name, value)
        storage.forget_clients()
        folder = here / "disk" / "data" / "a"
        for file in folder.rglob("*"):
            if file.is_file():
                storage.upload_file(file, f"s3://bucket/a/{file.relative_to(folder)}")
        monkeypatch.setattr(storage, "FIRST_PAUSE", 0.05)
        monkeypatch.setattr(storage, "READ_TIMEOUT", 1)
        storage.forget_clients()
        yield proxy


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", "cut", "stall", "refused"])
def test_faults_that_end_are_sat_out(fault, proxied, here):
    left = {"GET": 3, "HEAD": 2}
    proxied.stall = 2.0

    def some(method, path):
        if left.get(method, 0) > 0 and "train-0" in path:
            left[method] -= 1
            return fault
        return None

    proxied.fault = some
    source = cached(here, address="s3://bucket/a")
    with storage.patience(60):
        source.load(SHARD, 0, 20)
    assert left["GET"] == 0
    index = source.index(SHARD)
    assert [source.sample(SHARD, number) for number in range(20)] == [stored(here, index, n) for n in range(20)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "cause"),
    {
        "503": "the server answered 503",
        "cut": "IncompleteRead|ProtocolError|ResponseStreaming|cut off",
        "stall": "ReadTimeout|no answer|Timeout",
        "refused": "no connection|Connection",
        "403": "no right to",
    }.items(),
)
def test_faults_that_last_are_told_with_the_object_and_the_cause(fault, cause, proxied, here):
    proxied.stall = 2.0
    proxied.fault = lambda method, path: fault if path.endswith(".tar") and method == "GET" else None
    with storage.patience(0.5), pytest.raises(StorageError, match=f"cannot read s3://bucket/a/{SHARD}.*: .*({cause})"):
        cached(here, address="s3://bucket/a").sample(SHARD, 0)


@pytest.mark.slow
def test_no_right_to_list_no_bucket_and_no_credentials_are_told(proxied, here, monkeypatch, caplog):
    proxied.fault = lambda method, path: "403" if "list-type" in path else None
    data = world.config("s3://bucket", blend=str(here / "blend.yaml"), cache_dir=str(here / "cache"))
    world.write_blend(here / "blend.yaml", "a")
    with pytest.raises(StorageError, match="cannot list s3://bucket/a: no right to"):
        blend.load_blend(data)
    proxied.fault = lambda method, path: None
    caplog.set_level(logging.INFO)
    storage.forget_clients()
    for ask in (storage.read, storage.list_files, lambda address: storage.write(address, b"x")):
        with pytest.raises(StorageError, match="s3://nobody/x: there is no such bucket: correct") as raised:
            ask("s3://nobody/x")
        assert not isinstance(raised.value, Missing)
    assert "redentials" not in caplog.text  # botocore would tell where each client has found its own
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(here))
    storage.forget_clients()
    with pytest.raises(StorageError, match="there are no credentials: set them in the environment"):
        storage.read("s3://bucket/a/x")


@pytest.mark.slow
def test_a_shard_that_is_replaced_on_the_server_is_refused(proxied, here):
    source = cached(here, address="s3://bucket/a")
    source.sample(SHARD, 0)
    content = bytearray(storage.read(f"s3://bucket/a/{SHARD}"))
    content[-1] ^= 1
    storage.write(f"s3://bucket/a/{SHARD}", bytes(content))
    with pytest.raises(node_cache.Replaced, match="was replaced while it is in use"):
        source.sample(SHARD, 1)


# -- credentials that expire in the middle ----------------------------------------------------------------------------

OLD, NEW = "ASIAOLDOLDOLDOLDOLD0", "ASIANEWNEWNEWNEWNEW0"


def give(here: Path, source: str, key: str) -> None:
    """Write credentials with this access key to where `source` has them."""
    if source == "file":
        (here / "aws").write_text(f"[default]\naws_access_key_id={key}\naws_secret_access_key=s\naws_session_token=t\n")
    elif source == "process":
        made = {"Version": 1, "AccessKeyId": key, "SecretAccessKey": "s", "SessionToken": "t"}
        (here / "process").write_text(json.dumps(made))
        (here / "config").write_text(f"[default]\ncredential_process = cat {here / 'process'}\n")
    else:
        options = {"access_key": key, "secret_key": "s", "session_token": "t"}
        profile = {"storage_provider": {"type": "s3", "options": {"base_path": "data", "region_name": "us-east-1"}}}
        profile["storage_provider"]["options"]["endpoint_url"] = os.environ["AWS_ENDPOINT_URL"]
        profile["credentials_provider"] = {"type": "S3Credentials", "options": options}
        (here / "msc.json").write_text(json.dumps({"profiles": {"data": profile}}))


@pytest.fixture
def served(blended, monkeypatch):
    """The sources as a bucket of S3, s3://data, without credentials in the environment."""
    with SlowProxy(blended / "disk" / "data") as proxy:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {
            "AWS_ENDPOINT_URL": proxy.address,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_SHARED_CREDENTIALS_FILE": str(blended / "aws"),
            "AWS_CONFIG_FILE": str(blended / "config"),
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(storage, "FIRST_PAUSE", 0.05)
        monkeypatch.setattr(storage, "RENEW_AFTER", 0.0)
        storage.forget_clients()
        yield proxy


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidToken"])
def test_credentials_that_expire_are_told_with_the_object(code, served, blended):
    give(blended, "file", OLD)
    source = cached(blended, address="s3://data/a")
    source.sample(SHARD, 0)
    served.ended = {OLD: code}
    why = rf"s3://data/a/{SHARD} for \d+ s: the credentials have expired \({code}\): renew them\.$"
    with storage.patience(0.3):
        with pytest.raises(StorageError, match=f"^cannot read {why}"):
            source.sample(SHARD, 1)
        with pytest.raises(StorageError, match=f"^cannot look at {why}"):  # HEAD, whose answer does not say why
            storage.info(f"s3://data/a/{SHARD}")


@pytest.mark.parametrize("where", ["file", "process", "msc"])
def test_credentials_that_are_renewed_in_their_source_are_taken(where, served, blended):
    give(blended, where, OLD)
    source = cached(blended, address="msc://data/a" if where == "msc" else "s3://data/a")
    source.sample(SHARD, 0)
    served.ended = {OLD: "ExpiredToken"}
    since = len(served.requests)

    def renew(method, path):
        if len(served.requests) > since + 2:  # some have been refused by now
            give(blended, where, NEW)

    served.fault = renew
    index = source.index(SHARD)
    assert [source.sample(SHARD, number) for number in range(20)] == [stored(blended, index, n) for n in range(20)]


@pytest.mark.slow
def test_a_run_whose_credentials_expire_goes_on_when_they_are_renewed_and_ends_with_a_sentence_else(served, blended):
    """With a loader's worker process, which has connections of its own."""
    local, _ = batches(blended, blended / "disk" / "data", 9, num_workers=1)
    give(blended, "file", OLD)
    data = world.config("s3://data", blend=str(blended / "blend.yaml"), num_workers=1)
    for renewed in (True, False):
        found = blend.load_blend(replace(data, cache_dir=str(blended / f"cache {renewed}")))
        stream = loader.train_loader(data, world.VISION, found, 0, 1, None, 1)
        served.ended, since, refused = {}, len(served.requests), []

        def expire(method, path):
            if len(served.requests) > since + 4:  # in the middle of opening the shards
                served.ended = {OLD: "ExpiredToken"}
                refused.append(path)
            if renewed and len(refused) > 20:
                give(blended, "file", NEW)

        served.fault = expire
        with storage.patience(60 if renewed else 0.5):
            if renewed:
                assert_same(local, [next(stream) for _ in range(9)])
                assert len(refused) > 20
            else:
                give(blended, "file", OLD)
                storage.forget_clients()
                with pytest.raises(StorageError) as raised:
                    for _ in range(9):
                        next(stream)
                assert "the credentials have expired (ExpiredToken): renew them." in str(raised.value)
                assert str(raised.value).startswith("cannot ") and "s3://data/" in str(raised.value)
                assert "\n" not in str(raised.value) and OLD not in str(raised.value)
        stream.close()
