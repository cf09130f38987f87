"""What the jobs of a run share: the request to stop, the queue, and the code that they were submitted with.

    chain.py jobs RUN        prints "JOB STATE KIND" for every job of the run RUN_ROOT/NAME in the queue
    chain.py changes RUN     prints how conf/ and the code differ from those of the submission; exit 1 if they do
    chain.py record RUN      keeps a snapshot of conf/ and the hashes of the code, and prints which code it is

common.sh exports CODE and CODE_IMAGE, which say where the code is. Hashes are compared, and the code is not run from a
copy: the same works for a checkout, an installed package and an image, paths in messages stay those that people know,
and an edit in the middle of a run is seen and decided on, not kept from the run without a word.

Needs Python 3.6 or newer and no packages, since it runs with the host's python3 even if the training is in a container.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

STAGES = ("stage1", "stage2", "stage3")
STOP = "stop"  # in slurm/ of a run or of a stage: no job of it trains from then on
SNAPSHOT = "slurm/snapshot"
SHOWN = 8  # files in a message


def run_of(run_dir):
    """The run that a stage's folder belongs to, RUN_ROOT/NAME; None for a stage in a folder of another name."""
    return run_dir.parent if run_dir.name in STAGES else None


# The request to stop.


def stop_asked(run_dir):
    """A sentence if a person has asked to stop the run or the stage in run_dir; else None.

    The folder is listed, not asked for the file: a network file system may remember for a minute that a file is not
    there, and asks its server again when a folder is opened.
    """
    for folder in [run_dir] + ([run_of(run_dir)] if run_of(run_dir) else []):
        try:
            there = STOP in os.listdir(str(folder / "slurm"))
        except OSError:
            continue
        if there:
            return "stopped on request%s (%s)" % (when(folder / "slurm" / STOP), folder / "slurm" / STOP)
    return None


def when(path):
    try:
        return time.strftime(" at %Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
    except OSError:
        return ""


# Jobs in the queue.


def text_of(path):
    try:
        return path.read_text()
    except OSError:
        return ""


def ask(*command):
    """The output of a Slurm command. Raises OSError or subprocess.SubprocessError."""
    return subprocess.check_output(command, stderr=subprocess.DEVNULL, timeout=60).decode(errors="replace")


def value_of(key, command):
    """The value of an override in a command line that Slurm shows, where no shell quoting is left; None: not there."""
    end = r"(?= [+~]*[\w./@]+=|$)"  # a value without quotes may have spaces: up to the next override
    found = re.search(r"(?:^| )%s=('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|.*?)%s" % (re.escape(key), end), command)
    if not found:
        return None
    value = found.group(1)
    return re.sub(r"\\(.)", r"\1", value[1:-1]) if value[:1] in ("'", '"') else value


def stage_folder(folder, command, root):
    """The run folder of a stage's job that stands in `folder` and was submitted as `command`; None: it is no stage."""
    script = re.search(r"(?:^|/)(stage[123])\.sbatch(?= |$)", command)
    if not script:
        return None
    given = value_of("run_dir", command) or os.path.join(root, value_of("name", command) or "molmo2", script.group(1))
    return Path(os.path.realpath(os.path.join(folder, given)))


def jobs_of(run, root):
    """(job, state, kind) of the jobs of a run in the queue, by submit.sh or by sbatch alone.

    kind: stage1, ..., export or report.

    Names of jobs are no help: another checkout may have a run of the same name.
    """
    names = {os.path.abspath(str(run)) + "/", os.path.realpath(str(run)) + "/"}
    run = Path(os.path.realpath(str(run)))
    user = ask("id", "-un").strip()
    found, submitted = [], dict(reversed(line.split()) for line in text_of(run / "slurm" / "jobs").splitlines())
    for line in ask("squeue", "-h", "-u", user, "-o", "%A|%T|%Z|%o").splitlines():
        job, state, folder, command = (line.split("|", 3) + ["", "", ""])[:4]
        stage = stage_folder(folder, command, root)
        script = re.search(r"(?:^|/)(stage[123]|export|report)\.sbatch(?: (.*))?$", command)
        if stage is not None:
            mine = run in (stage, stage.parent)
        else:
            mine = script is not None and any(((script.group(2) or "") + "/").startswith(name) for name in names)
        if mine or job in submitted:  # a Slurm that does not show arguments
            found.append((job, state, script.group(1) if script else submitted[job]))
    return sorted(found, key=lambda entry: int(entry[0]))


def in_queue(job):
    """Whether Slurm still has a job in its queue, in any state."""
    try:
        return bool(ask("squeue", "-h", "-j", job, "-o", "%T").strip())
    except (OSError, subprocess.SubprocessError):
        return False  # unknown: the owner file of the run decides


# The code and the configuration.


def code_root():
    """The folder that holds molmo2_nemo/, in a checkout also conf/ and recipes/; None: it cannot be seen from here."""
    if os.environ.get("CODE", "checkout") == "checkout":
        return Path.cwd()
    spec = importlib.util.find_spec("molmo2_nemo")
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]).parent if places else None


def git(root, *arguments):
    """The output of git in the checkout; empty where git or the repository is missing."""
    try:
        command = ["git", "-C", str(root)] + list(arguments)
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, timeout=60).decode(errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""


def version_of(root):
    """How the code is called: its commit, or the version of the installed package."""
    if (root / "conf").is_dir():
        commit = git(root, "rev-parse", "--short=12", "HEAD").strip()
        dirty = git(root, "status", "--porcelain", "--", "molmo2_nemo", "recipes", "conf").strip()
        name = "commit " + commit if commit else "a folder without a git commit"
        return name + (" with uncommitted changes" if dirty else "")
    found = re.search(r"^__version__ = \"([^\"]+)\"", (root / "molmo2_nemo" / "__init__.py").read_text(), re.MULTILINE)
    return "molmo2-nemo " + (found.group(1) if found else "of an unknown version")


def code_state():
    """{"version", "files": {name: hash}} of the code and conf/ as they are now; no files where they cannot be seen.

    An image counts as one file: its size and its time of change, since its content is not to be seen from outside.
    """
    image = os.environ.get("CODE_IMAGE", "")
    if image and os.environ.get("CODE") == "installed":
        path = Path(image)
        stat = path.stat() if path.is_file() else None
        return {"version": "image " + image, "files": {image: "%d %d" % (stat.st_size, stat.st_mtime) if stat else ""}}
    root = code_root()
    if root is None:
        return {"version": "", "files": {}}
    files = {}
    for folder in ("molmo2_nemo", "recipes", "conf"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".yaml") and path.is_file():
                files[path.relative_to(root).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"version": version_of(root), "files": files}


def short_hash(state):
    return hashlib.sha256(json.dumps(state["files"], sort_keys=True).encode()).hexdigest()[:12]


def recorded(folder):
    """The state that was recorded for a run or a stage; None: there is none."""
    try:
        return json.loads((folder / SNAPSHOT / "state.json").read_text())
    except (OSError, ValueError):
        return None


def record(folder, state):
    """Keep the state, a copy of conf/, and in a checkout with uncommitted changes their patch: enough to go back."""
    target = folder / SNAPSHOT
    partial = target.with_name(".snapshot.%d" % os.getpid())
    shutil.rmtree(str(partial), ignore_errors=True)
    partial.mkdir(parents=True)
    root = code_root()
    if root is not None and not (os.environ.get("CODE") == "installed" and os.environ.get("CODE_IMAGE")):
        conf = root / "conf" if (root / "conf").is_dir() else root / "molmo2_nemo" / "conf"
        shutil.copytree(str(conf), str(partial / "conf"))
        if state["version"].endswith("uncommitted changes"):
            patch = git(root, "diff", "HEAD", "--", "molmo2_nemo", "recipes", "conf")
            (partial / "uncommitted.patch").write_text(patch)
    (partial / "state.json").write_text(json.dumps(dict(state, time=time.time()), indent=1) + "\n")
    shutil.rmtree(str(target), ignore_errors=True)
    partial.rename(target)


def changes(before, now):
    """One string for each file that differs: "changed conf/base.yaml", "new ...", "gone ..."."""
    old, new = before["files"], now["files"]
    found = ["changed " + name for name in sorted(old) if name in new and old[name] != new[name]]
    found += ["new " + name for name in sorted(set(new) - set(old))]
    return found + ["gone " + name for name in sorted(set(old) - set(new))]


def in_words(before, now, found):
    """The changes as the first half of a sentence."""
    files = ", ".join(found[:SHOWN]) + (" and %d more" % (len(found) - SHOWN) if len(found) > SHOWN else "")
    versions = "submitted with %s, now %s" % (before["version"] or "unknown code", now["version"] or "unknown code")
    return "the code or conf/ is not what the run was submitted with (%s; %s)" % (files, versions)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("jobs", "changes", "record"))
    parser.add_argument("run", type=Path)
    args = parser.parse_args()
    if args.what == "jobs":
        try:
            for job in jobs_of(args.run, os.environ.get("RUN_ROOT") or "runs"):
                print(*job)
        except (OSError, subprocess.SubprocessError) as error:
            sys.exit("error: squeue does not answer (%s): try again." % error)
    elif args.what == "changes":
        before, now = recorded(args.run), code_state()
        found = changes(before, now) if before and before["files"] and now["files"] else []
        if found:
            print(in_words(before, now, found))
            sys.exit(1)
    else:
        state = code_state()
        record(args.run, state)
        print(state["version"] or "unknown code: the first start records it")


if __name__ == "__main__":
    main()
