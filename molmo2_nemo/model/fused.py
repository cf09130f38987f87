"""Element-wise work of decoder and vision tower, each stretch between two matrix products as one kernel; for GPUs.

Each function here equals the formula that the layers use where `fused_kernels` is off (layers.py), within rounding:
everything is computed in float32 and rounded once. RMSNorm and SwiGLU are liger-kernel's, the others are those of
kernels.py. Each is an operation of torch with a shape rule, so that it can be counted without a GPU: it reads its
inputs once and writes its outputs once. tests/unit/test_fused.py runs them on a CPU by Triton's interpreter.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.library import custom_op

from molmo2_nemo import compat

_LLAMA = "llama"  # liger-kernel's name for: normalised in float32, rounded, then multiplied by the weight


# ---- RMSNorm ----


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the last dimension of [..., H], in the type of x."""
    return _RMSNorm.apply(x, weight, eps)[0]


def rms_norm_and_residual(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(RMSNorm of x, x itself): in the backward pass the sum of both gradients is part of the norm's kernel."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.set_materialize_grads(False)
        normed, scale = rms_norm_forward(x.contiguous(), weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return normed, x

    @staticmethod
    def backward(ctx, grad, grad_x):
        x, weight, scale = ctx.saved_tensors
        if grad is None:
            return grad_x, None, None
        if grad_x is not None:
            grad_x = grad_x.contiguous()
        return *rms_norm_backward(grad.contiguous(), grad_x, x.contiguous(), weight, scale), None


@custom_op("molmo2::rms_norm", mutates_args=())
def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.rms_norm import rms_norm_forward as forward

    normed, _, scale, *_ = forward(x, weight, eps, 0.0, _LLAMA, False)
    return normed, scale


@rms_norm_forward.register_fake
def _(x, weight, eps):
    return torch.empty_like(x), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@custom_op("molmo2::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad: Tensor, grad_x: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops import fused_add_rms_norm, rms_norm
    from liger_kernel.ops.utils import calculate_settings

    settings, mode = calculate_settings(x.shape[-1]), compat.liger_rms_norm_mode(_LLAMA)
    if grad_x is None:
        rows = x.view(-1, x.shape[-1])
        return rms_norm.rms_norm_backward(grad, rows, weight, scale, 0.0, mode, *settings, False, False)
    backward = fused_add_rms_norm.fused_add_rms_norm_backward
    grad_x, _, grad_weight = backward(grad, grad_x, x, weight, scale, 0.0, mode, *settings, 2, False)
    return grad_x, grad_weight


@rms_norm_backward.register_fake
def _(grad, grad_x, x, weight, scale):
    return torch.empty_like(x), torch.empty_like(weight)


# ---- SwiGLU ----


def swiglu(x: Tensor) -> Tensor:
    """[..., 2F], gates before the others, -> [..., F]."""
    return _SwiGLU.apply(x)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return swiglu_forward(x.contiguous())

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return swiglu_backward(grad.contiguous(), x.contiguous())


@custom_op("molmo2::swiglu", mutates_args=())
def swiglu_forward(x: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_forward

    return swiglu_fused_gate_up_forward(x)[1]


@swiglu_forward.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@custom_op("molmo2::swiglu_backward", mutates_args=())
def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import swiglu_fused_gate_up_backward

    return swiglu_fused_gate_up_backward(x, grad).view(x.shape)


@swiglu_backward.register_fake
def _(grad, x):
    return torch.empty_like(x)


# ---- bias and GELU ----


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """The tanh form of GELU of x + bias, [..., F]."""
    return _BiasGELU.apply(x, bias)


class _BiasGELU(Function):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(x, bias)
        return bias_gelu_forward(x.contiguous(), bias)

    @staticmethod
    def backward(ctx, grad):
        x, bias = ctx.saved_tensors
        return bias_gelu_backward(grad.contiguous(), x.contiguous(), bias)


@custom_op("molmo2::bias_gelu", mutates_args=())
def bias_gelu_forward(x: Tensor, bias: Tensor) -> Tensor:
    from molmo2_nemo.model import kernels

    out, (rows, columns) = torch.empty_like(x), rows_and_columns(x)
    grid = (-(-rows // 8), -(-columns // 512))
    kernels.bias_gelu[grid](x, bias, out, rows, columns, BLOCK_ROWS=8, BLOCK_COLUMNS=512)
    return out


@bias_gelu_forward.register_fake
def _(x, bias):
    return torch.empty_like(x)


@custom_op("molmo2::bias_gelu_backward", mutates_args=())
def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x)
    return grad_x, _gelu_backward(grad, x, bias, grad_x, again=False)


@bias_gelu_backward.register_fake
def _(grad, x, bias):
    return torch.empty_like(x), torch.empty_like(bias)


@custom_op("molmo2::bias_gelu_again", mutates_args=("grad", "x"))
def bias_gelu_again(grad: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """Forward and backward pass of GELU of x + bias in one, in place.

    grad, the gradient of GELU, becomes that of x; x becomes GELU of x + bias. Returns the gradient of the bias.
    """
    return _gelu_backward(grad, x, bias, grad, again=True)


@bias_gelu_again.register_fake
def _(grad, x, bias):
    return torch.empty_like(bias)


def _gelu_backward(grad: Tensor, x: Tensor, bias: Tensor, grad_x: Tensor, again: bool) -> Tensor:
    from molmo2_nemo.model import kernels

    rows, columns = rows_and_columns(x)
    programs = min(programs_on(x.device), rows)
    each = -(-rows // programs)
    sums = x.new_empty(programs, columns, dtype=torch.float32)
    grid = (programs, -(-columns // 512))
    kernels.bias_gelu_backward[grid](
        *(grad, x, bias, grad_x, sums, rows, columns, each), BLOCK_ROWS=8, BLOCK_COLUMNS=512, AGAIN=again, num_warps=8
    )
    return sums.sum(0).to(bias.dtype)


# ---- residuals ----


def bias_add(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """x + bias + residual, [..., H]."""
    return _BiasAdd.apply(x, bias, residual)


class _BiasAdd(Function):
    @staticmethod
    def forward(ctx, x, bias, residual):
        return bias_add_forward(x.contiguous(), bias, residual.contiguous())

    @staticmethod
    def backward(ctx, grad):
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad, grad_bias, grad


@custom_op("molmo2::bias_add", mutates_args=())
def bias_add_forward(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    from molmo2_nemo.model import kernels

    out, (rows, columns) = torch.empty_like(x), rows_and_columns(x)
    kernels.bias_add[rows, -(-columns // 1024)](x, bias, residual, out, columns, BLOCK=1024)
    return out


@bias_add_forward.register_fake
def _(x, bias, residual):
    return torch.empty_like(x)


def dropout_add(x: Tensor, residual: Tensor, where: Tensor | None, probability: float) -> Tensor:
    """residual + dropout(x), [s, B, H]. where: bool [s, B, 1], the positions that are dropped out; None: all."""
    return _DropoutAdd.apply(x, residual, where, probability)


class _DropoutAdd(Function):
    @staticmethod
    def forward(ctx, x, residual, where, probability):
        # From torch's generator, whose state is restored when a layer is recomputed.
        seed = torch.randint(2**62, (1,), device=x.device)
        where = None if where is None else where.contiguous()
        ctx.save_for_backward(where, seed)
        ctx.probability = probability
        return dropout_add_forward(x.contiguous(), residual.contiguous(), where, seed, probability)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        return dropout_backward(grad, *ctx.saved_tensors, ctx.probability), grad, None, None


@custom_op("molmo2::dropout_add", mutates_args=())
def dropout_add_forward(x: Tensor, residual: Tensor, where: Tensor | None, seed: Tensor, probability: float) -> Tensor:
    from molmo2_nemo.model import kernels

    out, (rows, columns) = torch.empty_like(x), rows_and_columns(x)
    grid = (rows, -(-columns // 1024))
    some = where is not None
    kernels.dropout_add[grid](x, residual, where, seed, out, columns, probability, BLOCK=1024, SOME=some)
    return out


@dropout_add_forward.register_fake
def _(x, residual, where, seed, probability):
    return torch.empty_like(x)


@custom_op("molmo2::dropout_backward", mutates_args=())
def dropout_backward(grad: Tensor, where: Tensor | None, seed: Tensor, probability: float) -> Tensor:
    from molmo2_nemo.model import kernels

    grad_x, (rows, columns) = torch.empty_like(grad), rows_and_columns(grad)
    grid = (rows, -(-columns // 1024))
    some = where is not None
    kernels.dropout_backward[grid](grad, where, seed, grad_x, columns, probability, BLOCK=1024, SOME=some)
    return grad_x


@dropout_backward.register_fake
def _(grad, where, seed, probability):
    return torch.empty_like(grad)


# ---- queries and keys ----


def split_norm_rotate(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values out of one projection; RMSNorm over each head of the first two, then RoPE.

    qkv: [s, B, G * (N / G + 2) * D], for each group its queries, its key, its value. weights: [D]. cos, sin: float32
    [s * B, D / 2], of each token's position; RoPE turns the two halves of a head. Returns [s, B, N, D] and twice
    [s, B, G, D].
    """
    return _SplitNormRotate.apply(qkv, q_weight, k_weight, cos, sin, groups, eps)


class _SplitNormRotate(Function):
    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, cos, sin, groups, eps):
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
        ctx.settings = groups, eps
        return split_norm_rotate_forward(qkv.contiguous(), q_weight, k_weight, cos, sin, groups, eps)

    @staticmethod
    def backward(ctx, *grads):
        grads = [grad.contiguous() for grad in grads]
        qkv, *others = ctx.saved_tensors
        found = split_norm_rotate_backward(*grads, qkv.contiguous(), *others, *ctx.settings)
        return *found, None, None, None, None


@custom_op("molmo2::split_norm_rotate", mutates_args=())
def split_norm_rotate_forward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (part.contiguous() if i == 2 else part for i, part in enumerate(_split(qkv, groups, len(q_weight))))
    return _rotate(q, q_weight, cos, sin, eps), _rotate(k, k_weight, cos, sin, eps), v.flatten(2, 3)


@split_norm_rotate_forward.register_fake
def _(qkv, q_weight, k_weight, cos, sin, groups, eps):
    return tuple(qkv.new_empty(part.flatten(2, 3).shape) for part in _split(qkv, groups, len(q_weight)))


@custom_op("molmo2::split_norm_rotate_backward", mutates_args=())
def split_norm_rotate_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = torch.empty_like(qkv)
    (q, k, _), (of_q, of_k, of_v) = (_split(x, groups, len(q_weight)) for x in (qkv, grad))
    of_v.copy_(grad_v.view(of_v.shape))
    grad_q_weight = _rotate_backward(grad_q, q, q_weight, cos, sin, of_q, eps)
    return grad, grad_q_weight, _rotate_backward(grad_k, k, k_weight, cos, sin, of_k, eps)


@split_norm_rotate_backward.register_fake
def _(grad_q, grad_k, grad_v, qkv, q_weight, k_weight, cos, sin, groups, eps):
    return torch.empty_like(qkv), torch.empty_like(q_weight), torch.empty_like(k_weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE alone, of [s, B, N, D]; cos, sin as above."""
    return _Rotate.apply(x, cos, sin)


class _Rotate(Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate_forward(x.contiguous(), cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return rotate_forward(grad.contiguous(), cos, -sin), None, None


@custom_op("molmo2::rotate", mutates_args=())
def rotate_forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return _rotate(x.unsqueeze(3), None, cos, sin, 0.0)


@rotate_forward.register_fake
def _(x, cos, sin):
    return torch.empty_like(x)


def _split(qkv: Tensor, groups: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the queries, keys and values, [s, B, G, heads of a group, D]."""
    by_group = qkv.view(*qkv.shape[:2], groups, -1, D)
    return by_group[..., :-2, :], by_group[..., -2:-1, :], by_group[..., -1:, :]


def _rotate(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """x: [s, B, G, M, D] with the M heads of a group side by side -> [s, B, G * M, D]."""
    from molmo2_nemo.model import kernels

    s, B, G, M, D = x.shape
    out = x.new_empty(s, B, G * M, D)
    kernels.rotate_heads[(s * B,)](
        *(x, weight, cos, sin, out, _token_stride(x), x.stride(2), G * M, M, eps), **_blocks(G * M, D, weight)
    )
    return out


def _rotate_backward(
    grad: Tensor, x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, grad_x: Tensor, eps: float
) -> Tensor:
    """Writes the gradient of x into grad_x, a view laid out as x; returns that of the weight."""
    from molmo2_nemo.model import kernels

    s, B, G, M, D = x.shape
    programs = min(programs_on(x.device), s * B)
    grad_weight = x.new_empty(programs, D, dtype=torch.float32)
    kernels.rotate_heads_backward[(programs,)](
        *(grad, x, weight, cos, sin, grad_x, grad_weight, _token_stride(x), x.stride(2), s * B, G * M, M, eps),
        **_blocks(G * M, D, weight),
    )
    return grad_weight.sum(0).to(weight.dtype)


def _token_stride(x: Tensor) -> int:
    """From one token of [s, B, ...] to the next. With one row the stride of B says nothing, whatever it is."""
    return x.stride(0) if x.shape[1] == 1 else x.stride(1)


def _blocks(heads: int, D: int, weight: Tensor | None) -> dict:
    # With 4 warps the backward pass of 32 heads of 128 takes all 255 registers of a thread (compiled for sm_90).
    return dict(
        HALF=D // 2,
        BLOCK_HEADS=power_of_two(heads),
        BLOCK_HALF=power_of_two(D // 2),
        NORM=weight is not None,
        num_warps=8 if heads * D > 2048 else 4,
    )


def power_of_two(number: int) -> int:
    """The next power of two, which sizes of Triton's blocks must be."""
    return 1 << (number - 1).bit_length()


def rows_and_columns(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def programs_on(device: torch.device) -> int:
    """Programs that share a sum over rows: four for each multiprocessor, and a few under the interpreter."""
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
