"""The Slurm scripts on a real cluster of two nodes on this machine, submitted as a user would.

The cluster needs root and the packages of tools/dev/install_slurm.sh. Without them its tests are skipped; with
CI=true they fail instead, unless there is no apt-get to install them with.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import warm
from programs import REPOSITORY, build_and_install, run, succeeded

os.environ["PATH"] += ":/usr/sbin:/sbin"
CLUSTER = REPOSITORY / "tests" / "slurm" / "local_slurm.sh"
TINY = [
    "model=tiny",
    "data=sample",
    "schedule=quickstart",
    "optim=from_scratch",
    "train.micro_batch_size=1",
    "train.validation_batches=0",
    "train.log_every=1",
    "train.report=false",
    "data.num_workers=0",
]
SMALL = ["--nodes=2", "--ntasks-per-node=1"]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE")


def skip_or_fail(why: str):
    if os.environ.get("CI") == "true" and shutil.which("apt-get"):
        pytest.fail(f"{why}: CI must run this; tools/dev/install_slurm.sh installs it")
    pytest.skip(f"{why}: the Slurm scripts were not run")


class Cluster:
    """Two nodes, the sample data, and the environment of a user."""

    def __init__(self, folder: Path, environment: dict[str, str], data: Path):
        self.folder, self.environment, self.data = folder, environment, f"data.root='{data}'"
        self.runs = Path(environment["RUN_ROOT"])

    def do(self, *command, timeout=120, folder=REPOSITORY, **environment) -> subprocess.CompletedProcess:
        return subprocess.run(
            [str(part) for part in command],
            cwd=folder,
            text=True,
            capture_output=True,
            timeout=timeout,
            env=self.environment | environment,
        )

    def submit(self, *arguments, **environment) -> dict[str, str]:
        """slurm/submit.sh: the job ids by name."""
        result = succeeded(self.do("slurm/submit.sh", *arguments, **environment))
        return dict(re.findall(r"^  (\w+) +job (\d+)$", result.stdout, re.MULTILINE))

    def sbatch(self, *arguments, **environment) -> str:
        return succeeded(self.do("sbatch", "--parsable", *arguments, **environment)).stdout.strip()

    def field(self, job: str, name: str) -> str:
        shown = self.do("scontrol", "show", "job", "-o", job).stdout
        found = re.search(rf"(?:^| ){name}=(\S*)", shown)
        return found.group(1) if found else ""

    def status(self, name: str) -> dict:
        return json.loads(succeeded(self.do(sys.executable, "tools/status.py", name, "--json")).stdout)

    def wait(self, what: str, condition, seconds=400):
        end = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > end:
                pytest.fail(f"waited {seconds} s for {what}\n{self.do('squeue').stdout}\n{self.logs()}")
            time.sleep(0.3)  # most conditions start a client of Slurm
        return found

    def logs(self) -> str:
        files = sorted(self.folder.rglob("*.log"), key=lambda path: path.stat().st_mtime)
        return "\n".join(
            f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in files if "slurmd" not in path.name
        )

    def wait_for_end(self, *jobs: str) -> list[str]:
        return [
            self.wait(f"the end of job {job}", lambda: (s := self.field(job, "JobState")) in ENDED and s)
            for job in jobs
        ]

    def steps(self, run_dir: Path) -> list[dict]:
        path = run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [r for r in (json.loads(line) for line in lines if line.endswith("\n")) if r["kind"] == "train"]

    def wait_for_new_steps(self, run_dir: Path, start: int) -> None:
        """That the start of this number (from 1) has taken two steps."""

        def trains():
            begun = [r["time"] for r in records(run_dir) if r["event"] == "begin"]
            written = (run_dir / "metrics.jsonl").stat().st_mtime if (run_dir / "metrics.jsonl").exists() else 0
            return len(begun) >= start and written > begun[-1] and len(self.steps(run_dir))

        first = self.wait(f"start {start} in {run_dir}", trains)
        self.wait(f"steps of start {start}", lambda: len(self.steps(run_dir)) >= first + 2)


def records(run_dir: Path) -> list[dict]:
    path = run_dir / "slurm" / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ends(run_dir: Path) -> list[str]:
    return [record["kind"] for record in records(run_dir) if record["event"] == "end"]


@pytest.fixture
def cluster(running_cluster):
    """The cluster without jobs of another test, also of one that failed."""
    yield running_cluster
    queue = ["squeue", "-h", "-o", "%A"]
    for job in running_cluster.do(*queue).stdout.split():
        running_cluster.do("scancel", job)
    running_cluster.do("scontrol", "update", "nodename=node2", "state=resume")
    running_cluster.wait("an empty queue", lambda: not running_cluster.do(*queue).stdout, 60)


@pytest.fixture(scope="session")
def running_cluster(sample, tmp_path_factory):
    missing = [program for program in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(program) is None]
    if missing:
        skip_or_fail(f"{', '.join(missing)} not installed (tools/dev/install_slurm.sh)")
    if os.geteuid() != 0:
        skip_or_fail("a cluster on this machine needs root")
    folder = tmp_path_factory.mktemp("slurm user")  # with a space, as people have
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
    local = {"SLURM_LOCAL_DIR": f"/tmp/slurm-test-{os.getpid()}"}
    try:
        started = run(["bash", CLUSTER, "start"], **local)
        if started.returncode:
            skip_or_fail(started.stderr.strip().splitlines()[-1])
        data = folder / "da ta" / "sample"
        shutil.copytree(sample, data)
        site = folder / "site.env"
        # One machine: all folders are shared. A rehearsal would take a minute of each submission.
        site.write_text(f"RUNTIME=venv\nRUN_ROOT='{folder}/run root'\nNODE_LOCAL=\nREHEARSAL=no\n")
        yield Cluster(
            folder,
            inherited
            | {
                "SLURM_CONF": re.search(r"SLURM_CONF=(\S+)", started.stdout).group(1),
                "PYTHON": str(warm.executable()),
                "SITE_ENV": str(site),
                "RUN_ROOT": f"{folder}/run root",
                "OMP_NUM_THREADS": "1",
                "PYTHONWARNINGS": "ignore",
                "PYTHONPATH": str(REPOSITORY),
                "PREFLIGHT_SECONDS": "240",
                "BACKOFF_SECONDS": "1",
            },
            data,
        )
    finally:
        run(["bash", CLUSTER, "stop"], **local)
        shutil.rmtree(local["SLURM_LOCAL_DIR"], ignore_errors=True)


@pytest.mark.slow
def test_a_chain_of_three_stages_survives_what_happens_to_it(cluster):
    """USR1, scontrol requeue and a lost node in stage 1; a person's stop in stage 3; then export and report."""
    name, run_dir = "my run", cluster.runs / "my run"
    stage1, stage3 = run_dir / "stage1", run_dir / "stage3"
    arguments = [
        "--name",
        name,
        *SMALL,
        *TINY,
        cluster.data,
        "stage1:train.max_steps=120",
        "stage2:train.max_steps=3",
        "stage3:train.max_steps=5000",
    ]
    jobs = cluster.submit(*arguments)
    assert list(jobs) == ["stage1", "stage2", "stage3", "export", "report"]
    again = cluster.do("slurm/submit.sh", *arguments)
    assert again.returncode == 2 and "exists already" in again.stderr, again.stderr

    cluster.wait_for_new_steps(stage1, 1)
    assert cluster.status(name)["stages"][0]["state"] == "running"
    succeeded(cluster.do("scancel", "--signal=USR1", "--batch", jobs["stage1"]))
    cluster.wait_for_new_steps(stage1, 2)
    succeeded(cluster.do("scontrol", "requeue", jobs["stage1"]))
    cluster.wait_for_new_steps(stage1, 3)
    succeeded(cluster.do("scontrol", "update", "nodename=node2", "state=down", "reason=test"))
    assert cluster.field(jobs["stage2"], "JobState") == "PENDING"
    cluster.wait(
        "a fourth start",
        lambda: (
            sum(r["event"] == "begin" for r in records(stage1)) == 4
            or (cluster.do("scontrol", "update", "nodename=node2", "state=resume") and False)
        ),
    )

    cluster.wait_for_new_steps(stage3, 1)
    assert cluster.wait_for_end(jobs["stage1"], jobs["stage2"]) == ["COMPLETED", "COMPLETED"]
    assert ends(stage1) == ["interrupted", "slurm", "slurm", "finished"]
    assert json.loads((stage1 / "ended.json").read_text())["reason"] == "finished"
    log = (run_dir / "slurm" / f"stage1-{jobs['stage1']}.log").read_text()
    assert log.count("pre-flight: passed") == 4 and "Traceback" not in log
    # Every start went on from the checkpoint before, and no step is missing.
    resumed = [int(step) for step in re.findall(r"resumed step (\d+) from", log)]
    assert len(resumed) == 3 and resumed == sorted(set(resumed))
    assert {r["step"] for r in cluster.steps(stage1)} == set(range(1, 121))
    row = cluster.status(name)["stages"][0]
    assert (row["state"], row["step"], row["restarts"]) == ("finished", 120, 3)
    # srun names the node, unless Slurm ends it with the job before it can: seen once on a busy machine.
    named = re.findall(r"srun: error: Node failure on ([\w.-]+)", log)
    assert row["failed_nodes"] == ({"node2": 1} if named else {}), (row, named)
    assert [r.get("message") for r in records(stage1) if r["event"] == "end"][2].startswith(
        "ended by Slurm (node failure"
    )

    twice = cluster.do("slurm/submit.sh", "--name", name, "--resume")
    assert twice.returncode == 2 and f"still queued (jobs {jobs['stage3']}" in twice.stderr, twice.stderr
    second = cluster.sbatch(*SMALL, f"--output={cluster.folder}/second.log", "slurm/stage3.sbatch", f"name='{name}'")
    result = succeeded(cluster.do("slurm/submit.sh", "--name", name, "--stop"))
    assert f"job {second} is cancelled" in result.stdout, result.stdout
    assert f"job {jobs['stage3']} saves and ends" in result.stdout
    assert cluster.wait_for_end(jobs["stage3"], jobs["export"]) == ["FAILED", "CANCELLED"]
    found = cluster.status(name)
    assert found["stages"][2]["state"] == "stopped" and found["export"] == "cancelled, since stage3 stopped"
    cluster.wait_for_end(jobs["report"])
    stopped_at = json.loads((stage3 / "ended.json").read_text())["step"]
    jobs = cluster.submit("--name", name, "--resume", f"stage3:train.max_steps={stopped_at + 2}")
    assert list(jobs) == ["stage3", "export", "report"]
    assert cluster.wait_for_end(*jobs.values()) == ["COMPLETED"] * 3, cluster.logs()
    assert (run_dir / "hf" / "config.json").exists() and (run_dir / "report.html").exists()
    assert f"resumed step {stopped_at} from" in (run_dir / "slurm" / f"stage3-{jobs['stage3']}.log").read_text()
    shown = succeeded(cluster.do(sys.executable, "tools/status.py", name)).stdout
    assert len(re.findall(r"^stage\d +finished ", shown, re.MULTILINE)) == 3
    done = succeeded(cluster.do("slurm/submit.sh", "--name", name, "--resume"))
    assert "nothing to do" in done.stdout


@pytest.mark.slow
def test_a_node_that_kills_ranks_is_left_out(cluster):
    """On node1 the recipe is killed at once. The third try has to be on node2."""
    shim = cluster.folder / "python_bad_on_node1"
    shim.write_text(
        f'#!/bin/bash\n[[ "$*" == *recipes/* && $SLURMD_NODENAME == node1 ]] && kill -9 $$\n'
        f'exec {warm.executable()} "$@"\n'
    )
    shim.chmod(0o755)
    job = cluster.sbatch(
        "--nodes=1",
        "--ntasks-per-node=1",
        f"--output={cluster.folder}/bad-%j.log",
        "slurm/stage1.sbatch",
        "name=bad",
        *TINY,
        cluster.data,
        "train.max_steps=2",
        PYTHON=str(shim),
        PREFLIGHT="no",
    )
    [state] = cluster.wait_for_end(job)
    log = (cluster.folder / f"bad-{job}.log").read_text()
    assert state == "COMPLETED", log
    assert ends(cluster.runs / "bad" / "stage1") == ["killed", "killed", "finished"], log
    assert "without node1, which failed twice" in log and cluster.field(job, "ExcNodeList") == "node1"
    row = cluster.status("bad")["stages"][0]
    assert row["failed_nodes"] == {"node1": 2} and row["excluded_nodes"] == ["node1"]


def make_image(folder: Path) -> Path:
    """A stand-in for a container's image: a virtual environment with all packages of this one, but without the project.

    The .pth file adds the folder of packages, and not what the .pth files in it add, such as the editable install.
    """
    succeeded(run([os.path.realpath(sys.executable), "-m", "venv", "--without-pip", folder]))
    (folder / f"lib/python3.{sys.version_info[1]}/site-packages/packages.pth").write_text(sysconfig.get_path("purelib"))
    missing = run([folder / "bin/python", "-P", "-c", "import torch, molmo2_nemo"], PYTHONPATH="")
    assert "No module named 'molmo2_nemo'" in missing.stderr, missing.stderr
    return folder


@pytest.mark.slow
def test_a_stage_runs_in_a_container(cluster, tmp_path):
    """Under apptainer with the code of the checkout, which is mounted; under pyxis with a wheel in the image.

    A stand-in plays the container: the job's Python is one that does not have the project, unless the image has it.
    """
    stand_ins = REPOSITORY / "tests" / "slurm" / "containers"
    bare, with_wheel, work = tmp_path / "bare", tmp_path / "with_wheel", tmp_path / "work"
    make_image(bare)
    site = make_image(with_wheel) / f"lib/python3.{sys.version_info[1]}/site-packages"
    build_and_install(tmp_path, site)
    work.mkdir()
    shutil.copytree(site / "molmo2_nemo" / "slurm", work / "slurm")  # all that a user of the wheel has
    jobs = {}
    for name, runtime, folder in (
        ("mounted", f"apptainer:{bare}", REPOSITORY),
        ("installed", f"pyxis:{with_wheel}", work),
    ):
        environment = dict(
            PATH=f"{stand_ins}:{cluster.environment['PATH']}",
            PYTHON="",
            PYTHONPATH="",
            HOST_PYTHON=sys.executable,
            RUNTIME=runtime,
            MOUNTS=f"{cluster.folder}:{cluster.folder}",
            SITE_ENV="/dev/null",
        )
        command = ["sbatch", "--parsable", "--nodes=1", "--ntasks-per-node=1", f"--output={tmp_path}/{name}.log"]
        command += ["slurm/stage1.sbatch", f"name={name}", *TINY, cluster.data, "train.max_steps=2"]
        jobs[name] = succeeded(cluster.do(*command, folder=folder, **environment)).stdout.strip()
    for name, job in jobs.items():
        [state] = cluster.wait_for_end(job)
        log = (tmp_path / f"{name}.log").read_text()
        assert state == "COMPLETED", log
        assert "pre-flight: passed" in log and "Traceback" not in log
        run_dir = cluster.runs / name / "stage1"
        assert json.loads((run_dir / "ended.json").read_text())["reason"] == "finished"
        # Only the code of a checkout knows a commit.
        commit = json.loads((run_dir / "versions.json").read_text())["commit"]
        assert (commit is not None) == (name == "mounted")
    command = ["sbatch", "--parsable", f"--output={tmp_path}/report.log", "slurm/report.sbatch", run_dir.parent]
    job = succeeded(cluster.do(*command, folder=work, **environment)).stdout.strip()
    assert cluster.wait_for_end(job) == ["COMPLETED"], (tmp_path / "report.log").read_text()
    assert (run_dir.parent / "report.html").exists()


@pytest.mark.slow
def test_a_stage_that_fails_leaves_its_successors_cancelled_with_the_reason(cluster):
    """The ranks are killed wherever they run: one more try, then the end; no time is lost in a loop."""
    shim = cluster.folder / "python_bad"
    shim.write_text(f'#!/bin/bash\n[[ "$*" == *recipes/* ]] && kill -9 $$\nexec {warm.executable()} "$@"\n')
    shim.chmod(0o755)
    jobs = cluster.submit(
        "--name", "fails", *SMALL, *TINY, cluster.data, "train.max_steps=2", PYTHON=str(shim), PREFLIGHT="no"
    )
    states = cluster.wait_for_end(*jobs.values())
    assert states[:4] == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"], cluster.logs()
    found = cluster.status("fails")
    assert [row["state"] for row in found["stages"]] == ["failed", "cancelled", "cancelled"]
    first, second = found["stages"][0]["why"], found["stages"][1]["why"]
    assert "left no marker" in first and second == "stage1 failed"
    assert found["export"] == "cancelled, since stage1 failed"
    assert len(ends(cluster.runs / "fails" / "stage1")) <= 3


@pytest.mark.slow
def test_wrong_settings_are_refused_before_and_after_the_submission(cluster):
    refused = cluster.do("slurm/submit.sh", "--name", "wrong", *SMALL, *TINY, cluster.data, "model.num_layer=3")
    assert refused.returncode == 2 and "did you mean model.num_layers" in refused.stderr
    assert not (cluster.runs / "wrong").exists()
    for arguments, sentence in (
        (["--name"], "--name has no value"),
        (["model=tiny"], "--name is missing"),
        (["--name", "a/b"], "letters, digits"),
        (["--name", "x", "tiny"], "neither an option"),
        (["--name", "x", "--resume"], "there is no run 'x'"),
        (["--name", "x", "--nodes=4", "--ntasks-per-node=1", *TINY, cluster.data], "node"),  # the cluster has two
    ):
        result = cluster.do("slurm/submit.sh", *arguments)
        assert result.returncode == 2 and sentence in result.stderr and not (cluster.runs / "x").exists(), result.stderr
    # By sbatch itself: one try, one sentence, not queued again.
    log = cluster.folder / "wrong.log"
    common = ["--nodes=1", "--ntasks-per-node=1", f"--output={log}", "slurm/stage1.sbatch", "name=wrong", *TINY]
    job = cluster.sbatch(*common, f"data.root='{cluster.folder}/nowhere'")
    assert cluster.wait_for_end(job) == ["FAILED"] and cluster.field(job, "ExitCode") == "2:0"
    text = log.read_text()
    assert re.search(
        r"^error: pre-flight: node\d: 5 of the 5 sources of data\.blend=sample_stage1 .* are not on disk",
        text,
        re.MULTILINE,
    ), text
    assert "the same would happen again until somebody changes it" in text and "Traceback" not in text
    assert cluster.status("wrong")["stages"][0]["state"] == "failed"
    # Stage 2 of a run whose stage 1 has not finished.
    job = cluster.sbatch(*SMALL, f"--output={log}", "slurm/stage2.sbatch", "name=wrong", *TINY)
    assert cluster.wait_for_end(job) == ["FAILED"]
    assert "which has not finished: train it first" in cluster.status("wrong")["stages"][1]["why"]


@pytest.mark.slow
def test_a_dry_run_shows_every_command_and_submits_nothing(cluster):
    jobs = ["squeue", "-h", "-o", "%A"]
    before = cluster.do(*jobs).stdout
    result = succeeded(
        cluster.do(
            "slurm/submit.sh",
            "--name",
            "its dry",
            "--dry-run",
            *SMALL,
            *TINY,
            cluster.data,
            "stage3:--nodes=1",
            "stage3:--ntasks-per-node=2",
            "train.init_from=runs/start",
            "stage3:train.max_steps=7",
            "train.max_steps=5",
        )
    )
    commands = [line for line in result.stdout.splitlines() if line.startswith("sbatch ")]
    assert [re.search(r"slurm/(\w+)\.sbatch", line).group(1) for line in commands] == [
        "stage1",
        "stage2",
        "stage3",
        "export",
        "report",
    ]
    assert (
        r"--dependency=afterok:\<stage2\>" in commands[2] and "--nodes=1 " in commands[2] and "--nodes=2" in commands[1]
    )
    assert "train.max_steps=7" in commands[2] and "train.max_steps=5" not in commands[2]
    assert "train.init_from=runs/start" in commands[0] and "init_from" not in commands[1] + commands[2]
    assert not (cluster.runs / "its dry").exists() and cluster.do(*jobs).stdout == before


@pytest.mark.slow
def test_an_array_does_every_task_once(cluster):
    """Three array tasks, seven lines, one of which fails; a second submission does that one alone."""
    tasks, out = cluster.folder / "tasks.txt", cluster.folder / "out put"
    out.mkdir()
    lines = [f"echo {i} >> '{out}/{i}'" for i in range(6)] + [
        f"python -c \"open('{out}/ok'); open('{out}/ran', 'a').write('x')\""
    ]
    tasks.write_text("# tasks\n\n" + "\n".join(lines) + "\n")
    common = ["--array=4-6", f"--output={cluster.folder}/prepare-%a.log", "slurm/prepare.sbatch", str(tasks)]

    def ended(job):
        states = re.findall(r"JobState=(\w+)", cluster.do("scontrol", "show", "job", "-o", job).stdout)
        return len(states) == 3 and all(state in ENDED for state in states) and sorted(states)

    first = cluster.sbatch(*common)
    assert cluster.wait("the array", lambda: ended(first)) == ["COMPLETED", "COMPLETED", "FAILED"]
    (out / "ok").write_text("")
    second = cluster.sbatch(*common)
    assert cluster.wait("the array", lambda: ended(second)) == ["COMPLETED"] * 3
    assert all((out / str(i)).read_text() == f"{i}\n" for i in range(6)) and (out / "ran").read_text() == "x"


def test_scripts_are_accepted_as_they_are(cluster):
    """For clusters of H100 nodes: on one of two nodes --nodes has to be given, nothing else."""
    for name in ("stage1", "stage2", "stage3", "export", "report", "prepare"):
        nodes = ["--nodes=2"] if name.startswith("stage") else []
        succeeded(cluster.do("sbatch", "--test-only", *nodes, f"slurm/{name}.sbatch"))
