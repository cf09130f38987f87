"""The vision transformer's layers where kernels are fused: what lies between two matrix products is one kernel.

As in fused.py, each kernel is an operation of torch with a shape rule. C crops of P patches, H wide, N heads of D.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.library import custom_op

from molmo2_nemo import compat
from molmo2_nemo.model.fused import bias_add, bias_gelu, bias_gelu_again, power_of_two, programs_on, rows_and_columns


def run_layers(layers: Iterable, x: Tensor, wanted: set[int], again: bool) -> list[Tensor]:
    """Outputs of the layers whose numbers, from 0, are wanted, in order; [C, P, H] each.

    layers: of `layers.fused_vit_block_spec`, whose norms and linear layers give their weights when they are called. x:
    [C, P, H]. again: keep the input and the middle of each layer alone, and make the rest again in the backward pass,
    but for the two products that end attention and MLP, whose results no gradient needs.
    """
    outputs, delta, bias = [], None, None
    for number, layer in enumerate(layers):
        norm, attends, inner = layer.input_layernorm, layer.self_attention, layer.mlp
        x, normed, *moments = add_norm(x, delta, bias, *norm(), norm.eps)
        if number - 1 in wanted:
            outputs.append(x)
        weights = *attends.linear_qkv(), (out := attends.linear_proj())[0]
        kept = (x, *moments, *norm()) if again else None
        delta, bias = attention(normed, *weights, attends.core_attention, layer.config.kv_channels, kept), out[1]

        norm = layer.pre_mlp_layernorm
        x, normed, *moments = add_norm(x, delta, bias, *norm(), norm.eps)
        weights = *inner.linear_fc1(), (out := inner.linear_fc2())[0]
        kept = (x, *moments, *norm()) if again else None
        delta, bias = mlp(normed, *weights, kept), out[1]
    if number in wanted:
        outputs.append(bias_add(delta, bias, x))
    return outputs


# ---- the halves of a layer ----


def attention(
    normed: Tensor, weight: Tensor, bias: Tensor, out: Tensor, core: Callable, D: int, kept: tuple | None
) -> Tensor:
    """What attention adds, without its last bias: normalised [C, P, H] -> [C, P, H].

    weight, bias: [3 N D, H] and [3 N D], for each head its query, key and value; out: [H, N D]; core:
    layers.CropAttention. kept: what `normalise` makes `normed` of, for all to be made again in the backward pass; None:
    everything waits for it.
    """

    def heads_to_heads(normed, weight, bias):
        return core(*_Heads.apply(normed, weight, bias, D), None)

    if kept is None:
        return F.linear(heads_to_heads(normed, weight, bias), out)
    return _AttentionAgain.apply(heads_to_heads, normed, weight, bias, out, *kept)


class _AttentionAgain(Function):
    """kept: what `normalise` takes."""

    @staticmethod
    def forward(ctx, inner, normed, weight, bias, out, *kept):
        ctx.inner = inner
        ctx.save_for_backward(weight, bias, out, *kept)
        return F.linear(inner(normed, weight, bias), out)

    @staticmethod
    def backward(ctx, grad):
        weight, bias, out, *kept = ctx.saved_tensors
        inputs = [x.detach().requires_grad_() for x in (normalise(*kept), weight, bias)]
        with torch.enable_grad():
            attended = ctx.inner(*inputs)
        grads = torch.autograd.grad(attended, inputs, grad @ out)
        return None, *grads, _weight_gradient(grad, attended.detach()), *[None] * len(kept)


def mlp(normed: Tensor, weight: Tensor, bias: Tensor, out: Tensor, kept: tuple | None) -> Tensor:
    """What the MLP adds, without its last bias: normalised [C, P, H] -> [C, P, H]. kept: as in `attention`."""
    if kept is None:
        return F.linear(bias_gelu(F.linear(normed, weight), bias), out)
    return _MLPAgain.apply(normed, weight, bias, out, *kept)


class _MLPAgain(Function):
    @staticmethod
    def forward(ctx, normed, weight, bias, out, *kept):
        ctx.save_for_backward(weight, bias, out, *kept)
        # GELU is the end of the product: what it takes is never stored.
        return F.linear(compat.gelu_of_product(normed, weight, bias), out)

    @staticmethod
    def backward(ctx, grad):
        weight, bias, out, *kept = ctx.saved_tensors
        normed = normalise(*kept)
        inner, grad_inner = F.linear(normed, weight), grad @ out
        grad_bias = bias_gelu_again(grad_inner, inner, bias)
        grad_out = _weight_gradient(grad, inner)
        del inner
        return (
            grad_inner @ weight,
            _weight_gradient(grad_inner, normed),
            grad_bias,
            grad_out,
            *[None] * len(kept),
        )


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return grad.flatten(0, -2).t() @ x.flatten(0, -2)


class _Heads(Function):
    """Queries, keys and values of one projection, [C, P, N, D] each."""

    @staticmethod
    def forward(ctx, normed, weight, bias, D):
        ctx.save_for_backward(normed, weight)
        return F.linear(normed, weight, bias).view(*normed.shape[:-1], -1, 3, D).unbind(-2)

    @staticmethod
    def backward(ctx, *grads):
        normed, weight = ctx.saved_tensors
        grad, grad_bias = join_heads(*(grad.contiguous() for grad in grads))
        return grad @ weight, _weight_gradient(grad, normed), grad_bias, None


# ---- LayerNorm ----


def add_norm(
    x: Tensor, delta: Tensor | None, bias: Tensor | None, weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x + delta + bias, LayerNorm of it over the last dimension, and that norm's mean and scale), of [..., H].

    delta, bias: [..., H] and [H], or both None, and x itself is normalised. mean, scale: float32, one for each H
    numbers, without gradients; `normalise` makes the norm again of them.
    """
    return _AddNorm.apply(x, delta, bias, weight, norm_bias, eps)


class _AddNorm(Function):
    @staticmethod
    def forward(ctx, x, delta, bias, weight, norm_bias, eps):
        if delta is None:
            normed, mean, scale = layer_norm_forward(x.contiguous(), weight, norm_bias, eps)
        else:
            found = add_norm_forward(x.contiguous(), delta.contiguous(), bias, weight, norm_bias, eps)
            x, normed, mean, scale = found
        ctx.adds = delta is not None
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.mark_non_differentiable(mean, scale)
        return x, normed, mean, scale

    @staticmethod
    def backward(ctx, grad_x, grad, *_):
        x, *others = ctx.saved_tensors
        found = add_norm_backward(grad.contiguous(), grad_x.contiguous(), x.contiguous(), *others)
        grad_x, grad_weight, grad_norm_bias, grad_bias = found
        return grad_x, *((grad_x, grad_bias) if ctx.adds else (None, None)), grad_weight, grad_norm_bias, None


@custom_op("molmo2::add_norm", mutates_args=())
def add_norm_forward(
    x: Tensor, delta: Tensor, bias: Tensor, weight: Tensor, norm_bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _norm(x, delta, bias, weight, norm_bias, eps)


@add_norm_forward.register_fake
def _(x, delta, bias, weight, norm_bias, eps):
    return torch.empty_like(x), torch.empty_like(x), *_moments(x)


@custom_op("molmo2::layer_norm", mutates_args=())
def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _norm(x, None, None, weight, bias, eps)[1:]


@layer_norm_forward.register_fake
def _(x, weight, bias, eps):
    return torch.empty_like(x), *_moments(x)


def _norm(x, delta, bias, weight, norm_bias, eps):
    from molmo2_nemo.model import kernels

    total = None if delta is None else torch.empty_like(x)
    normed, (mean, scale), (rows, columns) = torch.empty_like(x), _moments(x), rows_and_columns(x)
    kernels.add_norm[(rows,)](
        *(x, delta, bias, weight, norm_bias, total, normed, mean, scale, columns, eps),
        **_row_block(columns),
        ADD=delta is not None,
    )
    return total, normed, mean, scale


@custom_op("molmo2::normalise", mutates_args=())
def normalise(x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The LayerNorm of x that `add_norm` made."""
    from molmo2_nemo.model import kernels

    out, (rows, columns) = torch.empty_like(x), rows_and_columns(x)
    kernels.normalise[(rows,)](x, mean, scale, weight, bias, out, columns, **_row_block(columns))
    return out


@normalise.register_fake
def _(x, mean, scale, weight, bias):
    return torch.empty_like(x)


@custom_op("molmo2::add_norm_backward", mutates_args=())
def add_norm_backward(
    grad: Tensor, grad_x: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of x, and those of weight, norm's bias and what is added to every row of x."""
    from molmo2_nemo.model import kernels

    out, (rows, columns) = torch.empty_like(x), rows_and_columns(x)
    programs = min(programs_on(x.device), rows)
    sums = x.new_empty(programs, 3, columns, dtype=torch.float32)
    kernels.add_norm_backward[(programs,)](
        grad, grad_x, x, weight, mean, scale, out, sums, rows, columns, **_row_block(columns)
    )
    return out, *(sum.clone() for sum in sums.sum(0).to(weight.dtype))


@add_norm_backward.register_fake
def _(grad, grad_x, x, weight, mean, scale):
    return torch.empty_like(x), *(torch.empty_like(weight) for _ in range(3))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)
    return mean, torch.empty_like(mean)


def _row_block(columns: int) -> dict:
    return dict(BLOCK=power_of_two(columns), num_warps=8 if columns > 1024 else 4)


# ---- queries, keys and values ----


@custom_op("molmo2::join_heads", mutates_args=())
def join_heads(grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of queries, keys and values, [..., N, D] each, as that of their projection, [..., N * 3 * D], head by
    head, and their sum over all but the last dimension: the gradient of the projection's bias."""
    from molmo2_nemo.model import kernels

    *outer, N, D = grad_q.shape
    rows, columns = grad_q.numel() // (N * D), N * D
    programs = min(programs_on(grad_q.device), rows)
    out = grad_q.new_empty(*outer, 3 * columns)
    sums = grad_q.new_empty(programs, 3 * columns, dtype=torch.float32)
    grid = (programs, -(-columns // 512))
    for number, part in enumerate((grad_q, grad_k, grad_v)):
        kernels.join_heads[grid](
            *(part, out, sums, rows, columns, number, D, -(-rows // programs)),
            BLOCK_ROWS=8,
            BLOCK_COLUMNS=512,
            num_warps=8,
        )
    return out, sums.sum(0).to(grad_q.dtype)


@join_heads.register_fake
def _(grad_q, grad_k, grad_v):
    *outer, N, D = grad_q.shape
    return grad_q.new_empty(*outer, 3 * N * D), grad_q.new_empty(3 * N * D)
