"""Compare this code with transformers' Molmo2 on the weights of a Hugging Face folder, at any layout.

    python tools/check/parity.py HF_DIR...
    torchrun --nproc-per-node 4 tools/check/parity.py HF_DIR --tensor-parallel 2 \
        --sequence-parallel --context-parallel 2

Each folder's weights are imported. Random documents (several images, odd crop grids, a video, text, a message tree)
are packed into rows. transformers runs every document and every branch by itself, in float32, because its own
packed mask lets image tokens of neighbours see each other. Logits, the loss and the gradient of every parameter are
compared; exit status 1 above the bounds. Differences are norms of the difference over norms of transformers' value;
a parameter's norm counts as at least 1e-5 of the whole gradient's, since some (key biases) are zero but for rounding.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from gradients import difference, make_shards_whole, released_gradients
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from molmo2_nemo import checkpoint_dir, parallel
from molmo2_nemo.config.checks import check_parallel
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import ParallelConfig
from molmo2_nemo.environment import world_size_from_environment
from molmo2_nemo.hf import convert
from molmo2_nemo.hf.architecture import model_config_from_hf
from molmo2_nemo.hf.names import read_released
from molmo2_nemo.random_batches import pack, random_documents
from molmo2_nemo.training.batches import own_part
from molmo2_nemo.training.checkpoint import save_sharded
from molmo2_nemo.training.step import (
    MODEL_INPUTS,
    build_model,
    forward_backward,
    global_weight,
    iterators,
    load_weights,
    sharded_model_state,
)

# A hundred times the usual one, so that a mistake in it would show.
Z_LOSS = 1e-2


def load_oracle(folder: Path):
    """transformers' model in float32."""
    from transformers import Molmo2ForConditionalGeneration

    return Molmo2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def oracle(hf, batches: list[dict], places: list[tuple]):
    """transformers, one document and one branch at a time: logits per row [S, V] (NaN elsewhere), loss, gradients."""
    total = sum(batch["loss_weights"].sum() for batch in batches)
    logits, loss_sum = nothing_known(hf, batches), 0.0
    for row, index, own, out in branches(hf, batches, places):
        batch = batches[row]
        logits[row][index[own]] = out.logits[0, own].detach()
        weights = batch["loss_weights"][0, index].clone()
        ce = torch.nn.functional.cross_entropy(out.logits[0], batch["labels"][0, index], reduction="none")
        square = torch.logsumexp(out.logits[0], dim=-1).square()
        loss = ((ce + Z_LOSS * square) * weights).sum() / total
        loss.backward()
        loss_sum += loss.item()
    gradients = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in hf.named_parameters()}
    return logits, loss_sum, gradients


@torch.no_grad()
def causal_logits(hf, batches: list[dict], places: list[tuple]) -> list[torch.Tensor]:
    """The same logits if image tokens saw only what is before them."""
    logits = nothing_known(hf, batches)
    for row, index, own, out in branches(hf, batches, places, causal=True):
        logits[row][index[own]] = out.logits[0, own]
    return logits


def nothing_known(hf, batches: list[dict]) -> list[torch.Tensor]:
    vocab_size = hf.config.text_config.vocab_size
    return [torch.full((batch["input_ids"].shape[1], vocab_size), float("nan")) for batch in batches]


def branches(hf, batches: list[dict], places: list[tuple], causal: bool = False):
    """Yield (row, its positions, those of them that are the branch's own, transformers' output) of each branch."""
    for r, document, (root, *rest) in places:
        batch = batches[r]
        for m, branch in enumerate(rest):
            index = torch.cat([torch.arange(root.start, root.stop), torch.arange(branch.start, branch.stop)])
            types = torch.zeros_like(index)[None] if causal else batch["vision_mask"][0, index].long()[None]
            inputs = {}
            if document.crops:
                crops = torch.cat(document.crops)
                inputs = dict(
                    pixel_values=crops.float() / 127.5 - 1.0,
                    image_token_pooling=torch.cat(document.pooling).long(),
                    # Any split of the tokens will do: transformers joins them again.
                    image_grids=torch.tensor([[sum(w for _, w in document.units), 1, 0, 0]]),
                )
            out = hf(input_ids=batch["input_ids"][0, index][None], mm_token_type_ids=types, use_cache=False, **inputs)
            yield r, index, slice(root.stop - root.start, None) if m else slice(None), out


def gathered_logits(model, batches: list[dict], vocab_size: int) -> list[torch.Tensor] | None:
    """Whole logits [S, V] of each micro-batch of data-parallel replica 0..n, on every rank of the last stage."""

    def step(iterator, model):
        batch = next(iterator)
        return model(**{name: batch.get(name) for name in MODEL_INPUTS}), lambda out, non_loss_data: out.detach()

    rows, S = batches[0]["input_ids"].shape
    parts = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators(model, batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=S,
        micro_batch_size=rows,
        forward_only=True,
        collect_non_loss_data=True,
    )
    state = parallel_state
    key = (
        state.get_pipeline_model_parallel_rank(),
        state.get_data_parallel_rank(),
        state.get_context_parallel_rank(),
        state.get_tensor_model_parallel_rank(),
    )
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (key, parts))
    by_key, last = dict(gathered), state.get_pipeline_model_parallel_world_size() - 1
    whole = []
    for dp in range(state.get_data_parallel_world_size()):
        for m in range(len(batches)):
            columns = [
                torch.cat([by_key[last, dp, cp, tp][m][0] for cp in range(state.get_context_parallel_world_size())])
                for tp in range(state.get_tensor_model_parallel_world_size())
            ]
            whole.append(torch.cat(columns, dim=-1)[:, :vocab_size])
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hf_dirs", type=Path, nargs="+", metavar="HF_DIR")
    for name in ("tensor", "pipeline", "context"):
        parser.add_argument(f"--{name}-parallel", type=int, default=1, metavar="N")
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--cp-comm-type", choices=("a2a", "all_gather"), default="a2a")
    parser.add_argument("--first-stage-layers", type=int, help="decoder layers on the first pipeline stage")
    parser.add_argument("--virtual-pipeline", type=int, metavar="N", help="pieces of the decoder on each pipeline rank")
    parser.add_argument("--distributed-optimizer", action="store_true", help="shard gradients as ZeRO-1 does")
    parser.add_argument("--recompute", action="store_true", help="full activation recomputation")
    parser.add_argument("--rows", type=int, help="rows the five documents are dealt to (default 2 per replica)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-logit-difference", type=float, default=1e-4)
    parser.add_argument("--max-gradient-difference", type=float, default=1e-3)
    parser.add_argument("--export", type=Path, help="also export each, from this layout, into this folder")
    parser.add_argument("--json", type=Path, help="write the figures here, by folder name")
    args = parser.parse_args()
    layout = ParallelConfig(
        tensor_model_parallel_size=args.tensor_parallel,
        pipeline_model_parallel_size=args.pipeline_parallel,
        context_parallel_size=args.context_parallel,
        sequence_parallel=args.sequence_parallel,
        cp_comm_type=args.cp_comm_type,
        num_layers_in_first_pipeline_stage=args.first_stage_layers,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline,
    )
    try:
        run(args, layout)
    except ConfigError as error:
        sys.exit(f"error: {error}")


def run(args, layout: ParallelConfig) -> None:
    world_size = world_size_from_environment()
    for folder in args.hf_dirs:
        check_parallel(layout, model_config_from_hf(folder), world_size)
    parallel.initialize(layout, "cpu", timeout_minutes=5, seed=args.seed)
    figures = {folder.name: compare(args, layout, folder) for folder in args.hf_dirs}
    if dist.get_rank() == 0 and args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0 if all(f["passed"] for f in figures.values()) else 1)


def compare(args, layout: ParallelConfig, folder: Path) -> dict:
    """Import, forward, backward and compare one folder. Returns the figures on every rank."""
    scratch = [tempfile.mkdtemp(prefix="parity-") if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(scratch)
    scratch = Path(scratch[0])
    imported, exported = scratch / "step_00000000", scratch / "step_00000001"
    if dist.get_rank() == 0:
        convert.import_hf(folder, imported, progress=lambda line: None)
    dist.barrier()
    model_config = checkpoint_dir.read_model(imported)
    recompute = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    model = build_model(
        model_config,
        layout,
        "cpu",
        "fp32",
        transformer=recompute if args.recompute else {},
        ddp=dict(use_distributed_optimizer=args.distributed_optimizer),
    )
    load_weights(model, imported)

    replicas = parallel_state.get_data_parallel_world_size()
    rows = args.rows or 2 * replicas
    if rows % replicas or rows > 5:
        raise ConfigError(f"--rows {rows} must be a multiple of the {replicas} data-parallel replicas, and at most 5.")
    batches, places = pack(
        random_documents(model_config, args.seed),
        rows,
        model_config,
        args.seed,
        layout.context_parallel_size * layout.tensor_model_parallel_size,
    )
    own = [own_part(batch, model_config) for batch in batches[parallel_state.get_data_parallel_rank() :: replicas]]
    order = [row for dp in range(replicas) for row in range(dp, rows, replicas)]

    for chunk in model:
        chunk.train()
    logits = gathered_logits(model, own, model_config.vocab_size)
    for chunk in model:
        chunk.zero_grad_buffer()
    total = global_weight(own)
    losses = forward_backward(model, own, total, z_loss=Z_LOSS)
    loss = sum((x[0].double().sum() + Z_LOSS * x[1].double().sum() for x in losses), torch.zeros(()).double()) / total
    dist.all_reduce(loss)
    # Tensor parallel ranks hold copies.
    loss = loss.item() / layout.tensor_model_parallel_size
    if args.distributed_optimizer:
        make_shards_whole(model)
    gradients = released_gradients(model, model_config, scratch)
    result = [None]
    if dist.get_rank() == 0:
        result = [report(args, folder, model_config, batches, places, dict(zip(order, logits)), loss, gradients)]
    dist.broadcast_object_list(result)
    if args.export:
        if dist.get_rank() == 0:
            temporary = checkpoint_dir.aside(exported)
        dist.barrier()
        save_sharded(sharded_model_state(model), exported.with_name(".step_00000001.tmp"))
        if dist.get_rank() == 0:
            checkpoint_dir.publish(temporary, exported, model_config, {"step": 1, "stage": "parity"})
            convert.export_hf(exported, args.export / folder.name, progress=lambda line: None)
    if dist.get_rank() == 0:
        shutil.rmtree(scratch)
    dist.barrier()
    return result[0]


def report(args, folder, model_config, batches, places, logits, loss, gradients) -> dict:
    """Print and return the differences between our figures and transformers'."""
    hf = load_oracle(folder)
    theirs, their_loss, native = oracle(hf, batches, places)
    causal = causal_logits(hf, batches, places)
    known = [~row.isnan().any(-1) for row in theirs]
    logit_difference = max(difference(logits[r][k], theirs[r][k]) for r, k in enumerate(known))
    causal_difference = difference(
        torch.cat([c[k] for c, k in zip(causal, known)]), torch.cat([t[k] for t, k in zip(theirs, known)])
    )
    rows = {name: len(tensor) for name, tensor in native.items()}

    def read(name: str, part: slice | None) -> torch.Tensor:
        return native[name] if part is None else native[name][part]

    expected = {name: read_released(name, model_config, rows, read) for name in gradients}
    if model_config.tie_embeddings:
        both = expected["model.transformer.wte.embedding"] + expected["lm_head.weight"]
        expected["model.transformer.wte.embedding"] = expected["lm_head.weight"] = both
    floor = 1e-5 * torch.stack([g.norm() for g in expected.values()]).norm().item()
    per_parameter = {name: difference(g, expected[name], floor) for name, g in gradients.items()}
    worst = max(per_parameter, key=per_parameter.get)
    figures = {
        "logits": logit_difference,
        "loss": abs(loss - their_loss) / abs(their_loss),
        "gradients": per_parameter[worst],
        "worst_gradient": worst,
        "parameters": len(per_parameter),
        "causal_mask_would_differ_by": causal_difference,
    }
    figures["passed"] = (
        logit_difference <= args.max_logit_difference
        and figures["loss"] <= args.max_logit_difference
        and per_parameter[worst] <= args.max_gradient_difference
    )
    print(folder.name)
    for key, value in figures.items():
        print(f"  {key:30} {value:.3e}" if isinstance(value, float) else f"  {key:30} {value}")
    return figures


if __name__ == "__main__":
    main()
