"""What can be known before a job has waited days for its nodes: submit.sh calls it for each stage before sbatch.

    checks.py STAGE RUN ARGUMENT...          ARGUMENTs are options of sbatch (--time=...) and overrides (data.root=...)

Prints one sentence for each mistake, with its fix, and exits with 2 if there is one. FACTS has what the configuration
says, as tools/preflight.py --settings prints it; where Python is in a container, the overrides alone are known. Site
settings come from the environment. Needs Python 3.6 or newer and no packages.
"""

import json
import netrc
import os
import re
import sys
from pathlib import Path

NODE_LOCAL = "/tmp /var/tmp /dev/shm /run"  # each node has these folders of its own
SHARED = "must be on a file system that all nodes share"


def value_of(key, arguments, prefix=""):
    """The last value given for a key or an option; None: there is none."""
    given = [argument[len(prefix + key) + 1 :] for argument in arguments if argument.startswith(prefix + key + "=")]
    if not given:
        return None
    value = given[-1]
    return re.sub(r"\\(.)", r"\1", value[1:-1]) if re.match(r"'.*'$|\".*\"$", value) else value


def option(name, variable, arguments, script):
    """A setting of sbatch: the command line wins over the environment, and that over the #SBATCH line of the script."""
    written = re.findall(r"^#SBATCH --%s=(\S+)" % name, script, re.MULTILINE)
    given = value_of(name, arguments, "--")
    return given if given is not None else os.environ.get(variable) or (written[-1] if written else "")


def seconds_of(text):
    """Slurm's MINUTES, M:S, H:M:S, D-H, D-H:M and D-H:M:S in seconds; None: no limit, or not one of these."""
    match = re.match(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?$", text)
    if not match:
        return None
    days, first, second, third = [int(part) if part is not None else None for part in match.groups()]
    if days is not None:
        return days * 86400 + first * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return first * 3600 + second * 60 + third
    return first * 60 + (second or 0) or None


def time_fault(arguments, script):
    time = option("time", "SBATCH_TIMELIMIT", arguments, script)
    signal = option("signal", "SBATCH_SIGNAL", arguments, script)
    limit, lead = seconds_of(time), re.search(r"@(\d+)$", signal)
    lead = int(lead.group(1)) if lead else 60 if signal else 0  # Slurm's default
    if limit is None or limit > lead:
        return None
    return (
        "--time=%s is %d s, and --signal=%s asks the ranks to save %d s before the end, so nothing would be trained:"
        " give a --time above %d minutes, or --signal=B:USR1@SECONDS with fewer seconds"
    ) % (time, limit, signal, lead, lead // 60)


def node_local(path):
    """The node-local folder that a path is in; None: it is in none."""
    real = os.path.realpath(path)
    for folder in os.environ.get("NODE_LOCAL", NODE_LOCAL).split():
        if (real + "/").startswith(os.path.realpath(folder) + "/"):
            return folder
    return None


def local_faults(places):
    """A sentence for each of {what: path} in a node-local folder."""
    for what, path in places.items():
        folder = node_local(path) if path else None
        if folder:
            yield (
                "%s is in %s, which each node has of its own, and %s: use another folder, or correct NODE_LOCAL in"
                " slurm/site.env if your nodes share it"
            ) % (what, folder, SHARED)


def wandb_fault(project, kind):
    """A sentence if W&B is asked for and would not let the run in."""
    if not project or project == "null" or os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return None
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return None
    host = re.sub(r"^https?://|[/:].*$", "", os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai")
    # pyxis is told to leave the home out.
    if kind != "pyxis" and has_entry(host):
        return None
    seen = "and ~/.netrc has no entry for " + host
    if kind == "pyxis":
        seen = "and the container does not see ~/.netrc"
    return (
        "train.wandb_project=%s, but WANDB_API_KEY is not set, %s: export WANDB_API_KEY=KEY in slurm/site.env,"
        " or export WANDB_MODE=offline there"
    ) % (project, seen)


def has_entry(host):
    for name in [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]:
        path = os.path.expanduser(name)
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def mount_faults(kind, places):
    """A sentence for each of {what: path} that a container would not see, or lose at its end."""
    if kind not in ("pyxis", "apptainer"):
        return
    inside = [(mount + ":" + mount).split(":")[1] for mount in os.environ.get("MOUNTS", "").split(",") if mount]
    inside.append(os.getcwd())
    if kind == "apptainer":  # which mounts these by itself
        inside += ["/tmp", os.path.expanduser("~")]
    for what, path in places.items():
        if path and not any((os.path.expanduser(path) + "/").startswith(seen.rstrip("/") + "/") for seen in inside):
            folder = os.path.dirname(path) if what == "MSC_CONFIG" else path
            yield (
                "%s=%s is in no folder of MOUNTS, so that the container does not see it: add %s:%s to MOUNTS in"
                " slurm/site.env"
            ) % (what, path, folder, folder)


def faults(stage, run, arguments, facts):
    """All mistakes that can be seen, a sentence each."""
    script = Path("slurm", stage + ".sbatch").read_text()
    kind, _, image = os.environ.get("RUNTIME", "venv").partition(":")
    data = facts.get("data_root") or value_of("data.root", arguments) or os.environ.get("DATA_ROOT")
    if data and "://" in data:  # object storage, which the recipe's own checks look at
        data = None
    start = value_of("train.init_from", arguments)
    log = value_of("output", arguments, "--")
    is_file = kind in ("pyxis", "apptainer") and image.startswith(("/", "./", "../", "~"))
    places = {
        "the folder %s that you submit from" % os.getcwd(): os.getcwd(),
        "the run folder %s (RUN_ROOT), with its logs," % run: run,
        "data.root=%s" % data: data,
        "train.init_from=%s" % start: start if start and re.match(r"(?!\w+://)[^[]*/", start) else None,
        "the image %s of RUNTIME" % image: image if is_file else None,
        "--output=%s" % log: os.path.dirname(os.path.abspath(log)) if log else None,
    }
    found = list(local_faults(places))
    cache = value_of("data.cache_dir", arguments)
    found += mount_faults(kind, {"data.cache_dir": cache, "MSC_CONFIG": os.environ.get("MSC_CONFIG")})
    if data and not os.path.isdir(data):
        found.append(
            "data.root=%s does not exist: correct DATA_ROOT in slurm/site.env, or data.root=FOLDER, the folder of the"
            " prepared shards" % data
        )
    if is_file and not os.path.exists(os.path.expanduser(image)):
        found.append(
            "RUNTIME=%s:%s: there is no such image: make it (slurm/Dockerfile), or correct RUNTIME in slurm/site.env"
            % (kind, image)
        )
    if log and not os.path.isdir(os.path.dirname(os.path.abspath(log))):
        found.append("--output=%s: make its folder first, since Slurm does not, and the job would have no log" % log)
    project = facts["wandb_project"] if "wandb_project" in facts else value_of("train.wandb_project", arguments)
    found += [fault for fault in (time_fault(arguments, script), wandb_fault(project, kind)) if fault]
    return found


def main():
    stage, run, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
    found = faults(stage, run, arguments, json.loads(os.environ.get("FACTS") or "{}"))
    for fault in found:
        print("error: %s: %s." % (stage, fault), file=sys.stderr)
    sys.exit(2 if found else 0)


if __name__ == "__main__":
    main()
