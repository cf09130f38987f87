"""python lora_check.py HF_DIR SCRATCH LAYOUT [--recompute]: adapters on all matrices, at a layout, against PEFT.

LAYOUT: JSON of ParallelConfig's fields. The ranks save the adapters, which are exported in PEFT's format and loaded by
PEFT on transformers' own model. Rank 0 prints one line of JSON: how far logits, loss and gradients are apart, and
what the distributed optimizer holds.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.utils import unwrap_model

from molmo2_nemo import checkpoint_dir, lora_base, parallel
from molmo2_nemo.command_line import compose
from molmo2_nemo.config.components import is_adapter
from molmo2_nemo.config.schema import LORA_TARGETS, LoraConfig, ParallelConfig
from molmo2_nemo.hf import convert
from molmo2_nemo.hf.adapters import adapted, of_layers
from molmo2_nemo.hf.peft import export_adapter
from molmo2_nemo.model.lora import Adapter
from molmo2_nemo.random_batches import pack, random_documents
from molmo2_nemo.training.batches import own_part
from molmo2_nemo.training.checkpoint import save_sharded
from molmo2_nemo.training.optimizer import build_optimizer, clip_and_step
from molmo2_nemo.training.step import (
    build_model,
    forward_backward,
    global_weight,
    load_weights,
    sharded_model_state,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "check"))
import parity
from gradients import difference, make_shards_whole

folder, scratch, layout = Path(sys.argv[1]), Path(sys.argv[2]), ParallelConfig(**json.loads(sys.argv[3]))
RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
LORA = LoraConfig(rank=3, alpha=5.0, targets=list(LORA_TARGETS), rslora=True)


def save(state: dict, path: Path) -> Path:
    """What a sharded state dict holds, as a folder that is not marked as complete."""
    if dist.get_rank() == 0:
        checkpoint_dir.aside(path)
    dist.barrier()
    save_sharded(state, path.with_name(f".{path.name}.tmp"))
    return path.with_name(f".{path.name}.tmp")


def gradients(model, matrices) -> dict[str, torch.Tensor]:
    """Of the adapters, by PEFT's names; on rank 0."""
    found = {id(p): p.main_grad for p in unwrap_model(model)[0].parameters() if p.requires_grad}
    state = sharded_model_state(model, is_adapter)
    for entry in state["model0"].values():
        assert isinstance(entry, ShardedTensor | ShardedTensorFactory)
        entry.data = found[id(entry.data)].view_as(entry.data).clone()
    path = save(state, scratch / "gradients")
    by_layer = {}
    if dist.get_rank() == 0:
        for one, tensors in zip(matrices, [convert.read_adapters(path, [one], LORA.rank) for one in matrices]):
            for layer, both in of_layers(one, *(tensors[key] for key in one.keys())).items():
                by_layer |= {f"{layer}.lora_{which}.default.weight": x for which, x in zip("AB", both)}
    return by_layer


parallel.initialize(layout, "cpu", timeout_minutes=5, seed=0)
base, saved = scratch / "step_00000000", scratch / "step_00000001"
if dist.get_rank() == 0:
    convert.import_hf(folder, base, progress=lambda line: None)
dist.barrier()
architecture = checkpoint_dir.read_model(base)
model = build_model(
    architecture,
    layout,
    "cpu",
    "fp32",
    transformer=RECOMPUTE if "--recompute" in sys.argv else {},
    ddp=dict(use_distributed_optimizer=True),
    freeze=lambda name: not is_adapter(name),
    lora=LORA,
    seed=1,
)
load_weights(model, base)
for name, module in unwrap_model(model)[0].named_modules():
    if isinstance(module, Adapter):
        # Away from zero, alike on the ranks that hold copies: what is in the row decides.
        with torch.no_grad():
            module.b.copy_(0.1 * torch.sin(torch.arange(module.b.numel()).view_as(module.b) + len(name)))
config = compose("stage2", ["model=tiny", "data=sample", "schedule=quickstart"])
optimizer = build_optimizer(config, model, "fp32")

# Saved at this layout, and read again as a checkpoint of LoRA, with PEFT's names.
temporary = save(sharded_model_state(model, is_adapter), saved)
if dist.get_rank() == 0:
    marker = {"step": 1, "stage": "check", lora_base.KEY: lora_base.record(LORA, base, saved)}
    checkpoint_dir.publish(temporary, saved, architecture, marker)
    export_adapter(saved, scratch / "peft")
dist.barrier()

replicas = parallel_state.get_data_parallel_world_size()
rows = 2 * replicas
multiple = layout.context_parallel_size * layout.tensor_model_parallel_size
batches, places = pack(random_documents(architecture, 0), rows, architecture, 0, multiple)
own = [own_part(batch, architecture) for batch in batches[parallel_state.get_data_parallel_rank() :: replicas]]
order = [row for replica in range(replicas) for row in range(replica, rows, replicas)]
for chunk in model:
    chunk.train()
logits = dict(zip(order, parity.gathered_logits(model, own, architecture.vocab_size)))
for chunk in model:
    chunk.zero_grad_buffer()
total = global_weight(own)
losses = forward_backward(model, own, total, z_loss=parity.Z_LOSS)
loss = sum((x[0].double().sum() + parity.Z_LOSS * x[1].double().sum() for x in losses), torch.zeros(()).double())
loss = loss / total
dist.all_reduce(loss)
make_shards_whole(model)
matrices = adapted(architecture, LORA)
ours = gradients(model, matrices)
held = sum(buffer.numel for chunk in model for buffer in chunk.buffers)
updated, norms = clip_and_step(optimizer, 1.0)


def copies_apart() -> float:
    """With dropout: the largest difference of a matrix's gradient between tensor parallel ranks that hold copies."""
    group, apart = parallel_state.get_tensor_model_parallel_group(), 0.0
    for module in unwrap_model(model)[0].modules():
        if isinstance(module, Adapter):
            module.dropout = 0.5
    for chunk in model:
        chunk.zero_grad_buffer()
    forward_backward(model, own, total)
    for module in unwrap_model(model)[0].decoder.modules():
        if isinstance(module, Adapter):
            whole = (module.a if module.matrix.split == "rows" else module.b).main_grad
            gathered = [torch.empty_like(whole) for _ in range(group.size())]
            dist.all_gather(gathered, whole.contiguous(), group=group)
            apart = max(apart, *(difference(other, gathered[0]) for other in gathered))
    return apart


dropped = copies_apart()

if dist.get_rank() == 0:
    from peft import PeftModel

    hf = PeftModel.from_pretrained(parity.load_oracle(folder), scratch / "peft", is_trainable=True).base_model.model
    theirs, their_loss, native = parity.oracle(hf, batches, places)
    expected = {name: gradient for name, gradient in native.items() if ".lora_" in name}
    known = [~row.isnan().any(-1) for row in theirs]
    largest = max(gradient.norm().item() for gradient in expected.values())
    apart = {name: difference(ours[name], expected[name], 1e-5 * largest) for name in expected}
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    plain = parity.oracle(parity.load_oracle(folder), batches, places)[0]
    print(
        json.dumps(
            {
                "same layers": sorted(ours) == sorted(expected),
                "layers": len(expected) // 2,
                "logits": max(difference(logits[r][k], theirs[r][k]) for r, k in enumerate(known)),
                "without adapters": max(difference(plain[r][k], theirs[r][k]) for r, k in enumerate(known)),
                "loss": abs(loss.item() / layout.tensor_model_parallel_size - their_loss) / abs(their_loss),
                "gradients": max(apart.values()),
                "norm": abs(sum(value**2 for value in norms.values()) ** 0.5 - norm) / norm,
                "updated": bool(updated),
                "copies apart": dropped,
                "gradient numbers": held,
                "trained numbers": sum(p.numel() for p in unwrap_model(model)[0].parameters() if p.requires_grad),
                "optimizer numbers": sum(p.numel() for group in optimizer.param_groups for p in group["params"]),
            }
        ),
        flush=True,
    )
dist.barrier()
dist.destroy_process_group()
