"""Which rank is called slow, when the log says so, and whether its advice works."""

import json
import random
import re

import pytest
from programs import load
from stand_in_slurm import StandIn

from molmo2_nemo.training import slow_rank
from molmo2_nemo.training.slow_rank import ABOVE, INTERVALS, Place, SlowRank, advice

status = load("tools/status.py")


def places(peers) -> list[Place]:
    """Eight GPUs on two hosts. peers: of each rank."""
    return [Place(f"node{rank // 4}", f"GPU {rank % 4}, H100", one, 0) for rank, one in enumerate(peers)]


def judged(peers, intervals, flops=None):
    """(what is found, the line) of each interval."""
    ranks = SlowRank(places(peers), lambda place: f"leave {place.host} out")
    return [ranks.judge(list(seconds), list(flops or [1.0] * len(seconds))) for seconds in intervals]


SAME = [(0, 0, 0)] * 8
SLOW = [1.0, 1.01, 0.99, 1.0, 1.02, 1.2, 1.0, 1.0]
HEALTHY = [1.0, 1.01, 0.99, 1.0, 1.02, 1.09, 1.0, 1.0]


def test_a_slow_rank_is_named_once_and_then_until_it_is_not_slow_any_more():
    found = judged(SAME, [SLOW] * 6 + [HEALTHY] * 2)
    assert [one is not None for one, _ in found] == [False] * INTERVALS + [True] * 3 + [False] * 2
    lines = [(number, line) for number, (_, line) in enumerate(found) if line]
    assert lines == [
        (
            3,
            "rank 5 on node1 (GPU 1, H100) is slow: its compute took 1.2 s a step, 20% more than the median of the "
            "ranks that do the same work, and it was the slowest in 3 intervals in a row; leave node1 out",
        ),
        (6, "rank 5 on node1 (GPU 1, H100) is not the slowest any more"),
    ]
    assert found[3][0].rank == 5 and found[3][0].above == pytest.approx(0.2)


@pytest.mark.parametrize(
    "why, peers, intervals, flops",
    [
        ("not enough", SAME, [[1.0] * 7 + [1 + 0.99 * ABOVE]] * 9, None),
        ("two intervals, with one between them", SAME, [SLOW, SLOW, HEALTHY] * 4, None),
        ("another one each time", SAME, [SLOW, SLOW[::-1]] * 9, None),
        ("more work", SAME, [SLOW] * 9, [1.0] * 5 + [1.2] + [1.0] * 2),
        ("less work in the same time", SAME, [[1.0] * 8] * 9, [1.0] * 5 + [0.5] + [1.0] * 2),
        ("stages of a pipeline", [(0,), (1,)] * 4, [[1.0, 2.0] * 4] * 9, None),
        ("nobody else does the same", [(rank,) for rank in range(8)], [SLOW] * 9, None),
        ("nothing measured", SAME, [[0.0] * 8] * 9, [0.0] * 8),
    ],
)
def test_a_healthy_rank_is_not_named(why, peers, intervals, flops):
    assert all(found is None and line is None for found, line in judged(peers, intervals, flops)), why


def test_a_long_healthy_run_with_noise_and_uneven_rows_names_nobody():
    """Rows differ by a quarter, times by their work and by 3 %; some intervals have one rank that is held up."""
    draw = random.Random(0)
    for ranks in (2, 8):
        judge = SlowRank(places(SAME)[:ranks], lambda place: "").judge
        for _ in range(1500):
            flops = [draw.uniform(1, 1.25) for _ in range(ranks)]
            seconds = [work * draw.gauss(1, 0.03) for work in flops]
            if draw.random() < 0.02:
                seconds[draw.randrange(ranks)] *= 2
            found, _ = judge(seconds, flops)
            assert found is None, found


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("slow", [0, 1])
def test_a_slow_rank_is_found_among_few_and_with_uneven_rows(ranks, slow):
    draw = random.Random(1)
    judge, named = SlowRank(places(SAME)[:ranks], lambda place: "").judge, []
    for _ in range(200):
        flops = [draw.uniform(1, 1.1) for _ in range(ranks)]
        found, _ = judge([work * (1.4 if rank == slow else 1) for rank, work in enumerate(flops)], flops)
        named.append(found and found.rank)
    assert named[:INTERVALS] == [None] * INTERVALS and set(named[INTERVALS:]) == {slow}


def test_the_slowest_of_several_places_is_named():
    seconds = [1.0, 1.0, 1.2, 1.0, 2.0, 2.0, 2.0, 2.8]
    found, line = judged([(0,)] * 4 + [(1,)] * 4, [seconds] * 4)[-1]
    assert found.rank == 7 and found.median == 2.0 and line.startswith("rank 7 on node1 (GPU 3, H100) is slow: ")


@pytest.mark.slow
def test_what_the_log_advises_works(tmp_path):
    """The two commands, as they stand, on a chain that already leaves a node out."""
    place = Place("node17", "GPU 3, H100", (0,), 0)
    with StandIn(tmp_path, PREFLIGHT="no", FAULTS="{}") as cluster:
        assert cluster.submit("--exclude=node3", "train.max_steps=2").returncode == 0
        cluster.wait()
        (cluster.runs / "chain" / "stage2" / "ended.json").unlink()
        said = advice(place, cluster.runs / "chain" / "stage2", 2, in_slurm=True)
        stop, again = re.fullmatch(
            r"to go on without this node: (slurm/submit\.sh .*), and when the job has ended: (slurm/submit\.sh .*)",
            said,
        ).groups()
        assert cluster.do("bash", "-c", stop).returncode == 0
        shown = cluster.do("bash", "-c", f"{again} --dry-run")
        assert shown.returncode == 0 and shown.stdout.count("--exclude=node3\\,node17 ") == 1, (
            shown.stdout + shown.stderr
        )
        assert cluster.do("bash", "-c", again).returncode == 0
        arguments = (cluster.runs / "chain" / "slurm" / "arguments").read_text().splitlines()
        assert arguments == ["--exclude=node3,node17", "train.max_steps=2"]
        cluster.wait()


def test_what_is_advised_elsewhere(tmp_path, monkeypatch):
    gpu, cpu = Place("node17", "GPU 3, H100", (0,), 0), Place("laptop", None, (0,), 0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    alone = advice(gpu, tmp_path / "stage2", 2, in_slurm=True)
    assert alone.endswith("scancel 77, then the same sbatch command with --exclude=node17")
    assert advice(gpu, tmp_path / "stage2", 2, in_slurm=False).endswith("start it again with other hosts than node17")
    assert advice(gpu, tmp_path / "stage2", 1, in_slurm=False) == "see what else runs there: nvidia-smi, top"
    assert advice(cpu, tmp_path / "stage2", 1, in_slurm=False) == "see what else runs there: top"


def test_status_shows_the_slow_rank_of_a_run_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(status, "ask", lambda *command: "")
    ranks = SlowRank(places(SAME), lambda place: f"leave {place.host} out")
    record = ranks.record(slow_rank.Slow(5, 1.2, 1.0, 0.2))
    lines = [{"kind": "train", "step": 1, "slow_rank": record}, {"kind": "train", "step": 2}]
    for last, expected in ((lines[:1], 1), (lines, 0), ([{"kind": "train", "step": 1, "slow_rank": "5"}], 0)):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in last))
        found = status.status(tmp_path)
        said = "rank 5 on node1 (GPU 1, H100) is slow, 20% above the median; leave node1 out"
        assert status.table(found).count(said) == expected and found["stages"][0]["slow_rank"] == (
            said if expected else None
        )
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    (tmp_path / "ended.json").write_text(json.dumps({"reason": "finished", "step": 1}))
    assert "is slow" not in status.table(status.status(tmp_path))
