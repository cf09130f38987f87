"""What it costs to start a rank: CPU seconds and wall time until the tiny model has taken its first step on the CPU.

    python tools/bench/startup.py                    # three starts, one after the other
    python tools/bench/startup.py --repeat 1 --json

Prints a row for each start and a JSON line. `import torch` stands beside them as a measure of the machine: on a busy
one everything takes longer, also in CPU seconds. The first start after an installation compiles Python files: ignore
it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = [sys.executable, "recipes/stage1_pretrain.py", "model=tiny", "data=sample", "schedule=quickstart"]
SETTINGS = ["optim=from_scratch", "train.max_steps=1", "train.validation_batches=0", "data.num_workers=0"]


def cpu_seconds(pid: int) -> float:
    """User and system time of a running process and of its children that have ended (proc(5), stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def first_step(command: list[str]) -> tuple[float, float]:
    """(CPU seconds, seconds) until the command prints its first step. RuntimeError: it ends before that."""
    started = time.monotonic()
    with subprocess.Popen(command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        for line in run.stdout:
            if line.startswith("step 1/"):
                found = cpu_seconds(run.pid), time.monotonic() - started
                run.stdout.read()
                return found
    raise RuntimeError(f"no first step, exit status {run.returncode}: {' '.join(command)}")


def whole_process(command: list[str]) -> tuple[float, float]:
    """(CPU seconds, seconds) of a command from start to end."""
    before, started = os.times(), time.monotonic()
    subprocess.run(command, cwd=REPOSITORY, check=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="starts to measure (3)")
    parser.add_argument("--data", type=Path, help="sample data of tools/make_sample_data.py; made if not given")
    parser.add_argument("--json", action="store_true", help="the JSON line alone")
    args = parser.parse_args()
    os.environ.update(PYTHONUNBUFFERED="1", OMP_NUM_THREADS="1")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = args.data.absolute() if args.data else Path(folder, "sample")
        if not args.data:
            make = [sys.executable, "tools/make_sample_data.py", "--out", str(data), "--scale", "0.05"]
            subprocess.run(make, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
        for number in range(args.repeat):
            rows.append(("import torch", *whole_process([sys.executable, "-c", "import torch"])))
            where = [f"data.root='{data}'", f"run_dir='{folder}/run{number}'"]
            rows.append(("first step", *first_step([*RECIPE, *SETTINGS, *where])))
    if not args.json:
        print(f"{'':14} CPU s  wall s")
        for what, cpu, wall in rows:
            print(f"{what:14} {cpu:5.1f} {wall:7.1f}")
    print(json.dumps([{"what": what, "cpu_s": round(cpu, 2), "wall_s": round(wall, 2)} for what, cpu, wall in rows]))


if __name__ == "__main__":
    main()
