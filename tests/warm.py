"""Processes that start warm: forked from a server of the standard library that has imported what our programs import.

Torch, Megatron and NeMo take 8 seconds of a core to import; most of what the tests start works for less. A program is
run as `python script.py ...` would run it, in a process of its own, with its own environment and process group;
several ranks get what torchrun would give them. test_readme.py, test_quickstart.py, test_slurm.py, test_survive.py and
test_stage_pass.py start real commands from nothing.

What is already imported has read its environment variables (HF_ENDPOINT, ...), and the ranks share one hash seed: where
a test is about such a thing, conftest's `run` starts a real process.
"""

import atexit
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

PRELOAD = (
    "nemo.core.config", "molmo2_nemo.training.train", "molmo2_nemo.report", "molmo2_nemo.hf.convert", "molmo2_nemo.data.stages",
    "torchvision.transforms.v2",
    "transformers.models.molmo2.modeling_molmo2", "transformers.models.molmo2.processing_molmo2",
)  # fmt: skip
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(list(PRELOAD))
# Below the ports that the system hands out; a range for each of pytest's workers, gw0, gw1, ...
worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
ports = itertools.count(12000 + worker % 5 * 3500 + os.getpid() % 30 * 100)


def start(programs: list[tuple[list[str], dict[str, str]]], folder: Path, timeout: float) -> subprocess.CompletedProcess:
    """Run programs (arguments, environment) side by side in `folder`. The first that fails ends the others.

    Returns the output of all, and the exit status of the first that failed, or 0. Raises subprocess.TimeoutExpired.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as stdout, tempfile.TemporaryFile("w+", errors="replace") as stderr:
        files = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in (stdout, stderr)]
        processes = [context.Process(target=run, args=(*program, str(folder), *files)) for program in programs]
        for process in processes:
            process.start()
        end, failed, late = time.monotonic() + timeout, None, False
        while not failed and not late and any(process.is_alive() for process in processes):
            multiprocessing.connection.wait([p.sentinel for p in processes if p.is_alive()], end - time.monotonic())
            failed = next((process for process in processes if process.exitcode), None)
            late = time.monotonic() > end
        for process in processes if failed else ():
            process.terminate()
        for process in processes:
            process.join(30 if failed else 0)
            process.kill()
            process.join()
        output = []
        for file in (stdout, stderr):
            file.seek(0)
            output.append(file.read())
    if late:
        raise subprocess.TimeoutExpired(programs[0][0], timeout, *output)
    return subprocess.CompletedProcess(programs[0][0], failed.exitcode if failed else 0, *output)


def environments(ranks: int, environment: dict[str, str]) -> list[dict[str, str]]:
    """What torchrun sets on one node."""
    common = {**environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(next(ports)), "WORLD_SIZE": str(ranks),
              "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}  # fmt: skip
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def run(arguments: list[str], environment: dict[str, str], folder: str, stdout: str, stderr: str) -> None:
    """In the forked process."""
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # as in any other process; multiprocessing says forkserver here
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
        atexit._run_exitfuncs()  # torch ends loader workers there; multiprocessing leaves it out
