"""Where a run stands: its stages, steps, speed, last checkpoint, restarts, and why something stopped.

    python tools/status.py my-8b                 # the run RUN_ROOT/my-8b, or the path of a run or of a stage
    python tools/status.py my-8b --watch         # again every ten seconds
    python tools/status.py my-8b --json

Reads the run's files, and asks squeue and scontrol if they are installed. Needs Python 3.9 or newer and no packages.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

# The folder with slurm/, where a relative RUN_ROOT begins: the checkout, or the folder that a user of the wheel is in.
HOME = next(
    (folder for folder in (Path.cwd(), Path(__file__).resolve().parents[1]) if (folder / "slurm/common.sh").exists()),
    Path.cwd(),
)
STAGES = ("stage1", "stage2", "stage3")
COLUMNS = ("stage", "state", "step", "tokens/s", "left", "checkpoint", "restarts")
STAGE_FILES = ("metrics.jsonl", "ended.json", "config.yaml", "checkpoints", "slurm/starts.jsonl")  # one of them
NO_LAUNCH = (
    "the node could not start the job: its log folder, RUN_ROOT or the checkout is not on a file system that all nodes "
    "share, or is missing there"
)
FIGURES = ("step", "seconds", "tokens_per_second", "loss")  # of a training record, as numbers
TAIL = 2**20  # bytes of metrics.jsonl that are read


def find_run(given: str) -> Path:
    """The folder of a run, or of a stage that is in no run.

    given: a name below RUN_ROOT of the site settings, or a path: of a run, a stage, its checkpoints or one of them.
    ValueError: there is none.
    """
    command = 'source slurm/common.sh && load_site && printf %s "$RUN_ROOT"'
    asked = subprocess.run(["bash", "-c", command], cwd=HOME, capture_output=True, text=True)
    if asked.returncode:
        raise ValueError(asked.stderr.strip().removeprefix("error: ") or "the site settings cannot be read")
    root = HOME / asked.stdout
    for folder in (root / given, Path(given)):
        if folder.is_dir():
            return run_around(folder.resolve())
    runs = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    raise ValueError(f"there is no run '{given}' in {root}; there are {', '.join(runs[:20]) or 'none'}")


def run_around(folder: Path) -> Path:
    """The run that a folder is or belongs to. ValueError: it is neither a run nor in one."""
    while folder.name == "checkpoints" or folder.name.startswith("step_"):
        folder = folder.parent
    stage = next(
        (path for path in (folder, folder.parent) if any((path / name).exists() for name in STAGE_FILES)), None
    )
    if stage is not None:
        return stage.parent if stage.name in STAGES else stage
    run = folder.parent if folder.name in STAGES else folder
    if (run / "slurm" / "jobs").exists() or any((run / name).is_dir() for name in STAGES):
        return run
    raise ValueError(f"{folder} is no run: it has neither {', '.join(STAGES)} nor the files of a stage")


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_lines(path: Path, tail: int = TAIL) -> list[dict]:
    """The JSON objects in the last bytes of a file, without lines that are incomplete."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - tail))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def read_training(folder: Path) -> tuple[list[dict], int]:
    """The training records of metrics.jsonl, and how many of its lines have something else where a number belongs."""
    records = [record for record in read_lines(folder / "metrics.jsonl") if record.get("kind") == "train"]
    good = [record for record in records if all(is_number(record.get(key, 0)) for key in FIGURES)]
    good = [record for record in good if isinstance(record.get("step"), int)]
    return good, len(records) - len(good)


def is_number(value) -> bool:
    """Also None, which stands for a loss that is not finite."""
    return value is None or isinstance(value, (int, float)) and not isinstance(value, bool)


def ask(*command: str) -> str:
    """The output of a Slurm command; empty if the command is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except subprocess.TimeoutExpired:
        return ""


def job_state(job: str | None) -> dict[str, str]:
    """State, reason and start of a job that Slurm still knows, else nothing."""
    if not job:
        return {}
    shown = ask("scontrol", "show", "job", "-o", job)
    keys = ("JobState", "Reason", "StartTime", "ExcNodeList", "Dependency", "NodeList")
    found = {key: re.search(rf"(?:^| ){key}=(\S*)", shown) for key in keys}
    return {key: match.group(1) for key, match in found.items() if match}


def max_steps(folder: Path) -> int | None:
    """train.max_steps of the resolved configuration."""
    try:
        text = (folder / "config.yaml").read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"^train:\n(?:  .*\n)*?  max_steps: (\d+)$", text, re.MULTILINE)
    return int(found.group(1)) if found else None


def newest_checkpoint(folder: Path) -> tuple[int, float] | None:
    """(step, time) of the newest checkpoint that has its marker; its files are not looked at."""
    found = [
        (int(path.parent.name.removeprefix("step_")), path.stat().st_mtime)
        for path in (folder / "checkpoints").glob("step_*/complete.json")
        if path.parent.name.removeprefix("step_").isdigit()
    ]
    return max(found, default=None)


def seconds_per_step(records: list[dict]) -> float | None:
    """The mean over the last ten training records; a record covers the steps since the one before it."""
    steps = seconds = 0
    for before, after in zip(records[-11:], records[-10:]):
        if after["step"] > before["step"]:
            steps, seconds = steps + after["step"] - before["step"], seconds + after.get("seconds", 0)
    return seconds / steps if steps else None


def starts_of(folder: Path) -> list[dict]:
    """The starts in slurm/starts.jsonl, each with the record of its end if there is one."""
    starts = []
    for record in read_lines(folder / "slurm" / "starts.jsonl"):
        if record.get("event") == "begin":
            starts.append({"ended": False, **record})
            continue
        mine = [start for start in starts if start.get("job") == record.get("job", start.get("job"))]
        if mine:
            mine[-1] |= {**record, "ended": True}
    return starts


def newest_job(*jobs: str | None) -> str | None:
    return max((str(job) for job in jobs if job), key=lambda job: int(job) if job.isdigit() else 0, default=None)


def stop_request(*folders: Path) -> str | None:
    """When and by whom these folders of a run or a stage were stopped; None: they were not."""
    for path in (folder / "slurm" / "stop" for folder in folders):
        try:
            user, at = path.read_text().strip(), time.strftime("%F %T", time.localtime(path.stat().st_mtime))
        except OSError:
            continue
        return f"at {at}" + (f" by {user}" if user else "")
    return None


def stage_status(folder: Path, job: str | None, blocked: str | None, stop: str | None) -> dict:
    """One row of the table.

    blocked: which stage before will not finish, if that is known. stop: when the run was stopped.
    """
    ended, starts, checkpoint = read_json(folder / "ended.json"), starts_of(folder), newest_checkpoint(folder)
    records, strange = read_training(folder)
    step, total, last = (records[-1]["step"] if records else 0), max_steps(folder), starts[-1] if starts else {}
    job = newest_job(job, last.get("job"))
    slurm = job_state(job)
    queue = slurm.get("JobState", "")
    state, why = "not started", None
    if queue in ("RUNNING", "COMPLETING") and not (last.get("ended") and last.get("action") == "stop"):
        state = "running" if queue == "RUNNING" else "ending"
        if queue == "RUNNING":
            why = None if records and not last.get("ended") else "starting"
    elif queue == "PENDING":
        reason = slurm.get("Reason", "None")
        state, why = "queued", None if reason == "None" else f"Slurm says {reason}"
        if reason == "Dependency":
            why = "waits for the stage before"
        elif reason == "BeginTime":
            why = f"waits after a failure, until {slurm.get('StartTime')}"
        elif reason == "DependencyNeverSatisfied":
            state, why = "cancelled", blocked or "the stage before did not finish"
        elif "launch" in reason.lower():
            why = f"Slurm says {reason}: {NO_LAUNCH}"
    elif ended.get("reason") == "finished":
        state = "finished"
    elif last.get("ended") and last.get("action") == "stop":
        state = "stopped" if last.get("kind") == "stopped" else "failed"
        why = "; ".join(dict.fromkeys(part for part in (last.get("message"), last.get("why")) if part))
    elif blocked and job and not starts:
        state, why = "cancelled", blocked
    elif last or queue:
        state = "cancelled" if queue == "CANCELLED" else "failed" if queue else "ended"
        why = f"Slurm's state of job {job} is {queue}" if queue else f"job {job} is not in the queue any more"
        if "launch" in slurm.get("Reason", "").lower():
            why += f" ({slurm['Reason']}): {NO_LAUNCH}"
        if last.get("ended"):
            why += f"; {last.get('message')}"
    elif records:
        state, why = (
            ("ended", f"{ended.get('reason', 'no reason')} at step {ended.get('step')}")
            if ended
            else ("ended or running", "not under Slurm")
        )
    failed = last.get("action") == "stop" and last.get("kind") != "stopped"
    if stop and not blocked and state != "finished" and not failed:
        state, why = ("stopping" if queue in ("RUNNING", "COMPLETING", "PENDING") else "stopped"), None
    pace = seconds_per_step(records)
    left = (total - step) * pace if total and pace and state in ("running", "queued", "ending") else None
    return {
        "stage": folder.name,
        "state": state,
        "job": job,
        "step": step,
        "max_steps": total,
        "tokens_per_second": records[-1].get("tokens_per_second") if records else None,
        "loss": records[-1].get("loss") if records else None,
        "seconds_left": left,
        "checkpoint": checkpoint[0] if checkpoint else None,
        "checkpoint_time": checkpoint[1] if checkpoint else None,
        "restarts": sum(1 for start in starts if start.get("restart")),
        "why": why,
        "excluded_nodes": last.get("excluded") or [],
        "failed_nodes": failures(starts),
        "slow_rank": slow_rank(records) if state in ("running", "ended or running") else None,
        "uploads": uploads(folder),
        "strange_lines": strange,
        "ends": [
            {k: start.get(k) for k in ("time", "kind", "message", "step", "action")}
            for start in starts
            if start["ended"]
        ],
    }


def read_stage(folder: Path, *about) -> dict:
    """`stage_status`. ValueError: a file of the stage holds other values than the run or its job script writes."""
    try:
        return stage_status(folder, *about)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}/ended.json or slurm/starts.jsonl was changed: it holds another kind of value than a run writes "
            f"({type(error).__name__}: {error}); move that file away to see the rest"
        ) from error


def slow_rank(records: list[dict]) -> str | None:
    """The rank that held up the others in the last training record, and what to do about it; None: none did."""
    slow = records[-1].get("slow_rank") if records else None
    if not isinstance(slow, dict) or not is_number(slow.get("above_median")):
        return None
    above = f"{slow['above_median'] or 0:.0%} above the median"
    return f"rank {slow.get('rank')} on {slow.get('place')} is slow, {above}; {slow.get('advice')}"


def uploads(folder: Path) -> str | None:
    """What is wrong with the run's copies in object storage (train.upload_to); None: nothing, as far as is known."""
    records = [record for record in read_lines(folder / "metrics.jsonl") if record.get("kind") in ("train", "uploads")]
    last = records[-1] if records else {}
    if last.get("missing"):
        return f"NOT UPLOADED: {last['missing']}"
    if last.get("not_removed"):
        return f"what is not kept any more in object storage is still there: {last['not_removed']}"
    figures = last.get("uploads")
    if isinstance(figures, dict) and figures.get("failed") and figures.get("behind"):
        return f"{figures['failed']} failed upload(s), and what is in object storage is behind: the log says why"
    return None


def failures(starts: list[dict]) -> dict[str, int]:
    """Node -> how often its pre-flight or one of its ranks failed."""
    count = {}
    for node in (node for start in starts for node in start.get("failed_nodes") or []):
        count[node] = count.get(node, 0) + 1
    return count


def status(run: Path) -> dict:
    """Everything that is shown of a run."""
    jobs = {}
    if (run / "slurm" / "jobs").exists():
        jobs = dict(line.split(" ", 1) for line in (run / "slurm" / "jobs").read_text().splitlines() if " " in line)
    if any((run / name).exists() for name in STAGE_FILES):
        stop = stop_request(run)
        row = read_stage(run, None, None, stop)
        return {"run": str(run), "name": run.name, "stopped": stop, "stages": [row]}
    rows, blocked = [], None
    stop = stop_request(run, *(run / stage for stage in STAGES))
    for stage in STAGES:
        row = read_stage(run / stage, jobs.get(stage), blocked, stop)
        rows.append(row)
        if row["state"] in ("failed", "cancelled", "stopped", "stopping"):
            blocked = blocked or f"{stage} {row['state']}"
    stop = None if all(row["state"] == "finished" for row in rows) else stop
    more = {}
    for name, result in (("export", run / "hf" / "config.json"), ("report", run / "report.html")):
        queue = job_state(jobs.get(name)).get("JobState")
        if result.exists():
            more[name] = str(result.parent if name == "export" else result)
        elif queue in ("PENDING", "RUNNING"):
            more[name] = queue.lower()
        elif blocked and name in jobs:
            more[name] = f"cancelled, since {blocked}" if name == "export" else "none"
        else:
            more[name] = (queue or "none").lower()
    return {"run": str(run), "name": run.name, "stopped": stop, "stages": rows, **more}


def duration(seconds: float) -> str:
    minutes = int(seconds / 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min" if hours else f"{minutes} min"


def table(found: dict) -> str:
    """The status as text."""
    rows = [COLUMNS]
    for row in found["stages"]:
        pace = row["tokens_per_second"]
        saved = (
            ""
            if row["checkpoint"] is None
            else f"{row['checkpoint']:,}, {duration(time.time() - row['checkpoint_time'])} ago"
        )
        rows.append(
            (
                row["stage"],
                row["state"],
                f"{row['step']:,}" + (f" of {row['max_steps']:,}" if row["max_steps"] else ""),
                f"{pace:,.0f}" if pace else "",
                duration(row["seconds_left"]) if row["seconds_left"] is not None else "",
                saved,
                str(row["restarts"]),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    if found["stopped"]:
        again = f"slurm/submit.sh --name {shlex.quote(found['name'])} --resume"
        if "export" not in found:
            again = f"remove {found['run']}/slurm/stop and submit it again"
        lines.append(f"stopped on request {found['stopped']}; to go on: {again}")
    reasons = {}
    for row in found["stages"]:
        if row["why"]:
            reasons.setdefault(row["why"], []).append(row["stage"])
    lines += [f"{', '.join(stages)}: {why}" for why, stages in reasons.items()]
    for row in found["stages"]:
        if row["failed_nodes"]:
            counts = ", ".join(f"{node} {count} time(s)" for node, count in row["failed_nodes"].items())
            out = f"; left out: {', '.join(row['excluded_nodes'])}" if row["excluded_nodes"] else ""
            lines.append(f"{row['stage']}: nodes that failed: {counts}{out}")
        if row["slow_rank"]:
            lines.append(f"{row['stage']}: {row['slow_rank']}")
        if row["uploads"]:
            lines.append(f"{row['stage']}: {row['uploads']}")
        # The last of each message.
        for end in list({end["message"]: end for end in row["ends"]}.values())[-3:]:
            told = end["kind"] in ("finished", "stopped") or (end["message"] or "") in (row["why"] or "")
            if not told:
                at = time.strftime("%F %T", time.localtime(end["time"]))
                lines.append(
                    f"{row['stage']}: {at} {end['message']}" + (" (queued again)" if end["action"] == "requeue" else "")
                )
        if row["strange_lines"]:
            lines.append(f"{row['stage']}: {row['strange_lines']} lines of metrics.jsonl without a number: not counted")
    lines += [f"{name}: {found[name]}" for name in ("export", "report") if name in found]
    if shutil.which("squeue") is None:
        lines.append("Slurm's commands are not on this machine: the states are those of the run's files")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="name below RUN_ROOT, or a folder")
    parser.add_argument("--watch", nargs="?", type=float, const=10.0, metavar="SECONDS", help="again every so often")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    try:
        run = find_run(args.run)
        while True:
            found = status(run)
            shown = json.dumps(found, indent=2) if args.json else f"{found['name']} in {found['run']}\n{table(found)}"
            if args.watch and not args.json and sys.stdout.isatty():
                print("\033[H\033[2J", end="")
            print(shown, flush=True)
            if not args.watch:
                return
            time.sleep(max(1.0, args.watch))
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        os._exit(0)


if __name__ == "__main__":
    main()
