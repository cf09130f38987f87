"""What is said and recorded when a run ends in trouble."""

import os

import torch.distributed as dist

from molmo2_nemo.data.loader import WorkerDied
from molmo2_nemo.training.shutdown import describe, lost_contact


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
