"""Real runs on two ranks: the slow one is named, and the profile's table is that of the trace and of the metrics."""

import gzip
import json
import re

import pytest
from programs import TINY_SETTINGS, figures, python, run_ranks, succeeded

from molmo2_nemo.training.step_times import PARTS

STEPS = [3, 4]


def run(kind, sample, run_dir, *overrides):
    settings = [*TINY_SETTINGS, "train.global_batch_size=2", "train.micro_batch_size=1", "train.validation_batches=0"]
    recipe = ["recipes/stage2_sft.py", *settings, f"data.root={sample}", f"run_dir={run_dir}", *overrides]
    return succeeded(run_ranks(2, "tests/ranks/slow_check.py", kind, *recipe)).stdout


def records(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record for record in lines if record["kind"] == "train"}


def own_time(events, names):
    """Name -> seconds in ranges of that name without the named ranges inside of them."""
    seconds, open_ranges = {}, []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        if event["name"] not in names:
            continue
        while open_ranges and event["ts"] >= open_ranges[-1]["ts"] + open_ranges[-1]["dur"]:
            open_ranges.pop()
        seconds[event["name"]] = seconds.get(event["name"], 0) + event["dur"] / 1e6
        if open_ranges:
            seconds[open_ranges[-1]["name"]] -= event["dur"] / 1e6
        open_ranges.append(event)
    return seconds


@pytest.mark.slow
def test_a_slow_rank_is_named_and_a_profile_shows_why(sample, tmp_path):
    """Two tensor parallel ranks, which wait for each other in every layer."""
    profile = [f"train.profile_steps={STEPS}".replace(" ", ""), "train.profile_ranks=[0,1]", "train.max_steps=5"]
    said = run("slow", sample, tmp_path, "parallel=tp2", *profile)
    found = records(tmp_path)

    [line] = re.findall(r"step \d+: (rank .* is slow: .*)", said)
    assert line.startswith("rank 1 on ") and line.endswith("see what else runs there: top")
    assert [step for step, record in found.items() if "slow_rank" in record] == [4, 5] and "step 4: rank 1 on " in said
    assert {record["slow_rank"]["rank"] for step, record in found.items() if step >= 4} == {1}
    assert found[5]["compute_seconds"]["slowest"] > 1.1 * found[5]["compute_seconds"]["median"]

    for record in found.values():  # each line is one step
        assert sum(record["step_seconds"].values()) == pytest.approx(record["seconds"], abs=1e-9)
        assert record["data_wait_share"] == pytest.approx(record["step_seconds"]["data"] / record["seconds"])

    parts = json.loads((tmp_path / "profile" / "parts.json").read_text())
    assert parts["steps"] == STEPS and sorted(parts["seconds"]) == ["0", "1"]
    for part, seconds in parts["seconds"]["0"].items():
        assert seconds == pytest.approx(sum(found[step]["step_seconds"][part] for step in STEPS) / 2), part
    decoder, waiting = ([parts["seconds"][rank][part] for rank in "01"] for part in ("decoder", "communication tensor"))
    assert decoder[1] > decoder[0] + 0.6 and waiting[0] > waiting[1], parts

    table = said[said.index("profile of steps 3 to 4\n") :].split("\nprofile: ")[0].splitlines()[2:]
    for number, rank in enumerate("01"):
        shown = [float(re.findall(r"([\d.]+) s", row)[number]) for row in table]
        assert sum(shown[:-1]) == pytest.approx(shown[-1], abs=1e-3)
        assert shown[:-1] == pytest.approx(list(parts["seconds"][rank].values()), abs=1e-4)

    names = {*PARTS, "forward", *parts["seconds"]["0"]}
    for rank in "01":
        events = json.loads(gzip.open(tmp_path / "profile" / f"rank_000{rank}.json.gz").read())["traceEvents"]
        ranges = [event for event in events if event.get("cat") == "user_annotation"]
        steps = [event for event in ranges if re.fullmatch(r"step \d+", event["name"])]
        assert sorted(event["name"] for event in steps) == ["step 3", "step 4"]
        ranges = [event for event in ranges if event["tid"] == steps[0]["tid"]]
        whole = sum(event["dur"] for event in steps) / 1e6
        traced = own_time(ranges, {*names, "step 3", "step 4"})
        traced["other"] = sum(traced.pop(name, 0) for name in ("other", "forward", "step 3", "step 4"))
        assert sum(traced.values()) == pytest.approx(whole)
        for part, seconds in parts["seconds"][rank].items():  # within what writing the trace takes
            assert traced.get(part, 0) / 2 == pytest.approx(seconds, abs=0.1 * whole / 2), (rank, part)
        modules = {event["name"] for event in ranges}
        assert {"decoder.layers.0", "decoder.layers.1.mlp", "decoder.layers.1.self_attention", "embedding"} <= modules
        assert {"vision.vit", "vision.vit.encoder.layers.0", "vision.connector.projector"} <= modules

    succeeded(python("tools/report.py", tmp_path))
    page = (tmp_path / "report.html").read_text()
    assert "rank 1 on " in page and "in 2 of 5 intervals" in page and "seconds of a step, by part" in page

    again = run("slow", sample, tmp_path, "parallel=tp2", *profile[:2], "train.max_steps=6")
    assert "train.profile_steps=[3, 4] lie before step 6, where this start begins: none" in again


@pytest.mark.slow
def test_no_rank_of_a_healthy_run_is_named(sample, tmp_path):
    """Two replicas with other rows each; a clock makes every stretch of a step last as long as any other."""
    said = run("healthy", sample, tmp_path, "train.max_steps=8")
    found = records(tmp_path)
    assert " is slow" not in said and len(found) == 8 and not any("slow_rank" in record for record in found.values())
    assert all(record["compute_seconds"]["median"] > 5 for record in found.values())


@pytest.mark.slow
def test_the_benchmark_counts_marks():
    """At a toy size; a tensor parallel rank has those of its collectives, too."""
    found = figures(run_ranks(2, "tools/bench/step_times.py", "--steps", "1", "parallel=tp2"))
    assert found["marks of a step"] > 40 and found["µs of a mark"] > 0 and found["% of a step"] > 0
