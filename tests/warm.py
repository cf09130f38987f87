"""Processes that start warm: forked from a server of the standard library that has imported what our programs import.

Torch, Megatron and NeMo take 8 seconds of a core to import; most of what the tests start works for less. A program is
run as `python script.py ...` would run it, in a process of its own, with its own environment; several ranks get what
torchrun would give them. test_readme.py, test_quickstart.py, test_slurm.py, test_survive.py and test_stage_pass.py
start real commands from nothing.

What is already imported has read its environment variables (HF_ENDPOINT, ...), and the ranks share one hash seed: where
a test is about such a thing, conftest's `run` starts a real process.
"""

import itertools
import multiprocessing
import multiprocessing.connection
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from molmo2_nemo import compat

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "nemo.core.config",
        "molmo2_nemo.training.run",
        "molmo2_nemo.report",
        "molmo2_nemo.hf.convert",
        "molmo2_nemo.prepare.stage_datasets",
        "torchvision.transforms.v2",
        "transformers.models.molmo2.modeling_molmo2",
        "transformers.models.molmo2.processing_molmo2",
    ]
)
# Below the ports that the system hands out; a range for each of pytest's workers, gw0, gw1, ...
worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
ports = itertools.count(12000 + worker % 5 * 3500 + os.getpid() % 30 * 100)


def start(
    arguments: list, environments: list[dict[str, str]], folder: Path, timeout: float
) -> subprocess.CompletedProcess:
    """Run a program in `folder`, side by side in each of the environments. The first that fails ends the others.

    Returns the output of all, and the exit status of the first that failed, or 0. Raises subprocess.TimeoutExpired.
    """
    arguments = [str(part) for part in arguments]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as stdout,
        tempfile.TemporaryFile("w+", errors="replace") as stderr,
    ):
        files = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (stdout, stderr)]
        processes = [context.Process(target=run, args=(arguments, each, str(folder), *files)) for each in environments]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        while True:
            # In this order: once none is alive, the status is of all of them.
            alive = [process for process in processes if process.is_alive()]
            status = next((process.exitcode for process in processes if process.exitcode), 0)
            if not alive or status or time.monotonic() > end:
                break
            multiprocessing.connection.wait([process.sentinel for process in alive], end - time.monotonic())
        for process in alive if status else ():
            process.terminate()
        for process in alive:
            process.join(30 if status else 0)
            process.kill()
            process.join()
        output = []
        for file in (stdout, stderr):
            file.seek(0)
            output.append(file.read())
    if alive and not status:
        raise subprocess.TimeoutExpired(arguments, timeout, *output)
    return subprocess.CompletedProcess(arguments, status, *output)


def environments(ranks: int, environment: dict[str, str]) -> list[dict[str, str]]:
    """What torchrun sets on one node."""
    common = {
        **environment,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(next(ports)),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
    }
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def run(arguments: list[str], environment: dict[str, str], folder: str, stdout: str, stderr: str) -> None:
    """In the forked process."""
    multiprocessing.set_start_method(
        "fork", force=True
    )  # as in any other process; multiprocessing says forkserver here
    for number, file in ((1, stdout), (2, stderr)):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    program, sys.argv = arguments[0], arguments
    try:
        if program == "-c":
            code, sys.argv = arguments[1], ["-c", *arguments[2:]]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.path.insert(0, str(Path(program).resolve().parent))
            runpy.run_path(program, run_name="__main__")
    finally:
        compat.run_exit_functions()  # torch ends loader workers there; multiprocessing leaves it out
