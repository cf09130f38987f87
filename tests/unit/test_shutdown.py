"""What is said and recorded when a run ends in trouble."""

import errno
import json
import os

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

from molmo2_nemo.data.loader import DataLost, ValidationLoader, WorkerDied
from molmo2_nemo.storage import StorageError, Unreachable
from molmo2_nemo.training.shutdown import cause_of, describe, lost_contact, write_ended


def test_what_errors_are_called():
    gone = "[/__w/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:2"
    for error in (RuntimeError(gone), dist.DistBackendError("NCCL communicator was aborted"), dist.DistStoreError("x")):
        assert lost_contact(error) and str(error) in describe(error)
    # Words alone do not make another rank's error of it.
    for error in (RuntimeError("timed out"), ValueError(gone), WorkerDied(7)):
        assert not lost_contact(error)
    assert "process 7" in describe(WorkerDied(7)) and "lower data.num_workers" in describe(WorkerDied(7))
    assert describe(RuntimeError("DataLoader worker")) == "RuntimeError: DataLoader worker"
    assert describe(ValueError("no")) == "ValueError: no" and describe(KeyboardInterrupt()) == "interrupted"


@pytest.mark.parametrize(
    "error, cause",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "user"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "user"),
        (PermissionError(errno.EACCES, "Permission denied"), "user"),
        (IsADirectoryError(errno.EISDIR, "Is a directory: metrics.jsonl"), "user"),
        (FileExistsError(errno.EEXIST, "File exists: checkpoints"), "user"),
        (OSError(errno.EIO, "Input/output error"), "node"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "node"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory"),
        (WorkerDied(7), "memory"),
        (RuntimeError("shape mismatch"), "transient"),
        (KeyboardInterrupt(), "transient"),
    ],
)
def test_who_can_fix_an_error(error, cause):
    assert cause_of(error) == cause
    try:
        try:
            raise error
        except BaseException as first:
            raise RuntimeError("the writer failed") from first
    except RuntimeError as second:
        assert cause_of(second) == ("user" if cause == "user" else "node" if "Input" in str(error) else "transient")


@pytest.mark.parametrize(("kind", "cause"), {Unreachable: "transient", StorageError: "user"}.items())
def test_storage_that_fails_in_a_worker_is_told_in_its_sentence(kind, cause):
    """Held-out batches come from a worker process, too."""
    loader = DataLoader(Unreadable(kind), batch_size=None, num_workers=1, worker_init_fn=lambda worker: None)
    with pytest.raises(kind) as raised:
        list(ValidationLoader(loader))
    lost = DataLost(raised.value)
    assert describe(lost) == "cannot read x: gone" and cause_of(lost) == cause


class Unreadable(IterableDataset):
    def __init__(self, kind):
        self.kind = kind

    def __iter__(self):
        raise self.kind("cannot read x: gone.")


def test_the_end_of_a_run_names_the_job_and_the_cause(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    write_ended(tmp_path, "error", 5, "no", cause="user")
    ended = json.loads((tmp_path / "ended.json").read_text())
    assert (ended["job"], ended["cause"], ended["step"]) == ("71", "user", 5)


def test_what_the_user_set_of_the_flight_recorder_stays(monkeypatch, tmp_path):
    from molmo2_nemo.training.shutdown import record_collectives

    for name in list(os.environ):
        if name.startswith(("TORCH_FR_", "TORCH_NCCL_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")
    before = set(os.environ)
    record_collectives(tmp_path)
    added = {name: os.environ[name] for name in set(os.environ) - before}
    for name in added:
        monkeypatch.delenv(name)
    prefix = str(tmp_path / "errors" / "collectives_rank")
    assert added == {
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": prefix,
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": prefix,
    }
