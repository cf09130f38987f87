"""The planner's times against published runs, arithmetic that is written out here, and measured figures."""

import json
import math
from dataclasses import replace

import pytest

from molmo2_nemo.auto import resolve
from molmo2_nemo.command_line import compose
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.planner.efficiency import FAST, PUBLISHED, SLOW
from molmo2_nemo.planner.measured import with_measured
from molmo2_nemo.planner.memory import Job, count_parameters
from molmo2_nemo.planner.run_costs import run_costs
from molmo2_nemo.planner.search import scale, search
from molmo2_nemo.planner.step_time import H100, VISION, estimate, part_seconds, step_time
from molmo2_nemo.planner.traffic import Traffic, traffic

FULL = ["recompute_granularity=full", "recompute_method=uniform", "recompute_num_layers=1"]
FULL = [f"transformer.{word}" for word in FULL]
PEAK = 989.4e12


def job_of(stage: str, words: list[str], gpus: int) -> Job:
    return Job(resolve(compose(stage, words), gpus)[0], gpus)


def published_job(run) -> Job:
    """As the report's runs were laid out: no tensor parallelism, everything recomputed, no kernels of this project."""
    words = ["schedule=report", f"model={run.model}", f"data.num_workers={run.workers}", *FULL]
    words.append("parallel.kernels=plain")
    if run.stage == "stage1":
        words.append(f"train.micro_batch_size={128 // run.gpus}")
    return Job(compose(run.stage, words), run.gpus)


@pytest.fixture(scope="module")
def published():
    return {(run.model, run.stage): (run, published_job(run)) for run in PUBLISHED}


def test_published_runs_lie_in_the_shown_range(published):
    assert len(published) == 9
    # 15.2 hours for 32,000 steps.
    assert published["molmo2_4b", "stage1"][0].seconds == pytest.approx(1.71)
    for name, (run, job) in published.items():
        cost = estimate(job)
        assert cost.fast.seconds < run.seconds < cost.slow.seconds, name
        # Not by a range that holds everything.
        assert cost.slow.seconds < 1.5 * run.seconds and cost.slow.seconds < 3.6 * cost.fast.seconds, name


def test_compute_and_memory_of_a_step_by_hand(published):
    """molmo2_4b, stage 2, 128 GPUs: one row of 128 frames a GPU, so the numbers of one row."""
    _, job = published["molmo2_4b", "stage2"]
    patches, windows, tokens = 128 * 729, 128 * 81, 16384
    full_chunk = 32 * 729 / (32 * 729 + 128)  # a chunk is the smallest side of the ViT's products
    seconds = {
        "vit": 4 * 2 * patches * (588 * 1152 + 25 * (4 * 1152**2 + 2 * 1152 * 4304)) / (0.40 * full_chunk),
        "vit attention": 4 * 4 * 128 * 729**2 * 1152 * 25 / 0.15,
        "pooling": 4 * 2 * (windows + 2 * patches) * 2304 * 1152 / (0.25 * full_chunk),
        "pooling attention": 4 * 4 * patches * 1152 / 0.03,
        "projector": 4 * 2 * windows * (1152**2 + 2 * 1152 * 9728 + 9728 * 2560) / 0.35,
        # 32 heads of queries, 8 of keys and of values, of 128: 6,144 columns are the smallest side.
        "decoder": 4 * 2 * tokens * 36 * (2560 * 6144 + 4096 * 2560 + 3 * 2560 * 9728) / (0.45 * 6144 / (6144 + 128)),
        # A video of 128 frames has 10,624 tokens: 1.54 examples in a row. Its 10,368 visual tokens see each other.
        "decoder attention": 4 * 4 * (tokens**2 + windows**2) / 2 / (tokens / 10624) * 4096 * 36 / 0.06,
        # Half of the text has logits; the head is the frozen embedding; logits are made again.
        "head": 3 * 2 * (tokens - windows) / 2 * 2560 * 151936 / 0.30,
    }
    cost = step_time(job, SLOW)
    assert cost.causes["compute"] == pytest.approx(sum(seconds.values()) / PEAK, rel=1e-6)
    norms, rope, residual, mlp = (
        10240 * (2 * 36 + 97),
        5120 * (2 * 24 + 23),
        5120 * (2 * 12 + 16),
        9728 * (2 * 14.4 + 55.5),
    )
    moved = 36 * tokens * (norms + rope + residual + mlp)
    moved += patches * 25 * (1152 + 4304) * (2 * 17 + 23.2)
    moved += (tokens - windows) / 2 * 151936 * (30 + 48)
    moved += 14 * count_parameters(job)[1][0].trained
    assert cost.causes["memory"] == pytest.approx(moved / (0.7 * 3.35e12), rel=1e-6)
    # 128 replicas of one row: the longest of them.
    work = cost.causes["compute"] + cost.causes["memory"]
    assert cost.causes["unevenness"] == pytest.approx(0.05 * math.sqrt(2 * math.log(128)) * work)
    assert cost.causes["bubble"] == cost.causes["loading"] == 0
    # With fused kernels, counted as inputs read and outputs written: norms, residuals, queries with keys and values
    # (6,144 columns) and the angles of a position, the MLP; then the ViT's, and the pooling of 2,304 features a patch.
    fused = Job(replace(job.config, parallel=replace(job.config.parallel, kernels="auto")), job.gpus)
    moved = 36 * tokens * (5120 * (2 * 4 + 8 + 2 * 6 + 4) + 6144 * (2 * 4 + 6) + 128 * 12 + 9728 * (2 * 6 + 10))
    moved += (tokens - windows) / 2 * 151936 * (2 + 4) + 14 * count_parameters(job)[1][0].trained
    chunks = patches * 25 * (1152 * (2 * 16 + 28) + 4304 * (2 * 4 + 6)) + patches * 2304 * (2 * 11 + 58)
    assert step_time(fused, SLOW).causes["memory"] == pytest.approx((moved + chunks) / (0.7 * 3.35e12), rel=1e-6)
    # Layers of the ViT one by one: what is made again is in the backward pass.
    layers = Job(replace(fused.config, train=replace(job.config.train, vision_recompute="layers")), job.gpus)
    moved += patches * 25 * (1152 * (16 + 36) + 4304 * 8) + patches * 2304 * (11 + 58)
    assert step_time(layers, SLOW).causes["memory"] == pytest.approx(moved / (0.7 * 3.35e12), rel=1e-6)


@pytest.mark.parametrize(
    "stage, schedule, crops", [("stage1", "seed", 26), ("stage1", "report", 16), ("stage2", "seed", 49)]
)
def test_pictures_of_stage_1_are_images(stage, schedule, crops):
    work = Job(compose(stage, [f"schedule={schedule}"]), 1).work
    assert work.crops == crops
    if stage == "stage1":
        # Two rows of four tiles: (2 x 19 + 8) x (4 x 19 + 8) patches and the overview's 27 x 27, in windows of 2 x 2.
        assert work.visual_tokens == pytest.approx(crops / 9 * (23 * 42 + 14 * 14))
        assert work.pooled_patches == pytest.approx(crops / 9 * (46 * 84 + 27 * 27))


# ---- collectives ----


def test_time_of_a_collective_by_hand():
    inside = Traffic("TP", 9e9, "", ranks=8, span=8, calls=100, beside=8)
    assert inside.seconds(FAST, H100) == pytest.approx(9e9 / (0.8 * 450e9) + 100 * (10e-6 + 7 * 1e-6))
    # 16 GPUs of 16 nodes, each through its own port.
    alone = Traffic("DP", 9e9, "", ranks=16, span=128, calls=10)
    assert alone.seconds(FAST, H100) == pytest.approx(9e9 / (0.85 * 50e9) + 10 * (10e-6 + 15 * 4e-6))
    # All 128 GPUs of 16 nodes: eight rings, each through another port of a node.
    shared = Traffic("DP", 9e9, "", ranks=128, span=128, calls=10, beside=8)
    waits = 10 * (10e-6 + 112 * 1e-6 + 15 * 4e-6)
    assert shared.seconds(FAST, H100) == pytest.approx(max(9e9 / 8 / (0.85 * 50e9), 9e9 / (0.8 * 450e9)) + waits)


def test_gradients_hide_behind_the_last_micro_batch_alone():
    """On a network of a hundredth: what is sent, less one of two micro-batches' passes."""
    job = job_of("stage2", ["hardware=h100_128", "schedule=report", *FULL], 128)
    assert job.micro_batches == 2
    slow = replace(SLOW, network=0.006, network_latency=0.0, node_latency=0.0, launch=0.0)
    trained = count_parameters(job)[1][0].trained
    # TP 2: four GPUs of a node in a group of 64, which share four ports. Gradients have 4 bytes, weights 2.
    sent = [trained * size * 63 / 64 / 4 / (0.006 * 50e9) for size in (4, 2)]
    found, alone = step_time(job, slow), step_time(job, replace(slow, network=1e9))
    assert alone.causes["network"] == pytest.approx(0, abs=0.01)
    work = found.causes["compute"] + found.causes["memory"]
    assert found.causes["network"] == pytest.approx(sum(sent) - work / 2, rel=1e-3)


def test_no_step_is_shorter_than_what_it_sends():
    """--search promised 0.045 s here, with 1.38 s of traffic behind it."""
    config, _ = resolve(compose("stage1", ["model=molmo2_8b", "hardware=h100_1024"]), 1024)
    found = search(config, 1024, 79.6, H100)
    assert found
    for job, cost, _ in found:
        for column in (cost.fast, cost.slow):
            assert column.seconds > max(column.busy.values())
        sent = sum(item.network_bytes for item in cost.traffic)
        assert cost.fast.seconds > sent / 50e9
        assert job.config.train.global_batch_size == 128


def test_scale_keeps_the_rows_and_names_what_limits():
    curve = scale(compose("stage2", ["model=molmo2_4b", "schedule=report"]), 79.6, H100)
    assert [gpus for gpus, _ in curve] == [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    for gpus, found in curve:
        job, cost, _ = found
        assert job.t * job.p * job.c * job.d == gpus and job.d <= 128
        assert job.micro_batches * job.rows * job.d == 128
    # A GPU of very many does less.
    assert curve[-1][1][1].seconds * 4096 > 2 * curve[0][1][1].seconds * 8
    job, cost, _ = curve[-1][1]
    assert cost.bottlenecks == ["loading"]
    # As the printed advice says: more workers, and it is something else.
    more = replace(job.config, data=replace(job.config.data, num_workers=32))
    faster = estimate(Job(more, 4096))
    assert "loading" not in faster.bottlenecks and faster.seconds < cost.seconds


# ---- loading, host, checkpoints ----


def test_costs_of_a_run_by_hand():
    job = job_of("stage3", ["model=molmo2_8b", "hardware=h100_8", "data.num_workers=2"], 8)
    cost = estimate(job)
    costs = run_costs(job, cost, (FAST, SLOW))
    # One replica: 128 rows of 384 frames, 33 ms each, by two processes.
    assert cost.slow.seconds == pytest.approx(
        max(128 * 384 * 0.033 / 2, cost.slow.seconds - cost.slow.causes["loading"])
    )
    assert costs.gpu_hours[1] == pytest.approx(cost.slow.seconds * 2000 * 8 / 3600)
    pixels = 128 * 384 * 729 * 588  # bytes of a step's: 21 GB, an eighth of them on each rank
    assert costs.host_bytes == pytest.approx(pixels + 8 * 4 * 2**30 + 2 * 0.65 * 2**30)
    total = sum(counts.total for counts in count_parameters(job)[0].values())
    trained = total - 151936 * 4096  # all but the base embedding
    assert costs.checkpoint_bytes == pytest.approx(2 * total + 12 * trained)
    of_a_rank = count_parameters(job)[1][0].trained
    # Eight ranks' shards are the state of two halves of the model, one for each of TP 2; so are the weights.
    weights = 2 * count_parameters(job)[1][0].total
    assert costs.host_bytes_saving == pytest.approx(2 * (12 * of_a_rank + weights))
    staged = 12 * of_a_rank / 4 + weights
    assert costs.save_seconds[0] == pytest.approx(staged / 50e9 + costs.host_bytes_saving / 5e9)
    assert costs.restore_seconds[0] == pytest.approx(costs.checkpoint_bytes / 5e9 + costs.checkpoint_bytes / 8 / 1.1e9)
    assert costs.read_bytes[0] == pytest.approx(128 * 384 * 45e3 / cost.fast.seconds)
    computing = cost.fast.seconds - cost.fast.causes["loading"]
    assert costs.loader_cores[0] == pytest.approx(128 * 384 * 0.010 / 8 / computing)


# ---- measured figures ----

FACTS = {"tiny": False, "device": H100, "gpus": 1, "torch": "2.14.1", "transformer_engine": None}
CASE = dict(layer_spec="local", precision="bf16", recipe=None, recompute=False)
LINES = {
    "attention": [
        {"tokens": 4096, "kernel": "flex", "ms": 1.0, "tflops": 200.0},
        {"tokens": 16384, "kernel": "sdpa dense", "ms": 9.0, "tflops": 90.0},
        {"tokens": 16384, "kernel": "flex", "ms": 3.0, "tflops": 300.0},
    ],
    "vision": [
        {"layer_spec": "transformer_engine", "not_measured": "not measured: Transformer Engine is not installed"},
        {"layer_spec": "local", "recompute": True, "crops": 128, "ms": 900.0, "crops_per_second": 142.2},
        {"layer_spec": "local", "recompute": False, "crops": 128, "ms": 640.0, "crops_per_second": 200.0},
    ],
    "step": [
        dict(CASE, layers=4, extrapolated=False, tokens=16384, ms=1100.0),
        dict(CASE, layers=8, extrapolated=False, tokens=16384, ms=1300.0),
        dict(CASE, layers=36, extrapolated=True, tokens=16384, ms=2700.0),
    ],
    "nccl": [{"not_measured": "not measured: needs two GPUs, here are 1"}],
}


@pytest.fixture
def written(tmp_path):
    """A file as tools/bench/gpu.py --out writes it."""
    from tables import print_json

    def write(changes=(), lines=LINES):
        file = tmp_path / "bench.jsonl"
        for number, (section, rows) in enumerate(lines.items()):
            print_json({"section": section, **FACTS, **dict(changes), "rows": rows}, file, append=number > 0)
        return file

    return write


def test_measured_figures_replace_assumed_ones(written):
    job = job_of("stage2", ["schedule=report", "hardware=h100_8"], 8)
    measured = with_measured(written(), job, H100, (FAST, SLOW))
    assert [sentence.split(":")[0] for sentence in measured.taken] == ["attention", "vision", "decoder"]
    words = [
        "schedule=report",
        "train.global_batch_size=1",
        "train.vision_recompute=false",
        "train.vision_chunk_crops=0",
    ]
    benched = Job(compose("stage2", words), 1)
    for column in measured.columns:
        assert column.decoder_attention == pytest.approx(300e12 / PEAK)
        seconds = part_seconds(benched, column, H100)
        assert sum(seconds[part] for part in VISION) == pytest.approx(0.640)
        # (1,300 - 1,100) ms for four layers more.
        assert seconds["decoder"] + seconds["decoder attention"] == pytest.approx(36 * 0.050)
    before, after = estimate(job), estimate(job, H100, measured.columns)
    assert after.slow.seconds / after.fast.seconds < before.slow.seconds / before.fast.seconds
    nothing = with_measured(written(lines={"nccl": []}), job, H100, (FAST, SLOW))
    assert nothing.columns == (FAST, SLOW) and all("assumed" in sentence for sentence in nothing.taken)


@pytest.mark.parametrize(
    "section, row, reason",
    [
        ("attention", {"kernel": "flex", "tflops": 200.0}, "tokens: Field required"),
        ("attention", {"tokens": 4096, "kernel": "flex", "tflops": "fast"}, "tflops"),
        ("attention", {"tokens": 4096, "kernel": "flex", "tflops": 0}, "greater than 0"),
        ("attention", {"tokens": 4096, "kernel": "flex", "tflops": float("nan")}, "finite"),
        ("attention", {"tokens": 4096, "kernel": "flex", "tflops": 9999.0}, "more than the peak"),
        ("vision", dict(LINES["vision"][2], layer_spec="bogus"), "layer_spec"),
        ("step", dict(CASE, layers=12, extrapolated=False, tokens=16384, ms=1000.0), "measure again"),
    ],
)
def test_figures_that_cannot_be_are_refused(written, section, row, reason):
    lines = LINES | {section: [*LINES[section][:1], row] if section == "step" else [row]}
    with pytest.raises(ConfigError, match=reason):
        with_measured(written(lines=lines), job_of("stage2", ["hardware=h100_8"], 8), H100, (FAST, SLOW))


def test_files_of_other_devices_and_sizes_are_refused(written, tmp_path):
    job = job_of("stage2", ["hardware=h100_8"], 8)
    for changes, reason in (({"tiny": True}, "toy sizes"), ({"device": "NVIDIA H200"}, "--gpu 'NVIDIA H200'")):
        with pytest.raises(ConfigError, match=reason):
            with_measured(written(changes), job, H100, (FAST, SLOW))
    for text, reason in (
        ("decoder: 5\n", "no file of JSON lines"),
        ("", "is empty"),
        ("[]", "line 1 is not of"),
        (json.dumps({"ms": 5}), "line 1 is not of"),
    ):
        (tmp_path / "other").write_text(text)
        with pytest.raises(ConfigError, match=reason):
            with_measured(tmp_path / "other", job, H100, (FAST, SLOW))
    with pytest.raises(ConfigError, match="cannot be read"):
        with_measured(tmp_path / "absent", job, H100, (FAST, SLOW))


@pytest.mark.parametrize(
    "recompute, passes, gathers",
    [
        ({}, 0, 0),
        ({"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 10}, 4 * 10, 10),
        ({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}, 4 * 36, 36),
        ({"recompute_granularity": "selective", "recompute_modules": ["mlp"]}, 2 * 36, 0),
        ({"recompute_granularity": "selective"}, 0, 36),  # attention alone
    ],
)
def test_layers_that_run_again_send_again(recompute, passes, gathers):
    """TP 2 with sequence parallelism, CP 2 that gathers keys and values; 36 layers, of width 4,096 and 8 key heads."""
    words = ["model=molmo2_8b", "hardware=h100_8", "transformer={}", "train.vision_chunk_crops=8"]
    words += ["parallel.context_parallel_size=2", "parallel.cp_comm_type=all_gather"]
    config = compose("stage2", words)
    job = Job(replace(config, transformer=recompute), 8)
    sent = {}
    for item in traffic(job):
        if "vision" not in item.what:
            sent[item.kind] = sent.get(item.kind, 0) + item.bytes
    tokens = config.data.seq_length // 2 * config.train.micro_batch_size
    # In bf16, of 2 ranks: 10 passes of a layer, those of what runs again, and 5 at both ends.
    assert sent["TP"] == job.micro_batches * (10 * 36 + passes + 5) * tokens * 4096 * 2 / 2
    # A gather and a scatter of a layer, and a gather when it runs again.
    assert sent["CP"] == job.micro_batches * (2 * 36 + gathers) * tokens * 2 * (8 // 2) * 128 * 2
