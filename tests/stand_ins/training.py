"""Stands for a recipe: steps that do nothing, with the signals, files and exit status of the real one.

FAULTS of a stage, in the environment as JSON, {"stage1": ["time limit", "error", ...]}: what happens to each start.
After the run was stopped (see slurm_command), whatever goes on is long enough for a signal to arrive.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

overrides = dict(argument.split("=", 1) for argument in sys.argv[2:])
run_dir = Path(overrides["run_dir"].strip("'"))
cluster, job = Path(os.environ["STAND_IN"]), os.environ["SLURM_JOB_ID"]
restart = int(os.environ["SLURM_RESTART_COUNT"])
steps = int(overrides.get("train.max_steps", 3))
faults = json.loads(os.environ.get("FAULTS", "{}")).get(run_dir.name, [])
fault = faults[restart] if restart < len(faults) else ""
received = []


def event() -> None:
    """One event, if they count; if the run was stopped by now, time passes until the signal is there, at most 20 s."""
    if "STOP_AT" not in os.environ:
        return
    subprocess.run([str(cluster / "bin" / "event")], check=True)
    end = time.monotonic() + 20
    while is_stopped() and not received and time.monotonic() < end:
        time.sleep(0.02)


def is_stopped() -> bool:
    return (cluster / "fired").exists() and not (cluster / "fired" / "refused").exists()


def end(status: int, reason: str = "", **more) -> None:
    if reason:
        ended = {"reason": reason, "step": step, "message": "", "time": time.time(), "job": job, **more}
        (run_dir / "ended.json").write_text(json.dumps(ended))
    sys.stdout.flush()
    os._exit(status)


def save() -> None:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "complete.json").write_text("{}")


step = max((int(p.name[5:]) for p in (run_dir / "checkpoints").glob("step_*")), default=0)
event()  # imports: USR1 is ignored
if fault == "second job":
    end(2)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: received.append(number))
(run_dir / "ended.json").unlink(missing_ok=True)
event()  # builds the model
while step < steps and not received:
    step += 1
    with (cluster / "steps").open("a") as file:
        file.write(json.dumps({"stage": run_dir.name, "step": step, "time": time.time()}) + "\n")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": step, "seconds": 0.1, "tokens_per_second": 9.0}) + "\n")
    event()
    if step == steps - 1 and fault == "time limit":
        subprocess.run([str(cluster / "bin" / "scancel"), "--signal=USR1", "--batch", job], check=True)
        while not received:
            time.sleep(0.01)
    elif step == steps - 1 and fault == "error":
        save()
        end(1, "error", message=f"rank 0 on node1, step {step}: RuntimeError: no", cause="transient")
    elif fault == "edit":
        with open("conf/base.yaml", "a") as file:
            file.write("b = 2\n")
        Path("molmo2_nemo/c.py").write_text("")
    elif fault == "touch":
        time.sleep(1.5)  # rank.sh has looked for the last time
        (run_dir / "slurm" / "stop").touch()
        while not received:
            time.sleep(0.01)
    elif fault == "wait":
        while not (cluster / "go on").exists() and not received:
            time.sleep(0.01)
    elif fault == "full disk":
        end(2, "error", message=f"step {step} could not be saved: No space left on device", cause="user")
save()
end(0, signal.Signals(received[0]).name if received else "finished")
