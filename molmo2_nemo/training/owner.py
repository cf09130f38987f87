"""One run at a time in a run's folder: its owner.json says whose it is, and that this process is still alive.

Two jobs that train in one folder would remove each other's unfinished checkpoints and mix their metrics. Rank 0 makes
the file before anything else is written. Every BEAT_SECONDS a thread counts its `beat` up. A second run reads the file:
on the same machine it looks at the process; of another machine it watches the beat for PATIENCE_SECONDS. No clock is
compared, so that clocks may differ or be set back.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import BinaryIO

from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.files import NO_LOCKS, write_atomically

OWNER = "owner.json"
BEAT_SECONDS = 10
PATIENCE_SECONDS = 45
SECONDS_BETWEEN_LOOKS = 1


class FolderInUse(ConfigError):
    """Another run trains in this folder; nothing in it may be touched."""


class Owner:
    """Holds a run's folder until `release` or the end of the process. Raises FolderInUse, ConfigError."""

    def __init__(self, run_dir: Path):
        self.path, self.me, self.ended = run_dir / OWNER, _this_process(), threading.Event()
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._take()
        except (FileExistsError, NotADirectoryError) as error:
            raise ConfigError(f"run_dir={run_dir} is a file, or below one: name a folder.") from error
        except OSError as error:
            raise ConfigError(
                f"run_dir={run_dir} cannot be written to ({error}): make it writable, make room, or choose another "
                "folder."
            ) from error
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def release(self) -> None:
        """Let go of the folder. Safe to call again."""
        self.ended.set()
        self.thread.join(BEAT_SECONDS)  # it may be writing the file
        if (read(self.path) or {}).get("token") == self.me["token"]:
            with contextlib.suppress(OSError):  # the folder is read-only by now; the next start sees that we are dead
                self.path.unlink(missing_ok=True)

    def _take(self) -> None:
        own = self.path.with_name(f".{OWNER}.{self.me['token']}")
        try:
            own.write_text(json.dumps(self.me))
            while True:
                try:
                    os.link(own, self.path)  # fails if the file is there, also over NFS
                    return
                except FileExistsError:
                    pass
                if self.path.is_dir():
                    raise ConfigError(f"{self.path} is a folder: remove it, it is the name of a run's own file.")
                other = read(self.path)
                if other is not None and is_alive(self.path, other):
                    job = f" (Slurm job {other['slurm_job']})" if other.get("slurm_job") else ""
                    raise FolderInUse(
                        f"run_dir={self.path.parent} is in use by process {other.get('pid')} on {other.get('host')}"
                        f"{job}: wait until that run has ended or stop it, or give this one another name=NAME or "
                        "run_dir=FOLDER."
                    )
                self._remove(other)
        finally:
            own.unlink(missing_ok=True)

    def _remove(self, dead: dict | None) -> None:
        """Take the file of an owner that is dead away, unless another run was faster.

        Under a lock on that very file: who waits for it finds afterwards that another file has its name.
        """
        with contextlib.suppress(FileNotFoundError), self._opened() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:  # EBADF: over NFS, of a file that may only be read
                if error.errno not in {*NO_LOCKS, errno.EBADF}:
                    raise
            is_the_same = os.path.samestat(os.fstat(file.fileno()), self.path.stat())
            if is_the_same and (read(self.path) or {}).get("token") == (dead or {}).get("token"):
                self.path.unlink()
        if dead is not None:  # what it was writing when it was killed (files.write_atomically)
            name = f".{OWNER}.{dead.get('host')}.{dead.get('pid')}"
            if "/" not in name:
                self.path.with_name(name).unlink(missing_ok=True)

    def _opened(self) -> BinaryIO:
        try:
            return self.path.open("r+b")
        except PermissionError:  # of another user
            return self.path.open("rb")

    def _beat(self) -> None:
        while not self.ended.wait(BEAT_SECONDS):
            found = read(self.path)
            if self.ended.is_set():
                return
            if found is None and not self.path.exists() or found and found.get("token") != self.me["token"]:
                what = "is gone" if found is None else f"belongs to process {found.get('pid')} on {found.get('host')}"
                print(f"error: {self.path} {what}: the run ends here and saves nothing more.", file=sys.stderr)
                sys.stderr.flush()
                # In the middle of anything: what the folder holds now is not this run's.
                os._exit(2)  # for batch scripts: starting again would find an empty folder, and begin anew
            self.me["beat"] += 1
            with contextlib.suppress(OSError):  # a full or read-only disk: saving will say so
                write_atomically(self.path, json.dumps(self.me))


def read(path: Path) -> dict | None:
    """What an owner file says; None where there is none, or nothing that can be read."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def is_alive(path: Path, other: dict) -> bool:
    """Whether the owner that the file names still works. Looks at its process, or watches its beat."""
    me = _this_process()
    if all(other.get(key) == me[key] for key in ("boot", "pid_namespace")):
        return _started(other.get("pid")) is not None and _started(other.get("pid")) == other.get("started")
    print(
        f"{path} is of process {other.get('pid')} on {other.get('host')}: watching for up to {PATIENCE_SECONDS} s "
        "whether it is alive",
        flush=True,
    )
    same_job = me["slurm_job"] and other.get("slurm_job") == me["slurm_job"]
    if same_job and int(other.get("slurm_restarts") or 0) < int(me["slurm_restarts"] or 0):
        return False  # Slurm has ended that start of the job before it began this one
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        now = read(path)
        if now is not None and (now.get("token"), now.get("beat")) != (other.get("token"), other.get("beat")):
            return True
        if now is None and not path.exists():
            return False
    return False


def in_use(run_dir: Path) -> bool:
    """Whether another run holds the folder, as far as can be told without waiting. Ranks of a Slurm job are one run."""
    other, me = read(run_dir / OWNER), _this_process()
    if other is None or (other.get("pid"), other.get("started")) == (me["pid"], me["started"]):
        return False
    if me["slurm_job"] and all(other.get(key) == me[key] for key in ("slurm_job", "slurm_restarts")):
        return False
    if all(other.get(key) == me[key] for key in ("boot", "pid_namespace")):
        return _started(other.get("pid")) == other.get("started")
    return True


def _this_process() -> dict:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "pid_namespace": os.readlink("/proc/self/ns/pid"),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_restarts": os.environ.get("SLURM_RESTART_COUNT"),
        "token": uuid.uuid4().hex,
        "beat": 0,
    }


def _started(pid: int | None) -> str | None:
    """When a process began, in clock ticks since the boot; None: there is no such process. A zombie has ended."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, ValueError, TypeError, IndexError):
        return None
    return None if fields[0] in "ZX" else fields[19]
