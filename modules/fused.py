"""The blocks' operators on an NVIDIA GPU in bfloat16: Triton kernels with fewer passes over memory.

Each computes in float32 what its plain twin of `modules.blocks` does, and rounds where that does. Offsets are
of 64 bits, as maps of pictures above 6 thousand pixels a side have more than 2**31 elements.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from modules import blocks
from modules.blocks import GRN_EPS, LAYER_NORM_EPS, KeysValues, Modulation, Operators

TILE = 8192  # values that a program of the norms holds at once
MAX_PIXELS = 8  # neighbours that one program convolves, as their windows overlap
GELU_ROWS, GELU_COLUMNS, GELU_STEPS = 16, 128, 16  # of a program: rows at a time, columns, and times
WEIGHT_ROWS, WEIGHT_COLUMNS = 8, 1024  # of a weight that a program scales, and as many columns at a time
QUERIES = 64  # of one head that a program adds the condition to
SMALLEST_DOT = 16  # keys that tl.dot takes at least
MOST_TOKENS = 256  # of a condition that a program holds: more do not fit into every card's shared memory


def _on_device(x: Tensor):
    """A context in which kernels are launched on the tensor's GPU."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# --- depthwise convolution and norm ---------------------------------------------------------------


# Sizes and numbers of pixels, which masks alone read, are compiled once for all values.
@triton.jit(do_not_specialize=["height", "width"])
def depthwise_norm_kernel(
    x, weight, bias, added, y, residual, height, width,
    x_batch, x_pixel, y_batch, y_pixel,
    C: tl.constexpr, BLOCK_C: tl.constexpr, PIXELS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """y = LayerNorm(3×3 depthwise of x + bias), residual = x + added: some pixels of a row a program."""
    sample = tl.program_id(1).to(tl.int64)
    per_row = tl.cdiv(width, PIXELS)
    row = tl.program_id(0) // per_row
    column = (tl.program_id(0) % per_row) * PIXELS + tl.arange(0, PIXELS)
    c = tl.arange(0, BLOCK_C)
    inside, present = c < C, column < width
    total = tl.zeros((PIXELS, BLOCK_C), tl.float32) + tl.load(bias + c, inside, 0.0).to(tl.float32)[None, :]
    for i in range(3):
        for j in range(3):
            r, q = row + i - 1, column + j - 1
            valid = ((r >= 0) & (r < height) & (q >= 0) & (q < width))[:, None] & inside[None, :]
            at = (r.to(tl.int64) * width + q)[:, None] * x_pixel + c[None, :]
            value = tl.load(x + sample * x_batch + at, valid, 0.0).to(tl.float32)
            total += value * tl.load(weight + (i * 3 + j) * C + c, inside, 0.0).to(tl.float32)[None, :]
    total = tl.where(inside[None, :], total.to(y.dtype.element_ty).to(tl.float32), 0.0)
    deviation = tl.where(inside[None, :], total - (tl.sum(total, 1) / C)[:, None], 0.0)
    normed = deviation * tl.rsqrt(tl.sum(deviation * deviation, 1) / C + EPS)[:, None]
    pixel, mask = row.to(tl.int64) * width + column, present[:, None] & inside[None, :]
    out = sample * y_batch + pixel[:, None] * y_pixel + c[None, :]
    tl.store(y + out, normed.to(y.dtype.element_ty), mask)
    value = tl.load(x + sample * x_batch + pixel[:, None] * x_pixel + c[None, :], mask, 0.0).to(tl.float32)
    value += tl.load(added + c, inside, 0.0).to(tl.float32)[None, :]
    tl.store(residual + out, value.to(residual.dtype.element_ty), mask)


def depthwise_norm(x: Tensor, convolution: nn.Conv2d, bias: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm of a depthwise convolution of a map (B, H, W, C), and the map plus the bias (C)."""
    if convolution.kernel_size != (3, 3):
        y, _ = blocks.depthwise_norm(x, convolution, bias)
        return y, x + bias
    x = x.contiguous()
    batch, height, width, c = x.shape
    y, residual = torch.empty_like(x), torch.empty_like(x)
    block = triton.next_power_of_2(c)
    pixels = max(1, min(MAX_PIXELS, TILE // block))
    weight = convolution.weight.flatten(1).t().contiguous()  # (9, C)
    grid = (height * triton.cdiv(width, pixels), batch)
    strides = (x.stride(0), x.stride(2), y.stride(0), y.stride(2))
    with _on_device(x):
        depthwise_norm_kernel[grid](
            x, weight, convolution.bias, bias, y, residual, height, width, *strides,
            C=c, BLOCK_C=block, PIXELS=pixels, EPS=LAYER_NORM_EPS, num_warps=8,
        )  # fmt: skip
    return y, residual


# --- modulation and norm --------------------------------------------------------------------------


@triton.jit
def modulated_norm_kernel(
    x, scale, shift, added, y, residual,
    x_batch, x_pixel, y_batch, y_pixel, modulation_batch,
    C: tl.constexpr, BLOCK_C: tl.constexpr, MODULATED: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """m = x·scale + shift, y = LayerNorm(m), residual = m + added: one pixel a program."""
    pixel, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    inside = c < C
    value = tl.load(x + sample * x_batch + pixel * x_pixel + c, inside, 0.0).to(tl.float32)
    if MODULATED:
        row = sample * modulation_batch + c
        value = value * tl.load(scale + row, inside, 0.0).to(tl.float32)
        value += tl.load(shift + row, inside, 0.0).to(tl.float32)
        value = value.to(y.dtype.element_ty).to(tl.float32)
    value = tl.where(inside, value, 0.0)
    deviation = tl.where(inside, value - tl.sum(value, 0) / C, 0.0)
    normed = deviation * tl.rsqrt(tl.sum(deviation * deviation, 0) / C + EPS)
    out = sample * y_batch + pixel * y_pixel + c
    tl.store(y + out, normed.to(y.dtype.element_ty), inside)
    value += tl.load(added + c, inside, 0.0).to(tl.float32)
    tl.store(residual + out, value.to(residual.dtype.element_ty), inside)


def modulated_norm(x: Tensor, modulation: Modulation | None, bias: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm of x·scale + shift, and that plus the bias (C); x (B, H, W, C)."""
    x = x.contiguous()
    batch, height, width, c = x.shape
    y, residual = torch.empty_like(x), torch.empty_like(x)
    scale, shift = (x, x) if modulation is None else (part.contiguous() for part in modulation)
    shared = modulation is None or len(scale) == 1
    strides = (x.stride(0), x.stride(2), y.stride(0), y.stride(2), 0 if shared else c)
    with _on_device(x):
        modulated_norm_kernel[(height * width, batch)](
            x, scale, shift, bias, y, residual, *strides, C=c, BLOCK_C=triton.next_power_of_2(c),
            MODULATED=modulation is not None, EPS=LAYER_NORM_EPS, num_warps=4,
        )  # fmt: skip
    return y, residual


# --- GELU and GRN ---------------------------------------------------------------------------------


@triton.jit
def _gelu(v):
    """v·Φ(v), by a formula for erf that is 1.5e-7 off at most (Abramowitz and Stegun, 7.1.26)."""
    z = tl.abs(v) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    p = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    tail = 0.5 * p * tl.exp(-z * z)  # Φ(-|v|)
    return v * tl.where(v < 0, tail, 1.0 - tail)


@triton.jit(do_not_specialize=["rows"])
def gelu_squares_kernel(
    x, y, sums, rows, columns, x_batch, x_row,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """y = GELU(x) in the same places, sums[b, block, k] = squares of y over ROWS·STEPS rows."""
    part, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = k < columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    n = part * STEPS * ROWS + tl.arange(0, ROWS)
    at = sample * x_batch + n.to(tl.int64)[:, None] * x_row + k[None, :]
    mask = (n < rows)[:, None] & inside[None, :]
    value = tl.load(x + at, mask, 0.0)
    for step in range(STEPS):
        # The next rows are on their way while these are computed.
        n += ROWS
        next_at = at + tl.full((), ROWS, tl.int64) * x_row
        next_mask = (n < rows)[:, None] & inside[None, :] & (step + 1 < STEPS)
        next_value = tl.load(x + next_at, next_mask, 0.0)
        g = _gelu(value.to(tl.float32)).to(y.dtype.element_ty)
        tl.store(y + at, g, mask)
        total += g.to(tl.float32) * g.to(tl.float32)
        at, mask, value = next_at, next_mask, next_value
    out = (sample * tl.num_programs(1) + part) * columns + k
    tl.store(sums + out, tl.sum(total, 0), inside)


def gelu_squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU of x (B, N, K) in its place, and the sums of its squares (B, K) in float32."""
    batch, rows, columns = x.shape
    parts = triton.cdiv(rows, GELU_ROWS * GELU_STEPS)
    sums = x.new_empty(batch, parts, columns, dtype=torch.float32)
    with _on_device(x):
        gelu_squares_kernel[(triton.cdiv(columns, GELU_COLUMNS), parts, batch)](
            x, x, sums, rows, columns, x.stride(0), x.stride(1),
            ROWS=GELU_ROWS, COLUMNS=GELU_COLUMNS, STEPS=GELU_STEPS, num_warps=4,
        )  # fmt: skip
    return x, sums.sum(1)


def hidden(x: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """GELU of a layer's output (B, N, K), and the sums of its squares (B, K) in float32."""
    return gelu_squares(layer(x))


@triton.jit
def grn_weight_kernel(
    weight, squares, gamma, y, rows, columns, y_batch,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """y[b] = weight·(1 + gamma·energy / (mean energy + EPS)) by columns: some rows a program."""
    sample = tl.program_id(1).to(tl.int64)
    squares += sample * columns
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, columns, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        total += tl.sqrt(tl.load(squares + k, k < columns, 0.0))
    divisor = tl.sum(total, 0) / columns + EPS
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    for start in range(0, columns, COLUMNS):
        k = start + tl.arange(0, COLUMNS)
        response = tl.sqrt(tl.load(squares + k, k < columns, 0.0)) / divisor
        scale = 1 + tl.load(gamma + k, k < columns, 0.0).to(tl.float32) * response
        mask = (r < rows)[:, None] & (k < columns)[None, :]
        at = r.to(tl.int64)[:, None] * columns + k[None, :]
        value = tl.load(weight + at, mask, 0.0).to(tl.float32) * scale[None, :]
        tl.store(y + sample * y_batch + at, value.to(y.dtype.element_ty), mask)


def grn_weight(weight: Tensor, squares: Tensor, gamma: Tensor) -> Tensor:
    """The weight (C, K) times GlobalResponseNorm's scale, per sample: (B, C, K)."""
    rows, columns = weight.shape
    y = weight.new_empty(len(squares), rows, columns)
    with _on_device(weight):
        grn_weight_kernel[(triton.cdiv(rows, WEIGHT_ROWS), len(squares))](
            weight.contiguous(), squares.contiguous(), gamma, y, rows, columns, y.stride(0),
            ROWS=WEIGHT_ROWS, COLUMNS=WEIGHT_COLUMNS, EPS=GRN_EPS, num_warps=8,
        )  # fmt: skip
    return y


def add_product(residual: Tensor, x: Tensor, weights: Tensor, _bias: Tensor) -> Tensor:
    """The residual (B, N, C), which has the bias, plus x (B, N, K) times weights (B or 1, C, K), in place."""
    if len(weights) == 1 and residual.is_contiguous():
        residual.view(-1, residual.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weights[0].t())
        return residual
    return residual.baddbmm_(x, weights.expand(len(x), -1, -1).transpose(1, 2))


# --- attention in two parts -----------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "tokens"])
def add_condition_kernel(
    q, keys, values, pixels, sums, y, rows, tokens,
    q_batch, q_row, kv_batch, kv_row, y_batch, y_row, scale,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """y = attention over pixels and condition tokens, from that over the pixels and its log-sum-exp."""
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d, t = head * WIDTH + tl.arange(0, WIDTH), tl.arange(0, TOKENS)
    mask, known = (n < rows)[:, None], (t < tokens)[:, None]
    wide = n.to(tl.int64)[:, None]
    query = tl.load(q + sample * q_batch + wide * q_row + d[None, :], mask, 0.0)
    at = sample * kv_batch + t[:, None] * kv_row + d[None, :]
    key, value = tl.load(keys + at, known, 0.0), tl.load(values + at, known, 0.0)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    scores = tl.where((t < tokens)[None, :], scores, -1e30)
    top = tl.max(scores, 1)
    weights = tl.exp(scores - top[:, None])
    of_pixels = tl.load(sums + (sample * HEADS + head) * rows + n, n < rows, 0.0)
    highest = tl.maximum(of_pixels, top)
    first, second = tl.exp(of_pixels - highest), tl.exp(top - highest)
    conditional = tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    out = sample * y_batch + wide * y_row + d[None, :]
    attended = tl.load(pixels + out, mask, 0.0).to(tl.float32)
    total = (attended * first[:, None] + conditional * second[:, None]) / (
        first + second * tl.sum(weights, 1)
    )[:, None]
    tl.store(y + out, total.to(y.dtype.element_ty), mask)


def pixel_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (B, N, heads, width), and the log-sum-exp (B, heads, N) of its scores, in float32."""
    if not q.is_cuda:
        y, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif torch.cuda.get_device_capability(q.device) == (9, 0):  # elsewhere flash is as fast or faster
        y, sums = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    else:
        y, sums = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return y.transpose(1, 2).contiguous(), sums.reshape(q.shape[:3]).contiguous()


def attention(q: Tensor, k: Tensor, v: Tensor, condition: KeysValues) -> Tensor:
    """Attention (B, N, C) over k, v and the condition's, each (B, heads, tokens, C / heads).

    A width that is no power of two, and a long prompt's condition, are left to the plain twin.
    """
    batch, heads, rows, width = q.shape
    tokens = condition[0].shape[2]
    if width != triton.next_power_of_2(width) or width < SMALLEST_DOT or tokens > MOST_TOKENS:
        return blocks.attention(q, k, v, condition)
    if (q.stride(1), q.stride(3)) != (width, 1):  # the kernel reads heads that lie side by side
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    y, sums = pixel_attention(q, k, v)
    keys, values = (t.transpose(1, 2).contiguous() for t in condition)  # (B, tokens, heads, width)
    block = max(SMALLEST_DOT, triton.next_power_of_2(tokens))
    strides = (q.stride(0), q.stride(2), keys.stride(0), keys.stride(1), y.stride(0), y.stride(1))
    with _on_device(q):
        add_condition_kernel[(triton.cdiv(rows, QUERIES), heads, batch)](
            q, keys, values, y, sums, y, rows, tokens, *strides, width**-0.5,
            HEADS=heads, WIDTH=width, ROWS=QUERIES, TOKENS=block, num_warps=4,
        )  # fmt: skip
    return y.flatten(2)


OPERATORS = Operators(depthwise_norm, modulated_norm, F.linear, hidden, grn_weight, add_product, attention)
