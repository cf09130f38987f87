"""The cases of gpu.py that take optimisation steps."""

import dataclasses
import gc
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from gpu_kernels import model_config, timed
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from molmo2_nemo import checkpoint_dir, parallel
from molmo2_nemo.config.components import COMPONENTS, is_frozen
from molmo2_nemo.config.schema import ComponentOptim, Config, OptimConfig, ParallelConfig, TrainConfig
from molmo2_nemo.planner.flops import frozen_parts, peak_flops, training_flops
from molmo2_nemo.random_batches import packed_row, visible_pairs
from molmo2_nemo.training.batches import own_part
from molmo2_nemo.training.checkpoint import save_sharded
from molmo2_nemo.training.optimizer import build_optimizer, clip_and_step, set_learning_rates
from molmo2_nemo.training.step import (
    build_model,
    forward_backward,
    global_weight,
    load_weights,
    sharded_model_state,
)

FULL_RECOMPUTE = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


class Trainer:
    """A model, its optimizer and their configuration, as training builds them, on the ranks that are there."""

    def __init__(self, device: str, model, layout, precision: str, transformer: dict, lr: float, seed: int = 0):

        parallel.seed_everything(seed)
        torch.manual_seed(seed)
        rates = {name: ComponentOptim(lr=lr, warmup_steps=10) for name in COMPONENTS}
        self.config = Config(
            model=model,
            parallel=layout,
            optim=OptimConfig(**rates),
            train=TrainConfig(max_steps=10_000),
            transformer=transformer,
        )
        optim, tied = self.config.optim, model.tie_embeddings
        self.model = build_model(
            model,
            layout,
            device,
            precision,
            transformer,
            {"use_distributed_optimizer": device == "cuda"},
            freeze=lambda name: is_frozen(name, optim, tied),
        )
        for chunk in self.model:
            chunk.train()
        self.optimizer = build_optimizer(self.config, self.model, precision)
        self.steps = 0

    def step(self, batch: dict) -> float:
        """One optimisation step on one micro-batch; the loss before it, over all ranks."""

        optim = self.config.optim
        self.steps += 1
        set_learning_rates(self.optimizer, self.config, self.steps)
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        total = global_weight([batch])
        weighted = forward_backward(self.model, [batch], total, z_loss=optim.z_loss)
        updated, norms = clip_and_step(self.optimizer, optim.clip_grad, all(bool(x.isfinite().all()) for x in weighted))
        if not updated:
            raise RuntimeError(f"step {self.steps}: loss or gradient is not finite (norms {norms})")
        loss = torch.stack([x[0].double().sum() for x in weighted]).sum() / total
        dist.all_reduce(loss)
        # Tensor parallel ranks hold copies.
        return loss.item() / self.config.parallel.tensor_model_parallel_size


def flops_of(model, batch: dict) -> float:
    """Model FLOPs of a training step on a row."""
    return training_flops(
        model,
        frozen_parts(OptimConfig(), model.tie_embeddings),
        crops=len(batch["crops"]),
        visual_tokens=len(batch["pooling"]),
        pooled_patches=int((batch["pooling"] >= 0).sum()),
        tokens=batch["input_ids"].numel(),
        attended=visible_pairs(batch),
        loss_tokens=int((batch["loss_weights"] > 0).sum()),
    )


def mfu(flops: float, ms: float, device: str, precision: str) -> float | None:
    """Share of the device's peak in that precision; None for a device whose peak is not known."""
    if device == "cpu":
        return None

    peak = peak_flops(torch.cuda.get_device_name(), precision)
    return None if peak is None else flops / (ms / 1e3) / peak


def step(
    device: str,
    tiny: bool,
    layer_spec: str,
    precision: str,
    recipe: str | None,
    recompute: bool,
    kernels: str = "auto",
) -> Iterator[dict]:
    """Whole optimisation steps at two depths, and a line through them."""
    name, S, crops, depths = ("tiny", 256, 4, (1, 2)) if tiny else ("molmo2_4b", 16384, 128, (4, 8))
    whole, layout = model_config(name), ParallelConfig(layer_spec=layer_spec, kernels=kernels)
    parallel.initialize(layout, device, 5, 0)
    transformer = {**({"fp8_recipe": recipe} if recipe else {}), **(FULL_RECOMPUTE if recompute else {})}
    batch, measured = own_part(packed_row(whole, S, crops, seed=1, device=device), whole), []

    def row(model, ms, gib, extrapolated):
        share = mfu(flops_of(model, batch), ms, device, precision)
        return dict(
            layers=model.num_layers,
            extrapolated=extrapolated,
            tokens=S,
            ms=ms,
            tokens_per_second=S / ms * 1e3,
            mfu_percent=None if share is None else 100 * share,
            peak_gib=gib,
        )

    for depth in depths:
        model = dataclasses.replace(whole, num_layers=depth)
        trainer = Trainer(device, model, layout, precision, transformer, lr=1e-5)
        ms, gib = timed(lambda: trainer.step(batch), device, repeats=2 if tiny else 5, warmup=1 if tiny else 3)
        measured.append((ms, gib))
        yield row(model, ms, gib, False)
        trainer = None  # its memory is not counted with the next one's
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    yield row(whole, *(through(depths, values, whole.num_layers) for values in zip(*measured)), True)


def through(x: tuple[int, int], y: list[float | None], at: int) -> float | None:
    """The line through two points, read at a third place."""
    return None if None in y else y[0] + (y[1] - y[0]) / (x[1] - x[0]) * (at - x[0])


def small_model(tiny: bool):
    """Dimensions that every FP8 recipe takes: multiples of 128."""
    if tiny:
        return model_config("tiny")
    return model_config(
        "tiny",
        num_layers=4,
        hidden_size=512,
        num_attention_heads=8,
        num_query_groups=4,
        head_dim=64,
        ffn_hidden_size=1536,
        vocab_size=1024,
    )


def fp8_loss(device: str, tiny: bool, layer_spec: str, recipes: tuple[str, ...]) -> Iterator[dict]:
    """Losses of the same steps in FP8 and with the other layer spec, against bf16."""
    S, steps = (256, 6) if tiny else (2048, 200)
    last = max(1, steps // 4)
    parallel.initialize(ParallelConfig(layer_spec=layer_spec), device, 5, 0)
    model = small_model(tiny)
    plain = "fp32" if device == "cpu" else "bf16"
    batches = [own_part(packed_row(model, S, 8, seed, device), model) for seed in range(steps)]
    baseline = None
    runs = [(layer_spec, plain, None)]
    if layer_spec == "transformer_engine":
        # How much another bf16 kernel changes is what FP8's figure has to be seen against.
        runs += [("local", plain, None), *((layer_spec, "fp8", recipe) for recipe in recipes)]
    for spec, precision, recipe in runs:
        row = {"layer_spec": spec, "precision": precision, "recipe": recipe}
        if precision == "fp8":
            from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

            FP8GlobalStateManager.reset()  # the last model's scales
        try:
            trainer = Trainer(
                device,
                model,
                ParallelConfig(layer_spec=spec),
                precision,
                {"fp8_recipe": recipe} if recipe else {},
                lr=1e-3,
            )
            curve = [trainer.step(batch) for batch in batches]
        except Exception as error:
            yield dict(row, not_measured=f"failed: {type(error).__name__}: {error}"[:300])
            continue
        baseline = baseline or curve
        differences = [abs(a - b) for a, b in zip(curve[-last:], baseline[-last:])]
        yield dict(
            row,
            steps=steps,
            first_loss=curve[0],
            last_loss=sum(curve[-last:]) / last,
            mean_difference=sum(differences) / last,
            max_difference=max(differences),
        )
    if layer_spec == "local":
        reason = "FP8 needs a GPU" if device == "cpu" else "Transformer Engine is not installed"
        for recipe in recipes:
            yield dict(precision="fp8", recipe=recipe, not_measured=f"not measured: {reason}")


def nccl(device: str, tiny: bool) -> Iterator[dict]:
    """Five steps in float32 on two ranks: each alone with the row, then sharing it by tensor or context parallelism."""
    model, alone, weights = small_model(tiny), None, None
    for name, sizes in (
        ("each alone", {}),
        ("TP2", dict(tensor_model_parallel_size=2)),
        ("TP2 + SP", dict(tensor_model_parallel_size=2, sequence_parallel=True)),
        ("CP2 a2a", dict(context_parallel_size=2)),
        ("CP2 all_gather", dict(context_parallel_size=2, cp_comm_type="all_gather")),
    ):
        layout = ParallelConfig(layer_spec="local", **sizes)
        parallel.initialize(layout, device, 5, 0)
        trainer = Trainer(device, model, layout, "fp32", {}, lr=1e-4)
        if weights is None:
            # Random weights depend on the layout: all layouts start from those of the first.
            parent = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(parent)
            weights = Path(parent[0]) / checkpoint_dir.step_name(0)
            aside = [str(checkpoint_dir.aside(weights)) if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(aside)
            save_sharded(sharded_model_state(trainer.model), Path(aside[0]))
            if dist.get_rank() == 0:
                checkpoint_dir.publish(Path(aside[0]), weights, unwrap_model(trainer.model)[0].model, {"step": 0})
            dist.barrier()
        load_weights(trainer.model, weights)
        trainer.optimizer.reload_model_params()
        losses = [trainer.step(packed_row(model, 256 if tiny else 2048, 8, seed, device)) for seed in range(5)]
        alone = alone or losses
        difference = max(abs(a - b) / abs(b) for a, b in zip(losses, alone))
        yield dict(layout=name, first_loss=losses[0], last_loss=losses[-1], largest_relative_difference=difference)
        trainer = None
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        shutil.rmtree(weights.parent)
    dist.barrier()
    dist.destroy_process_group()
