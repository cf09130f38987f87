"""Predicted against measured memory of small models: every tensor that a forward and backward pass allocates is
counted.

    python tools/bench/memory.py [--only small] [--out FILE]
    torchrun --standalone --nproc-per-node 2 tools/bench/memory.py      # the cases of two ranks

On a CPU, with Megatron's local layers; of several ranks the first one's. A torch dispatch mode sees the storage of
every tensor that is made and when it goes, so figures are exact bytes of tensors; what kernels take for themselves
inside is not seen. Prints a table and a JSON line. Exit status 1 if a prediction is off by more than 10 %.
"""

import gc
import sys
import weakref

import torch
from tables import parser, print_json, print_table

from molmo2_nemo import compat

BOUND = 0.10
SMALL = [
    "model=tiny",
    "model.num_layers=4",
    "model.hidden_size=256",
    "model.num_attention_heads=8",
    "model.num_query_groups=2",
    "model.head_dim=32",
    "model.ffn_hidden_size=768",
    "model.vit.num_layers=3",
    "model.vit.hidden_size=128",
    "model.vit.num_attention_heads=4",
    "model.vit.ffn_hidden_size=384",
    "data=sample",
    "data.seq_length=512",
    "data.max_crops=12",
    "data.max_frames=12",
]
OLMO = ["model.qk_norm=full_width", "model.norm_after=true", "model.num_query_groups=8"]
FULL = [
    "+transformer.recompute_granularity=full",
    "+transformer.recompute_method=uniform",
    "+transformer.recompute_num_layers=1",
]
MLP = ["+transformer.recompute_granularity=selective", "+transformer.recompute_modules=[mlp]"]
TINY = ["model=tiny", "data=sample", "schedule=quickstart"]
# What patterns freeze counts as trained in the plan (planner/flops.py).
FROM_SCRATCH = ["optim=from_scratch", "optim.freeze_patterns=[]"]
# name -> (precision, overrides)
CASES = {
    "tiny": ("fp32", [*TINY, *FROM_SCRATCH]),
    "tiny full recompute": ("fp32", [*TINY, *FULL]),
    "small": ("fp32", SMALL),
    "small full recompute": ("fp32", [*SMALL, *FULL]),
    "small vision recompute": ("fp32", [*SMALL, *FULL, "train.vision_recompute=true", "train.vision_chunk_crops=4"]),
    "small mlp recompute": ("fp32", [*SMALL, *MLP]),
    "small olmo dropout": ("fp32", [*SMALL, *OLMO, "schedule.stage1.hidden_dropout=0.1"]),
    "small bf16": ("bf16", SMALL),
    "small bf16 full recompute": ("bf16", [*SMALL, *FULL]),
    "small lora": ("bf16", [*SMALL, "lora.rank=8", "lora.dropout=0.1", "lora.targets=[attention,mlp,connector,vit]"]),
    "wide vocabulary": ("fp32", [*SMALL, "model.vocab_size=20000", *FROM_SCRATCH]),
    "wide vocabulary bf16": ("bf16", [*SMALL, "model.vocab_size=20000", *FROM_SCRATCH]),
    "small tp2": ("fp32", [*SMALL, "parallel=tp2"]),
    "small cp2": ("fp32", [*SMALL, "parallel=cp2"]),
    "small cp2 gathered": ("fp32", [*SMALL, "parallel=cp2", "parallel.cp_comm_type=all_gather"]),
}
RANKS = {name: 2 if "tp2" in name or "cp2" in name else 1 for name in CASES}


class Storages(compat.dispatch_mode()):
    """Bytes of the tensors that were made under this mode and still live, and their highest sum."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.current = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in compat.tensors_in(result):
            self.see(tensor.untyped_storage())
        return result

    def see(self, storage) -> None:
        address = compat.storage_address(storage)
        if address in self.alive:
            return
        self.alive[address] = storage.nbytes()
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self.gone, address)

    def gone(self, address: int) -> None:
        self.current -= self.alive.pop(address)


def bytes_of(tensors) -> int:
    """Bytes of the storages of tensors, each once."""
    return sum({compat.storage_address(s): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def measure(config, precision: str) -> tuple[dict[str, int], dict]:
    """(bytes by part, micro-batch) of one optimisation step of one micro-batch on the CPU."""
    from megatron.core import parallel_state

    from molmo2_nemo import parallel
    from molmo2_nemo.config.components import is_frozen
    from molmo2_nemo.random_batches import packed_row
    from molmo2_nemo.training.batches import own_part
    from molmo2_nemo.training.optimizer import build_optimizer, clip_and_step
    from molmo2_nemo.training.step import MODEL_INPUTS, TARGETS, build_model

    optim, tied = config.optim, config.model.tie_embeddings
    schedule = getattr(config.schedule, config.stage)
    parallel.initialize(config.parallel, "cpu", 5, 0)
    chunks = build_model(
        config.model,
        config.parallel,
        "cpu",
        precision,
        config.transformer,
        config.ddp,
        freeze=lambda name: is_frozen(name, optim, tied, config.lora.rank > 0),
        dropout=schedule.hidden_dropout,
        response_dropout=schedule.response_dropout,
        lora=config.lora,
    )
    (model,) = chunks
    model.train()
    tower = model.module.vision
    tower.chunk_crops, tower.recompute = config.train.vision_chunk_crops, config.train.vision_recompute
    batch = packed_row(config.model, config.data.seq_length, config.data.max_crops, seed=0)
    batch["loss_weights"].fill_(1.0)  # the planner's upper bound
    batch = own_part(batch, config.model)
    inputs = {name: batch[name] for name in MODEL_INPUTS}
    found = {
        "weights": bytes_of(model.parameters()),
        "gradients": bytes_of(p.main_grad for p in model.parameters() if p.requires_grad),
    }
    seen = Storages()
    grads = [p.main_grad for p in model.parameters() if p.requires_grad]
    for tensor in (*model.parameters(), *model.module.buffers(), *grads, *batch.values()):
        seen.see(tensor.untyped_storage())
    with seen:
        built = seen.current
        optimizer = build_optimizer(config, chunks, precision)
        masters = seen.current - built
        optimizer.zero_grad()
        gc.collect()
        start = seen.current
        losses = model(**inputs, **{name: batch[name] for name in TARGETS})
        loss = losses.sum()
        found["activations"] = seen.current - start
        seen.peak = seen.current
        loss.backward()
        found["peak of the backward pass"] = seen.peak - start
        del losses, loss
        gc.collect()
        start = seen.current
        clip_and_step(optimizer, 1.0)
        gc.collect()
        found["optimizer"] = seen.current - start + masters
    parallel_state.destroy_model_parallel()
    return found, batch


def predict(config, precision: str, batch: dict) -> dict[str, float]:
    """The planner's figures for the same."""
    from dataclasses import replace

    from molmo2_nemo.environment import world_size_from_environment
    from molmo2_nemo.planner.memory import Job, stage_memory

    config = replace(config, train=replace(config.train, precision=precision, micro_batch_size=1, global_batch_size=1))
    job = Job(config, world_size_from_environment(), device="cpu")
    crops, windows = len(batch["crops"]), len(batch["pooling"])
    job.work = replace(job.work, crops=crops, visual_tokens=windows, pooled_patches=int((batch["pooling"] >= 0).sum()))
    job.units = batch["vision_units"][:, 0].tolist()
    job.places = batch["pooling"].shape[1]
    parts = stage_memory(job, 0)
    of = {part.name: part.bytes for part in parts}
    kept = (
        "decoder activations",
        "ViT activations",
        "connector activations",
        "visual tokens",
        "head's inputs",
        "mask and angles",
    )
    states = ("weights", "gradients", "optimizer", "inputs", "gather buffer")
    phases = [
        sum(part.bytes for part in parts if phase in part.phases and part.name not in states)
        for phase in ("head backward", "decoder backward", "vision backward")
    ]
    return {
        "weights": of["weights"],
        "gradients": of["gradients"],
        "optimizer": of["optimizer"],
        "activations": sum(of.get(name, 0) for name in kept),
        "peak of the backward pass": max(phases),
    }


def compare(name: str) -> list[dict]:
    """A row for each part of a case."""
    from molmo2_nemo.command_line import compose

    precision, overrides = CASES[name]
    config = compose("stage1", ["train.vision_recompute=false", "train.vision_chunk_crops=0", *overrides])
    measured, batch = measure(config, precision)
    predicted = predict(config, precision, batch)
    return [
        dict(
            case=name,
            part=part,
            predicted_kib=predicted[part] / 1024,
            measured_kib=measured[part] / 1024,
            off_percent=100 * (predicted[part] / measured[part] - 1),
        )
        for part in ("weights", "gradients", "optimizer", "activations", "peak of the backward pass")
    ]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--only", action="append", choices=CASES, help="this case alone; may be given again")
    args = arguments.parse_args()
    from molmo2_nemo.environment import quiet_libraries

    quiet_libraries()
    from molmo2_nemo.environment import rank_from_environment, world_size_from_environment

    ranks = world_size_from_environment()
    names = [name for name in args.only or CASES if RANKS[name] == ranks]
    if not names:
        sys.exit(
            f"error: no case of {ranks} rank(s) is asked for: --only names cases of {sorted(set(RANKS.values()))}"
            " ranks."
        )
    rows = [row for name in names for row in compare(name)]
    if rank_from_environment() > 0:
        return
    print_table(rows)
    worst = max(abs(row["off_percent"]) for row in rows)
    record = {"bound_percent": 100 * BOUND, "worst_percent": worst, "torch": torch.__version__, "rows": rows}
    print_json(record, args.out)
    sys.exit(worst > 100 * BOUND)


if __name__ == "__main__":
    main()
