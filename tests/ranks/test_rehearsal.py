"""tools/rehearse.py: figures against the planner's, ranks that agree, and faults that it has to find."""

import json

import pytest
from programs import python

SMALL = [
    "model=tiny",
    "data=sample",
    "optim=from_scratch",
    "data.seq_length=320",
    "data.max_crops=6",
    "data.max_frames=6",
    "model.num_layers=2",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
]
RECOMPUTE = [
    "+transformer.recompute_granularity=full",
    "+transformer.recompute_method=uniform",
    "+transformer.recompute_num_layers=1",
]


def rehearse(tmp_path, *words, stage="stage1", code=0):
    """(the figures, what was printed on standard error)."""
    out = tmp_path / "out.json"
    result = python("tools/rehearse.py", "--config-name", stage, *words, "--json", out)
    assert result.returncode == code, f"{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return json.loads(out.read_text()), result.stderr


def counted(figures, rank, figure):
    rows = next(each for each in figures["ranks"] if each["rank"] == rank)["beside"]
    return next((row["counted"], row["planned"]) for row in rows if row["figure"] == figure)


def off(figures, rank=0):
    rows = next(each for each in figures["ranks"] if each["rank"] == rank)["beside"]
    return {row["figure"]: row["off_percent"] for row in rows}


@pytest.mark.slow
def test_two_replicas_and_the_planner_agree(tmp_path):
    figures, _ = rehearse(tmp_path, *SMALL, *RECOMPUTE, "parallel=tp2", "gpus=4", "--ranks", "0,2")
    assert [each["rows"] for each in figures["ranks"]] == ["full", "pictures"]
    found = off(figures)
    assert found["weights"] == pytest.approx(0, abs=1.5) and found["gradients"] == pytest.approx(0, abs=1.5)
    assert found["peak of the step"] == pytest.approx(0, abs=8), found  # the tiny model's norms and masks weigh more
    for kind in ("DP traffic", "FLOP"):
        assert found[kind] == pytest.approx(0, abs=3), found
    # So small a model's gradients are one bucket, and the vision tower's are in the shard of one replica alone.
    sent, planned = zip(*(counted(figures, rank, "vision gradients' traffic") for rank in (0, 2)))
    assert sum(sent) == pytest.approx(sum(planned), rel=0.03) and sent[0] != sent[1]
    for rank in (0, 2):
        assert off(figures, rank)["TP traffic"] == pytest.approx(0, abs=1)
    assert found["vision traffic"] == pytest.approx(0, abs=0.1), found


@pytest.mark.slow
def test_stages_of_a_pipeline_send_what_the_others_receive(tmp_path):
    words = ["parallel=pp2", "parallel.num_layers_in_first_pipeline_stage=1", "model.num_layers=3", "gpus=2"]
    figures, _ = rehearse(tmp_path, *SMALL, *words)
    assert [each["coordinates"]["PP"] for each in figures["ranks"]] == [0, 1]
    for rank in (0, 1):
        assert off(figures, rank)["PP traffic"] == pytest.approx(0, abs=0.1)


# Shipped layouts of different kinds with their real widths and two layers: stage, ranks, overrides.
FEW = ["model.vit.num_layers=2", "model.vit.feature_layers=[-1,-2]"]
LAYOUTS = {
    "optimizer on the host": ("stage1", [0], "model=molmo2_4b", "hardware=h100_1", "gpus=1"),
    "8 GPUs, FP8": ("stage2", [0], "model=molmo2_8b", "hardware=h100_8", "gpus=8", "train.precision=fp8"),
    "long rows": ("stage3", [0], "model=molmo2_8b", "hardware=h100_128", "gpus=128"),
    "OLMo's layers": ("stage2", [0], "model=molmo2_o_7b", "hardware=h100_64", "gpus=64"),
    "interleaved pipeline": (
        *("stage2", [0, 4], "model=molmo2_8b", "parallel=pp2", "gpus=8"),
        *("model.num_layers=4", "parallel.virtual_pipeline_model_parallel_size=2"),
    ),
    "images over 8 ranks": ("stage1", [0], "model=molmo2_4b", "hardware=h100_1024", "gpus=1024"),
}
# Rehearses them in one process after the other, of one program that has imported everything.
REHEARSE = """
import json, sys
sys.path.insert(0, "tools")
import rehearse
from molmo2_nemo.auto import resolve
from molmo2_nemo.command_line import compose, take_gpus
from molmo2_nemo.config.checks import check_settings
from molmo2_nemo.rehearsal.plan import beside, plan
out, layouts = sys.argv[1:]
figures = {}
for name, (stage, ranks, *words) in json.loads(layouts).items():
    gpus, overrides = take_gpus(words)
    config = compose(stage, overrides)
    check_settings(config, gpus)
    made = plan(resolve(config, gpus)[0], gpus, None, ranks)
    found, failed = rehearse.rehearse_all(made, 1)
    faults = [fault for counted in found for fault in counted.faults] + list(failed.values())
    figures[name] = [made.notes, faults, [[beside(made, counted), sum(counted.syncs.values())] for counted in found]]
open(out, "w").write(json.dumps(figures))
"""


@pytest.mark.slow
def test_shipped_layouts_with_few_layers(tmp_path):
    layouts = {
        name: [stage, ranks, "model.num_layers=2", *FEW, *words] for name, (stage, ranks, *words) in LAYOUTS.items()
    }
    result = python("-c", REHEARSE, tmp_path / "out.json", json.dumps(layouts))
    assert result.returncode == 0, result.stderr[-4000:]
    figures = json.loads((tmp_path / "out.json").read_text())
    for name, (notes, faults, ranks) in figures.items():
        assert not faults and len(ranks) == len(LAYOUTS[name][1]), (name, faults)
        assert ("stand-ins for Transformer Engine" in "".join(notes)) == (name == "8 GPUs, FP8")
        for rows, waits in ranks:
            assert waits <= 8, (name, waits)  # none of a layer or a micro-batch
            by_figure = {row["figure"]: row for row in rows}
            by_figure.pop("vision gradients' traffic", None)  # of one replica, the planner's is a mean
            assert len(by_figure) >= 6
            for figure, row in by_figure.items():
                bound = 3 if figure == "peak of the step" else 1
                assert row["off_percent"] is None or abs(row["off_percent"]) <= bound, (name, figure, row)
    host = {row["figure"]: row for row in figures["optimizer on the host"][2][0][0]}
    # Gradients in float32 go there, weights in bf16 come back; weights, two moments and gradients stay there.
    trained = host["copied to and from the host"]["counted"] / (4 + 2)
    assert 16 <= host["optimizer on the host"]["counted"] / trained < 20


# What a program plants before it starts the tool: code, and the sentence that has to come.
FAULTS = {
    "skipped collective": (
        """
from molmo2_nemo.model import collectives
import torch.distributed as dist
real = collectives._AllGather.forward
def forward(ctx, x, group, copies):
    if dist.get_rank() == 1:
        ctx.group, ctx.copies = group, copies
        return x.repeat(group.size(), *[1] * (x.dim() - 1))
    return real(ctx, x, group, copies)
collectives._AllGather.forward = staticmethod(forward)
""",
        "ranks 0 and 1 differ at call 1 that they share",
    ),
    "all pairs of tokens": (
        """
from molmo2_nemo.model import layers
real = layers.DecoderLayer.forward
def forward(self, *args, hidden_states, **kwargs):
    scores = hidden_states[:, 0] @ hidden_states[:, 0].t()
    return real(self, *args, hidden_states=hidden_states + scores.mean(), **kwargs)
layers.DecoderLayer.forward = forward
""",
        "a number for every pair of tokens",
    ),
    "item in a layer": (
        """
from molmo2_nemo.model import layers
real = layers.RMSNorm.forward
layers.RMSNorm.forward = lambda self, x: (x.sum().item(), real(self, x))[1]
""",
        "waits for the device in every layer",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(tmp_path, fault):
    code, sentence = FAULTS[fault]
    program = tmp_path / "planted.py"
    program.write_text(
        f"{code}\nimport runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = [*SMALL, "gpus=2"] + (["parallel=tp2", "--ranks", "0,1"] if "collective" in fault else ["--ranks", "0"])
    result = python(program, "tools/rehearse.py", "--config-name", "stage1", *words)
    assert result.returncode == 1, result.stderr[-3000:]
    assert sentence in result.stderr, result.stderr[-3000:]


def test_what_cannot_be_rehearsed_is_said(tmp_path):
    for words, code, sentence in (
        (["gpus=8", "train.precision=fp8", "train.vit_fp8=true"], 3, "rehearse train.vit_fp8=false"),
        (["gpus=8", "parallel=pp2", "--micro-batches", "1"], 2, "at least 2 are in flight"),
        (["gpus=8", "--ranks", "8"], 2, "there are ranks 0 to 7"),
        (["gpus=8", "--ranks", "x"], 2, "--ranks 0,1"),
    ):
        result = python("tools/rehearse.py", "--config-name", "stage2", *words)
        assert result.returncode == code and sentence in result.stderr and "Traceback" not in result.stderr
