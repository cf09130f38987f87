"""Kill a small training run at random moments, again and again, and check that its loss curve is the undisturbed one.

    python tools/check/chaos.py --rounds 30 [--ranks 2] [--steps 60] [--seed 1] [--async-checkpoint alternate]

One run is left alone. The other has the same settings and is started again after every round; a round waits for a
random moment and then does one of these:

    job       SIGKILL to all of its processes at once
    rank      SIGKILL to one rank, while the others go on
    worker    SIGKILL to a loader worker
    writer    SIGKILL to all processes while a checkpoint is being written
    stop      SIGUSR1 to one rank, which is a request to save and end

Checkpoints are written asynchronously in every other start, or in all, or in none (--async-checkpoint). After the last
round the run is completed; a run that ends before is compared, and another one is begun. Every step's loss, gradient
norms and data must be those of the run left alone, to the last bit. Needs the sample data
(tools/make_sample_data.py --out data/sample), or --data DIR. No GPU.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
KINDS = ("job", "rank", "worker", "writer", "stop")
SAME = ("loss", "loss_by_source", "grad_norm", "tokens", "tokens_seen", "data")


class Run:
    """A training run in a folder, and the processes of its present start."""

    def __init__(self, folder: Path, args):
        self.folder, self.args = folder, args
        self.process = None
        self.starts = 0

    def start(self) -> None:
        arguments = [
            "recipes/stage2_sft.py",
            "model=tiny",
            "data=sample",
            "schedule=quickstart",
            "optim=from_scratch",
            f"data.root={self.args.data}",
            f"run_dir={self.folder}",
            f"train.max_steps={self.args.steps}",
            "train.log_every=1",
            "train.save_every=4",
            "train.keep_last=2",
            "train.validation_batches=0",
            "train.global_batch_size=4",
            "train.micro_batch_size=1",
            "data.num_workers=2",
            f"train.async_checkpoint={self.is_asynchronous()}",
        ]
        self.starts += 1
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.args.ranks)]
        self.folder.mkdir(parents=True, exist_ok=True)
        log = open(self.folder / "console.txt", "a")
        self.process = subprocess.Popen(
            [sys.executable, *launcher, *arguments],
            cwd=REPOSITORY,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )

    def is_asynchronous(self) -> bool:
        choice = self.args.async_checkpoint
        return self.starts % 2 == 0 if choice == "alternate" else choice == "true"

    def records(self) -> dict[int, dict]:
        """Step -> record, of the last start that took the step. Lines that a kill has cut short are left out."""
        found = {}
        path = self.folder / "metrics.jsonl"
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record.get("kind") == "train":
                found[record["step"]] = record
        return found

    def children(self, parent: int) -> list[int]:
        listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True)
        return [int(line) for line in listing.stdout.split()]

    def ranks(self) -> list[int]:
        return self.children(self.process.pid)

    def workers(self) -> list[int]:
        return [worker for rank in self.ranks() for worker in self.children(rank)]

    def kill_all(self) -> None:
        for pid in [*self.workers(), *self.ranks(), self.process.pid]:
            _send(pid, signal.SIGKILL)

    def is_writing(self) -> bool:
        return any((self.folder / "checkpoints").glob(".step_*.tmp"))

    def wait(self) -> int | None:
        """Wait for the end. Returns the exit status, None if it does not end; its processes are killed then."""
        try:
            return self.process.wait(self.args.patience)
        except subprocess.TimeoutExpired:
            return None
        finally:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def strike(run: Run, kind: str, dice: random.Random) -> str:
    """Wait for a random moment of this start, then kill or signal; returns what was done, or that the run has ended."""
    first = max(run.records(), default=0)
    # The first step is taken after some seconds of imports; some kills happen before.
    target, early = first + dice.randint(0, 7), dice.random() < 0.1
    deadline = time.monotonic() + run.args.patience
    while run.process.poll() is None and not early and time.monotonic() < deadline:
        if max(run.records(), default=0) >= target and (kind != "writer" or run.is_writing()):
            break
        time.sleep(0.001 if kind == "writer" else 0.02)
    time.sleep(dice.random() * (8 if early else 0.2 if kind != "writer" else 0.0))
    at = max(run.records(), default=0)
    if run.process.poll() is not None:
        return "ended before"
    if kind == "stop":
        targets = run.ranks()
        # Before the ranks listen, a request ends them like any other program.
        if targets:
            _send(dice.choice(targets), signal.SIGUSR1)
    elif kind in ("rank", "worker"):
        targets = run.ranks() if kind == "rank" else run.workers()
        if targets:
            _send(dice.choice(targets), signal.SIGKILL)
        else:
            run.kill_all()
    else:
        run.kill_all()
    return f"after step {at}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--async-checkpoint", choices=("true", "false", "alternate"), default="alternate")
    parser.add_argument("--patience", type=float, default=600, help="seconds for a start to get going, and to end")
    parser.add_argument("--data", type=Path, default=REPOSITORY / "data" / "sample")
    parser.add_argument("--keep", type=Path, help="leave both runs in this folder")
    args = parser.parse_args()
    args.data = args.data.resolve()
    if not args.data.is_dir():
        sys.exit(f"error: {args.data} does not exist: python tools/make_sample_data.py --out {args.data}")
    scratch = tempfile.TemporaryDirectory(prefix="chaos-")
    folder = args.keep.resolve() if args.keep else Path(scratch.name)
    alone, struck = Run(folder / "alone", args), Run(folder / "struck", args)
    alone.start()
    if alone.wait() != 0:
        sys.exit(f"error: the run left alone failed: {(alone.folder / 'console.txt').read_text()[-2000:]}")
    dice, lost, hung, failed = random.Random(args.seed), 0, 0, 0
    lived, different = 1, []
    print(f"{'round':>5}  {'blow':7} {'saves':5} {'moment':16} {'exit':>5}  newest checkpoint", flush=True)
    for number in range(1, args.rounds + 1):
        kind = KINDS[(number - 1) % len(KINDS)]
        before, saves = _newest(struck.folder), "async" if struck.is_asynchronous() else "sync"
        struck.start()
        done = strike(struck, kind, dice)
        status = struck.wait()
        hung += status is None
        failed += done == "ended before" and bool(status)
        after = _newest(struck.folder)
        lost += after < before
        shown = "hung" if status is None else status
        print(f"{number:5}  {kind:7} {saves:5} {done:16} {shown:>5}  {before} -> {after}", flush=True)
        if after == args.steps and number < args.rounds:
            # Nothing left to disturb: look at the whole curve, and begin another run.
            lived += 1
            different += differing(struck, alone, args.steps)
            shutil.rmtree(struck.folder)
    struck.start()
    status = struck.wait()
    different += differing(struck, alone, args.steps)
    expected, found = alone.records(), struck.records()
    passed = status == 0 and not (different or lost or hung or failed)
    print(
        f"{args.rounds} rounds, {lived} runs to the end: {lost} checkpoints lost, {hung} hung, {failed} failed by"
        f" themselves, steps that differ from the run left alone: {', '.join(map(str, different)) or 'none'}; loss of"
        f" step {args.steps}: {found.get(args.steps, {}).get('loss')} and {expected[args.steps]['loss']}"
    )
    print(
        json.dumps(
            {
                "bench": "chaos",
                "rounds": args.rounds,
                "lost": lost,
                "hung": hung,
                "failed": failed,
                "different": different,
                "passed": passed,
            }
        )
    )
    sys.exit(0 if passed else 1)


def differing(struck: Run, alone: Run, steps: int) -> list[int]:
    """Steps that are missing, or not the same to the last bit."""
    found, expected = struck.records(), alone.records()
    return [
        step
        for step in range(1, steps + 1)
        if step not in found or any(found[step][key] != expected[step][key] for key in SAME)
    ]


def _newest(folder: Path) -> int:
    """The step of the newest complete checkpoint, 0 if there is none."""
    marked = [path for path in (folder / "checkpoints").glob("step_*") if (path / "complete.json").exists()]
    return max((int(path.name.removeprefix("step_")) for path in marked), default=0)


if __name__ == "__main__":
    main()
