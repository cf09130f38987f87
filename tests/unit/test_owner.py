"""One run at a time in a folder: who is refused, who may take it over, and what becomes of a holder that loses it."""

import json
import signal
import subprocess
import sys
import threading
import time

import pytest
from programs import REPOSITORY

from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.training import owner

HOLDER = """
import sys, time
from pathlib import Path
from molmo2_nemo.training import owner
owner.BEAT_SECONDS = 0.05
owner.Owner(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def claimed(run_dir, **changes):
    """An owner file of another machine."""
    run_dir.mkdir()
    other = {"host": "far", "pid": 7, "boot": "x", "pid_namespace": "y", "token": "t", "beat": 3, **changes}
    (run_dir / owner.OWNER).write_text(json.dumps(other))
    return run_dir


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_process_that_is_alive_keeps_the_folder_and_a_killed_one_does_not(holder, tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises(owner.FolderInUse, match=rf"is in use by process {holder.pid} on "):
        owner.Owner(run_dir)
    assert owner.in_use(run_dir) and names(run_dir) == [owner.OWNER]
    holder.send_signal(signal.SIGSTOP)  # one that is stopped is alive
    with pytest.raises(owner.FolderInUse):
        owner.Owner(run_dir)
    holder.kill()
    holder.wait()
    (run_dir / f".{owner.OWNER}.{owner._this_process()['host']}.{holder.pid}").touch()  # killed while writing
    assert not owner.in_use(run_dir)
    mine = owner.Owner(run_dir)
    assert names(run_dir) == [owner.OWNER] and not owner.in_use(run_dir)
    mine.release()
    mine.release()
    assert names(run_dir) == []


@pytest.mark.parametrize("how", ["moved", "removed", "taken"])
def test_who_loses_the_folder_ends_at_once(how, holder, tmp_path):
    run_dir = tmp_path / "run"
    if how == "moved":
        run_dir.rename(tmp_path / "elsewhere")
    elif how == "removed":
        (run_dir / owner.OWNER).unlink()
    else:
        while json.loads((run_dir / owner.OWNER).read_text()).get("token") != "t":  # against its own writing
            (run_dir / owner.OWNER).write_text(json.dumps({"host": "far", "pid": 7, "token": "t"}))
            time.sleep(0.2)
    assert holder.wait(timeout=60) == 2
    said = holder.stderr.read()
    assert "the run ends here and saves nothing more" in said
    assert ("belongs to process 7 on far" if how == "taken" else "is gone") in said
    assert how != "moved" or not run_dir.exists()  # and it was not made anew


def test_another_machine_is_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "SECONDS_BETWEEN_LOOKS", 0.02)
    monkeypatch.setattr(owner, "PATIENCE_SECONDS", 0.2)
    owner.Owner(claimed(tmp_path / "silent")).release()
    owner.Owner(claimed(tmp_path / "strange", token=None, beat="?")).release()
    (tmp_path / "strange" / owner.OWNER).write_text("no json")
    owner.Owner(tmp_path / "strange").release()
    # As long as its beat goes on, it is alive, whatever any clock says.
    monkeypatch.setattr(owner, "PATIENCE_SECONDS", 30)
    beating = claimed(tmp_path / "beating", slurm_job="17")

    def beat():
        time.sleep(0.2)
        (beating / owner.OWNER).write_text(json.dumps(json.loads((beating / owner.OWNER).read_text()) | {"beat": 4}))

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(owner.FolderInUse, match=r"process 7 on far \(Slurm job 17\)"):
        owner.Owner(beating)
    thread.join()


def test_the_same_slurm_job_does_not_wait_for_its_start_before(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setattr(owner.time, "sleep", lambda seconds: pytest.fail("it waits"))
    owner.Owner(claimed(tmp_path / "run", slurm_job="17", slurm_restarts="1")).release()


@pytest.fixture
def quick_switches():
    """Threads take turns so often that races show: of 400 rounds one in seven did, before there was a lock."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("number", range(40))
def test_of_many_at_once_one_gets_it(number, quick_switches, tmp_path):
    run_dir = claimed(tmp_path / "run", boot=owner._this_process()["boot"], pid=2**22 + 1)
    (run_dir / owner.OWNER).write_text(
        json.dumps(owner._this_process() | {"pid": 2**22 + 1, "started": "1"})  # a process that is gone
    )
    got, refused = [], []

    def attempt():
        try:
            got.append(owner.Owner(run_dir))
        except owner.FolderInUse:
            refused.append(1)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 7 and names(run_dir) == [owner.OWNER]
    got[0].release()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_the_place_of_a_folder_is_named(place, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="run_dir=.* is a file, or below one: name a folder"):
        owner.Owner(tmp_path / place)
