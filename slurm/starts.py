"""The starts of one stage under Slurm: how each began, how it ended, and whether the job is queued again.

common.sh calls it on the first node of the job, once before and once after each try:

    starts.py begin RUN_DIR                      exit 1: this start must not continue (the reason is printed)
    starts.py end RUN_DIR --exit N --phase ...   prints "requeue SECONDS NODES" (NODES to exclude, or -) or "exit N"
    starts.py stop RUN_DIR REASON                records that this start ends, for a reason that the batch script found

The records are in RUN_DIR/slurm/starts.jsonl, two lines for each start; tools/status.py shows them. Needs Python 3.6 or
newer and no packages, since it runs with the host's python3 even if the training runs in a container.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

STARTS = "slurm/starts.jsonl"
ERRORS = "slurm/srun_errors.txt"  # standard error of the last step
STOP = "slurm/stop"  # asks the batch script not to queue the job again
NODE_FAILURES = 2  # of one node, then the node is excluded
FAILED_STARTS = 2  # in a row without a new checkpoint, then the job is not queued again
MAX_DELAY = 1800  # seconds


def environment_number(name, default):
    text = os.environ.get(name) or str(default)
    if not text.isdigit():
        sys.exit("error: %s=%s is not a whole number: correct it in site.env." % (name, text))
    return int(text)


def read(run_dir):
    """The starts of this submission (the job and its requeues), oldest first: the begin and end records merged."""
    starts = []
    path = run_dir / STARTS
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # an incomplete line, written when a node failed
        if record["event"] == "begin":
            if record["restart"] == 0:
                starts = []
            starts.append(record)
        elif starts:
            starts[-1] = dict(starts[-1], **dict(record, event="end"))
    return starts


def append(run_dir, **record):
    path = run_dir / STARTS
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(str(path), "a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def newest_step(run_dir):
    """The step of the newest complete checkpoint, 0 if there is none."""
    markers = (run_dir / "checkpoints").glob("step_*/complete.json")
    names = [re.match(r"step_(\d+)$", path.parent.name) for path in markers]
    return max([int(match.group(1)) for match in names if match] + [0])


def read_json(path, since=0.0):
    """The file's object if it was written after `since`; else nothing."""
    try:
        found = json.loads(path.read_text())
        fresh = float(found.get("time", path.stat().st_mtime)) >= since
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    return found if fresh else {}


def hosts(nodelist):
    """node[1-3] -> [node1, node2, node3]; unchanged if scontrol fails."""
    try:
        return subprocess.check_output(["scontrol", "show", "hostnames", nodelist], timeout=60).decode().split()
    except (OSError, subprocess.SubprocessError):
        return [nodelist]


def nodes_to_blame(message, srun_errors, nodes):
    """The node of the job whose rank failed first, according to the trainer's message, else to srun's.

    srun: "srun: error: node2: task 1: Killed"; later lines are of ranks that were ended because of the first.
    """
    named = re.findall(r"\brank \d+ on ([\w.-]+)", message or "")
    if not named or "lost contact" in message:
        named = re.findall(r"srun: error: ([\w.-]+): tasks? [\d,-]+:", srun_errors)
    short = {node.split(".")[0]: node for node in nodes}
    return [short[name.split(".")[0]] for name in named[:1] if name.split(".")[0] in short]


def ended_by_slurm(run_dir, began):
    """(sentence, nodes that failed) of a start that Slurm ended, from the last output of srun."""
    path = run_dir / ERRORS
    fresh = path.exists() and path.stat().st_mtime >= began["time"]
    errors = path.read_text(errors="replace") if fresh else ""
    why = re.findall(r"CANCELLED AT \S+ DUE TO ([A-Z ]+)", errors)  # JOB REQUEUE, NODE FAILURE, PREEMPTION, TIME LIMIT
    failed = re.findall(r"srun: error: Node failure on ([\w.-]+)", errors)
    marker = read_json(run_dir / "ended.json", began["time"])
    message = "ended by Slurm"
    if why:
        message += " (%s%s)" % (why[-1].strip().lower(), " of " + failed[0] if failed else "")
    if marker.get("reason") and marker["reason"] != "error":
        message += ", saved at step %s" % marker.get("step")
    return message, [node for node in failed if node in began["nodes"]][:1]


def classify(exit_code, phase, marker, preflight, usr1, term, stop_asked):
    """(kind, sentence) of how a start ended.

    kinds: finished | stopped (by a user) | slurm (cancelled, requeued, a node is lost) | interrupted (it saved, or
    was asked to) | config (a retry would fail, too) | node (the pre-flight found one with a fault) | error.
    """
    reason = marker.get("reason")
    if reason == "finished":
        return "finished", "finished at step %s" % marker.get("step")
    if stop_asked:
        return "stopped", "stopped on request at step %s" % marker.get("step", "?")
    if term:
        return "slurm", "ended by Slurm"
    if phase == "preflight" and exit_code:
        message = preflight.get("message") or "the pre-flight ended with exit status %d and no verdict" % exit_code
        kind = {"config": "config", "node": "node"}.get(preflight.get("kind"), "error")
        return kind, "pre-flight: " + message
    if reason == "config error" or (exit_code == 2 and not reason):
        return "config", marker.get("message") or "the configuration was refused: see the job's log"
    if reason == "error":
        return "error", marker.get("message") or "an error: see the job's log"
    if reason:
        return "interrupted", "%s, saved at step %s" % (reason, marker.get("step"))
    if usr1:
        where = "in training, without a marker" if phase == "training" else "before the training began"
        return "interrupted", "SIGUSR1 %s" % where
    return "error", "the training ended with exit status %d and left no marker" % exit_code


def idle(starts):
    """How many of the last starts in a row saved no new step, without those that the pre-flight stopped for a node."""
    count = 0
    for start in reversed(starts):
        if start["event"] == "end" and start["step"] > start["begin_step"]:
            break
        count += start.get("kind") != "node"
    return count


def excluded(starts):
    """Nodes that failed NODE_FAILURES times in this submission."""
    failed = [node for start in starts for node in start.get("failed_nodes", [])]
    return sorted(node for node in set(failed) if failed.count(node) >= NODE_FAILURES)


def decide(starts, max_restarts, max_idle, backoff):
    """(action, why, seconds to wait) for the last of `starts`. action: finished | requeue | stop | slurm (Slurm
    decides)."""
    last = starts[-1]
    kind = last["kind"]
    if kind == "finished":
        return "finished", "", 0
    if kind == "slurm":
        return "slurm", "left to Slurm, which queues it again unless it was cancelled", 0
    if kind == "stopped":
        return "stop", "a person asked for it", 0
    if kind == "config":
        return "stop", "a setting that cannot work is not tried again", 0
    if last["restart"] >= max_restarts:
        return "stop", "the budget of MAX_RESTARTS=%d restarts is spent" % max_restarts, 0
    without = idle(starts)
    if kind == "error" and without >= FAILED_STARTS:
        # Excluding a node is a reason for one more try, but not for one with each node of the cluster.
        news = set(excluded(starts)) - set(excluded(starts[:-1]))
        if not (news and without == FAILED_STARTS):
            return "stop", "%d starts in a row gained no checkpoint" % without, 0
    if kind == "interrupted" and without >= max_idle:
        return "stop", "%d starts in a row gained no checkpoint (MAX_IDLE_STARTS)" % without, 0
    failures = 0
    for start in reversed(starts):
        if start["kind"] not in ("error", "node"):
            break
        failures += 1
    delay = min(MAX_DELAY, backoff * 2 ** (failures - 1)) if failures else 0
    return "requeue", "", delay


def too_few_nodes(left_out, wanted):
    """A sentence if the partition has fewer than `wanted` nodes without the excluded ones; None if it has enough or
    sinfo fails."""
    partition = os.environ.get("SLURM_JOB_PARTITION", "")
    try:
        listing = subprocess.check_output(["sinfo", "-h", "-N", "-p", partition, "-o", "%N"], timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    rest = set(listing.decode().split()) - set(left_out)
    if len(rest) >= wanted:
        return None
    return "%s failed twice, and without it the partition %s has %d nodes of the %d that the job needs" % (
        ", ".join(left_out),
        partition,
        len(rest),
        wanted,
    )


def begin(run_dir):
    starts = read(run_dir)
    restart = environment_number("SLURM_RESTART_COUNT", 0)
    if restart == 0:
        starts = []
        if (run_dir / STOP).exists():  # it was for an earlier submission
            (run_dir / STOP).unlink()
    if starts and starts[-1]["event"] == "begin":  # its batch script was killed before it could record the end
        message, blamed = ended_by_slurm(run_dir, starts[-1])
        append(
            run_dir,
            event="end",
            time=time.time(),
            kind="slurm",
            message=message,
            failed_nodes=blamed,
            step=newest_step(run_dir),
            action="requeue",
        )
        starts = read(run_dir)
    append(
        run_dir,
        event="begin",
        time=time.time(),
        job=os.environ.get("SLURM_JOB_ID"),
        restart=restart,
        nodes=hosts(os.environ.get("SLURM_JOB_NODELIST", "")),
        begin_step=newest_step(run_dir),
    )
    limit = environment_number("MAX_IDLE_STARTS", 5)
    without = idle(starts)
    if restart and without >= limit:
        why = "%d starts in a row gained no checkpoint (MAX_IDLE_STARTS)" % without
        append(
            run_dir,
            event="end",
            time=time.time(),
            kind="error",
            message=why,
            action="stop",
            why=why,
            step=newest_step(run_dir),
        )
        sys.exit("error: %s: it is not tried again." % why)


def end(run_dir, exit_code, phase, usr1, term):
    starts = read(run_dir)
    began = starts[-1]
    marker = read_json(run_dir / "ended.json", began["time"]) if phase == "training" else {}
    preflight = read_json(run_dir / "slurm" / "preflight.json", began["time"])
    kind, message = classify(exit_code, phase, marker, preflight, usr1, term, (run_dir / STOP).exists())
    blamed = []
    if kind == "node":
        blamed = [node for node in preflight.get("nodes", []) if node in began["nodes"]]
    elif kind == "slurm":
        message, blamed = ended_by_slurm(run_dir, began)
    elif kind == "error" and phase == "training":
        errors = (run_dir / ERRORS).read_text(errors="replace") if (run_dir / ERRORS).exists() else ""
        blamed = nodes_to_blame(marker.get("message"), errors, began["nodes"])
        first = re.search(r"srun: error: ([\w.\[\],-]+: tasks? [\d,-]+: .*)", errors)
        if first and not marker:
            message += " (%s)" % first.group(1)
    starts[-1] = dict(
        began,
        event="end",
        kind=kind,
        message=message,
        failed_nodes=blamed,
        step=newest_step(run_dir),
    )
    action, why, delay = decide(
        starts,
        environment_number("MAX_RESTARTS", 50),
        environment_number("MAX_IDLE_STARTS", 5),
        environment_number("BACKOFF_SECONDS", 60),
    )
    left_out = excluded(starts)
    if action == "requeue" and left_out:
        few = too_few_nodes(left_out, len(began["nodes"]))
        if few:
            action, why = "stop", few
    append(
        run_dir,
        event="end",
        time=time.time(),
        kind=kind,
        message=message,
        failed_nodes=blamed,
        exit=exit_code,
        step=newest_step(run_dir),
        action=action,
        why=why,
        delay=delay,
        excluded=left_out,
    )
    print("start %d: %s" % (began["restart"] + 1, message), file=sys.stderr)
    if action == "requeue":
        more = " after %d s" % delay if delay else ""
        more += ", without %s, which failed twice" % ", ".join(left_out) if left_out else ""
        print("queued again%s" % more, file=sys.stderr)
        print("requeue %d %s" % (delay, ",".join(left_out) or "-"))
    else:
        if why:
            print(why if action == "slurm" else "not queued again: %s" % why, file=sys.stderr)
        print("exit %d" % (0 if kind == "finished" else 2 if kind == "config" else 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("begin", "end", "stop"))
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("reason", nargs="?", default="")
    parser.add_argument("--exit", type=int, default=0, help="exit status of the step")
    parser.add_argument("--phase", choices=("preflight", "training"), default="training", help="how far it came")
    parser.add_argument("--usr1", action="store_true", help="the batch script got SIGUSR1: the time limit is near")
    parser.add_argument("--term", action="store_true", help="the batch script got SIGTERM: Slurm ends the job")
    args = parser.parse_args()
    if args.what == "begin":
        begin(args.run_dir)
    elif args.what == "end":
        end(args.run_dir, args.exit, args.phase, args.usr1, args.term)
    else:
        print("error: %s" % args.reason, file=sys.stderr)
        append(
            args.run_dir,
            event="end",
            time=time.time(),
            kind="error",
            message=args.reason,
            action="stop",
            why=args.reason,
            step=newest_step(args.run_dir),
        )


if __name__ == "__main__":
    main()
