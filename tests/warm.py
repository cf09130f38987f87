"""Programs that start warm: forked from a server that has already imported what our programs import.

Importing torch, Megatron, NeMo and transformers takes many seconds of a core, and most of what the tests start works
for less. One server does it once for all of pytest's processes. A request to it carries arguments, environment,
working folder and the three standard streams; the server forks, and the new process runs the program as
`python script.py ...`, `python -m module ...` or `python -c code ...` would run it.

There are two ways to use it. `start` runs programs and returns their output; programs.py builds on it. The script
that `executable` writes can stand wherever a command line expects `python`: it passes on the signals it gets, and
ends as the program ends.

What is already imported has read its environment variables (HF_ENDPOINT, ...), and the forked processes share one hash
seed. Where a test is about such a thing, `programs.run` starts a real process.
"""

import atexit
import contextlib
import itertools
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path

PRELOAD = [
    "molmo2_nemo.training.run",
    "molmo2_nemo.report",
    "molmo2_nemo.hf.convert",
    "molmo2_nemo.prepare.stage_datasets",
    "torchvision.transforms.v2",
    "transformers.models.molmo2.modeling_molmo2",
    "transformers.models.molmo2.processing_molmo2",
    # What Megatron imports as late as in the first step and the first save.
    "megatron.core.models.mimo.model",
    "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "molmo2_nemo.cpu",
]
# Overrides of each kind that the tests use.
COMPOSED = ["model=tiny", "train.max_steps=2", "train.report=false", "optim.vit.lr=1e-4", "run_dir=/a-b/c_d"]
FOLDER = "MOLMO2_NEMO_WARM"  # names the folder of the server's socket; conftest.py sets it
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # by the stand-in
# Below the ports that the system hands out and above those of the Slurm tests (local_slurm.sh); a range for each of
# pytest's workers, gw0, gw1, ...
worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
ports = itertools.count(12000 + worker % 5 * 3500 + os.getpid() % 30 * 100)


# --- the server -----------------------------------------------------------------------------------------------------


def serve(listener: socket.socket, owner: int) -> dict:
    """Fork twice for each request: a process that watches, and the program's, in which alone this returns the request.

    Ends when the process `owner` has ended.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that watch
    listener.settimeout(2)
    while Path(f"/proc/{owner}").exists():
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        if not os.fork():
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return watch(connection)
        connection.close()
    sys.exit()


def watch(connection: socket.socket) -> dict:
    """Answer with the id of the program's process and, once it has ended, its status. Kill it if nobody listens."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    line = connection.makefile("rb").readline()
    client, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    pid = os.fork() if line else os._exit(0)
    if not pid:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        # On a node of the Slurm tests: with the node's host name and hosts file.
        try:
            is_elsewhere = os.readlink(f"/proc/{client}/ns/uts") != os.readlink("/proc/self/ns/uts")
        except FileNotFoundError:  # the client was killed meanwhile: nobody waits for the program
            os._exit(0)
        if is_elsewhere:
            os.setns(os.pidfd_open(client), os.CLONE_NEWUTS | os.CLONE_NEWNS)
        return json.loads(line)
    for stream in streams:
        os.close(stream)
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % pid)
        ended = os.pidfd_open(pid)
        if ended not in select.select([connection, ended], [], [])[0]:
            os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % status)
    os._exit(0)


def leave(status: list[int]) -> None:
    """End this process without taking apart what the server had imported: that takes longer than most programs.

    Registered with atexit before anything else, and so called after everything else. Without a status, Python ends the
    process itself.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    if status:
        os._exit(status[0])


def run(arguments: list[str], environment: dict[str, str], folder: str, ignored: list[int]) -> None:
    """In the program's process."""
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    while arguments[0] == "-u":
        arguments = arguments[1:]
    if environment.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    program, sys.argv = arguments[0], arguments
    if program == "-c":
        code, sys.argv[:] = arguments[1], ["-c", *arguments[2:]]
        sys.path[0] = ""
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif program == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = folder
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(program).resolve().parent)
        runpy.run_path(program, run_name="__main__")


# --- its clients ----------------------------------------------------------------------------------------------------


class Program:
    """A program that runs; `fileno` becomes readable when it has ended."""

    def __init__(self, arguments: list[str], environment: dict[str, str], folder: Path, streams: list[int]):
        self.status = None
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(os.path.join(os.environ[FOLDER], "socket"))
        socket.send_fds(self.connection, [b"\0"], streams)
        ignored = [number for number in PASSED_ON if signal.getsignal(number) is signal.SIG_IGN]
        request = {"arguments": arguments, "environment": environment, "folder": str(folder), "ignored": ignored}
        self.connection.sendall(json.dumps(request).encode() + b"\n")
        self.answers = self.connection.makefile("rb", buffering=0)
        line = self.answers.readline()
        if not line:
            raise RuntimeError(f"the server of warm programs has ended: see {os.environ[FOLDER]}/log")
        self.pid = int(line)

    def fileno(self) -> int:
        return self.connection.fileno()

    def poll(self) -> int | None:
        """Its exit status, or None if it still runs."""
        if self.status is None and select.select([self], [], [], 0)[0]:
            self.wait()
        return self.status

    def wait(self) -> int:
        """Its exit status, negative if a signal ended it."""
        if self.status is None:
            self.status = int(self.answers.readline() or -signal.SIGKILL)
            self.answers.close()
            self.connection.close()
        return self.status

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def ensure_server() -> None:
    """Start the server, unless a process of this test run has done so. It listens at once and imports meanwhile."""
    import subprocess

    from filelock import FileLock

    folder = Path(os.environ[FOLDER])
    with FileLock(folder / "lock"):
        if (folder / "socket").exists():
            return
        with socket.socket(socket.AF_UNIX) as listener, (folder / "log").open("w") as log:
            listener.bind(str(folder / "socket"))
            listener.listen(100)
            subprocess.Popen(
                [sys.executable, __file__, "--serve", str(listener.fileno()), (folder / "owner").read_text()],
                cwd=Path(__file__).resolve().parents[1],
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def start(arguments: list, environments: list[dict[str, str]], folder: Path, timeout: float):
    """Run a program in `folder`, side by side in each of the environments. The first that fails ends the others.

    Returns a subprocess.CompletedProcess with the output of all and the exit status of the first that failed, or 0.
    Raises subprocess.TimeoutExpired.
    """
    import multiprocessing.connection
    import subprocess
    import tempfile

    ensure_server()
    arguments = [str(part) for part in arguments]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as stdout,
        tempfile.TemporaryFile("w+", errors="replace") as stderr,
        open(os.devnull) as stdin,
    ):
        streams = [stdin.fileno(), stdout.fileno(), stderr.fileno()]
        programs = [Program(arguments, each, folder, streams) for each in environments]
        end = time.monotonic() + timeout
        while True:
            alive = [program for program in programs if program.status is None]
            status = next((program.status for program in programs if program.status), 0)
            if not alive or status or time.monotonic() > end:
                break
            for program in multiprocessing.connection.wait(alive, end - time.monotonic()):
                program.wait()
        for program in alive if status else ():
            program.send_signal(signal.SIGTERM)
        for program in alive:
            if not status or not multiprocessing.connection.wait([program], 30):
                program.send_signal(signal.SIGKILL)
            program.wait()
        output = []
        for file in (stdout, stderr):
            file.seek(0)
            output.append(file.read())
    if alive and not status:
        raise subprocess.TimeoutExpired(arguments, timeout, *output)
    return subprocess.CompletedProcess(arguments, status, *output)


def free_port() -> int:
    """The next of this worker's ports on which nothing listens."""
    for port in ports:
        with socket.socket() as attempt:
            if attempt.connect_ex(("127.0.0.1", port)):
                return port


def environments(ranks: int, environment: dict[str, str]) -> list[dict[str, str]]:
    """What torchrun sets on one node."""
    common = {
        **environment,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
    }
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def executable() -> Path:
    """A script that stands for `python`: it runs what it is given warm."""
    ensure_server()
    path = Path(os.environ[FOLDER]) / "python"
    if not path.exists():
        own = path.with_suffix(f".{os.getpid()}")
        own.write_text(f'#!/bin/sh\n{FOLDER}={path.parent} exec {sys.executable} -S -E {__file__} "$@"\n')
        own.chmod(0o755)
        own.rename(path)
    return path


def pid_behind(stand_in: int) -> int:
    """The program's process of such a script's process."""
    return int((Path(os.environ[FOLDER]) / f"pid.{stand_in}").read_text())


def stand_in(arguments: list[str]) -> None:
    """What that script does."""
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until there is somebody to pass them on to
    program = Program(arguments, dict(os.environ), Path.cwd(), [0, 1, 2])
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: program.send_signal(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    (Path(os.environ[FOLDER]) / f"pid.{os.getpid()}").write_text(str(program.pid))
    status = program.wait()
    if status >= 0:
        os._exit(status)
    if status != -signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)


if __name__ == "__main__":
    if sys.argv[1] != "--serve":
        stand_in(sys.argv[1:])
    else:
        import gc
        import importlib

        status = []
        atexit.register(leave, status)
        for name in PRELOAD:
            importlib.import_module(name)
        importlib.import_module("molmo2_nemo.recipe").nemo_hydra_runner()  # imports Hydra
        # Hydra's parsers are slow until they have met each kind of override; what they have learnt is kept.
        importlib.import_module("molmo2_nemo.command_line").compose("stage2", COMPOSED)
        gc.freeze()  # a collection in a forked process would copy what is shared
        request = serve(socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]))
        try:
            run(**request)
            status.append(0)
        except SystemExit as end:
            status.append(end.code if isinstance(end.code, int) else int(end.code is not None))
            raise
        except Exception:
            status.append(1)
            raise
