"""The Slurm scripts on a real cluster of two nodes on this machine, submitted as a user would; and their rules alone.

The cluster needs root and the packages of tools/dev/install_slurm.sh. Without them its tests are skipped; with
CI=true they fail instead, unless there is no apt-get to install them with.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from programs import REPOSITORY, build_and_install, python, run, succeeded

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
    "data.num_workers=0",
]
SMALL = ["--nodes=2", "--ntasks-per-node=1"]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE")


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


starts, preflight, status = load("slurm/starts.py"), load("tools/preflight.py"), load("tools/status.py")


# The rules.


def history(*ends, restart=0):
    """Starts of one job: (kind, checkpoint gained, failed nodes)."""
    step, made = 0, []
    for number, (kind, gained, *nodes) in enumerate(ends):
        made.append(
            {
                "event": "end",
                "restart": restart + number,
                "begin_step": step,
                "step": step + gained,
                "kind": kind,
                "failed_nodes": nodes,
            }
        )
        step += gained
    return made


def decide(*ends, max_restarts=50, **kwargs):
    return starts.decide(history(*ends, **kwargs), max_restarts, 5, 60)


def test_what_is_queued_again():
    assert decide(("finished", 5))[0] == "finished"
    assert decide(("interrupted", 5))[::2] == ("requeue", 0)
    assert (
        decide(("config", 0))[0] == "stop"
        and decide(("slurm", 0))[0] == "slurm"
        and decide(("stopped", 9))[0] == "stop"
    )
    # A failure is tried again once where no checkpoint is gained, and as long as one is where it is.
    assert decide(("error", 0))[0] == "requeue"
    assert decide(("error", 0), ("error", 0))[:2] == ("stop", "2 starts in a row gained no checkpoint")
    assert decide(("error", 3), ("error", 3), ("error", 3), ("error", 0))[0] == "requeue"
    # Interrupted before it began to train, a few times: nothing is wrong with the run.
    assert decide(*[("interrupted", 0)] * 4)[0] == "requeue" and decide(*[("interrupted", 0)] * 5)[0] == "stop"
    assert decide(("interrupted", 1), restart=50)[:2] == ("stop", "the budget of MAX_RESTARTS=50 restarts is spent")


def test_the_wait_doubles_with_every_failure_in_a_row():
    assert [decide(*[("error", 1)] * n)[2] for n in (1, 2, 3, 9)] == [60, 120, 240, 1800]
    assert decide(("error", 1), ("error", 1), ("interrupted", 1), ("error", 1))[2] == 60


def test_a_node_that_failed_twice_is_left_out_and_earns_one_more_try():
    twice = [("error", 0, "n7"), ("error", 0, "n7")]
    assert starts.excluded(history(*twice)) == ["n7"] and starts.excluded(history(twice[0])) == []
    assert decide(*twice)[0] == "requeue"
    assert decide(*twice, ("error", 0, "n8"))[0] == "stop"
    # A pre-flight that names a node is no failure of the run.
    other = [("node", 0, f"n{i}") for i in range(6)]
    assert decide(*other)[0] == "requeue" and decide(*other, max_restarts=5)[0] == "stop"


def test_who_is_to_blame():
    nodes = ["node1.cluster", "node2.cluster"]
    srun = "srun: error: node2: task 1: Killed\nsrun: error: node1: task 0: Exited with exit code 1\n"
    assert starts.nodes_to_blame("rank 3 on node1, step 7: RuntimeError: no", srun, nodes) == ["node1.cluster"]
    assert starts.nodes_to_blame("rank 0 on node1, step 7: lost contact to another rank", srun, nodes) == [
        "node2.cluster"
    ]
    assert starts.nodes_to_blame(None, srun, nodes) == ["node2.cluster"]
    assert starts.nodes_to_blame(None, "", nodes) == [] and starts.nodes_to_blame(None, srun, ["node9"]) == []


@pytest.mark.parametrize(
    "exit_code, phase, marker, verdict, flags, kind",
    [
        (1, "training", {"reason": "finished", "step": 9}, {}, "", "finished"),  # a rank fell over after the end
        (0, "training", {"reason": "SIGUSR1", "step": 9}, {}, "u", "interrupted"),
        (0, "training", {"reason": "SIGTERM", "step": 9}, {}, "", "interrupted"),  # preemption
        (0, "training", {"reason": "SIGTERM", "step": 9}, {}, "t", "slurm"),  # scancel
        (137, "training", {}, {}, "u", "interrupted"),
        (137, "training", {}, {}, "", "error"),
        (2, "training", {}, {}, "", "config"),
        (1, "training", {"reason": "config error", "message": "no"}, {}, "", "config"),
        (1, "training", {"reason": "error", "message": "no"}, {}, "u", "error"),
        (3, "preflight", {}, {"kind": "node", "message": "n1: no", "nodes": ["n1"]}, "", "node"),
        (2, "preflight", {}, {"kind": "config", "message": "no"}, "", "config"),
        (124, "preflight", {}, {}, "", "error"),
        (0, "preflight", {}, {"kind": "ok"}, "u", "interrupted"),
        (0, "training", {"reason": "SIGUSR1", "step": 9}, {}, "us", "stopped"),
    ],
)
def test_how_a_start_ended(exit_code, phase, marker, verdict, flags, kind):
    found, sentence = starts.classify(exit_code, phase, marker, verdict, "u" in flags, "t" in flags, "s" in flags)
    assert found == kind and sentence


def facts(name, **changes):
    gpu = {"name": "H100", "driver": "570.1", "gib": 79.6, "used_gib": 0.0}
    return {
        "node": name,
        "faults": [],
        "gpus": [dict(gpu) for _ in range(8)],
        "pci": 8,
        "slurm_gpus": 8,
        "versions": {"torch": "2.14.1"},
        "warnings": [],
    } | changes


def fault(nodes):
    with pytest.raises(preflight.Fault) as caught:
        preflight.judge(nodes)
    return str(caught.value), caught.value.nodes


def test_the_preflight_names_the_node():
    good = [facts("n1"), facts("n2"), facts("n3")]
    preflight.judge(good)
    assert fault([*good, facts("n4", pci=7, gpus=good[0]["gpus"][:7])]) == (
        "n4: nvidia-smi shows 7 GPUs and Slurm counts 8",
        ["n4"],
    )
    assert fault([*good, facts("n4", versions={"torch": "2.12.0"})]) == (
        "n4: torch is 2.12.0 and 2.14.1 on most nodes",
        ["n4"],
    )
    old = [gpu | {"driver": "535.2"} for gpu in good[0]["gpus"]]
    assert fault([*good, facts("n4", gpus=old)]) == ("n4: NVIDIA driver is 535.2 and 570.1 on most nodes", ["n4"])
    busy = [gpu | {"used_gib": 40.0} for gpu in good[0]["gpus"]]
    assert fault([facts("n0", gpus=busy), *good]) == ("n0: GPU 0 has 40 GiB in use by another process", ["n0"])
    assert fault([facts("n0", pci=0, gpus=[]), *good]) == ("n0: it has no NVIDIA device, and others have", ["n0"])
    mixed = [*good[0]["gpus"][:7], good[0]["gpus"][0] | {"name": "A100"}]
    assert fault([*good, facts("n4", gpus=mixed)])[1] == ["n4"]
    broken = facts("n4", gpus=[], faults=["nvidia-smi failed: no driver"])
    assert fault([*good, broken]) == ("n4: nvidia-smi failed: no driver", ["n4"])
    # What is wrong everywhere is nobody's fault.
    assert fault([facts(f"n{i}", faults=["data.root=/x is gone"]) for i in range(3)]) == (
        "all nodes: data.root=/x is gone",
        [],
    )
    # Clocks: 40 s off; and 4 s off with an answer that took 8 s, which proves nothing.
    with pytest.raises(preflight.Fault, match="n2: its clock is -40.0 s off") as caught:
        preflight.judge_clocks({"n1": (0.0, 0.0), "n2": (-40.0, 0.1), "n3": (0.1, 0.1)}, 5.0)
    assert caught.value.nodes == ["n2"]
    assert preflight.judge_clocks({"n1": (0.0, 0.0), "n2": (8.0, 4.0), "n3": (0.1, 0.1)}, 5.0) == pytest.approx(3.9)
    # The network: one bad link, or a floor that is too high.
    chain = {("n1", "n2"): 20.0, ("n2", "n3"): 19.0, ("n3", "n4"): 0.8, ("n4", "n5"): 21.0}
    assert preflight.slow_fault(0.9, 5.0, chain, ["n1"]).nodes == ["n3", "n4"]
    assert preflight.slow_fault(0.9, 50.0, dict.fromkeys(chain, 20.0), ["n1"]).nodes == []


def test_room_for_checkpoints_is_asked_for_before_the_first_step(tmp_path, monkeypatch):
    preflight.prepare([])
    config = preflight.compose("stage1", [*TINY, f"run_dir='{tmp_path}'"])
    # As saved by a CPU run: float32 weights and two moments; the estimate is an upper bound and no more than twice
    # that.
    parameters = preflight.checkpoint_bytes(config) / preflight.CHECKPOINT_BYTES
    assert 0.6e6 < parameters < 0.7e6
    assert "free for checkpoints" in preflight.room(config)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(total=100, used=99, free=1))
    with pytest.raises(
        preflight.Fault, match=r"GiB free, and 4 checkpoints of about 0\.0 GiB are to come \(train\.keep_last=3\)"
    ):
        preflight.room(config)


def test_scripts_are_shellcheck_clean():
    if shutil.which("shellcheck") is None:
        skip_or_fail("shellcheck is not installed (tools/dev/install_slurm.sh)")
    scripts = sorted(
        str(path)
        for pattern in ("slurm/*.sh", "slurm/*.sbatch", "tools/dev/install_slurm.sh", "tests/slurm/containers/*")
        for path in REPOSITORY.glob(pattern)
    )
    assert len(scripts) >= 9
    result = run(["shellcheck", *scripts])
    assert result.returncode == 0, result.stdout


# The cluster.


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
            time.sleep(0.1)
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
def running_cluster(tmp_path_factory):
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
        succeeded(python("tools/make_sample_data.py", "--out", data, "--scale", 0.05))
        site = folder / "site.env"
        site.write_text(f"RUNTIME=venv\nRUN_ROOT='{folder}/run root'\n")
        yield Cluster(
            folder,
            inherited
            | {
                "SLURM_CONF": re.search(r"SLURM_CONF=(\S+)", started.stdout).group(1),
                "PYTHON": sys.executable,
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
@pytest.mark.ranks
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

    result = succeeded(cluster.do("slurm/submit.sh", "--name", name, "--stop"))
    assert f"job {jobs['stage3']} saves and ends" in result.stdout
    assert cluster.wait_for_end(jobs["stage3"], jobs["export"]) == ["FAILED", "CANCELLED"]
    found = cluster.status(name)
    assert found["stages"][2]["state"] == "stopped" and found["export"].startswith("cancelled, since stage3 stopped")
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
@pytest.mark.ranks
def test_a_node_that_kills_ranks_is_left_out(cluster):
    """On node1 the recipe is killed at once. The third try has to be on node2."""
    shim = cluster.folder / "python_bad_on_node1"
    shim.write_text(
        f'#!/bin/bash\n[[ "$*" == *recipes/* && $SLURMD_NODENAME == node1 ]] && kill -9 $$\nexec {sys.executable}'
        ' "$@"\n'
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
    assert ends(cluster.runs / "bad" / "stage1") == ["error", "error", "finished"], log
    assert "without node1, which failed twice" in log and cluster.field(job, "ExcNodeList") == "node1"
    row = cluster.status("bad")["stages"][0]
    assert row["failed_nodes"] == {"node1": 2} and row["excluded_nodes"] == ["node1"]


def make_image(folder: Path) -> Path:
    """A stand-in for a container's image: a virtual environment with all packages of this one, but without the project.

    The .pth file adds the folder of packages, and not what the .pth files in it add, such as the editable install.
    """
    succeeded(run([sys._base_executable, "-m", "venv", "--without-pip", folder]))
    (folder / f"lib/python3.{sys.version_info[1]}/site-packages/packages.pth").write_text(sysconfig.get_path("purelib"))
    missing = run([folder / "bin/python", "-P", "-c", "import torch, molmo2_nemo"], PYTHONPATH="")
    assert "No module named 'molmo2_nemo'" in missing.stderr, missing.stderr
    return folder


@pytest.mark.slow
@pytest.mark.ranks
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
    shim.write_text(f'#!/bin/bash\n[[ "$*" == *recipes/* ]] && kill -9 $$\nexec {sys.executable} "$@"\n')
    shim.chmod(0o755)
    jobs = cluster.submit(
        "--name", "fails", *SMALL, *TINY, cluster.data, "train.max_steps=2", PYTHON=str(shim), PREFLIGHT="no"
    )
    states = cluster.wait_for_end(*jobs.values())
    assert states[:4] == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"], cluster.logs()
    found = cluster.status("fails")
    assert [row["state"] for row in found["stages"]] == ["failed", "cancelled", "cancelled"]
    first, second = found["stages"][0]["why"], found["stages"][1]["why"]
    assert "left no marker" in first and second == f"stage1 failed: {first}"
    assert found["export"] == f"cancelled, since stage1 failed: {first}"
    assert len(ends(cluster.runs / "fails" / "stage1")) <= 3


@pytest.mark.slow
def test_wrong_settings_are_refused_before_and_after_the_submission(cluster):
    refused = cluster.do("slurm/submit.sh", "--name", "wrong", *SMALL, *TINY, "model.num_layer=3")
    assert refused.returncode == 2 and "did you mean model.num_layers" in refused.stderr
    assert not (cluster.runs / "wrong").exists()
    for arguments, sentence in (
        (["--name"], "--name has no value"),
        (["model=tiny"], "--name is missing"),
        (["--name", "a/b"], "letters, digits"),
        (["--name", "x", "tiny"], "neither an option"),
        (["--name", "x", "--resume"], "there is no run 'x'"),
        (["--name", "x", "--nodes=4", "--ntasks-per-node=1", *TINY], "node"),  # the cluster has two
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
    assert "a setting that cannot work is not tried again" in text and "Traceback" not in text
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
