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
def add_norm(
    x,
    delta,  # what is added to x, with a bias, if ADD
    bias,
    weight,
    norm_bias,
    total,  # the sum, if ADD
    normed,
    mean,  # float32 [rows], as scale: 1 / standard deviation
    scale,
    columns,
    eps,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    """LayerNorm of x + delta + bias, [rows, columns] contiguous. One program for a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask, place = column < columns, row * columns + column
    y = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        y += tl.load(delta + place, mask=mask, other=0.0).to(tl.float32)
        y += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
        y = y.to(total.dtype.element_ty)  # the norm is that of the sum as it is stored
        tl.store(total + place, y, mask=mask)
        y = y.to(tl.float32)
    m = tl.sum(y, axis=0) / columns
    y = tl.where(mask, y - m, 0.0)
    s = tl.rsqrt(tl.sum(y * y, axis=0) / columns + eps)
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(normed + place, y * s * w + tl.load(norm_bias + column, mask=mask, other=0.0).to(tl.float32), mask=mask)
    tl.store(mean + row, m)
    tl.store(scale + row, s)


@triton.jit
def normalise(x, mean, scale, weight, bias, out, columns, BLOCK: tl.constexpr):
    """LayerNorm with mean and scale that are known, [rows, columns] contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask, place = column < columns, row * columns + column
    y = (tl.load(x + place, mask=mask, other=0.0).to(tl.float32) - tl.load(mean + row)) * tl.load(scale + row)
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, y * w + tl.load(bias + column, mask=mask, other=0.0).to(tl.float32), mask=mask)


@triton.jit
def add_norm_backward(
    grad,
    grad_x,  # of x itself, which the norm's gradient is added to
    x,
    weight,
    mean,  # float32 [rows], as scale
    scale,
    out,
    sums,  # float32 [programs, 3, columns]: gradients of weight, norm's bias and, the sum of `out`, added bias
    rows,
    columns,
    BLOCK: tl.constexpr,
):
    """LayerNorm's backward pass with the residual's gradient, [rows, columns] contiguous.

    Each program takes every n-th row and sums over its own.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < columns
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    sum_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_norm_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    sum_out = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        place = row * columns + column
        g = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(scale + row)
        normed = tl.where(
            mask, (tl.load(x + place, mask=mask, other=0.0).to(tl.float32) - tl.load(mean + row)) * s, 0.0
        )
        sum_weight += g * normed
        sum_norm_bias += g
        d = g * w
        d = (d - tl.sum(d, axis=0) / columns - normed * (tl.sum(d * normed, axis=0) / columns)) * s
        d += tl.load(grad_x + place, mask=mask, other=0.0).to(tl.float32)
        sum_out += d
        tl.store(out + place, d, mask=mask)
    to = sums + program * 3 * columns + column
    tl.store(to, sum_weight, mask=mask)
    tl.store(to + columns, sum_norm_bias, mask=mask)
    tl.store(to + 2 * columns, sum_out, mask=mask)


@triton.jit
def join_heads(
    part,  # [rows, N * D], contiguous
    out,  # [rows, N, 3, D], of which the part `number` is written
    sums,  # float32 [programs of axis 0, N, 3, D], likewise: of each column over the program's rows
    rows,
    columns,  # N * D
    number,
    D,
    rows_per_program,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Put the gradients of queries, keys or values where the projection has them."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_row = column < columns
    to = (column // D) * (3 * D) + number * D + column % D
    total = tl.zeros((BLOCK_COLUMNS,), dtype=tl.float32)
    start = program * rows_per_program
    end = tl.minimum(start + rows_per_program, rows)
    for block in range(start, end, BLOCK_ROWS):
        row = block + tl.arange(0, BLOCK_ROWS)
        mask = (row < end)[:, None] & in_row[None, :]
        x = tl.load(part + row[:, None] * columns + column[None, :], mask=mask, other=0.0)
        tl.store(out + row[:, None] * (3 * columns) + to[None, :], x, mask=mask)
        total += tl.sum(x.to(tl.float32), axis=0)
    tl.store(sums + program * (3 * columns) + to, total, mask=in_row)


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
    x,  # with AGAIN, GELU of x + bias is written over it
    bias,
    grad_x,
    grad_bias,  # float32 [programs of axis 0, columns]
    rows,
    columns,
    rows_per_program,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    AGAIN: tl.constexpr,
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
        if AGAIN:
            tl.store(x + place, z * s, mask=mask)
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


@triton.jit
def logit_statistics(logits, index, largest, total, chosen, width, columns, BLOCK: tl.constexpr):
    """The largest of a row's first `columns` of `width` logits, the sum of exp(logit - largest), and one logit.

    index: int64 [rows], which one, or -1 for none (0). Results are float32 [rows]. One program for a row.
    """
    row = tl.program_id(0).to(tl.int64)
    most = tl.full((BLOCK,), -3.0e38, tl.float32)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * width + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        more = tl.maximum(most, x)
        sums = sums * tl.exp(most - more) + tl.exp(x - more)
        most = more
    of_all = tl.max(most, axis=0)
    place = tl.load(index + row)
    tl.store(largest + row, of_all)
    tl.store(total + row, tl.sum(sums * tl.exp(most - of_all), axis=0))
    tl.store(chosen + row, tl.load(logits + row * width + place, mask=place >= 0, other=0.0).to(tl.float32))


@triton.jit
def logit_gradient(logits, index, log_partition, scale, grad_loss, width, columns, BLOCK: tl.constexpr):
    """Write over a row's logits scale * exp(logit - log_partition), less grad_loss at `index`; 0 from `columns` on.

    log_partition, scale, grad_loss: float32 [rows].
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row * width + column
    x = tl.load(place, mask=column < columns, other=float("-inf")).to(tl.float32)
    x = tl.exp(x - tl.load(log_partition + row)) * tl.load(scale + row)
    x -= tl.where(column == tl.load(index + row), tl.load(grad_loss + row), 0.0)
    tl.store(place, x, mask=column < width)
