"""Build a model for this rank, load weights into it, and run one global batch through Megatron's schedules."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from molmo2_nemo import checkpoint_dir
from molmo2_nemo.config.components import is_adapter
from molmo2_nemo.config.errors import ConfigError
from molmo2_nemo.config.schema import LoraConfig, ModelConfig, ParallelConfig, VitConfig
from molmo2_nemo.lora_base import lora_of
from molmo2_nemo.model.collectives import context_slice
from molmo2_nemo.model.lora import add_adapters
from molmo2_nemo.model.molmo2 import Molmo2
from molmo2_nemo.parallel import solo_groups, transformer_configs
from molmo2_nemo.training.batches import own_part

# The fields of a micro-batch that the model's forward takes; the others are for the loss and the log.
MODEL_INPUTS = (
    *("input_ids", "position_ids", "segment_ids", "vision_mask"),
    *("crops", "pooling", "vision_units", "patch_index"),
)
# And what it takes of it to return losses.
TARGETS = ("labels", "loss_weights", "loss_index")


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    device: str,
    precision: str,
    transformer: dict | None = None,
    ddp: dict | None = None,
    freeze: Callable[[str], bool] = lambda name: False,
    dropout: float = 0.0,
    response_dropout: bool = False,
    vision_chunk_crops: int = 32,
    vision_recompute: bool | str = True,
    vit_fp8: bool = False,
    lora: LoraConfig | None = None,
    seed: int = 0,
) -> list[DistributedDataParallel]:
    """This rank's pipeline stage inside Megatron's DistributedDataParallel. Collective.

    A list as Megatron's schedules take it: of one, or of the pieces of an interleaved pipeline.

    transformer, ddp: the user's fields for TransformerConfig and DistributedDataParallelConfig.
    freeze: parameter name, with the layer's number in the whole model -> True where it is not trained.
    dropout: of the decoder's residuals, at positions that carry loss alone if `response_dropout`.
    vision_chunk_crops, vision_recompute, vit_fp8: as in TrainConfig.
    lora: adapters to add; None or a rank of 0: none. seed: of their random values, which are the same at any layout.
    Raises ConfigError on a combination Megatron refuses.
    """
    configs = transformer_configs(model, parallel, device, precision, transformer or {}, dropout, vit_fp8)
    configs["decoder"].finalize_model_grads_func = _finalize_gradients
    solo, pieces = solo_groups(), parallel.virtual_pipeline_model_parallel_size
    ddp_config = {"grad_reduce_in_fp32": True, "overlap_grad_reduce": False, **(ddp or {})}
    chunks = []
    for vp_stage in [None] if pieces is None else range(pieces):
        module = Molmo2(model, configs, solo, response_dropout, vp_stage, vision_chunk_crops, vision_recompute)
        if lora is not None:
            modules = {global_name(name, module): part for name, part in module.named_modules()}
            add_adapters(modules, model, lora, configs["decoder"], module.tp_group, seed)
        module = module.to(device)
        if module.pre_process:
            _copy_from_first_tensor_parallel_rank(module)
        for name, parameter in global_names(module):
            parameter.requires_grad_(not freeze(name))
        try:
            config = DistributedDataParallelConfig(**ddp_config)
            # One bucket for all pieces but the first, as Megatron's own trainer has it.
            chunks.append(DistributedDataParallel(configs["decoder"], config, module, disable_bucketing=bool(vp_stage)))
        except (AssertionError, ValueError) as error:
            raise ConfigError(f"Megatron refuses ddp settings {ddp_config}: {error}") from error
    if chunks[-1].ddp_config.overlap_param_gather:
        _wait_for_head(chunks[-1])
    if chunks[0].ddp_config.overlap_grad_reduce:
        # Gradients are reduced in the last micro-batch's backward pass only.
        functions = [chunk.no_sync for chunk in chunks]
        configs["decoder"].no_sync_func = functions if len(functions) > 1 else functions[0]
    return chunks


def _wait_for_head(chunk: DistributedDataParallel) -> None:
    """Wait for the gathered weights of the head before they are used.

    Megatron waits for a module's weights when the module is called, but the losses read the head's without calling it.
    """
    module = chunk.module
    group = chunk.param_to_bucket_group.get(module.output_layer.weight) if module.post_process else None
    if group is not None:
        module.decoder.final_layernorm.register_forward_pre_hook(lambda *_: group.finish_param_sync())


def global_names(module: Molmo2) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters with their layer's number in the whole model, from 0, in their names instead of in this piece."""
    for name, parameter in module.named_parameters():
        yield global_name(name, module), parameter


def global_name(name: str, module: Molmo2) -> str:
    """A parameter's or module's name in this piece -> with the layer's number in the whole model."""
    first = module.decoder.layers[0].layer_number - 1 if len(module.decoder.layers) else 0
    return re.sub(r"(?<=decoder\.layers\.)\d+", lambda match: str(int(match[0]) + first), name)


def _copy_from_first_tensor_parallel_rank(module: Molmo2) -> None:
    """Give replicated first-stage parameters one value: Megatron seeds tensor parallel ranks differently."""
    group = parallel_state.get_tensor_model_parallel_group()
    source = parallel_state.get_tensor_model_parallel_src_rank()
    for parameter in [*module.vision.parameters(), module.embedding.extra_embedding]:
        dist.broadcast(parameter.data, source, group=group)


def _finalize_gradients(model, num_tokens=None, **kwargs) -> None:
    """Megatron's reductions, then the vision tower's sum over tensor parallel ranks (each encoded other crops).

    `num_tokens` is ignored: the losses were already divided by the global batch's weight.
    """
    finalize_model_grads(model, None)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return
    gradients = vision_gradients(model)
    if gradients:
        flat = torch.cat(gradients)
        dist.all_reduce(flat, group=group)
        for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(summed)


def vision_gradients(model: list[DistributedDataParallel]) -> list[Tensor]:
    """Views of what this rank's optimizer reads of the vision tower's gradients, each [N]; the same on all tensor
    parallel ranks. With a distributed optimizer that is the rank's shard of each bucket, without one everything."""
    found = []
    for group in (group for chunk in model for group in chunk.bucket_groups):
        for bucket in group.buckets:
            first, end = 0, bucket.grad_data.numel()
            if group.ddp_config.use_distributed_optimizer:
                size = end // group.intra_distributed_optimizer_instance_size
                first = size * group.intra_distributed_optimizer_instance_rank
                end = first + size
            for parameter in bucket.params_list:
                if getattr(parameter, "vision_data_parallel", False):
                    begins, ends = bucket.param_to_index[parameter]
                    begins, ends = max(begins, first), min(ends, end)
                    if begins < ends:
                        found.append(bucket.grad_data[begins:ends])
    return found


def sharded_model_state(model: list[DistributedDataParallel], keep: Callable[[str], bool] = lambda name: True) -> dict:
    """Megatron's sharded state dicts of the wrapped pieces, model0, model1, ...; the tensors' keys know no layout.

    keep: parameter name -> whether it is wanted.
    """
    states = [chunk.sharded_state_dict() for chunk in unwrap_model(model)]
    return {
        f"model{number}": {name: entry for name, entry in state.items() if keep(name)}
        for number, state in enumerate(states)
    }


def load_model_state(model: list[DistributedDataParallel], state: dict) -> None:
    """Copy what was loaded into a `sharded_model_state` into the model."""
    for number, chunk in enumerate(unwrap_model(model)):
        # Megatron leaves out what is empty, as a piece without adapters is.
        chunk.load_state_dict(state.get(f"model{number}", {}), strict=False)


def load_weights(model: list[DistributedDataParallel], checkpoint: Path) -> None:
    """Weights of a checkpoint of any layout into this rank's part. Collective.

    Those of a checkpoint of LoRA go into the model's adapters, those of another into all that is no adapter. Raises
    ConfigError when the checkpoint is damaged or of another architecture.
    """
    saved = checkpoint_dir.read_model(checkpoint)
    refuse_other_architecture(saved, unwrap_model(model)[0].model, checkpoint)
    adapters = lora_of(checkpoint_dir.read_marker(checkpoint)) is not None
    with checkpoint_dir.nothing_executed(checkpoint):
        wanted = sharded_model_state(model, lambda name: is_adapter(name) == adapters)
        loaded = dist_checkpointing.load(wanted, str(checkpoint))
    load_model_state(model, loaded)


def refuse_other_architecture(saved: ModelConfig, wanted: ModelConfig, checkpoint: Path) -> None:
    """Raise ConfigError naming the first key of the architecture that differs. Names and paths may differ."""
    for key in vars(saved):
        if key in ("name", "hf_path", "tokenizer", "vision_token_ids", "init_std", "max_position_embeddings"):
            continue
        if _from_0(getattr(saved, key)) != _from_0(getattr(wanted, key)):
            raise ConfigError(
                f"checkpoint {checkpoint} has model.{key}={getattr(saved, key)}, this run has {getattr(wanted, key)}: "
                "start from a checkpoint of the same model."
            )


def _from_0(value):
    """A ViT with its feature layers counted from 0, as transformers gives them; anything else as it is."""
    if not isinstance(value, VitConfig):
        return value
    return replace(value, feature_layers=[layer % value.num_layers for layer in value.feature_layers])


def global_weight(batches: list[dict]) -> Tensor:
    """Sum of the loss weights of the global batch, over micro-batches and data-parallel ranks. float64 scalar."""
    total = sum(batch["loss_weights"].double().sum() for batch in batches)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total


def forward_backward(
    model: list[DistributedDataParallel],
    batches: list[dict],
    total_weight: Tensor,
    forward_only: bool = False,
    z_loss: float = 0.0,
) -> list[Tensor]:
    """One global batch. Returns, on the last pipeline stage, the weighted token losses of each micro-batch.

    The loss is sum(weight x (cross entropy + z_loss x log-partition^2)) / total_weight over all micro-batches and
    ranks, so it does not depend on the layout. Returned tensors are float32 [2, B, S / context parallel size], weight
    x cross entropy and weight x log-partition^2, undivided. Gradients are in main_grad.

    batches: as BatchSource gives them, or whole (batches.own_part).
    """
    batches = [own_part(batch, unwrap_model(model)[0].model) for batch in batches]
    rows, seq_length = batches[0]["input_ids"].shape
    local = context_slice(seq_length, parallel_state.get_context_parallel_group())

    def forward_step(iterator, model):
        batch = next(iterator)
        output = model(**model_inputs(batch), **{name: batch[name] for name in TARGETS})

        def loss(token_losses):
            weighted = token_losses * batch["loss_weights"][:, local]
            cross_entropy, square = weighted.sum(dim=(1, 2))
            total = (cross_entropy + z_loss * square) / total_weight
            # The integer count that Megatron asks for is not used: see _finalize_gradients.
            return total.float(), torch.zeros((), dtype=torch.int), weighted.detach()

        return output, loss

    run = get_forward_backward_func()
    return run(
        forward_step_func=forward_step,
        data_iterator=iterators(model, batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=seq_length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )


def model_inputs(batch: dict) -> dict[str, Tensor | None]:
    """What the model's forward takes of a micro-batch, with the pixels on their way to its device."""
    inputs = {name: batch.get(name) for name in MODEL_INPUTS}
    if inputs["crops"] is not None:
        inputs["crops"] = inputs["crops"].to(batch["input_ids"].device, non_blocking=True)
    return inputs


def iterators(model: list[DistributedDataParallel], batches: list[dict]):
    """An iterator for each piece of the model, as Megatron's schedules take them."""
    return [iter(batches) for _ in model] if len(model) > 1 else iter(batches)
