"""Checkpoints in object storage: whole or not taken, pruned as on disk, and uploads that fail stop nothing."""

import errno
import json
import shutil
import threading
from types import SimpleNamespace

import object_store
import pytest
import torch
import torch.distributed as dist

from molmo2_nemo import checkpoint_dir, remote_checkpoints, storage
from molmo2_nemo.checkpoint_dir import MARKER, step_name
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import Config, ModelConfig, TrainConfig
from molmo2_nemo.hf import convert
from molmo2_nemo.training import uploads
from molmo2_nemo.training.start import newest, newest_verified

RUNS = "msc://disk/runs/mine/stage2/checkpoints"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """One of step 1, to be copied."""
    path = tmp_path_factory.mktemp("made") / step_name(1)
    state = {"weight": torch.empty(40, 3, device="meta")}
    make = {"weight": lambda: torch.arange(120.0).reshape(40, 3)}
    convert.write_checkpoint(path, ModelConfig(name="m"), state, make, {"step": 1, "stage": "stage2"})
    return path


@pytest.fixture
def saved(checkpoint, tmp_path):
    """saved(step): a whole checkpoint in the run's folder."""

    def save(step):
        path = tmp_path / "run" / "checkpoints" / step_name(step)
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(checkpoint, path)
        marker = json.loads((path / MARKER).read_text()) | {"step": step}
        (path / MARKER).write_text(json.dumps(checkpoint_dir.sealed(marker)))
        return path

    return save


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The folder behind RUNS."""
    for name, value in object_store.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    storage.forget_clients()
    yield tmp_path / "disk" / RUNS.removeprefix("msc://disk/")
    storage.forget_clients()


def steps(folder):
    """Folders with a file; under msc:// a folder on disk stays when it is empty."""
    return sorted({int(path.parent.name.removeprefix("step_")) for path in folder.glob("step_*/*")})


def up(path):
    remote_checkpoints.upload(path, f"{RUNS}/{path.name}")


def test_a_checkpoint_comes_back_as_it_was_saved(saved, store, tmp_path):
    path = saved(3)
    up(path)
    found, damaged, halves = remote_checkpoints.newest(RUNS)
    assert (found.step, damaged, halves) == (3, [], []) and remote_checkpoints.newest(RUNS, below=3)[0] is None
    assert found == remote_checkpoints.resolve("msc://disk/runs/mine/stage2") == remote_checkpoints.resolve(RUNS)
    target = tmp_path / "back" / step_name(3)
    remote_checkpoints.fetch(found, target)
    checkpoint_dir.verify(target)
    assert {p.name: p.read_bytes() for p in target.iterdir() if p.name != MARKER} == {
        p.name: p.read_bytes() for p in path.iterdir() if p.name != MARKER
    }
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    # Of a folder that is not whole, what is right is not fetched again, and each file is read once for its checksum.
    fetched, summed = [], []
    download, sum_of = storage.download_file, remote_checkpoints.sha256_of
    file = next(target.glob("*.distcp"))
    file.write_bytes(b"x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "download_file", lambda a, to: (fetched.append(to.name), download(a, to)))
        patch.setattr(remote_checkpoints, "sha256_of", lambda file: (summed.append(file.name), sum_of(file))[1])
        remote_checkpoints.fetch(found, target)
    assert fetched == [file.name] and checkpoint_dir.is_complete(target)
    assert sorted(summed) == sorted(found.marker["files"])
    # So it is where an interrupted copy has left all of them.
    target.rename(target.with_name(f".{target.name}.fetched"))
    summed.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "download_file", None)
        patch.setattr(remote_checkpoints, "sha256_of", lambda file: (summed.append(file.name), sum_of(file))[1])
        remote_checkpoints.fetch(found, target)
    assert sorted(summed) == sorted(found.marker["files"])


def test_half_an_upload_and_damage_are_never_taken(saved, store, tmp_path):
    for step in (1, 2, 3, 4):
        up(saved(step))
    (store / step_name(4) / MARKER).unlink()
    file = next((store / step_name(3)).glob("*.distcp"))
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    found, damaged, halves = remote_checkpoints.newest(RUNS)
    assert found.step == 2 and len(damaged) == len(halves) == 1
    assert "has no complete.json: its upload has not ended" in halves[0] and f"{file.name} has" in damaged[0]
    with pytest.raises(ConfigError, match=rf"The newest that is whole is {RUNS}/step_00000002"):
        remote_checkpoints.resolve(RUNS)
    # The sentence's advice.
    assert remote_checkpoints.resolve(f"{RUNS}/{step_name(2)}") == found
    # Of the right length, and other bytes: found when it is fetched, and then marked.
    file.write_bytes(content[::-1])
    found, *_ = remote_checkpoints.newest(RUNS)
    assert found.step == 3
    with pytest.raises(remote_checkpoints.Damaged, match=f"{file.name} does not have the SHA-256"):
        remote_checkpoints.fetch(found, tmp_path / "back" / step_name(3))
    assert not (tmp_path / "back" / step_name(3)).exists()
    remote_checkpoints.mark_damaged(found.address, "wrong")
    assert remote_checkpoints.newest(RUNS)[0].step == 2
    # A marker that leads outside.
    marker = json.loads((store / step_name(2) / MARKER).read_text())
    marker["files"]["../../evil"] = 1
    (store / step_name(2) / MARKER).write_text(json.dumps(checkpoint_dir.sealed(marker)))
    assert "../../evil, which is outside" in remote_checkpoints.newest(RUNS)[1][-1]


def test_of_disk_and_storage_the_newest_whole_one_is_taken(saved, store, tmp_path, monkeypatch):
    here = tmp_path / "run" / "checkpoints"
    up(saved(1))
    assert newest(here, RUNS).here == here / step_name(1)  # the same step: nothing is fetched
    up(saved(2))
    shutil.rmtree(here / step_name(2))
    found = newest(here, RUNS)
    assert found.here is None and found.there.step == 2
    (here / step_name(2)).mkdir()
    assert newest(here, RUNS).there.step == 2
    saved(3)
    assert newest(here, RUNS).here == here / step_name(3)

    def refused(folder):
        raise storage.StorageError("cannot list it: no connection.")

    monkeypatch.setattr(storage, "list_files", refused)
    found = newest(here, RUNS)
    assert (
        found.here == here / step_name(3)
        and "which may have a newer checkpoint: train.upload_to: cannot list" in found.ignored[0]
    )
    with pytest.raises(ConfigError, match="cannot list"):
        newest(tmp_path / "nothing", RUNS)


def test_an_upload_that_was_killed_is_finished_by_the_next_one(saved, store, monkeypatch):
    path = saved(1)
    send, sent = storage.upload_file, []

    def killed(local, address):
        if len(sent) == 2:
            raise KeyboardInterrupt
        sent.append(local.name)
        send(local, address)

    monkeypatch.setattr(remote_checkpoints, "AT_ONCE", 1)
    monkeypatch.setattr(storage, "upload_file", killed)
    with pytest.raises(KeyboardInterrupt):
        up(path)
    assert remote_checkpoints.newest(RUNS)[0] is None and len(list((store / path.name).iterdir())) == 2
    [first, second], left = list(sent), {p.name for p in path.iterdir()}
    (store / path.name / first).write_bytes(b"\0" * (path / first).stat().st_size)
    (store / path.name / "other").write_bytes(b"of a checkpoint of the same step")
    sent.clear()
    monkeypatch.setattr(storage, "upload_file", lambda local, address: (sent.append(local.name), send(local, address)))
    up(path)
    assert second not in sent and first in sent
    assert {p.name for p in (store / path.name).iterdir()} == left
    assert remote_checkpoints.newest(RUNS)[0].step == 1
    sent.clear()
    up(path)  # it is there
    assert not sent


def test_what_arrives_is_compared(saved, store, monkeypatch):
    path, send = saved(1), storage.upload_file

    def spoiled(local, address):
        send(local, address)
        if local.suffix == ".distcp":
            storage.write(address, local.read_bytes()[::-1])

    monkeypatch.setattr(storage, "upload_file", spoiled)
    with pytest.raises(storage.StorageError, match="distcp was written 3 times and came back with other bytes"):
        up(path)
    assert remote_checkpoints.newest(RUNS)[0] is None


def uploader(tmp_path, **settings):
    return uploads.Uploads(tmp_path / "run" / "checkpoints", RUNS, TrainConfig(**{"keep_every": 0, **settings}))


def test_copies_are_kept_and_removed_as_on_disk(saved, store, tmp_path, monkeypatch):
    (store / step_name(1)).mkdir(parents=True)  # half of an earlier start
    (store / step_name(1) / "x.distcp").write_bytes(b"x")
    lines = []
    for step in (2, 3, 4, 5, 6):
        saved(step)
        if step == 3:
            (tmp_path / "run" / "checkpoints" / checkpoint_dir.BEST).write_text(json.dumps({"step": 3, "value": 1.0}))
        copies = uploader(tmp_path, keep_last=2, keep_every=2 if step < 5 else 0)
        copies.wake(3 if step >= 3 else None)
        assert copies.finish(lines.append) and copies.failed == 0 and copies.uploaded == 1
        shutil.rmtree(tmp_path / "run" / "checkpoints" / step_name(step - 2), ignore_errors=True)
        if step == 4:
            assert steps(store) == [2, 3, 4]
    assert steps(store) == [3, 5, 6]  # the best, and the last two
    assert json.loads((store / checkpoint_dir.BEST).read_text())["step"] == 3
    assert sum(line.startswith(f"uploaded {RUNS}/step_") for line in lines) == 5
    # The last good one stays, whatever is newer and damaged.
    for step in (5, 6):
        remote_checkpoints.mark_damaged(f"{RUNS}/{step_name(step)}", "wrong")
    remote_checkpoints.prune(RUNS, 6, 1, 0, None)
    assert remote_checkpoints.newest(RUNS)[0].step == 3
    # Storage that does not answer has not said that there is no best one.
    refused = storage.StorageError("cannot read x: the credentials have expired.")
    monkeypatch.setattr(storage, "read", lambda *_: (_ for _ in ()).throw(refused))
    for ask in (remote_checkpoints.best, remote_checkpoints.resolve_best):
        with pytest.raises(storage.StorageError, match="have expired"):
            ask(RUNS)


def test_failing_uploads_are_tried_again_counted_and_told(saved, store, tmp_path, monkeypatch):
    send = storage.upload_file
    # By attempt, not by file: another file may have begun before the first one has failed.
    faults = {0: storage.StorageError("cannot write x for 120 s: 503."), 1: RuntimeError("secret")}

    def failing(local, address):
        if fault := faults.get(copies.failed):
            raise fault
        send(local, address)

    monkeypatch.setattr(uploads, "PAUSE", 0.01)
    monkeypatch.setattr(remote_checkpoints, "AT_ONCE", 1)
    monkeypatch.setattr(storage, "upload_file", failing)
    saved(1)
    copies = uploader(tmp_path)
    assert copies.note() == ""
    copies.wake()
    copies.is_idle.wait(60)
    assert copies.failed == 2 and copies.uploaded == 1 and copies.note() == " | 2 failed upload(s)"
    first, second, third = copies.lines()
    assert "failed (1 so far): cannot write x for 120 s: 503." in first and "(2 so far): RuntimeError." in second
    assert third.startswith("uploaded ")
    # For good: the run's end says so, and the next start uploads it.
    faults |= {2 + attempt: storage.StorageError("cannot write x: no right to.") for attempt in range(20)}
    saved(2)
    copies.wake()
    copies.is_idle.wait(60)
    assert copies.failed == 2 + uploads.TIMES and "the last one too" in copies.note()
    lines = []
    assert not copies.finish(lines.append)
    assert (
        f"NOT UPLOADED: {RUNS} lacks checkpoints of" in lines[-1] and "no right to); start the run again" in lines[-1]
    )
    assert copies.record() == {"missing": "cannot write x: no right to.", "not_removed": ""}
    assert steps(store) == [1]
    faults.clear()
    again = uploader(tmp_path)
    assert again.finish(lines.append) and remote_checkpoints.newest(RUNS)[0].step == 2


@pytest.mark.parametrize("step", (2, 7))
def test_two_runs_at_one_address_are_told_and_remove_nothing(saved, store, tmp_path, step):
    copies, lines = uploader(tmp_path, keep_last=1), []
    saved(2)
    copies.wake()
    copies.is_idle.wait(60)
    # Of another run: a checkpoint of a step of its own, or one in the place of ours.
    marker = json.loads((saved(step) / MARKER).read_text())
    (tmp_path / "run" / "checkpoints" / step_name(step)).rename(tmp_path / step_name(step))
    (tmp_path / step_name(step) / MARKER).write_text(json.dumps(checkpoint_dir.sealed(marker | {"seed": 5})))
    up(tmp_path / step_name(step))
    saved(8)
    assert not copies.finish(lines.append) and steps(store) == sorted({2, step})
    assert f"another run has put {step_name(step)} there, too: end one of them" in lines[-1]


def test_copies_that_cannot_be_removed_are_not_called_missing(saved, store, tmp_path, monkeypatch):
    def refused(folder, first=()):
        raise storage.StorageError(f"cannot delete {folder}/complete.json: no right to.")

    monkeypatch.setattr(storage, "delete_folder", refused)
    copies, lines = uploader(tmp_path, keep_last=1), []
    for step in (1, 2, 3):
        saved(step)
        copies.wake()
        copies.is_idle.wait(60)
    assert copies.failed == 0 and copies.note() == "" and copies.uploaded == 3
    assert sum("is still there: cannot delete" in line for line in copies.lines()) == 1
    assert copies.finish(lines.append) and steps(store) == [1, 2, 3]
    assert lines == [
        f"all is at {RUNS}, but what is not kept any more could not be removed (cannot delete {RUNS}/step_00000001/"
        "complete.json: no right to): remove it there, or mend that for the next start."
    ]
    assert copies.record()["missing"] == "" and "no right to" in copies.record()["not_removed"]


def test_a_checkpoint_is_not_removed_while_it_is_uploaded(saved, store, tmp_path, monkeypatch):
    send, begun, go_on = storage.upload_file, threading.Event(), threading.Event()

    def slow(local, address):
        begun.set()
        go_on.wait(60)
        send(local, address)

    monkeypatch.setattr(storage, "upload_file", slow)
    path = saved(1)
    copies = uploader(tmp_path)
    copies.wake()
    begun.wait(60)
    assert copies.uses(path) and not copies.uses(path.with_name(step_name(2)))
    assert copies.note() == " | uploading step_00000001 0%"
    shutil.rmtree(path)  # by somebody else
    go_on.set()
    assert copies.finish(lambda line: None) and not copies.uses(path)
    assert remote_checkpoints.newest(RUNS)[0] is None


def test_a_folder_is_refused_where_an_address_is_and_the_other_way_round(tmp_path):
    from molmo2_nemo.config.places import check_addresses

    def said(**keys):
        train = TrainConfig(**{key: value for key, value in keys.items() if key != "run_dir"})
        config = Config(name="n", stage="stage2", run_dir=keys.get("run_dir", "runs/n"), train=train)
        try:
            check_addresses(config)
        except ConfigError as error:
            return str(error)

    advice = "set train.upload_to=msc://store/runs, which copies each checkpoint there"
    assert said(run_dir="msc://store/runs").startswith("run_dir=msc://store/runs is an address") and advice in said(
        run_dir="msc://store/runs"
    )
    assert said(run_dir=str(tmp_path), upload_to="msc://store/runs") is None  # the advice
    assert "train.upload_to=runs is no address" in said(upload_to="runs")
    assert "secret" not in said(upload_to="s3://me:secret@bucket/x") and "credentials and the server" in said(
        upload_to="s3://me:secret@bucket/x"
    )
    assert said(run_dir="file:///x") == "run_dir=file:///x is a local path with a scheme: write it without file://."
    assert "train.init_from=file:/x is a local path" in said(init_from="file:/x")
    assert "train.init_from=ftp://x/y has an unknown scheme" in said(init_from="ftp://x/y")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def test_a_damaged_one_is_replaced_by_its_copy_or_by_the_one_before(saved, store, tmp_path):
    if not dist.is_initialized():  # another test of this process may have left its group
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    here, name = tmp_path / "run" / "checkpoints", next(path.name for path in saved(1).glob("*.distcp"))
    for step in (1, 2, 3):
        up(saved(step))
    # On disk the bits of the newest have changed, its copy is right.
    flip(here / step_name(3) / name)
    path, ignored = newest_verified(here, here / step_name(3), True, RUNS)
    assert path == here / step_name(3) and len(ignored) == 1 and f"{name} does not have the SHA-256" in ignored[0]
    checkpoint_dir.verify(path)
    # The disk is empty, and the copy of the newest has changed.
    shutil.rmtree(here)
    flip(store / step_name(3) / name)
    found = newest(here, RUNS).there
    path, ignored = newest_verified(here, None, True, RUNS, found)
    assert path == here / step_name(2) and f"{RUNS}/step_00000003 is damaged: {name} does not" in ignored[0]
    assert (store / step_name(3) / checkpoint_dir.DAMAGED).is_file()
    # None is whole, here or there.
    shutil.rmtree(here)
    for step in (1, 2):
        flip(store / step_name(step) / name)
    path, ignored = newest_verified(here, None, True, RUNS, remote_checkpoints.newest(RUNS)[0])
    assert path is None and len(ignored) >= 2 and not list(here.glob("step_*"))


def test_a_disk_without_room_is_told_before_anything_is_fetched(saved, store, tmp_path, monkeypatch):
    up(saved(1))
    found = remote_checkpoints.newest(RUNS)[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=100, used=100, free=0))
    with pytest.raises(ConfigError, match=f"the copy of {RUNS}/step_00000001 needs .* are missing: make room"):
        remote_checkpoints.fetch(found, tmp_path / "back" / step_name(1))
    monkeypatch.undo()
    store_again = object_store.environment(tmp_path)
    monkeypatch.setenv("MSC_CONFIG", store_again["MSC_CONFIG"])

    def full(address, local):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "download_file", full)
    with pytest.raises(ConfigError, match="No space left on device"):
        remote_checkpoints.fetch(found, tmp_path / "back" / step_name(1))
    assert not (tmp_path / "back" / step_name(1)).exists()


def test_a_server_that_refuses_is_told_without_credentials(saved, tmp_path, monkeypatch):
    for name, value in object_store.environment(tmp_path, "http://127.0.0.1:9").items():
        monkeypatch.setenv(name, value)
    storage.forget_clients()
    monkeypatch.setattr(storage, "PATIENCE", 0.0)
    monkeypatch.setattr(uploads, "PAUSE", 0.01)
    saved(1)
    lines, folder = [], tmp_path / "run" / "checkpoints"
    copies = uploads.Uploads(folder, "msc://store/runs", TrainConfig())
    copies.wake()
    copies.is_idle.wait(60)
    assert copies.failed == uploads.TIMES and not copies.finish(lines.append)
    assert sum("failed (" in line for line in lines) == copies.failed and "NOT UPLOADED: msc://store/runs" in lines[-1]
    assert "cannot list msc://store/runs" in lines[-1] and "no connection to the server" in lines[-1]
    assert not any(key in line for line in lines for key in (object_store.ACCESS_KEY, object_store.SECRET_KEY))
    storage.forget_clients()
