"""A cluster of stand-ins: Slurm's commands without a Slurm, and a training program that does nothing, in seconds.

The batch scripts and submit.sh are the real ones, in a small checkout of their own. tests/slurm has a real Slurm.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from programs import REPOSITORY

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo", "srun", "python", "host_python", "event")
STAND_INS = REPOSITORY / "tests" / "stand_ins"
IN_QUEUE = ("PENDING", "RUNNING", "COMPLETING")


class StandIn:
    """A checkout, a data root, a run root and a queue in `folder`. Use it in a `with`."""

    def __init__(self, folder: Path, **environment: str):
        self.folder, self.checkout, self.runs, self.state = folder, folder / "code", folder / "runs", folder / "cluster"
        (self.state / "jobs").mkdir(parents=True)
        (self.state / "bin").mkdir()
        for name in COMMANDS:
            (self.state / "bin" / name).symlink_to(STAND_INS / "slurm_command")
        shutil.copytree(REPOSITORY / "slurm", self.checkout / "slurm", ignore=shutil.ignore_patterns("site.env"))
        for name in ("molmo2_nemo/a.py", "recipes/b.py", "conf/base.yaml"):
            (self.checkout / name).parent.mkdir()
            (self.checkout / name).write_text("a = 1\n")
        (folder / "data").mkdir()
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN", "WANDB"))}
        self.environment = inherited | {
            "PATH": f"{self.state}/bin:{os.environ['PATH']}",
            "STAND_IN": str(self.state),
            "REAL_PYTHON": os.path.realpath(sys.executable),
            "HOST_PYTHON": str(self.state / "bin" / "host_python"),
            "PYTHON": str(self.state / "bin" / "python"),
            "RUN_ROOT": str(self.runs),
            "DATA_ROOT": str(folder / "data"),
            "HOME": str(folder),
            "NODE_LOCAL": "",
            "BACKOFF_SECONDS": "0",
            "REHEARSAL": "no",
            "STOP_NAME": "chain",
            **environment,
        }
        self.processes: dict[str, subprocess.Popen] = {}
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.control)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        for process in self.processes.values():
            end_group(process)

    def do(self, *command, **environment: str) -> subprocess.CompletedProcess:
        """A command in the checkout."""
        return subprocess.run(
            [str(part) for part in command],
            cwd=self.checkout,
            env=self.environment | environment,
            text=True,
            capture_output=True,
            timeout=300,
        )

    def submit(self, *arguments, **environment: str) -> subprocess.CompletedProcess:
        return self.do("slurm/submit.sh", "--name", "chain", *arguments, **environment)

    def status(self, *arguments) -> dict:
        command = [sys.executable, REPOSITORY / "tools" / "status.py", *(arguments or ["chain"]), "--json"]
        result = self.do(*command, QUIET="yes")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def states(self) -> dict[str, str]:
        folders = sorted((self.state / "jobs").iterdir(), key=lambda path: int(path.name))
        return {folder.name: self.read(folder.name, "state") for folder in folders}

    def wait(self, seconds: float = 120) -> dict[str, str]:
        """The states of all jobs once none is in the queue."""
        end = time.monotonic() + seconds
        while any(state in IN_QUEUE for state in self.states().values()):
            assert time.monotonic() < end, f"{self.states()}\n{self.log()}"
            time.sleep(0.1)
        return self.states()

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("**/*.log")))

    def steps(self) -> list[dict]:
        path = self.state / "steps"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def read(self, job: str, name: str) -> str:
        try:
            return (self.state / "jobs" / job / name).read_text().strip()
        except OSError:
            return ""

    # What slurmctld does.

    def control(self):
        while not self.over.wait(0.03):
            for job, state in self.states().items():
                if state == "PENDING":
                    self.start_if_possible(job)
                elif state in ("RUNNING", "COMPLETING") and self.processes[job].poll() is not None:
                    self.end(job)

    def set_state(self, job: str, state: str):
        path = self.state / "jobs" / job / "state"
        path.with_name(".new").write_text(state)
        path.with_name(".new").replace(path)

    def start_if_possible(self, job: str):
        folder = self.state / "jobs" / job
        kind, _, before = self.read(job, "after").partition(":")
        state = self.read(before, "state") if before else ""
        if (folder / "cancelled").exists() or (kind == "afterok" and state not in (*IN_QUEUE, "COMPLETED")):
            self.set_state(job, "CANCELLED")
        elif not before or state not in IN_QUEUE:
            restart = int(self.read(job, "restart") or 0)
            environment = dict(line.split("=", 1) for line in self.read(job, "environment").split("\0") if line)
            environment |= {
                "SLURM_JOB_ID": job,
                "SLURM_SUBMIT_DIR": self.read(job, "folder"),
                "SLURM_JOB_NODELIST": "node1",
                "SLURM_NNODES": "1",
                "SLURM_NTASKS": "1",
                "SLURM_NTASKS_PER_NODE": "1",
                "SLURM_CPUS_ON_NODE": "2",
                "SLURM_RESTART_COUNT": str(restart),
            }
            arguments = [part for part in (folder / "arguments").read_text().split("\0") if part]
            output = Path(self.read(job, "folder"), self.read(job, "output").replace("%j", job).replace("%x", "job"))
            with output.open("a") as log:
                self.processes[job] = subprocess.Popen(
                    ["bash", str(folder / "script"), *arguments],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            (folder / "pid").write_text(str(self.processes[job].pid))
            self.set_state(job, "RUNNING")

    def end(self, job: str):
        folder = self.state / "jobs" / job
        end_group(self.processes[job])
        status = self.processes[job].returncode
        if (folder / "cancelled").exists():
            self.set_state(job, "CANCELLED")
        elif (folder / "requeue").exists():
            (folder / "requeue").unlink()
            (folder / "restart").write_text(str(int(self.read(job, "restart") or 0) + 1))
            self.set_state(job, "PENDING")
        else:
            (folder / "status").write_text(str(status))
            self.set_state(job, "COMPLETED" if status == 0 else "FAILED")


def end_group(process: subprocess.Popen):
    """Kill what a job has left behind."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
