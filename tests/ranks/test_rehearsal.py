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
    sent, planned = zip(*(counted(figures, rank, "TP traffic") for rank in (0, 2)))
    assert sum(sent) == pytest.approx(sum(planned), rel=0.03) and sent[0] != sent[1]
    assert found["vision traffic"] == pytest.approx(0, abs=0.1), found


@pytest.mark.slow
def test_stages_of_a_pipeline_send_what_the_others_receive(tmp_path):
    words = ["parallel=pp2", "parallel.num_layers_in_first_pipeline_stage=1", "model.num_layers=3", "gpus=2"]
    figures, _ = rehearse(tmp_path, *SMALL, *words)
    assert [each["coordinates"]["PP"] for each in figures["ranks"]] == [0, 1]
    for rank in (0, 1):
        assert off(figures, rank)["PP traffic"] == pytest.approx(0, abs=0.1)


@pytest.mark.slow
def test_two_layers_of_the_8b_on_128_gpus(tmp_path):
    words = ["model=molmo2_8b", "hardware=h100_128", "gpus=128", "model.num_layers=2", "model.vit.num_layers=2"]
    words += ["model.vit.feature_layers=[-1,-2]", "train.vision_chunk_crops=0", "--ranks", "0"]
    figures, _ = rehearse(tmp_path, *words, stage="stage3")
    found = off(figures)
    assert found.pop("peak of the step") == pytest.approx(0, abs=3), found
    assert len(found) == 9 and all(abs(percent) <= 1 for percent in found.values()), found


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
        (["gpus=8", "hardware=h100_1"], 3, "optimizer_cpu_offload=false"),
        (["gpus=8", "train.precision=fp8"], 3, "rehearse train.precision=bf16"),
        (["gpus=8", "--ranks", "8"], 2, "there are ranks 0 to 7"),
        (["gpus=8", "--ranks", "x"], 2, "--ranks 0,1"),
    ):
        result = python("tools/rehearse.py", "--config-name", "stage2", *words)
        assert result.returncode == code and sentence in result.stderr and "Traceback" not in result.stderr
