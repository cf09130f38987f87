"""Triton kernels for stretches between two matrix products that liger-kernel has none for.

Everything is computed in float32 and rounded once, when it is stored. Each is launched by one function of fused.py.
"""

import triton
import triton.language as tl


@triton.jit
def rotate_heads(
    x,  # N heads of D numbers each per token, `per_group` of them side by side, groups `group_stride` apart
    weight,  # [D], if NORM
    cos,  # float32 [tokens, D / 2], contiguous
    sin,
    out,  # [tokens, N, D], contiguous
    token_stride,
    group_stride,
    heads,
    per_group,
    eps,
    HALF: tl.constexpr,  # D / 2
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    NORM: tl.constexpr,
):
    """RMSNorm over each head of a token, then the rotation of its two halves. One program for a token."""
    token = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_HALF)
    of_head, in_half = head < heads, column < HALF
    mask = of_head[:, None] & in_half[None, :]
    place = ((head // per_group) * group_stride + (head % per_group) * (2 * HALF))[:, None] + column[None, :]
    first = tl.load(x + token * token_stride + place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + token * token_stride + place + HALF, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = tl.rsqrt(square / (2 * HALF) + eps)[:, None]
        first *= scale * tl.load(weight + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
        second *= scale * tl.load(weight + HALF + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
    c = tl.load(cos + token * HALF + column, mask=in_half, other=0.0)[None, :]
    s = tl.load(sin + token * HALF + column, mask=in_half, other=0.0)[None, :]
    to = out + token * heads * (2 * HALF) + (head * (2 * HALF))[:, None] + column[None, :]
    tl.store(to, first * c - second * s, mask=mask)
    tl.store(to + HALF, second * c + first * s, mask=mask)


@triton.jit
def rotate_heads_backward(
    grad,  # [tokens, N, D], contiguous
    x,  # as in the forward pass; not read unless NORM
    weight,
    cos,
    sin,
    grad_x,  # laid out as x
    grad_weight,  # float32 [programs, D], if NORM
    token_stride,
    group_stride,
    tokens,
    heads,
    per_group,
    eps,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    NORM: tl.constexpr,
):
    """Each program takes every n-th token and sums the gradient of the weight over its own."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    head, column = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_HALF)
    of_head, in_half = head < heads, column < HALF
    mask = of_head[:, None] & in_half[None, :]
    place = ((head // per_group) * group_stride + (head % per_group) * (2 * HALF))[:, None] + column[None, :]
    packed = (head * (2 * HALF))[:, None] + column[None, :]
    if NORM:
        w_first = tl.load(weight + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
        w_second = tl.load(weight + HALF + column, mask=in_half, other=0.0).to(tl.float32)[None, :]
        sum_first = tl.zeros((BLOCK_HALF,), dtype=tl.float32)
        sum_second = tl.zeros((BLOCK_HALF,), dtype=tl.float32)
    for token in range(program, tokens, programs):
        c = tl.load(cos + token * HALF + column, mask=in_half, other=0.0)[None, :]
        s = tl.load(sin + token * HALF + column, mask=in_half, other=0.0)[None, :]
        of_token = grad + token * heads * (2 * HALF) + packed
        g_first = tl.load(of_token, mask=mask, other=0.0).to(tl.float32)
        g_second = tl.load(of_token + HALF, mask=mask, other=0.0).to(tl.float32)
        d_first, d_second = g_first * c + g_second * s, g_second * c - g_first * s
        if NORM:
            first = tl.load(x + token * token_stride + place, mask=mask, other=0.0).to(tl.float32)
            second = tl.load(x + token * token_stride + place + HALF, mask=mask, other=0.0).to(tl.float32)
            square = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
            scale = tl.rsqrt(square / (2 * HALF) + eps)[:, None]
            first, second = first * scale, second * scale
            sum_first += tl.sum(d_first * first, axis=0)
            sum_second += tl.sum(d_second * second, axis=0)
            d_first, d_second = d_first * w_first, d_second * w_second
            dot = tl.sum(d_first * first, axis=1) + tl.sum(d_second * second, axis=1)
            dot = (dot / (2 * HALF))[:, None]
            d_first, d_second = (d_first - first * dot) * scale, (d_second - second * dot) * scale
        tl.store(grad_x + token * token_stride + place, d_first, mask=mask)
        tl.store(grad_x + token * token_stride + place + HALF, d_second, mask=mask)
    if NORM:
        to = grad_weight + program * (2 * HALF) + column
        tl.store(to, sum_first, mask=in_half)
        tl.store(to + HALF, sum_second, mask=in_half)


@triton.jit
def layer_norm_backward(
    grad,
    grad_x,  # of x itself, which the norm's gradient is added to
    x,
    weight,
    mean,  # float32 [rows], as scale
    scale,
    out,
    grad_weight,  # float32 [programs, columns], as grad_bias
    grad_bias,
    rows,
    columns,
    BLOCK: tl.constexpr,
):
    """LayerNorm's backward pass with the residual's gradient, [rows, columns] contiguous.

    Each program takes every n-th row and sums the gradients of weight and bias over its own.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < columns
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    sum_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        place = row * columns + column
        g = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(scale + row)
        normed = tl.where(
            mask, (tl.load(x + place, mask=mask, other=0.0).to(tl.float32) - tl.load(mean + row)) * s, 0.0
        )
        sum_weight += g * normed
        sum_bias += g
        d = g * w
        d = (d - tl.sum(d, axis=0) / columns - normed * (tl.sum(d * normed, axis=0) / columns)) * s
        tl.store(out + place, d + tl.load(grad_x + place, mask=mask, other=0.0).to(tl.float32), mask=mask)
    tl.store(grad_weight + program * columns + column, sum_weight, mask=mask)
    tl.store(grad_bias + program * columns + column, sum_bias, mask=mask)


@triton.jit
def bias_gelu(x, bias, out, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The tanh form of GELU of x + bias, [rows, columns] contiguous. z * sigmoid(2u) = z / 2 * (1 + tanh(u))."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    place = row[:, None] * columns + column[None, :]
    z = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    z += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(out + place, z * tl.sigmoid(1.5957691216057308 * z * (1 + 0.044715 * z * z)), mask=mask)


@triton.jit
def bias_gelu_backward(
    grad,
    x,
    bias,
    grad_x,
    grad_bias,  # float32 [programs of axis 0, columns]
    rows,
    columns,
    rows_per_program,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Each program takes some columns of some rows and sums the gradient of the bias over these rows."""
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_row = column < columns
    b = tl.load(bias + column, mask=in_row, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BLOCK_COLUMNS,), dtype=tl.float32)
    start = tl.program_id(0).to(tl.int64) * rows_per_program
    end = tl.minimum(start + rows_per_program, rows)
    for block in range(start, end, BLOCK_ROWS):
        row = block + tl.arange(0, BLOCK_ROWS)
        mask = (row < end)[:, None] & in_row[None, :]
        place = row[:, None] * columns + column[None, :]
        z = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) + b
        s = tl.sigmoid(1.5957691216057308 * z * (1 + 0.044715 * z * z))
        slope = s + z * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * z * z)
        d = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32) * slope
        tl.store(grad_x + place, d, mask=mask)
        total += tl.sum(d, axis=0)
    tl.store(grad_bias + tl.program_id(0).to(tl.int64) * columns + column, total, mask=in_row)


@triton.jit
def _factors(seed, row, column, where, probability, SOME: tl.constexpr):
    """What dropout multiplies a row's numbers by: 0 or 1 / (1 - probability), and 1 in rows that it leaves alone.

    Made again in the backward pass from the seed. Each row has a random sequence of its own.
    """
    kept = tl.rand(tl.load(seed) + row, column) >= probability
    factors = tl.where(kept, 1 / (1 - probability), 0.0)
    if SOME:
        factors = tl.where(tl.load(where + row), factors, 1.0)
    return factors


@triton.jit
def dropout_add(
    x,
    residual,
    where,  # bool [rows], if SOME
    seed,  # int64 [1]
    out,
    columns,
    probability,
    BLOCK: tl.constexpr,
    SOME: tl.constexpr,
):
    """residual + dropout(x), [rows, columns] contiguous; with SOME only rows of `where` are dropped out."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask, place = column < columns, row * columns + column
    factors = _factors(seed, row, column, where, probability, SOME)
    added = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) * factors
    tl.store(out + place, tl.load(residual + place, mask=mask, other=0.0).to(tl.float32) + added, mask=mask)


@triton.jit
def dropout_backward(grad, where, seed, grad_x, columns, probability, BLOCK: tl.constexpr, SOME: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask, place = column < columns, row * columns + column
    factors = _factors(seed, row, column, where, probability, SOME)
    tl.store(grad_x + place, tl.load(grad + place, mask=mask, other=0.0).to(tl.float32) * factors, mask=mask)


@triton.jit
def bias_add(x, bias, residual, out, columns, BLOCK: tl.constexpr):
    """x + bias + residual, [rows, columns] contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask, place = column < columns, row * columns + column
    total = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, total + tl.load(residual + place, mask=mask, other=0.0).to(tl.float32), mask=mask)
