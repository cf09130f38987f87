"""What tools/quickstart.sh does once .venv is there: sample data, three chained stages, export, questions, a report.

    tools/quickstart.sh [OVERRIDE...]

Each part is a program that a user would start himself, and its command line is printed. Here they run in processes
that are forked from this one, which imports torch, Megatron and transformers once: to do that in every rank and tool
would take a third of the quickstart's time.
"""

import importlib
import os
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from pathlib import Path

from molmo2_nemo.environment import quiet_libraries, set_cpu_environment

# The tests have data and runs of their own.
DATA = os.environ.get("QUICKSTART_DATA", "data/sample")
RUNS = Path(os.environ.get("QUICKSTART_RUNS", "runs/quickstart"))
SCALE = os.environ.get("QUICKSTART_SCALE", "1.0")
# A change of one of these starts the stages over, as other overrides do.
SETTINGS = [
    *("schedule/quickstart.yaml", "model/tiny.yaml", "model/quickstart.yaml", "optim/from_scratch.yaml"),
    "blend/sample_stage*.yaml",
]
IMPORTED = [
    "molmo2_nemo.training.run",
    "molmo2_nemo.report",
    "molmo2_nemo.hf.convert",
    "molmo2_nemo.ask.model",
    "transformers.models.molmo2.modeling_molmo2",
    "transformers.models.molmo2.processing_molmo2",
    "megatron.core.models.mimo.model",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
]


def say(title: str) -> None:
    print(f"\n== {title}", flush=True)


def fork(arguments: list[str], environment: dict[str, str], stderr: int) -> int:
    """Run `python ARGUMENTS...` in a process forked from this one; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.dup2(stderr, 2)
        os.environ.update(environment)
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
        runpy.run_path(arguments[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(*arguments: str, ranks: int = 1, stderr: int = 2) -> bool:
    """Run a program, on several ranks with what torchrun sets; True if all end well. The first that fails ends all."""
    launcher = "python" if ranks == 1 else f"torchrun --nproc-per-node {ranks}"
    print("+", launcher, shlex.join(arguments), flush=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    environments = [common | {"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {} for rank in range(ranks)]
    alive = {fork([*arguments], {key: str(value) for key, value in each.items()}, stderr) for each in environments}
    well, interrupted = True, False
    while alive:
        try:
            pid, status = os.wait()
        except KeyboardInterrupt:  # the terminal has sent it to them, too
            interrupted = True
            continue
        alive.discard(pid)
        if status and well:
            well = False
            for other in alive:
                os.kill(other, signal.SIGTERM)
    if interrupted:
        raise KeyboardInterrupt
    return well


def stage(number: int, recipe: str, ranks: int, *overrides: str) -> None:
    """One stage of training; nothing if it is finished."""
    folder = RUNS / f"stage{number}"
    if (folder / "seconds").exists():
        say(f"stage {number}: finished earlier, kept in {folder}")
        return
    say(f"stage {number}: {recipe} on {ranks} CPU rank{'s' * (ranks > 1)}")
    started, errors = time.monotonic(), RUNS / f"stage{number}.err"
    with subprocess.Popen(["tee", "-i", str(errors)], stdin=subprocess.PIPE, stdout=sys.stderr) as tee:
        well = run(
            f"recipes/{recipe}.py",
            *["model=quickstart", "data=sample", f"data.root={DATA}", "schedule=quickstart", "optim=from_scratch"],
            *["name=quickstart", f"run_dir={folder}", "train.vision_recompute=false"],
            # Once, in the end.
            *["train.save_every=5000", "train.validate_every=5000", "train.generate_every=5000"],
            *["train.generate_examples=15", "train.generate_max_tokens=32"],
            *overrides,
            ranks=ranks,
            stderr=tee.stdin.fileno(),
        )
    if not well:
        sys.exit(f"stage {number} failed. Its error is above and in {errors}; docs/troubleshooting.md explains it.")
    (folder / "seconds").write_text(f"{time.monotonic() - started:.0f}\n")


def keep_or_clear(overrides: list[str]) -> None:
    """A second run with the same overrides keeps the stages that are finished; with others it starts over."""
    settings = [path.read_bytes() for pattern in SETTINGS for path in sorted(Path("conf").glob(pattern))]
    wanted, record = f"{shlex.join(overrides)} {zlib.crc32(b''.join(settings))}\n", RUNS / "overrides"
    if not record.exists() or record.read_text() != wanted:
        shutil.rmtree(RUNS, ignore_errors=True)
        RUNS.mkdir(parents=True)
        record.write_text(wanted)


def main(overrides: list[str]) -> None:
    os.chdir(Path(__file__).resolve().parents[1])
    keep_or_clear(overrides)
    say("sample data")
    make = ["tools/make_sample_data.py", "--out", DATA, "--scale", SCALE]
    print("+ python", shlex.join(make), flush=True)
    with subprocess.Popen([sys.executable, *make]) as data:
        # All of it is on the CPU, also beside GPUs: no forked process could use one that this process has asked for.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        quiet_libraries()
        set_cpu_environment()
        for module in IMPORTED:
            importlib.import_module(module)
    if data.returncode:
        sys.exit(data.returncode)

    stage(1, "stage1_pretrain", 1, "train.log_every=50", *overrides)
    stage(2, "stage2_sft", 1, "train.log_every=50", f"train.init_from={RUNS}/stage1", *overrides)
    stage(
        3, "stage3_long_context", 2, "parallel=cp2", "train.log_every=10", f"train.init_from={RUNS}/stage2", *overrides
    )

    shutil.rmtree(RUNS / "hf", ignore_errors=True)
    (RUNS / "answers.jsonl").unlink(missing_ok=True)
    questions = ["--batch", f"{DATA}/quiz/quiz.json", "--out", f"{RUNS}/answers.jsonl", "--max-new-tokens", "64"]
    for title, arguments in (
        ("export", ["tools/export_hf.py", f"{RUNS}/stage3", f"{RUNS}/hf"]),
        ("questions to the exported model", ["tools/ask.py", f"{RUNS}/hf", *questions]),
        ("report", ["tools/report_quickstart.py", str(RUNS), "--data", DATA]),
    ):
        say(title)
        if not run(*arguments):
            sys.exit(1)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
