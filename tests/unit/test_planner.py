"""The planner: parameters against transformers, memory against measured bytes, presets, advice, the command line."""

import itertools
import json
import re
import sys
from dataclasses import replace

import plan
import pytest
import torch
from programs import run, succeeded

from molmo2_nemo.auto import resolve
from molmo2_nemo.command_line import compose
from molmo2_nemo.config.checks import check, check_settings
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import padded_vocab_size
from molmo2_nemo.paths import CONF_DIR
from molmo2_nemo.planner.flops import training_flops
from molmo2_nemo.planner.memory import GIB, Job, count_parameters, in_flight, peak, stage_memory, worst_stage
from molmo2_nemo.planner.parameters import parameters
from molmo2_nemo.planner.run_costs import checkpoint_bytes
from molmo2_nemo.planner.search import RECOMPUTE, search
from molmo2_nemo.planner.step_time import estimate
from molmo2_nemo.planner.verdict import verdict

MODELS = ("molmo2_4b", "molmo2_8b", "molmo2_o_7b")
STAGES = ("stage1", "stage2", "stage3")
SCHEDULES = ("seed", "report")
PRESETS = {f"h100_{gpus}": gpus for gpus in (1, 8, 64, 128, 256, 512, 1024)}


# ---- parameters and memory against what is measured ----


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_transformers(name):
    from transformers import Molmo2ForConditionalGeneration

    from molmo2_nemo.hf.architecture import hf_config

    model = compose("stage2", [f"model={name}"]).model
    with torch.device("meta"):
        theirs = sum(p.numel() for p in Molmo2ForConditionalGeneration(hf_config(model)).parameters())
    ours = sum(elements for _, elements, _ in parameters(model))
    # Our tables are padded to 128 rows; transformers' always has a head of its own.
    tables = 1 if model.tie_embeddings else 2
    ours -= tables * (padded_vocab_size(model.vocab_size) - model.vocab_size) * model.hidden_size
    ours += model.vocab_size * model.hidden_size if model.tie_embeddings else 0
    assert ours == theirs


def test_lora_trains_its_adapters_and_keeps_nothing_for_the_rest():
    """Adapters of PEFT on transformers' model have as many numbers; gradients and optimizer are theirs alone."""
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model
    from transformers import Molmo2ForConditionalGeneration

    from molmo2_nemo.hf.architecture import hf_config

    words = ["model=molmo2_8b", "lora.rank=16", "train.global_batch_size=8"]
    job, full = (Job(compose("stage2", overrides), 1) for overrides in (words, words[:1] + words[2:]))
    names = r".*language_model.*_proj"
    with torch.device("meta"):
        theirs = Molmo2ForConditionalGeneration(hf_config(job.config.model))
        inject_adapter_in_model(PeftConfig(r=16, target_modules=names), theirs)
    adapters = sum(p.numel() for name, p in theirs.named_parameters() if ".lora_" in name)
    by_component, [rank] = count_parameters(job)
    assert rank.trained == adapters == by_component["llm"].trained
    parts, all_trained = ({part.name: part.bytes for part in stage_memory(j, 0)} for j in (job, full))
    assert parts["gradients"] == 4 * adapters and parts["optimizer"] == 12 * adapters
    assert parts["weights"] == 2 * rank.total and parts["gradients of chunks"] == 0
    assert all_trained["gradients"] > 100 * parts["gradients"]
    # Split as the matrices are: at two ranks more than half, since the whole sides are on both.
    two = Job(compose("stage2", [*words, "parallel=tp2"]), 2)
    assert adapters / 2 < count_parameters(two)[1][0].trained < 0.8 * adapters
    assert checkpoint_bytes(job) == 14 * adapters


# ---- presets ----


@pytest.fixture(scope="module")
def models():
    return {name: compose("stage2", [f"model={name}"]).model for name in MODELS}


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_serve_every_model_stage_and_schedule(preset, models):
    gpus = PRESETS[preset]
    for stage, schedule in itertools.product(STAGES, SCHEDULES):
        composed = compose(stage, [f"hardware={preset}", f"schedule={schedule}", "model=molmo2_4b"])
        for name, model in models.items():
            config = replace(composed, model=model)
            check(config, gpus)  # with Megatron's own fields
            assert verdict(resolve(config, gpus)[0], gpus) is None, (name, stage, schedule)
            assert config.train.global_batch_size == 128 and config.parallel.tensor_model_parallel_size <= 8
            # None is accepted because everything would be: half of a GPU's memory is too little for stage 3 of the 8B.
            if preset in ("h100_1", "h100_8") and (name, stage) == ("molmo2_8b", "stage3"):
                assert f"gradients {29 if preset == 'h100_1' else 15}." in verdict(
                    resolve(config, gpus, 40.0)[0], gpus, 40.0
                )


def test_every_h100_preset_is_tested():
    assert {path.stem for path in (CONF_DIR / "hardware").glob("h100_*.yaml")} == set(PRESETS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset, gpus, model", [("h100_8", 512, "molmo2_4b"), ("h100_256", 2048, "molmo2_8b"), ("any", 4096, "molmo2_o_7b")]
)
def test_layouts_that_share_a_batch_are_named(preset, gpus, model):
    """Above as many data-parallel ranks as rows of a step. What is named is accepted, also by Megatron."""
    words = [f"hardware={preset}", f"model={model}"]
    with pytest.raises(ConfigError) as refused:
        check(compose("stage2", words), gpus)
    sentence, ways = str(refused.value).split(": use ")
    assert sentence.startswith("train.global_batch_size=128 is not a multiple of train.micro_batch_size=1 x ")
    ways = ways.removesuffix(".").split(", or ")
    assert len(ways) == 4 and ways[0] == f"train.global_batch_size={sentence.rsplit('= ')[-1]}"
    for way in ways:
        changed = compose("stage2", [*words, *way.split()])
        check(changed, gpus)
        assert changed.train.global_batch_size == 128 or way == ways[0]


@pytest.mark.parametrize(
    "stage, words, gpus, ways",
    [
        ("stage1", ["schedule=report"], 64, ["global_batch_size=256", "micro_batch_size=2"]),
        (
            "stage1",
            ["schedule=report", "train.micro_batch_size=96"],
            2,
            ["global_batch_size=192", "micro_batch_size=64"],
        ),
        ("stage2", [], 384, ["global_batch_size=384"]),  # no layout makes 3 a divisor
    ],
)
def test_other_ways_to_share_a_batch(stage, words, gpus, ways):
    with pytest.raises(ConfigError) as refused:
        check(compose(stage, ["model=molmo2_4b", *words]), gpus)
    found = str(refused.value).split(": use ")[1].removesuffix(".").split(", or ")
    assert found == [f"train.{way}" for way in ways]
    for way in found:
        check(compose(stage, ["model=molmo2_4b", *words, way]), gpus)


# ---- verdict and advice ----


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, stage, gpus", [("molmo2_8b", "stage3", 128), ("molmo2_8b", "stage2", 8), ("molmo2_4b", "stage2", 8)]
)
def test_advice_works_when_taken(model, stage, gpus):
    words = [f"model={model}", "schedule=report", "train.vision_recompute=false"]
    config = compose(stage, words)
    sentence = verdict(config, gpus)
    assert sentence is not None and "\n" not in sentence and sentence.endswith(".")
    needed = peak(worst_stage(Job(config, gpus))[1])[0] / GIB
    assert sentence.startswith(f"{needed:.1f} GiB are needed")
    advised = re.findall(r"((?:\w+\.\w+=\w+ ?)+)\((\d+\.\d) GiB\)", sentence)
    assert advised
    for keys, gib in advised:
        changed = compose(stage, [*words, *keys.split()])
        assert peak(worst_stage(Job(changed, gpus))[1])[0] / GIB == pytest.approx(float(gib), abs=0.06)
        if "no single key" not in sentence:
            assert verdict(changed, gpus) is None
    assert verdict(config, gpus, 1000.0) is None


def test_a_plan_imports_neither_torch_nor_megatron():
    words = ["plan.py", "--config-name", "stage2", "hardware=h100_8", "gpus=8", "--search", "--json"]
    code = f"import sys; sys.argv = {words}; from tools.plan import main; main(); "
    code += "print({'torch', 'megatron'} & set(sys.modules))"
    assert succeeded(run([sys.executable, "-c", code])).stdout.endswith("\nset()\n")


# ---- formulas ----


@pytest.mark.parametrize("gpus, micro_batches", [(4, 1), (4, 2), (4, 9)])
def test_micro_batches_in_flight_follow_the_schedule(gpus, micro_batches):
    config = compose("stage1", ["parallel.pipeline_model_parallel_size=4", f"train.global_batch_size={micro_batches}"])
    job = Job(config, gpus)
    for stage in range(4):
        # 1F1B as a list of steps: so many forward passes first, then one of each, then what is left.
        warm_up = min(4 - stage - 1, micro_batches)
        steps = [1] * warm_up + [1, -1] * (micro_batches - warm_up) + [-1] * warm_up
        assert in_flight(job, stage) == max(itertools.accumulate(steps)), stage


def test_interleaving_holds_what_its_schedule_holds():
    words = ["parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_model_parallel_size=3"]
    job = Job(compose("stage1", [*words, "train.global_batch_size=8"]), 4)
    # Megatron's schedules.py: (stages after this one) x 2 + (pieces - 1) x stages forward passes of a piece come first.
    assert [in_flight(job, stage) for stage in range(4)] == [(2 * (3 - s) + 8 + 1) / 3 for s in range(4)]


def test_rows_hold_what_a_packed_row_can():
    from molmo2_nemo.data.encode import ROOT_SEGMENT  # noqa: F401  the numbering of segments
    from molmo2_nemo.model.mask import SEGMENTS_PER_EXAMPLE, dense_mask

    job = Job(compose("stage2", ["data.seq_length=4096", "data.max_crops=30", "data.max_frames=30"]), 1)
    work = job.work
    assert (work.crops, work.visual_tokens, work.pooled_patches) == (30, 30 * 81, 30 * 729)
    # One example: its visual tokens see each other, the text comes after them.
    segments = torch.zeros(1, 4096, dtype=torch.int64)
    vision = torch.arange(4096)[None] < work.visual_tokens
    assert SEGMENTS_PER_EXAMPLE > 1
    assert work.attended == pytest.approx(dense_mask(segments, vision).sum().item(), rel=0.001)
    # The crop budget is no use where the row is too short for it.
    assert Job(compose("stage2", ["data.seq_length=4096"]), 1).work.crops == 4096 // 83


def test_recomputation_trades_memory_for_time():
    config = compose("stage2", ["hardware=h100_64", "schedule=report", "train.vision_chunk_crops=8"])
    found = []
    for values in ({}, dict(recompute_granularity="selective", recompute_modules=["mlp"]), RECOMPUTE["full"]):
        job = Job(replace(config, transformer=values), 64)
        found.append((peak(stage_memory(job, 0))[0], -estimate(job).seconds))
    assert found == sorted(found, reverse=True) and len({x for x, _ in found}) == 3


def test_estimate_counts_the_flops_of_the_whole_step():
    job = Job(resolve(compose("stage2", ["hardware=h100_8"]), 8)[0], 8)
    cost = estimate(job)
    expected = training_flops(job.config.model, ("head",), **vars(job.work)) * job.config.train.global_batch_size
    assert sum(cost.flops.values()) == pytest.approx(expected)
    assert cost.mfu == pytest.approx(expected / cost.seconds / 8 / 989.4e12)
    assert 0 < cost.mfu < 1
    # ZeRO-1 on 4 ranks sends 3/4 of 4 bytes of gradients and 2 of weights for each trained parameter of a rank.
    sent = sum(item.bytes for item in cost.traffic if item.kind == "DP")
    trained = [part for part in stage_memory(job, 0) if part.name == "gradients"][0].bytes / 4
    assert sent == pytest.approx(trained * 6 * 3 / 4)


def test_search_lists_only_what_fits_fastest_first():
    config = compose("stage2", ["parallel=default"])
    found = search(config, 8, 79.6, "NVIDIA H100 80GB HBM3")
    times = [cost.seconds for _, cost, _ in found]
    assert len(found) > 3 and times == sorted(times)
    for job, _, needed in found:
        check_settings(job.config, 8)
        assert verdict(job.config, 8) is None and needed <= (79.6 - 4) * GIB


# ---- the command ----


@pytest.mark.slow
def test_command_says_what_fits_and_what_does_not(capsys, monkeypatch):
    def run_plan(*words):
        monkeypatch.setattr(sys, "argv", ["plan.py", *words])
        status = plan.main()
        output = capsys.readouterr()
        return status, output.out, output.err

    status, out, err = run_plan("--config-name", "stage3", "model=molmo2_8b", "gpus=128", "hardware=h100_128")
    assert status == 0 and out.rstrip().endswith("fits") and not err
    for word in (
        "weights",
        "gradients",
        "optimizer",
        "decoder activations",
        "vision workspace",
        "PFLOP",
        "days",
        "unmeasured",
        "NVLink",
    ):
        assert word in out, word
    status, out, _ = run_plan("--config-name", "stage3", "model=molmo2_8b", "gpus=32")
    assert status == 1 and "does not fit: " in out and "transformer.recompute_granularity=full" in out
    status, out, _ = run_plan("--config-name", "stage2", "gpus=8", "hardware=h100_8", "--json", "--search")
    found = json.loads(out)
    assert status == 0 and found["fits"] and found["search"] and found["peak_bytes"] > GIB
    for words, reason in (
        (["gpus=8", "trian.seed=1"], "has no key trian"),
        ([], "gpus has no value"),
        (["gpus=eight"], "gpus=eight is not a number"),
        (["gpus=3", "parallel.tensor_model_parallel_size=3"], "must be a power of two"),
        (["gpus=8", "parallel.context_parallel_size=64"], "cannot be divided"),
        (["gpus=8", "--gpu", "H100"], "its peak is not known"),
        (["gpus=8", "hardware=h100_9"], "has no h100_9.yaml"),
        (["gpus=8", "train.max_steps=many"], "train.max_steps"),
        (["gpus=8", "transformer.recompute_granularity=full"], "recompute_method"),
        (["gpus=8", "transformer.no_such=1"], "no field no_such"),
        (["gpus=8", "--serach"], "--serach is no option"),
        (["gpus=8", "--gpu-memory", "3"], "--gpu-memory 3"),
        (["gpus=8", "--gpu-memory", "nan"], "must be a number above the 4 GiB"),
        (["gpus=8", "model.vit.feature_layers=[]"], "name layers of the vision transformer"),
    ):
        status, out, err = run_plan("--config-name", "stage2", *words)
        assert status == 2 and reason in err and err.startswith("error: ") and err.count("\n") == 1 and not out, (
            words,
            err,
        )
    status, _, err = run_plan("--config-name", "stage9", "gpus=8")
    assert status == 2 and "stage9" in err


@pytest.mark.slow
def test_sources_on_this_machine_are_looked_at(tmp_path, capsys, monkeypatch):
    """A source without a training sample ends the plan; one that is not on this machine does not."""
    from test_blend import fixed, make_source

    make_source(tmp_path / "data", "good")
    blend = tmp_path / "blend.yaml"
    overrides = [f"data.root={tmp_path / 'data'}", f"data.blend={blend}", "hardware=h100_8", "gpus=8"]
    monkeypatch.setattr(sys, "argv", ["plan.py", "--config-name", "stage2", *overrides])

    def planned(**sources):
        blend.write_text(json.dumps(fixed(**sources)))
        status = plan.main()
        return status, "".join(capsys.readouterr())

    for sources, words in (
        ({"x": ("good", 1), "y": ("away", 1)}, "1 of the 2 sources of data.blend="),
        ({"y": ("away", 1)}, "0 of the 1 sources"),
    ):
        status, output = planned(**sources)
        assert status == 0 and f"data: {words}" in output
    make_source(tmp_path / "data", "empty", train=())
    status, output = planned(x=("good", 1), empty=("empty", 1), y=("away", 1))
    assert status == 2 and f"source empty of data.blend={blend}" in output and "has no training samples" in output
    (tmp_path / "data" / "good" / "train-0.tar").unlink()
    status, output = planned(x=("good", 1))
    assert status == 2 and "lacks 1 of 2 shards" in output
    blend.unlink()
    assert plan.main() == 2 and "names no blend" in capsys.readouterr().err


def test_wrong_settings_are_sentences():
    with pytest.raises(ConfigError, match="recompute_num_layers"):
        check_settings(
            compose("stage1", ["transformer.recompute_granularity=full", "transformer.recompute_method=uniform"]), 1
        )
    with pytest.raises(ConfigError, match="selective"):
        check_settings(
            compose("stage1", ["transformer.recompute_granularity=selective", "transformer.recompute_num_layers=1"]), 1
        )
