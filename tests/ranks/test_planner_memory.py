"""The planner's memory against measured bytes, on one rank and on two."""

import json

import pytest
from programs import python, run_ranks


def measured(out, start, *cases):
    only = [word for case in cases for word in ("--only", case)]
    result = start("tools/bench/memory.py", *only, "--out", out)
    assert out.exists(), result.stderr[-3000:]
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 5 * len(cases) and all(row["measured_kib"] > 0 for row in rows)
    return rows


@pytest.mark.slow
def test_memory_is_what_is_measured(tmp_path):
    cases = (
        "tiny",
        "tiny full recompute",
        "small",
        "small full recompute",
        "small olmo dropout",
        "small lora",
        "wide vocabulary bf16",
    )
    for row in measured(tmp_path / "memory.json", python, *cases):
        exact = row["part"] in ("weights", "gradients", "optimizer")
        assert row["predicted_kib"] == pytest.approx(row["measured_kib"], rel=1e-3 if exact else 0.10), row


@pytest.mark.slow
def test_memory_of_two_ranks_is_what_is_measured(tmp_path):
    for row in measured(tmp_path / "memory.json", lambda *words: run_ranks(2, *words), "small tp2", "small cp2"):
        assert row["predicted_kib"] == pytest.approx(row["measured_kib"], rel=0.10), row
