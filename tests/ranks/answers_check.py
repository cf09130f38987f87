"""Run by test_answers.py, alone or under torchrun: answers of a small random model at several layouts.

    python answers_check.py DATA_ROOT BLEND HF_DIR SCRATCH_DIR EOS_ID

All of LAYOUTS for this number of ranks, one after the other. EOS_ID: the token that ends an answer. Rank 0 prints one
JSON line: for each layout, of each rank, token ids of the answers, and what answering did besides.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from molmo2_nemo import parallel
from molmo2_nemo.command_line import compose
from molmo2_nemo.config.checks import check
from molmo2_nemo.data import blend
from molmo2_nemo.environment import world_size_from_environment
from molmo2_nemo.hf import convert
from molmo2_nemo.training import answers
from molmo2_nemo.training.step import build_model, load_weights

LAYOUTS = {
    1: {"one rank": []},
    2: {
        "PP 2, uneven": ["pipeline_model_parallel_size=2", "num_layers_in_first_pipeline_stage=1"],
        "PP 2, interleaved": ["pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2"],
        "TP 2 + SP": ["tensor_model_parallel_size=2", "sequence_parallel=true"],
        "CP 2": ["context_parallel_size=2"],
        "CP 2, all_gather": ["context_parallel_size=2", "cp_comm_type=all_gather"],
        "DP 2": [],
    },
    # By hand: the tests' machine has two cores.
    4: {
        "TP 2 + SP, CP 2": ["tensor_model_parallel_size=2", "sequence_parallel=true", "context_parallel_size=2"],
        "TP 2, PP 2": ["tensor_model_parallel_size=2", "pipeline_model_parallel_size=2"],
        "PP 2, interleaved, DP 2": ["pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=2"],
    },
}
MAX_TOKENS = 12


def configuration(root: str, blend_file: str, run_dir: Path, layout: list[str]):
    """The tiny model with a layer for each piece of an interleaved pipeline; rows that hold two or three questions."""
    return compose(
        "stage2",
        [
            "model=tiny",
            "data=sample",
            "schedule=quickstart",
            "model.num_layers=4",
            f"data.root={root}",
            f"data.blend={blend_file}",
            f"run_dir={run_dir}",
            "data.seq_length=256",
            "train.micro_batch_size=1",
            "train.global_batch_size=4",
            "train.generate_every=1",
            "train.generate_examples=8",
            f"train.generate_max_tokens={MAX_TOKENS}",
            *(f"parallel.{setting}" for setting in layout),
        ],
    )


def answered(config, hf_dir: Path, scratch: Path, eos_id: int) -> list[dict]:
    """Figures of the answers at a layout, of every rank. Collective."""
    check(config, world_size_from_environment())
    parallel.initialize(config.parallel, "cpu", timeout_minutes=5, seed=0)
    if dist.get_rank() == 0 and not (scratch / "step_00000000").exists():
        convert.import_hf(hf_dir, scratch / "step_00000000", progress=lambda line: None)
    dist.barrier()
    # Dropout is on while training: it must be off here.
    model = build_model(config.model, config.parallel, "cpu", "fp32", dropout=0.5)
    load_weights(model, scratch / "step_00000000")
    for chunk in model:
        chunk.train()
    group = parallel.model_replica_group(timeout_minutes=5)
    exam = answers.prepare(config, blend.load_blend(config.data), group)
    exam.eos_id = eos_id
    state = torch.random.get_rng_state()
    tokens = answers.answer(model, exam, group, "cpu", MAX_TOKENS)
    stopped = answers.answer(model, exam, group, "cpu", MAX_TOKENS, stop=lambda: True)
    own = {
        "tokens": tokens.tolist(),
        "answers_when_stopped": stopped,
        "random_state_changed": not torch.equal(state, torch.random.get_rng_state()),
        "chunks_left_in_eval": sum(not chunk.training for chunk in model),
    }
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    parallel_state.destroy_model_parallel()
    return ranks


def main() -> None:
    root, blend_file, hf_dir, scratch, eos_id = sys.argv[1:]
    scratch = Path(scratch)
    found = {
        name: answered(configuration(root, blend_file, scratch, layout), Path(hf_dir), scratch, int(eos_id))
        for name, layout in LAYOUTS[world_size_from_environment()].items()
    }
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
