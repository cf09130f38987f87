"""Stands in for Transformer Engine's linear layers and norms: what they hold, send and read, without their kernels.

Facts are from NVIDIA/TransformerEngine at d0067d0 (2.20.0.dev0), transformer_engine/pytorch/module/linear.py and
ops/basic/rmsnorm.py, and megatron-core 0.19.2, extensions/transformer_engine.py:

- In FP8 the input of a product is quantized, one byte an element (blocks of `blockwise` and `mxfp8` add a 32nd for
  their scales). A sequence parallel column's input is gathered in FP8 and kept as it was, one byte; others are kept
  turned, one byte, since Hopper multiplies FP8 one way round alone. Gradients of outputs are quantized both ways round.
- A weight is quantized both ways round in the first micro-batch, and these copies stay.
- The attention's output projection keeps its input in bf16, which attention keeps anyway (not with `delayed`).
- With `tensorwise`, the maximum of what is gathered is agreed on first.
- Weights' gradients go into the float32 buffer; autograd gets a tensor that all weights of a shape share.
- Norms keep their input and a float32 number or two a row.

Not covered: cuBLAS's workspaces, kernels' own temporaries, Transformer Engine's Adam (torch's is rehearsed), the maxima
that `delayed` shares once a step, FP8 parameters, and overlap by user buffers.
"""

import contextlib
import functools

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

from molmo2_nemo import parallel
from molmo2_nemo.model import layers
from molmo2_nemo.rehearsal.recorder import Recorder

FP8 = " FP8"  # what follows the part in the counter of FLOPs
WITH_SCALES = ("blockwise", "mxfp8")


class Engine:
    """The layers' provider, in the place of Megatron's TESpecProvider."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder
        self.in_fp8 = True  # whether layers that are built now are, if their configuration says so
        self.shared: dict[tuple, Tensor] = {}  # shape and type of a weight -> what autograd gets as its gradient

    def column_parallel_linear(self):
        return functools.partial(Linear, self, "column")

    def row_parallel_linear(self):
        return functools.partial(Linear, self, "row")

    def layer_norm(self, rms_norm: bool = False):
        return functools.partial(Norm, self)

    @contextlib.contextmanager
    def fp8_context(self, config, layer_no: int = -1, is_init: bool = False):
        """As megatron.core.fp8_utils.get_fp8_context, which says at building which layers stay in bf16."""
        from megatron.core.fp8_utils import is_first_last_bf16_layer

        before, self.in_fp8 = self.in_fp8, not (is_init and is_first_last_bf16_layer(config, layer_no))
        yield
        self.in_fp8 = before

    def quantized(self, x: Tensor, recipe: str, copies: int, group=None) -> list[Tensor]:
        """`copies` of x in FP8. group: ranks that agree on its maximum, None where it is this rank's alone."""
        width = x.shape[-1] + (x.shape[-1] // 32 if recipe in WITH_SCALES else 0)
        made = [torch.empty(*x.shape[:-1], width, dtype=torch.uint8, device=x.device) for _ in range(copies)]
        reads = 2 if recipe == "tensorwise" else 1  # the maximum first
        self.recorder.note_moved(x.numel() * (x.element_size() * reads + copies))
        if group is not None and group.size() > 1 and recipe == "tensorwise":
            dist.all_reduce(torch.empty(1, dtype=torch.float32, device=x.device), op=dist.ReduceOp.MAX, group=group)
        return made


def install(recorder: Recorder) -> None:
    """For the rest of this process: Transformer Engine is there, and its layers are those of this module."""
    import megatron.core.extensions.transformer_engine as extension
    from megatron.core import fp8_utils, recompute
    from megatron.core.transformer import transformer_block

    engine, backend_of = Engine(recorder), layers.layer_backend
    layers.layer_backend = lambda config: engine if config.transformer_impl != "local" else backend_of(config)
    parallel.has_transformer_engine = lambda: True
    transformer_block.get_fp8_context = fp8_utils.get_fp8_context = engine.fp8_context

    def te_checkpoint(function, distribute, tracker, tp_group, *args, **kwargs):
        return checkpoint(functools.partial(function, **kwargs), distribute, *args)

    recompute.te_checkpoint = extension.te_checkpoint = te_checkpoint


class Linear(nn.Module):
    """Arguments as TEColumnParallelLinear and TERowParallelLinear take them; mode: column or row."""

    def __init__(
        self,
        engine: Engine,
        mode: str,
        input_size: int,
        output_size: int,
        *,
        config,
        init_method,
        bias: bool,
        skip_bias_add: bool,
        tp_group,
        tp_comm_buffer_name: str | None = None,
        **others,
    ):
        super().__init__()
        self.engine, self.mode, self.group, self.skip_bias_add = engine, mode, tp_group, skip_bias_add
        self.fp8, self.recipe = bool(config.fp8) and engine.in_fp8, config.fp8_recipe
        self.sequence = config.sequence_parallel and tp_group.size() > 1
        self.fused_gradient = config.gradient_accumulation_fusion
        self.keeps_original = self.fp8 and tp_comm_buffer_name == "proj" and self.recipe != "delayed"
        ranks = tp_group.size()
        rows, columns = (output_size // ranks, input_size) if mode == "column" else (output_size, input_size // ranks)
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=config.params_dtype))
        init_method(self.weight)
        set_tensor_model_parallel_attributes(self.weight, True, 0 if mode == "column" else 1, 1)
        self.bias = nn.Parameter(torch.zeros(rows, dtype=config.params_dtype)) if bias else None
        if bias and mode == "row":
            self.bias.sequence_parallel = config.sequence_parallel
        self.copies: list[Tensor] | None = None  # of the weight in FP8, from the first micro-batch on

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.fp8 and self.copies is None:
            self.copies = self.engine.quantized(self.weight.detach(), self.recipe, copies=2)
        own_bias = None if self.skip_bias_add else self.bias
        return _Product.apply(x, self.weight, own_bias, self), self.bias if self.skip_bias_add else None

    def gathered(self, x: Tensor) -> Tensor:
        whole = x.new_empty(x.shape[0] * self.group.size(), *x.shape[1:])
        dist.all_gather_into_tensor(whole, x, group=self.group)
        return whole

    def summed(self, x: Tensor) -> Tensor:
        """The sum over the ranks, of which each keeps its part if they are sequence parallel."""
        if self.sequence:
            own = x.new_empty(x.shape[0] // self.group.size(), *x.shape[1:])
            dist.reduce_scatter_tensor(own, x, group=self.group)
            return own
        if self.group.size() > 1:
            dist.all_reduce(x, group=self.group)
        return x


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Linear) -> Tensor:
        engine, gathers = layer.engine, layer.sequence and layer.mode == "column"
        ctx.layer, ctx.gathers, ctx.has_bias = layer, gathers, bias is not None
        ctx.part = engine.recorder.places.here(engine.recorder.phase)[0] + (FP8 if layer.fp8 else "")
        operand, kept = x, x
        if layer.fp8:
            turned = not gathers and not layer.keeps_original
            operand, *more = engine.quantized(x, layer.recipe, 1 + turned, layer.group if gathers else None)
            kept = x if layer.keeps_original else more[0] if turned else operand
        if gathers:
            operand = layer.gathered(operand.contiguous())
        out = x.new_empty(*operand.shape[:-1], weight.shape[0])
        engine.recorder.product(2 * out.numel() * weight.shape[1], ctx.part)
        del operand
        ctx.save_for_backward(kept, weight)
        return layer.summed(out) if layer.mode == "row" else out

    @staticmethod
    def backward(ctx, grad: Tensor):
        kept, weight = ctx.saved_tensors
        layer, engine = ctx.layer, ctx.layer.engine
        gathers = layer.sequence and layer.mode == "row"
        operand, more = grad.contiguous(), []
        if layer.fp8:
            operand, *more = engine.quantized(grad, layer.recipe, 1 + (not gathers), layer.group if gathers else None)
        if gathers:
            operand = layer.gathered(operand)
            more = [torch.empty_like(operand)] if layer.fp8 else []  # turned
        if ctx.gathers:
            kept = layer.gathered(kept.contiguous())
        of_input = grad.new_empty(*operand.shape[:-1], weight.shape[1])
        flops = 2 * of_input.numel() * weight.shape[0]
        engine.recorder.product(flops, ctx.part)
        own = layer.summed(of_input) if layer.mode == "column" else of_input
        if layer.fp8 and (ctx.gathers or layer.keeps_original):
            kept = torch.empty(kept.shape, dtype=torch.uint8, device=kept.device)  # turned, or quantized now
        of_weight = None
        if ctx.needs_input_grad[1]:
            engine.recorder.product(flops, ctx.part)
            if layer.fused_gradient and hasattr(weight, "grad_added_to_main_grad"):
                weight.grad_added_to_main_grad = True
                key = (weight.shape, weight.dtype)
                if key not in engine.shared:
                    engine.shared[key] = torch.empty_like(weight, requires_grad=False)
                of_weight = engine.shared[key]
            else:
                of_weight = torch.empty_like(weight)
        of_bias = grad.new_empty(weight.shape[0]) if ctx.has_bias else None
        del operand, more, kept
        return own, of_weight, of_bias, None


class Norm(nn.Module):
    """RMSNorm or LayerNorm, as TENorm makes them."""

    def __init__(self, engine: Engine, config, hidden_size: int, eps: float = 1e-5, has_residual: bool = False):
        super().__init__()
        self.engine = engine
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
            self.bias.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return _Normalize.apply(x, self.weight, self.bias, self.engine.recorder)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, recorder: Recorder) -> Tensor:
        x = x.contiguous()
        numbers = 1 if bias is None else 2
        a_row = x.new_empty(numbers, x.numel() // x.shape[-1], dtype=torch.float32)
        ctx.recorder, ctx.has_bias = recorder, bias is not None
        ctx.save_for_backward(x, weight, a_row)
        recorder.note_moved(2 * x.numel() * x.element_size())
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, _ = ctx.saved_tensors
        ctx.recorder.note_moved(3 * x.numel() * x.element_size())
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight) if ctx.has_bias else None, None
