"""The rules of the Slurm scripts, without a cluster: what is started again, and what the pre-flight check refuses."""

import re
from types import SimpleNamespace

import pytest
from programs import REPOSITORY, load

starts, preflight = load("slurm/starts.py"), load("tools/preflight.py")


def history(*ends, restart=0):
    """Starts of one job: (kind, checkpoint gained, failed nodes)."""
    step, made = 0, []
    for number, (kind, gained, *nodes) in enumerate(ends):
        made.append(
            {
                "event": "end",
                "restart": restart + number,
                "begin_step": step,
                "step": step + gained,
                "kind": kind,
                "failed_nodes": nodes,
            }
        )
        step += gained
    return made


def decide(*ends, max_restarts=50, **kwargs):
    return starts.decide(history(*ends, **kwargs), max_restarts, 5, 60)


def test_what_is_queued_again():
    assert decide(("finished", 5))[0] == "finished"
    assert decide(("interrupted", 5))[::2] == ("requeue", 0)
    assert (
        decide(("config", 0))[0] == "stop"
        and decide(("slurm", 0))[0] == "slurm"
        and decide(("stopped", 9))[0] == "stop"
    )
    # A failure is tried again once where no checkpoint is gained, and as long as one is where it is.
    assert decide(("error", 0))[0] == "requeue"
    assert decide(("killed", 0), ("killed", 0))[0] == decide(("error", 0), ("killed", 0))[0] == "stop"
    assert decide(("error", 0), ("error", 0))[:2] == ("stop", "2 starts in a row gained no checkpoint")
    assert decide(("error", 3), ("error", 3), ("error", 3), ("error", 0))[0] == "requeue"
    # Interrupted before it began to train, a few times: nothing is wrong with the run.
    assert decide(*[("interrupted", 0)] * 4)[0] == "requeue" and decide(*[("interrupted", 0)] * 5)[0] == "stop"
    assert decide(("interrupted", 1), restart=50)[:2] == ("stop", "the budget of MAX_RESTARTS=50 restarts is spent")


def test_the_wait_doubles_with_every_failure_in_a_row():
    assert [decide(*[("error", 1)] * n)[2] for n in (1, 2, 3, 9)] == [60, 120, 240, 1800]
    assert decide(("error", 1), ("error", 1), ("interrupted", 1), ("error", 1))[2] == 60


def test_a_node_that_failed_twice_is_left_out_and_earns_one_more_try():
    twice = [("killed", 0, "n7"), ("killed", 0, "n7")]
    assert starts.excluded(history(*twice)) == ["n7"] and starts.excluded(history(twice[0])) == []
    assert decide(*twice)[0] == "requeue"
    assert decide(*twice, ("killed", 0, "n8"))[0] == "stop"
    # A pre-flight that names a node is no failure of the run.
    other = [("node", 0, f"n{i}") for i in range(6)]
    assert decide(*other)[0] == "requeue" and decide(*other, max_restarts=5)[0] == "stop"


def test_who_is_to_blame():
    nodes = ["node1.cluster", "node2.cluster"]
    srun = "srun: error: node2: task 1: Killed\nsrun: error: node1: task 0: Exited with exit code 1\n"
    assert starts.nodes_to_blame("rank 3 on node1, step 7: RuntimeError: no", srun, nodes) == ["node1.cluster"]
    assert starts.nodes_to_blame("rank 0 on node1, step 7: lost contact to another rank", srun, nodes) == [
        "node2.cluster"
    ]
    assert starts.nodes_to_blame(None, srun, nodes) == ["node2.cluster"]
    assert starts.nodes_to_blame(None, "", nodes) == [] and starts.nodes_to_blame(None, srun, ["node9"]) == []


def ended(reason="error", step=9, **more):
    return {"marker": {"reason": reason, "step": step, "message": "rank 3 on node1, step 9: no"} | more}


KILLED = "srun: error: node2: task 1: Killed"
PREFLIGHT = {"phase": "preflight", "exit_code": 3}
# First column of the table in docs/operations.md -> what the batch script knows of such an end.
CASES = {
    "all steps are taken": [ended("finished"), ended("finished") | {"exit_code": 1}],  # a rank fell over after the end
    "a person stopped the run": [ended("SIGUSR1") | {"stop": "stopped"}, ended() | {"stop": "stopped"}, {"stop": "s"}],
    "the time limit is near, or `train.stop_after_minutes` is over": [
        ended("SIGUSR1") | {"usr1": True},
        ended("time limit"),
        {"usr1": True, "exit_code": 137},
        {"usr1": True, "phase": "preflight"},
    ],
    "preemption, `scontrol requeue`, `scancel`, a lost node": [
        ended("SIGTERM") | {"term": True},
        {"term": True, "exit_code": 143},
        {"term": True, "phase": "preflight", "exit_code": 143},
    ],
    "the pre-flight finds a node with a fault": [
        PREFLIGHT | {"preflight": {"kind": "node", "message": "n1: no", "nodes": ["n1"]}}
    ],
    "a rank is killed or crashes": [
        {"exit_code": 137, "errors": KILLED},
        {"exit_code": 139},
        ended(cause="lost contact") | {"exit_code": 137, "errors": KILLED},
    ],
    "a GPU, its driver or a node's disk fails": [ended(cause="node") | {"exit_code": 1}],
    "any other error, such as a defect of the program or lost contact": [
        ended(cause="transient") | {"exit_code": 1},
        ended(cause="lost contact") | {"exit_code": 1},
        ended() | {"exit_code": 1, "usr1": True},
        {"exit_code": 1, "errors": "srun: error: node2: task 1: Exited with exit code 1"},
        {},
    ],
    "object storage with the data or the checkpoint to go on from does not answer for two minutes, or ten seconds of"
    " the pre-flight": [
        dict(exit_code=2, phase="preflight", preflight={"kind": "error", "message": "n1: cannot list s3://b/a"}),
        ended(cause="transient") | {"exit_code": 1},
    ],
    "object storage refuses, or a shard was replaced": [
        ended(cause="user") | {"exit_code": 1},
        ended("config error") | {"exit_code": 1},
    ],
    "the pre-flight gives no verdict, or takes too long": [
        PREFLIGHT | {"exit_code": 124},
        PREFLIGHT | {"exit_code": 1},
    ],
    "memory of a GPU or host used up, after a new checkpoint": [
        ended(cause="memory") | {"exit_code": 1, "gained": True},
        {"exit_code": 137, "errors": "error: Detected 1 oom-kill event(s) in step 7.0\n" + KILLED, "gained": True},
    ],
    "memory of a GPU or host used up, with none": [
        ended(cause="memory") | {"exit_code": 1},
        {"exit_code": 137, "errors": "srun: error: node2: task 1: Out Of Memory"},
    ],
    "a setting cannot work": [ended("config error") | {"exit_code": 2}, {"exit_code": 2}],
    "data or a setting fail the pre-flight on all nodes": [
        PREFLIGHT | {"preflight": {"kind": "config", "message": "no"}}
    ],
    "too many steps without a finite loss or gradient, too many broken samples, no token with loss": [
        ended(cause="user") | {"exit_code": 2}
    ],
    "the disk or the quota is full": [
        ended(cause="user") | {"exit_code": 2},
        ended(cause="transient") | {"exit_code": 1, "full": "/run: No space left on device"},
        {"exit_code": 1, "errors": "error: rank 0: [Errno 28] No space left on device"},
        {"exit_code": 1, "full": "/run: Disk quota exceeded"},
    ],
    "Python is not found": [PREFLIGHT | {"exit_code": 127}, PREFLIGHT | {"exit_code": 126}],
}
# Ends that the batch script records without a step: in the table, and tested with stand-ins.
ELSEWHERE = {
    "conf/ or the code is not what was submitted",
    "another job trains in the folder",
    "the stage before has not finished",
    "a limit on starts is reached",
}
ACTIONS = {
    "finished": "the next stage starts",
    "stop": "ends",
    "slurm": "left to Slurm, which queues it again unless it was cancelled",
}


def table():
    """First cell -> the other cells of the table of ends in docs/operations.md."""
    text = (REPOSITORY / "docs" / "operations.md").read_text()
    lines = re.search(r"\| what happened \|.*?\n\|[-|]+\n(.*?)\n\n", text, re.DOTALL).group(1).splitlines()
    return {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}


def test_the_table_of_ends_has_every_case():
    assert set(table()) == {*CASES, *ELSEWHERE} and {row[0] for row in table().values()} == set(starts.CLASSES.values())


@pytest.mark.parametrize("name", CASES)
def test_how_a_start_ended_and_what_follows(name):
    common = dict(exit_code=0, phase="training", marker={}, preflight={}, errors="", usr1=False, term=False)
    common |= dict(stop=None, full=None, gained=False)
    for case in CASES[name]:
        kind, sentence = starts.classify(**common | case)
        assert sentence
        action, _, delay = decide((kind, int(case.get("gained", 0))))
        follows = ACTIONS.get(action) or f"queued again {'after a wait' if delay else 'at once'}"
        blamed = "yes" if kind in ("node", "killed") else "no"
        assert [starts.CLASSES[kind], blamed, follows] == table()[name][:3], (case, kind)
        assert (starts.exit_status(kind) == 0) is (action == "finished")


def facts(name, **changes):
    gpu = {"name": "H100", "driver": "570.1", "gib": 79.6, "used_gib": 0.0}
    return {
        "node": name,
        "faults": [],
        "unreachable": None,
        "gpus": [dict(gpu) for _ in range(8)],
        "pci": 8,
        "slurm_gpus": 8,
        "versions": {"torch": "2.14.1"},
        "warnings": [],
    } | changes


def fault(nodes):
    with pytest.raises(preflight.Fault) as caught:
        preflight.judge(nodes)
    return str(caught.value), caught.value.nodes


def test_the_preflight_names_the_node():
    good = [facts("n1"), facts("n2"), facts("n3")]
    preflight.judge(good)
    assert fault([*good, facts("n4", pci=7, gpus=good[0]["gpus"][:7])]) == (
        "n4: nvidia-smi shows 7 GPUs and Slurm counts 8",
        ["n4"],
    )
    assert fault([*good, facts("n4", versions={"torch": "2.12.0"})]) == (
        "n4: torch is 2.12.0 and 2.14.1 on most nodes",
        ["n4"],
    )
    old = [gpu | {"driver": "535.2"} for gpu in good[0]["gpus"]]
    assert fault([*good, facts("n4", gpus=old)]) == ("n4: NVIDIA driver is 535.2 and 570.1 on most nodes", ["n4"])
    busy = [gpu | {"used_gib": 40.0} for gpu in good[0]["gpus"]]
    assert fault([facts("n0", gpus=busy), *good]) == ("n0: GPU 0 has 40 GiB in use by another process", ["n0"])
    assert fault([facts("n0", pci=0, gpus=[]), *good]) == ("n0: it has no NVIDIA device, and others have", ["n0"])
    mixed = [*good[0]["gpus"][:7], good[0]["gpus"][0] | {"name": "A100"}]
    assert fault([*good, facts("n4", gpus=mixed)])[1] == ["n4"]
    broken = facts("n4", gpus=[], faults=["nvidia-smi failed: no driver"])
    assert fault([*good, broken]) == ("n4: nvidia-smi failed: no driver", ["n4"])
    # What is wrong everywhere is nobody's fault.
    assert fault([facts(f"n{i}", faults=["data.root=/x is gone"]) for i in range(3)]) == (
        "all nodes: data.root=/x is gone",
        [],
    )
    # Clocks: 40 s off; and 4 s off with an answer that took 8 s, which proves nothing.
    with pytest.raises(preflight.Fault, match="n2: its clock is -40.0 s off") as caught:
        preflight.judge_clocks({"n1": (0.0, 0.0), "n2": (-40.0, 0.1), "n3": (0.1, 0.1)}, 5.0)
    assert caught.value.nodes == ["n2"]
    assert preflight.judge_clocks({"n1": (0.0, 0.0), "n2": (8.0, 4.0), "n3": (0.1, 0.1)}, 5.0) == pytest.approx(3.9)
    # The network: one bad link, or a floor that is too high.
    chain = {("n1", "n2"): 20.0, ("n2", "n3"): 19.0, ("n3", "n4"): 0.8, ("n4", "n5"): 21.0}
    assert preflight.slow_fault(0.9, 5.0, chain, ["n1"]).nodes == ["n3", "n4"]
    assert preflight.slow_fault(0.9, 50.0, dict.fromkeys(chain, 20.0), ["n1"]).nodes == []


def test_room_for_checkpoints_is_asked_for_before_the_first_step(tmp_path, monkeypatch):
    preflight.prepare([])
    config = preflight.compose("stage1", ["model=tiny", "data=sample", "optim=from_scratch", f"run_dir='{tmp_path}'"])
    # As saved by a CPU run: float32 weights and two moments; the estimate is an upper bound and no more than twice
    # that.
    parameters = preflight.checkpoint_bytes(config) / preflight.CHECKPOINT_BYTES
    assert 0.5e6 < parameters < 0.6e6
    assert "free for checkpoints" in preflight.room(config)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(total=100, used=99, free=1))
    with pytest.raises(
        preflight.Fault, match=r"GiB free, and 4 checkpoints of about 0\.0 GiB are to come \(train\.keep_last=3\)"
    ):
        preflight.room(config)
