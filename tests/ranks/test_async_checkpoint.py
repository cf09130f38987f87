"""Checkpoints that are written while training goes on: the same files, and the same resume. test_survive.py has what is
left when they fail."""

import json
import shutil

import pytest
from programs import TINY_SETTINGS, figures, python, run_ranks, succeeded

from molmo2_nemo import checkpoint_dir

TINY = [
    "recipes/stage2_sft.py",
    *TINY_SETTINGS,
    "data.num_workers=2",
    "train.validation_batches=0",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
]


def records(run_dir) -> dict[int, dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    same = ("loss", "loss_by_source", "grad_norm", "tokens", "tokens_seen", "data")
    return {line["step"]: {key: line[key] for key in same} for line in lines if line["kind"] == "train"}


@pytest.mark.slow
def test_a_run_with_them_is_the_same_and_continues_bit_for_bit(sample, tmp_path):
    """Two data-parallel ranks; the resumed run ends like the one that waits for its checkpoints."""

    def train(run_dir, *overrides):
        return succeeded(
            run_ranks(
                2,
                *TINY,
                f"data.root={sample}",
                f"run_dir={run_dir}",
                "train.max_steps=7",
                "train.save_every=2",
                *overrides,
            )
        )

    train(tmp_path / "waits", "train.async_checkpoint=auto")
    first = train(tmp_path / "goes_on", "train.async_checkpoint=true")
    assert "training waited" in first.stdout and records(tmp_path / "goes_on") == records(tmp_path / "waits")
    folder = tmp_path / "goes_on" / "checkpoints"
    assert [path.name for path in checkpoint_dir.find_checkpoints(folder)] == [f"step_{n:08d}" for n in (4, 6, 7)]
    # What a save that was killed leaves behind is passed over, and removed by the next one.
    for step in (6, 7):
        shutil.rmtree(folder / f"step_{step:08d}")
    (folder / ".step_00000005.tmp").mkdir()
    (tmp_path / "goes_on" / "metrics.jsonl").unlink()
    again = train(tmp_path / "goes_on", "train.async_checkpoint=true")
    assert "resumed step 4" in again.stdout and not (folder / ".step_00000005.tmp").exists()
    expected = {step: record for step, record in records(tmp_path / "waits").items() if step > 4}
    assert records(tmp_path / "goes_on") == expected


@pytest.mark.slow
def test_shards_make_the_checkpoint_that_megatron_makes_of_gathered_state(tmp_path):
    """Megatron's own ways to save and load are the oracle: each loads what the others wrote, and no bit differs."""
    found = figures(run_ranks(2, "tools/bench/save.py", "--layers", 1, "--folder", tmp_path))
    assert found["differing"] == 0
    grown = {way: [row for row in found["rows"] if row["way"] == way] for way in ("own shards", "every rank")}
    for figure in ("save_gb", "load_gb"):
        own, gathered = ([row[figure] for row in rows] for rows in grown.values())
        assert max(own) < max(gathered) / 2, figure  # a rank may have had room from before


def test_what_is_written_is_what_was_there_when_the_save_began(tmp_path):
    """The tensors change at once, while the thread writes for a good part of a second; the file has the old ones."""
    result = succeeded(python("-c", SNAPSHOT, tmp_path))
    assert result.stdout.split() == ["False", "None", "0.0", "1.0"]


SNAPSHOT = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from molmo2_nemo import cpu
cpu.install()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from molmo2_nemo.hf.convert import read_tensor
from molmo2_nemo.training.checkpoint import ShardedSave
tensor = torch.arange(2.0).repeat_interleave(2**24)
save = ShardedSave({"w": ShardedTensor.from_rank_offsets("w", tensor)}, Path(sys.argv[1]), asynchronous=True)
tensor.fill_(7)
print(save.written())
print(save.finish())
found = read_tensor(Path(sys.argv[1]), "w", (2**25,), torch.float32)
print(*(float(x) for x in (found[:2**24].unique(), found[2**24:].unique())))
"""
