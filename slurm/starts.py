"""The starts of one stage under Slurm: how each began, how it ended, and whether the job is queued again.

common.sh calls it on the first node of the job, once before and once after each try:

    starts.py begin RUN_DIR                      exit 1 or 2: this start must not train (the reason is printed)
    starts.py end RUN_DIR --exit N --phase ...   prints "requeue SECONDS NODES" (NODES to exclude, or -) or "exit N"
    starts.py stop RUN_DIR REASON                records that this start ends, for a reason that the batch script found

The records are in RUN_DIR/slurm/starts.jsonl, two lines for each start; tools/status.py shows them. Needs Python 3.6 or
newer and no packages, since it runs with the host's python3 even if the training runs in a container.
"""

import argparse
import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import chain

STARTS = "slurm/starts.jsonl"
NODE_FAILURES = 2  # of one node, then the node is excluded
FAILED_STARTS = 2  # in a row without a new checkpoint, then the job is not queued again
MAX_DELAY = 1800  # seconds
PROBE = 2**20  # bytes that a disk with room takes

# How a start can end, who can change it, and what becomes of the job. docs/operations.md has the cases.
CLASSES = {
    "finished": "done",
    "stopped": "done",  # by a person, who also goes on with it
    "config": "user",  # a retry would fail, too
    "node": "node",  # the pre-flight named a node before anything was trained
    "killed": "node",  # a rank was killed, or its GPU failed
    "error": "transient",
    "interrupted": "transient",  # it saved, or was asked to
    "slurm": "transient",  # cancelled, requeued, preempted, or a node is lost
}
# A rank that ends by a signal has this status and more; srun hands it on.
SIGNALLED = 128
MEMORY = ("oom-kill", "oom_kill", "Out Of Memory", "OOM Killed")  # words of slurmstepd and srun
FULL = ("No space left on device", "Disk quota exceeded")
NOT_FOUND = (126, 127)  # of a shell or srun: the program is not there or cannot be executed


def environment_number(name, default):
    text = os.environ.get(name) or str(default)
    if not text.isdigit():
        print("error: %s=%s is not a whole number: correct it in slurm/site.env." % (name, text), file=sys.stderr)
        sys.exit(2)
    return int(text)


def job_id():
    return os.environ.get("SLURM_JOB_ID")


def lines(run_dir):
    """All records of the run folder, oldest first."""
    path, found = run_dir / STARTS, []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # an incomplete line, written when a node failed
        if isinstance(record, dict):
            found.append(record)
    return found


def read(run_dir):
    """The starts of this submission (the job and its requeues), oldest first: the begin and end records merged."""
    starts = []
    for record in lines(run_dir):
        if record.get("job") != job_id():
            continue
        if record["event"] == "begin":
            starts.append(record)
        elif starts:
            starts[-1] = dict(starts[-1], **dict(record, event="end"))
    return starts


def append(run_dir, **record):
    """Add a record of this job. A disk that takes none must not keep the batch script from its decision."""
    path = run_dir / STARTS
    record.update(time=time.time(), job=job_id(), step=newest_step(run_dir))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(str(path), "a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        print("warning: %s could not be written (%s)" % (path, error.strerror), file=sys.stderr)


def disk_fault(run_dir):
    """A sentence if the run's disk takes no more; else None."""
    probe = run_dir / "slurm" / (".room.%s" % job_id())
    try:
        with open(str(probe), "wb") as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return "%s: %s: make room, then submit it again" % (run_dir, error.strerror)
    finally:
        try:
            probe.unlink()
        except OSError:
            pass
    return None


def newest_step(run_dir):
    """The step of the newest complete checkpoint, 0 if there is none."""
    markers = (run_dir / "checkpoints").glob("step_*/complete.json")
    names = [re.match(r"step_(\d+)$", path.parent.name) for path in markers]
    return max([int(match.group(1)) for match in names if match] + [0])


def read_json(path, since=0.0):
    """The file's object if it is of this job and was written after `since`; else nothing."""
    try:
        found = json.loads(path.read_text())
        fresh = float(found.get("time", path.stat().st_mtime)) >= since and found.get("job", job_id()) == job_id()
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    return found if fresh else {}


def srun_errors(run_dir, since):
    """Standard error of this job's last step, if it was written after `since`."""
    path = run_dir / "slurm" / ("srun_errors-%s.txt" % job_id())
    try:
        return path.read_text(errors="replace") if path.stat().st_mtime >= since else ""
    except OSError:
        return ""


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
    errors = srun_errors(run_dir, began["time"])
    why = re.findall(r"CANCELLED AT \S+ DUE TO ([A-Z ]+)", errors)  # JOB REQUEUE, NODE FAILURE, PREEMPTION, TIME LIMIT
    failed = re.findall(r"srun: error: Node failure on ([\w.-]+)", errors)
    marker = read_json(run_dir / "ended.json", began["time"])
    message = "ended by Slurm"
    if why:
        message += " (%s%s)" % (why[-1].strip().lower(), " of " + failed[0] if failed else "")
    if marker.get("reason") and marker["reason"] != "error":
        message += ", saved at step %s" % marker.get("step")
    return message, [node for node in failed if node in began["nodes"]][:1]


def classify(exit_code, phase, marker, preflight, errors, usr1, term, stop, full, gained):
    """(kind, sentence) of how a start ended; kinds are those of CLASSES.

    marker: ended.json. preflight: its verdict. errors: what srun wrote. stop, full: a sentence if a person has asked to
    stop, and if the disk is full. gained: whether this start made a checkpoint.
    """
    reason, message = marker.get("reason"), marker.get("message")
    if reason == "finished":
        return "finished", "finished at step %s" % marker.get("step")
    if stop:
        saved = ", saved at step %s" % marker.get("step") if reason not in (None, "error", "config error") else ""
        return "stopped", stop + (": " + message if message else saved)
    if term:
        return "slurm", "ended by Slurm"
    if phase == "preflight" and exit_code:
        if not preflight.get("message"):
            said = "the pre-flight ended with exit status %d and no verdict" % exit_code
            if exit_code in NOT_FOUND:
                return "config", said + ": Python was not found or not executable: correct RUNTIME in slurm/site.env"
            return "error", said
        kind = {"config": "config", "node": "node"}.get(preflight.get("kind"), "error")
        return kind, "pre-flight: " + preflight["message"]
    if reason == "config error" or (exit_code == 2 and not reason):
        return "config", message or "the configuration was refused: see the job's log"
    if reason not in (None, "error"):
        return "interrupted", "%s, saved at step %s" % (reason, marker.get("step"))
    if not reason and usr1:
        where = "in training, without a marker" if phase == "training" else "before the training began"
        return "interrupted", "SIGUSR1 %s" % where
    cause = marker.get("cause")
    is_lost = cause == "lost contact"  # the marker is of a rank that waited in vain for another one
    if not reason or is_lost:
        message = message if is_lost else "the training ended with exit status %d and left no marker" % exit_code
        first = re.search(r"srun: error: ([\w.\[\],-]+: tasks? [\d,-]+: .*)", errors)
        message += " (%s)" % first.group(1) if first else ""
        if any(word in errors for word in MEMORY):
            cause, message = "memory", message + ": the host's memory was used up: lower data.num_workers"
        elif exit_code > SIGNALLED:
            cause = "node"
    # A full disk keeps the trainer from saying so.
    if full or (not reason and any(word in errors for word in FULL)):
        return "config", "%s (%s)" % (full or "a disk is full", message or "see the job's log")
    # What got further with the same settings is worth another try.
    if cause == "user" or (cause == "memory" and not gained):
        return "config", message
    return "killed" if cause == "node" else "error", message or "an error: see the job's log"


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
    """(action, why, seconds to wait) for the last of `starts`.

    action: finished | requeue | stop | slurm (Slurm decides).
    """
    last = starts[-1]
    kind = last["kind"]
    if kind == "finished":
        return "finished", "", 0
    if kind == "slurm":
        return "slurm", "left to Slurm, which queues it again unless it was cancelled", 0
    if kind == "stopped":
        return "stop", "a person asked for it", 0
    if kind == "config":
        return "stop", "the same would happen again until somebody changes it", 0
    if last["restart"] >= max_restarts:
        return "stop", "the budget of MAX_RESTARTS=%d restarts is spent" % max_restarts, 0
    without = idle(starts)
    if kind in ("error", "killed") and without >= FAILED_STARTS:
        # Excluding a node is a reason for one more try, but not for one with each node of the cluster.
        news = set(excluded(starts)) - set(excluded(starts[:-1]))
        if not (news and without == FAILED_STARTS):
            return "stop", "%d starts in a row gained no checkpoint" % without, 0
    if kind == "interrupted" and without >= max_idle:
        return "stop", "%d starts in a row gained no checkpoint (MAX_IDLE_STARTS)" % without, 0
    failures = 0
    for start in reversed(starts):
        if start["kind"] not in ("error", "killed", "node"):
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


def limits():
    """(MAX_RESTARTS, MAX_IDLE_STARTS, BACKOFF_SECONDS), for `decide`."""
    wanted = (("MAX_RESTARTS", 50), ("MAX_IDLE_STARTS", 5), ("BACKOFF_SECONDS", 60))
    return tuple(environment_number(name, default) for name, default in wanted)


def other_job(run_dir):
    """The job that trains in this folder already and is still in the queue; None: there is none.

    The first one to have begun is the one that stays, also if both look at the same time.
    """
    order, last = [], {}
    for record in lines(run_dir):
        job = record.get("job")
        if job is None:
            continue
        if record["event"] == "begin" and job not in order:
            order.append(job)
        last[job] = record
    for job in order:
        if job == job_id():
            return None
        over = last[job]["event"] == "end" and last[job].get("action") in ("stop", "finished")
        if not over and chain.in_queue(job):
            return job
    return None


def refuse(run_dir, kind, message, status):
    """Record that this start ends before it began to train, say so, and exit."""
    append(run_dir, event="end", kind=kind, message=message, action="stop", why="")
    print("error: %s" % message if kind != "stopped" else message, file=sys.stderr)
    sys.exit(status)


def refuse_a_second_job(run_dir):
    """No record and no file of the first job is touched."""
    first = other_job(run_dir)
    if first is not None:
        print(
            "error: job %s trains in %s already, so this one ends: wait for it, or scancel one of the two"
            % (first, run_dir),
            file=sys.stderr,
        )
        sys.exit(2)


def check_code(run_dir, restart):
    """End this start if conf/ or the code is not what was submitted, unless ACCEPT_CHANGES names the state of now."""
    run, now = chain.run_of(run_dir), chain.code_state()
    folder = run if run is not None and chain.recorded(run) else run_dir
    before = chain.recorded(folder)
    # A stage submitted by sbatch alone has its snapshot from its own first start.
    if not before or not before["files"] or (folder == run_dir and restart == 0):
        chain.record(folder, now)
        before = now
    found = chain.changes(before, now) if now["files"] else []
    print("code: %s" % (now["version"] or "version unknown"), file=sys.stderr)
    if not found:
        return
    words, accept = chain.in_words(before, now, found), chain.short_hash(now)
    if os.environ.get("ACCEPT_CHANGES") == accept:
        print("accepted by ACCEPT_CHANGES=%s: %s" % (accept, words), file=sys.stderr)
        return
    advice = "put it back and submit it again"
    if folder == run:
        advice += ", or accept it: slurm/submit.sh --name '%s' --resume --accept-changes" % run.name
        advice += ", or ACCEPT_CHANGES=%s in front of sbatch" % accept
    else:
        advice = "submit it again to run it as it is now, or put it back first"
    refuse(run_dir, "config", "%s: %s" % (words, advice), 2)


def begin(run_dir):
    limits()  # refuse a wrong number now, not when the job has to decide
    refuse_a_second_job(run_dir)
    starts = read(run_dir)
    restart = environment_number("SLURM_RESTART_COUNT", 0)
    if starts and starts[-1]["event"] == "begin":  # its batch script was killed before it could record the end
        message, blamed = ended_by_slurm(run_dir, starts[-1])
        append(run_dir, event="end", kind="slurm", message=message, failed_nodes=blamed, action="requeue")
        starts = read(run_dir)
    append(
        run_dir,
        event="begin",
        restart=restart,
        nodes=hosts(os.environ.get("SLURM_JOB_NODELIST", "")),
        begin_step=newest_step(run_dir),
    )
    if other_job(run_dir) is not None:  # it began between the look and the record
        append(run_dir, event="end", kind="config", message="another job trains in this folder", action="stop")
        refuse_a_second_job(run_dir)
    stop = chain.stop_asked(run_dir)
    if stop:
        refuse(run_dir, "stopped", stop, 1)
    try:
        check_code(run_dir, restart)
    except OSError as error:
        refuse(run_dir, "config", "%s: %s" % (error.filename or run_dir, error.strerror), 2)
    limit = limits()[1]
    without = idle(starts)
    if restart and without >= limit:
        message = "%d starts in a row gained no checkpoint (MAX_IDLE_STARTS): it is not tried again" % without
        refuse(run_dir, "error", message, 1)


def end(run_dir, exit_code, phase, usr1, term):
    starts = read(run_dir)
    if not starts or starts[-1]["event"] != "begin":  # the disk did not take the record
        nodes = hosts(os.environ.get("SLURM_JOB_NODELIST", ""))
        restart, step = environment_number("SLURM_RESTART_COUNT", 0), newest_step(run_dir)
        starts.append({"event": "begin", "time": 0.0, "restart": restart, "nodes": nodes, "begin_step": step})
    began, step = starts[-1], newest_step(run_dir)
    marker = read_json(run_dir / "ended.json", began["time"]) if phase == "training" else {}
    preflight = read_json(run_dir / "slurm" / "preflight.json", began["time"])
    errors = srun_errors(run_dir, began["time"]) if phase == "training" else ""
    stop, full = chain.stop_asked(run_dir), disk_fault(run_dir) if exit_code or not marker else None
    gained = step > began["begin_step"]
    kind, message = classify(exit_code, phase, marker, preflight, errors, usr1, term, stop, full, gained)
    blamed = []
    if kind == "node":
        blamed = [node for node in preflight.get("nodes", []) if node in began["nodes"]]
    elif kind == "slurm":
        message, blamed = ended_by_slurm(run_dir, began)
    elif kind == "killed":
        blamed = nodes_to_blame(marker.get("message"), errors, began["nodes"])
    starts[-1] = dict(began, event="end", kind=kind, message=message, failed_nodes=blamed, step=step)
    action, why, delay = decide(starts, *limits())
    left_out = excluded(starts)
    if action == "requeue" and left_out:
        few = too_few_nodes(left_out, len(began["nodes"]))
        if few:
            action, why = "stop", few
    append(
        run_dir,
        event="end",
        kind=kind,
        message=message,
        failed_nodes=blamed,
        exit=exit_code,
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
        print("exit %d" % exit_status(kind))


def exit_status(kind):
    """Of the batch script. Slurm starts the next stage after 0 alone."""
    return 0 if kind == "finished" else 2 if CLASSES[kind] == "user" else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("begin", "end", "stop"))
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("reason", nargs="?", default="", help="of stop; without, a person has asked for it")
    parser.add_argument("--exit", type=int, default=0, help="exit status of the step")
    parser.add_argument("--phase", choices=("preflight", "training"), default="training", help="how far it came")
    parser.add_argument("--usr1", action="store_true", help="the batch script got SIGUSR1: the time limit is near")
    parser.add_argument("--term", action="store_true", help="the batch script got SIGTERM: Slurm ends the job")
    args = parser.parse_args()
    run_dir = Path(os.path.abspath(str(args.run_dir)))
    if args.what == "begin":
        begin(run_dir)
    elif args.what == "end":
        end(run_dir, args.exit, args.phase, args.usr1, args.term)
    elif args.reason:
        refuse(run_dir, "config", args.reason, 2)
    else:
        refuse(run_dir, "stopped", chain.stop_asked(run_dir) or "stopped on request", 1)


if __name__ == "__main__":
    main()
