"""What submit.sh refuses before the queue, and what a chain does about edits, second jobs and mistakes."""

import json
import os
import re
import shutil
import time

import pytest
from programs import REPOSITORY, load, run
from stand_in_slurm import StandIn

checks = load("slurm/checks.py")
SCRIPTS = sorted(
    path
    for pattern in ("slurm/*.sh", "slurm/*.sbatch", "tools/**/*.sh", "tests/slurm/*.sh", "tests/slurm/containers/*")
    for path in REPOSITORY.glob(pattern)
) + [REPOSITORY / "tests" / "stand_ins" / "slurm_command"]


@pytest.mark.slow
def test_shell_scripts_are_shellcheck_clean_and_have_no_long_lines():
    assert len(SCRIPTS) >= 18
    for path in [*SCRIPTS, REPOSITORY / "slurm" / "site.example.env"]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 120, f"{path}:{number}"
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (tools/dev/install_slurm.sh)")
    result = run(["shellcheck", *SCRIPTS])
    assert result.returncode == 0, result.stdout


# Before the queue.


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The environment of submit.sh, with data and a home."""
    for name in ("SBATCH_TIMELIMIT", "SBATCH_SIGNAL", "WANDB_MODE", "WANDB_API_KEY", "NETRC", "NODE_LOCAL", "RUNTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    monkeypatch.setenv("NODE_LOCAL", "/node_local")
    monkeypatch.chdir(REPOSITORY)
    return tmp_path


@pytest.mark.parametrize(
    "arguments, environment, sentence",
    [
        ([], {}, None),
        (["data.root=/no/where"], {}, r"data\.root=/no/where does not exist: correct DATA_ROOT in slurm/site\.env"),
        (["data.root='/no/wh ere'"], {}, r"data\.root=/no/wh ere does not exist"),
        (["data.root=/node_local/shards"], {}, r"data\.root=\S+ is in /node_local, which each node has of its own"),
        (["--time=1"], {}, r"--time=1 is 60 s, and --signal=B:USR1@300 asks .* give a --time above 5 minutes"),
        (["--time=00:05:00"], {}, "--time=00:05:00 is 300 s"),
        (["--time=6"], {}, None),
        (["--time=1", "--signal=B:USR1@30"], {}, None),
        (["--signal=B:USR1@90000"], {}, "--time=24:00:00 is 86400 s"),
        ([], {"SBATCH_TIMELIMIT": "2:30"}, "--time=2:30 is 150 s"),
        (["--time=1-0"], {"SBATCH_TIMELIMIT": "2:30"}, None),
        (["--time=UNLIMITED"], {}, None),
        (["--output=/no/where/%j.log"], {}, "make its folder first"),
        (["train.wandb_project=molmo"], {}, "WANDB_API_KEY is not set, and ~/.netrc has no entry for api.wandb.ai"),
        (["train.wandb_project=molmo"], {"WANDB_MODE": "offline"}, None),
        (["train.wandb_project=molmo"], {"WANDB_API_KEY": "k"}, None),
        (["train.wandb_project=null"], {}, None),
        ([], {"RUNTIME": "pyxis:/no/where.sqsh"}, "there is no such image: make it"),
        ([], {"RUNTIME": "apptainer:/node_local/x.sif"}, "the image /node_local/x.sif of RUNTIME is in /node_local"),
        ([], {"RUNTIME": "pyxis:nvcr.io#nvidia/pytorch:26.04-py3"}, None),
        (
            ["data.cache_dir=/local/cache"],
            {"RUNTIME": "pyxis:x#y", "MOUNTS": "/data:/data,/locals:/local2"},
            "data.cache_dir=/local/cache is in no folder of MOUNTS.*: add /local/cache:/local/cache to MOUNTS",
        ),
        (["data.cache_dir=/local/cache"], {"RUNTIME": "pyxis:x#y", "MOUNTS": "/data:/data,/nvme:/local"}, None),
        (["data.cache_dir=/local/cache"], {"RUNTIME": "pyxis:x#y", "MOUNTS": "/local/cache:/local/cache"}, None),
        (["data.cache_dir=/local/cache"], {}, None),
        (["data.cache_dir=/tmp/cache"], {"RUNTIME": "apptainer:docker://x"}, None),
        (
            [],
            {"RUNTIME": "pyxis:x#y", "MSC_CONFIG": "/keys/msc.yaml"},
            "MSC_CONFIG=/keys/msc.yaml .*: add /keys:/keys to",
        ),
        (["train.init_from=/node_local/start"], {}, "train.init_from=/node_local/start is in /node_local"),
    ],
)
def test_what_can_be_seen_before_the_queue(site, monkeypatch, arguments, environment, sentence):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = checks.faults("stage1", str(site / "run"), arguments, {})
    assert found == [] if sentence is None else found and re.search(sentence, found[0]), found


def test_the_configuration_says_more_than_the_command_line(site):
    facts = {"data_root": "/no/where", "wandb_project": "molmo"}
    found = checks.faults("stage1", str(site / "run"), [], facts)
    assert len(found) == 2 and "data.root=/no/where" in found[0] and "train.wandb_project=molmo" in found[1]
    netrc = site / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password k\n")
    netrc.chmod(0o600)
    assert len(checks.faults("stage1", str(site / "run"), [], facts)) == 1


def test_node_local_folders_are_refused_by_default_also_through_a_link(site, monkeypatch):
    monkeypatch.delenv("NODE_LOCAL")
    (site / "link").symlink_to("/dev/shm")
    found = checks.faults("stage1", str(site / "link" / "run"), [], {"data_root": "/usr"})
    found = [fault for fault in found if "that you submit from" not in fault]  # the checkout may be below /tmp itself
    assert len(found) == 1 and "/link/run (RUN_ROOT), with its logs, is in " in found[0] and "NODE_LOCAL" in found[0]


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("90", 5400),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-12", 129600),
        ("1-0:30", 88200),
        ("0", None),
        ("infinite", None),
    ],
)
def test_time_limits_are_read_as_slurm_does(text, seconds):
    assert checks.seconds_of(text) == seconds


@pytest.mark.parametrize(
    "said, fix",
    [
        ("allocation failure: Invalid partition name specified", "--partition or SBATCH_PARTITION .*; there are main"),
        ("allocation failure: Invalid account or account/partition combination specified", "--account or SBATCH_ACC"),
        ("allocation failure: Requested node configuration is not available", "Correct --nodes, --gpus-per-node"),
    ],
)
def test_what_slurm_refuses_is_told_with_the_fix(tmp_path, said, fix):
    cluster = StandIn(tmp_path)
    (cluster.state / "refusal").write_text(f"sbatch: error: no\n{said}\n")
    result = cluster.submit()
    assert result.returncode == 2 and re.search(f"^error: stage1: Slurm says: .*{fix}", result.stderr), result.stderr
    assert not cluster.runs.exists() and not cluster.states()


def test_a_mistake_leaves_nothing_behind(tmp_path):
    cluster = StandIn(tmp_path)
    result = cluster.submit("--time=1", "stage2:data.root=/no/where")
    assert result.returncode == 2 and result.stderr.count("error: ") == 1, result.stderr
    assert "error: stage1: --time=1 is 60 s" in result.stderr and not cluster.runs.exists() and not cluster.states()


def test_what_the_rehearsal_finds_is_not_submitted(tmp_path):
    cluster = StandIn(tmp_path, REHEARSAL="yes")
    (cluster.state / "rehearsal").write_text("figures\nerror: ranks 0 and 1 differ at call 1 on TP\n")
    result = cluster.submit()
    assert result.returncode == 2 and "ranks 0 and 1 differ" in result.stderr and "REHEARSAL=no" in result.stderr
    assert "error: stage1: the rehearsal" in result.stderr and not cluster.runs.exists() and not cluster.states()
    result = cluster.submit(REHEARSED="3")  # a setting that cannot be rehearsed
    assert result.returncode == 0 and "stage3 is not rehearsed: ranks 0" in result.stdout, result.stderr


@pytest.mark.parametrize("words, environment", [(["--dry-run"], {}), ([], {"REHEARSAL": "no"})])
def test_a_rehearsal_can_be_left_out(tmp_path, words, environment):
    cluster = StandIn(tmp_path, REHEARSAL="yes")
    (cluster.state / "rehearsal").write_text("error: a fault\n")
    result = cluster.submit(*words, **environment)
    assert result.returncode == 0 and "a fault" not in result.stdout + result.stderr, result.stderr


# The code and the configuration.


@pytest.mark.slow
def test_an_edit_between_stages_needs_a_word(tmp_path):
    with StandIn(tmp_path, PREFLIGHT="no", FAULTS='{"stage1": ["edit"]}') as cluster:
        assert "code: a folder without a git commit" in cluster.submit("train.max_steps=2").stdout
        states = list(cluster.wait().values())
        assert states[:4] == ["COMPLETED", "FAILED", "CANCELLED", "CANCELLED"], cluster.log()
        assert cluster.read("2", "status") == "2" and cluster.read("2", "restart") == ""
        why = cluster.status()["stages"][1]["why"]
        assert "(changed conf/base.yaml, new molmo2_nemo/c.py; submitted with" in why, why
        snapshot = cluster.runs / "chain" / "slurm" / "snapshot"
        assert (snapshot / "conf" / "base.yaml").read_text() == "a = 1\n"
        assert (snapshot.parent / "arguments").read_text() == "train.max_steps=2\n"
        # The advice works, each of the two.
        refused = cluster.submit("--resume")
        assert refused.returncode == 2 and "changed conf/base.yaml" in refused.stderr
        accept = re.search(r"ACCEPT_CHANGES=(\w+) in front of sbatch", why).group(1)
        alone = ["sbatch", "slurm/stage2.sbatch", "name=chain"]
        cluster.do(*alone, ACCEPT_CHANGES="0" * 12)
        cluster.wait()  # Of two jobs at the same time the second would end, since the first trains in the folder.
        cluster.do(*alone, ACCEPT_CHANGES=accept)
        states = cluster.wait()
        assert [states["6"], states["7"]] == ["FAILED", "COMPLETED"], cluster.log()
        assert cluster.submit("--resume", "--accept-changes").returncode == 0
        assert list(cluster.wait().values())[7:] == ["COMPLETED"] * 3, cluster.log()


def test_which_code_a_chain_runs(tmp_path, monkeypatch):
    chain = load("slurm/chain.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CODE", "checkout")
    monkeypatch.delenv("CODE_IMAGE", raising=False)
    for name in ("molmo2_nemo/a.py", "recipes/b.py", "conf/model/c.yaml"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1\n")
    git = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        assert run([*git, *command]).returncode == 0
    first = chain.code_state()
    assert re.fullmatch(r"commit [0-9a-f]{12}", first["version"]) and len(first["files"]) == 3
    (tmp_path / "recipes" / "b.py").write_text("2\n")
    (tmp_path / "molmo2_nemo" / "a.py").unlink()
    (tmp_path / "conf" / "d.yaml").write_text("1\n")
    (tmp_path / "notes.txt").write_text("no code")
    second = chain.code_state()
    assert second["version"] == first["version"] + " with uncommitted changes"
    assert chain.changes(first, second) == ["changed recipes/b.py", "new conf/d.yaml", "gone molmo2_nemo/a.py"]
    chain.record(tmp_path, second)
    assert "+2" in (tmp_path / "slurm" / "snapshot" / "uncommitted.patch").read_text()
    assert chain.changes(chain.recorded(tmp_path), second) == []
    # An image is one file, which a new one of the same name differs from.
    image = tmp_path / "x.sif"
    image.write_text("1")
    monkeypatch.setenv("CODE", "installed")
    monkeypatch.setenv("CODE_IMAGE", str(image))
    before = chain.code_state()
    image.write_text("12")
    assert chain.changes(before, chain.code_state()) == [f"changed {image}"]


# Two jobs, and mistakes.


def test_of_two_jobs_in_one_folder_the_second_ends_and_leaves_the_first_alone(tmp_path):
    with StandIn(tmp_path, PREFLIGHT="no", FAULTS='{"stage1": ["wait"]}') as cluster:
        command = ["sbatch", "slurm/stage1.sbatch", "name=chain"]
        cluster.do(*command)
        refused = cluster.submit()
        assert refused.returncode == 2 and "still queued (jobs 1)" in refused.stderr or "exists" in refused.stderr
        while not cluster.steps():
            time.sleep(0.05)
        records = cluster.runs / "chain" / "stage1" / "slurm" / "starts.jsonl"
        before = records.read_text()
        cluster.do(*command)
        while cluster.states()["2"] in ("PENDING", "RUNNING"):
            time.sleep(0.05)
        assert cluster.read("2", "status") == "2" and cluster.read("2", "restart") == "", cluster.log()
        assert "job 1 trains in" in cluster.log() and records.read_text() == before
        (cluster.state / "go on").touch()
        assert cluster.wait()["1"] == "COMPLETED" and len(cluster.steps()) == 3


@pytest.mark.slow
def test_a_full_disk_is_not_tried_again_and_blames_no_node(tmp_path):
    with StandIn(tmp_path, PREFLIGHT="no", FAULTS='{"stage1": ["full disk", "full disk"]}') as cluster:
        cluster.submit()
        assert list(cluster.wait().values())[:4] == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"], cluster.log()
        assert len(cluster.steps()) == 1 and cluster.read("1", "status") == "2"
        found = cluster.status()
        assert found["stages"][0]["failed_nodes"] == {} and "No space left" in found["stages"][0]["why"]
        shown = cluster.do("python3", REPOSITORY / "tools" / "status.py", "chain").stdout
        assert shown.count("No space left on device") == 1, shown
        assert "stage2, stage3: stage1 failed\nexport: cancelled, since stage1 failed\n" in shown, shown


def test_jobs_of_a_run_are_told_apart_by_their_folder(monkeypatch, tmp_path):
    chain = load("slurm/chain.py")
    queue = [
        "1|RUNNING|/w|/w/slurm/stage1.sbatch name='my run' run_dir='/r/my run/stage1' a=1",
        "2|PENDING|/w|/w/slurm/stage2.sbatch name=my run a.b=1",
        "3|PENDING|/w|/w/slurm/stage2.sbatch name='my run 2' run_dir='/r/my run 2/stage2'",
        "4|PENDING|/w|/w/slurm/export.sbatch /r/my run/stage3 /r/my run/hf",
        "5|PENDING|/w|/w/slurm/report.sbatch /r/my run",
        "6|PENDING|/w|/w/slurm/report.sbatch /r/my run 2",
        "7|PENDING|/w|/w/other.sh run_dir='/r/my run/stage1'",
        "8|PENDING|/w|/w/slurm/stage3.sbatch a=1 name=my run",
    ]
    monkeypatch.setattr(chain, "ask", lambda *command: "\n".join(queue) if command[0] == "squeue" else "me\n")
    assert [job[0] for job in chain.jobs_of("/r/my run", "/r")] == ["1", "2", "4", "5", "8"]
    assert chain.jobs_of("/r/my run 2", "/r") == [("3", "PENDING", "stage2"), ("6", "PENDING", "report")]
    assert chain.stage_folder("/w", "/w/slurm/stage1.sbatch name=x", "runs").as_posix() == "/w/runs/x/stage1"
    assert chain.stage_folder("/w", "/w/slurm/stage1.sbatch", "/r").as_posix() == "/r/molmo2/stage1"


def test_the_end_of_another_job_is_not_taken_for_ones_own(tmp_path, monkeypatch):
    starts = load("slurm/starts.py")
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    path = tmp_path / "ended.json"
    path.write_text(json.dumps({"reason": "finished", "job": "1"}))
    assert starts.read_json(path) == {}
    path.write_text(json.dumps({"reason": "finished", "job": "2"}))
    assert starts.read_json(path)["reason"] == "finished"
    assert starts.read_json(path, os.path.getmtime(path) + 1) == {}
