"""What tools/status.py shows of a run's files; tests/unit/test_stop.py and tests/slurm have it beside a queue."""

import json
import time

import pytest
from programs import load

status = load("tools/status.py")


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    monkeypatch.setattr(status, "ask", lambda *command: "")


@pytest.fixture
def run(tmp_path):
    """A run of three stages that has finished."""
    for stage in status.STAGES:
        folder = tmp_path / "my run" / stage
        (folder / "checkpoints" / "step_00000007").mkdir(parents=True)
        (folder / "checkpoints" / "step_00000007" / "complete.json").write_text("{}")
        (folder / "checkpoints" / "step_00000007" / "config.yaml").write_text("stage: stage1\n")
        (folder / "config.yaml").write_text("train:\n  seed: 1\n  max_steps: 7\n")
        (folder / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 7, "tokens_per_second": 9.0}) + "\n")
        (folder / "ended.json").write_text(json.dumps({"reason": "finished", "step": 7}))
    return tmp_path / "my run"


@pytest.mark.parametrize("given", [".", "stage1", "stage2/checkpoints", "stage3/checkpoints/step_00000007"])
def test_a_run_is_found_from_each_of_its_folders(run, given):
    found = status.status(status.find_run(str(run / given)))
    assert [row["state"] for row in found["stages"]] == ["finished"] * 3 and found["name"] == "my run"
    assert [row["step"] for row in found["stages"]] == [7, 7, 7] and found["stages"][0]["max_steps"] == 7


def test_a_stage_in_a_folder_of_another_name_is_shown_alone(run, tmp_path):
    (run / "stage2").rename(tmp_path / "alone")
    for given in ("alone", "alone/checkpoints"):
        found = status.status(status.find_run(str(tmp_path / given)))
        assert [(row["stage"], row["state"]) for row in found["stages"]] == [("alone", "finished")]
        assert "export" not in found and "export" not in status.table(found)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "slurm").mkdir()
    for given, sentence in ((str(tmp_path), "is no run: it has neither stage1"), ("no/where", "there is no run")):
        with pytest.raises(ValueError, match=sentence):
            status.find_run(given)


def record(folder, **more):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), "job": "7", **more}) + "\n")


def test_a_failure_is_told_once(tmp_path):
    """Two starts that ended alike, and two stages, an export and a report that wait for them in vain."""
    message = "rank 0 on node1, step 3: RuntimeError: a long sentence"
    for action, why in (("requeue", ""), ("stop", "2 starts in a row gained no checkpoint")):
        record(tmp_path / "stage1" / "slurm", event="begin", restart=0, nodes=["node1"])
        record(tmp_path / "stage1" / "slurm", event="end", kind="error", message=message, action=action, why=why)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs").write_text("stage1 7\nstage2 8\nstage3 9\nexport 10\nreport 11\n")
    found = status.status(tmp_path)
    assert [row["state"] for row in found["stages"]] == ["failed", "cancelled", "cancelled"]
    shown = status.table(found)
    assert shown.count("a long sentence") == 1 and shown.count("gained no checkpoint") == 1, shown
    assert "stage2, stage3: stage1 failed\nexport: cancelled, since stage1 failed\n" in shown, shown
    assert found["stopped"] is None


def test_a_stopped_run_says_when_and_how_to_go_on(run):
    (run / "slurm").mkdir()
    (run / "slurm" / "stop").write_text("ada\n")
    assert status.status(run)["stopped"] is None  # all of it had finished
    (run / "stage3" / "ended.json").unlink()
    found = status.status(run)
    assert [row["state"] for row in found["stages"]] == ["finished", "finished", "stopped"]
    shown = status.table(found)
    assert " by ada; to go on: slurm/submit.sh --name 'my run' --resume\n" in shown and shown.count("ada") == 1


def test_a_job_that_no_node_could_start_comes_with_a_hint(tmp_path, monkeypatch):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs").write_text("stage1 7\n")
    for state, reason in (("FAILED", "JobLaunchFailure"), ("PENDING", "launch_failed_requeued_held")):
        shown = f"JobId=7 JobState={state} Reason={reason} Dependency=(null)"
        monkeypatch.setattr(status, "ask", lambda *command, shown=shown: shown if command[-1] == "7" else "")
        row = status.status(tmp_path)["stages"][0]
        assert reason in row["why"] and "not on a file system that all nodes share" in row["why"], row


@pytest.mark.parametrize("key", status.FIGURES)
@pytest.mark.parametrize("value", ["12", True, [1], {}])
def test_a_line_of_metrics_without_a_number_is_counted_and_left_out(run, key, value):
    good = {"kind": "train", "step": 7, "tokens_per_second": 9.0, "seconds": 1.0, "loss": 2.0}
    lines = [{**good, "step": 5}, {**good, "step": 6, "loss": None}, good, {**good, "step": 8, key: value}]
    (run / "stage1" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = status.status(run)
    assert found["stages"][0]["step"] == 7 and found["stages"][0]["tokens_per_second"] == 9.0
    assert "stage1: 1 lines of metrics.jsonl without a number: not counted" in status.table(found)


def test_a_changed_record_of_starts_is_named(run, tmp_path):
    record(run / "stage1" / "slurm", event="begin")
    record(run / "stage1" / "slurm", event="end", action="stop", kind="failed", message=7, failed_nodes=3)
    with pytest.raises(ValueError, match="stage1/ended.json or slurm/starts.jsonl was changed"):
        status.status(run)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            {"kind": "uploads", "missing": "cannot write x: no right to.", "not_removed": ""},
            "NOT UPLOADED: cannot write",
        ),
        ({"kind": "uploads", "missing": "", "not_removed": "cannot delete x."}, "is still there: cannot delete x."),
        ({"kind": "train", "uploads": {"failed": 2, "behind": 1}}, "2 failed upload(s), and what is in object storage"),
        ({"kind": "train", "uploads": {"failed": 2, "behind": 0}}, None),
        ({"kind": "uploads", "missing": "", "not_removed": ""}, None),
    ],
)
def test_copies_in_object_storage_that_are_missing_are_told(run, record, said):
    with (run / "stage2" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 7, **record}) + "\n")
    found = status.status(run)
    told = [line for line in status.table(found).splitlines() if line.startswith("stage2: ")]
    assert len(told) == (said is not None) and all(said in line for line in told)
