"""`submit.sh --stop` holds from the moment it is given, at every moment of a chain."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from programs import REPOSITORY
from stand_in_slurm import StandIn

# Each stage and each kind of end: saved at the time limit, an error with a new try, finished.
FAULTS = json.dumps({"stage1": ["time limit"], "stage2": ["error"]})
# Begins and ends of commands from the chain's first to its last, and each point of the training program.
EVENTS = range(1, 180)
MOMENTS = sorted(random.Random(20).sample(EVENTS, 20))


@pytest.fixture
def cluster(tmp_path):
    with StandIn(tmp_path / "with space", FAULTS=FAULTS) as started:
        yield started


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stop_holds_at_any_moment(cluster, moment):
    submitted = cluster.submit(STOP_AT=str(moment))
    states = cluster.wait()
    fired = cluster.state / "fired"
    if not fired.exists():  # the chain was over before
        assert set(states.values()) == {"COMPLETED"}, cluster.log()
        return
    while not (fired / "at").exists():
        time.sleep(0.05)
    where, said, at = ((fired / name).read_text() for name in ("where", "said", "at"))
    told = f"{where}{said}\n{submitted.stderr}\n{cluster.log()}"
    if "there is no run" in said:  # given before there was a run: refused with an error, so that nobody relies on it
        assert not [step for step in cluster.steps() if step["time"] < float(at)]
        return
    assert not [step for step in cluster.steps() if step["time"] > float(at)], told
    assert submitted.returncode == 0 or "was stopped while it was submitted" in submitted.stderr, told
    # Nothing has a second life: what was given once is still there after the jobs.
    assert (cluster.runs / "chain" / "slurm" / "stop").exists(), told
    found = cluster.status()
    unfinished = [row["state"] for row in found["stages"] if row["state"] != "finished"]
    if unfinished:
        assert found["stopped"] and unfinished[0] == "stopped", (found, told)
        assert set(unfinished[1:]) <= {"cancelled", "not started"}, (found, told)
        before = len(cluster.steps())
        assert cluster.wait() == states and len(cluster.steps()) == before


@pytest.mark.slow
def test_a_file_alone_stops_a_stage_and_a_new_job_does_not_lift_it(tmp_path):
    """Without a signal, for a stage that sbatch alone submitted; a person's submit.sh goes on."""
    with StandIn(tmp_path, STOP_POLL="0.2", PREFLIGHT="no", FAULTS='{"stage1": ["touch"]}') as cluster:
        command = ["sbatch", "slurm/stage1.sbatch", "name=chain"]
        assert cluster.do(*command).returncode == 0
        assert cluster.wait() == {"1": "FAILED"} and len(cluster.steps()) == 1, cluster.log()
        assert "SIGUSR1: asking" in cluster.log() and "saved at step 1" in cluster.log()
        assert cluster.status()["stages"][0]["state"] == "stopped"
        cluster.do(*command, FAULTS="{}")
        assert cluster.wait()["2"] == "FAILED" and len(cluster.steps()) == 1, cluster.log()
        assert cluster.read("2", "restart") == "", cluster.log()
        resumed = cluster.submit("--resume", FAULTS="{}")
        assert resumed.returncode == 0, resumed.stderr
        assert list(cluster.wait().values())[2:] == ["COMPLETED"] * 5, cluster.log()
        assert [step["step"] for step in cluster.steps()] == [1, 2, 3] * 3 and cluster.status()["stopped"] is None


@pytest.mark.slow
def test_a_stop_reaches_a_stage_that_sbatch_alone_submitted(tmp_path):
    """Running, and while it waits and has no folder yet; the job of a run with a similar name is left alone."""
    with StandIn(tmp_path, PREFLIGHT="no", FAULTS='{"stage1": ["wait"]}') as cluster:
        for name in ("chain", "chain-2"):
            cluster.do("sbatch", "slurm/stage1.sbatch", f"name={name}")
        cluster.do("sbatch", "--dependency=afterany:1", "slurm/stage2.sbatch", "name='chain'")
        while len(cluster.steps()) < 2:
            time.sleep(0.05)
        stopped = cluster.submit("--stop")
        assert "job 1 saves and ends" in stopped.stdout and "job 3 is cancelled" in stopped.stdout, stopped
        (cluster.state / "go on").touch()
        assert cluster.wait() == {"1": "FAILED", "2": "COMPLETED", "3": "CANCELLED"}, cluster.log()
        refused = cluster.do("slurm/submit.sh", "--name", "other", "--stop")
        assert refused.returncode == 2 and "there is no run 'other'" in refused.stderr


@pytest.mark.parametrize("stopped", [False, True])
def test_a_rank_that_does_not_listen_yet_is_ended_by_a_stop(tmp_path, stopped):
    if stopped:
        (tmp_path / "stop").touch()
    environment = os.environ | {"SLURM_PROCID": "0", "STOP_FILES": f"{tmp_path}/other\n{tmp_path}/stop\n"}
    code = f"import time; time.sleep({60 if stopped else 0}); print('trained')"
    result = subprocess.run(
        ["bash", REPOSITORY / "slurm" / "rank.sh", sys.executable, "-S", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (result.returncode, result.stdout) == ((-signal.SIGKILL, "") if stopped else (0, "trained\n")), result
