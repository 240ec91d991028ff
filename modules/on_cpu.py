"""The blocks' operators on a CPU in float32: products by oneDNN, in chunks of rows that stay in the cache.

PyTorch's own products go through MKL, which is half as fast on some processors with AVX-512.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.blocks import (
    LAYER_NORM_EPS,
    KeysValues,
    Operators,
    attention,
    channels_first,
    grn_weight,
    modulated_norm,
    pixels_last,
    row_spans,
)

SCORES = 2**19  # attention scores that are computed at once: they stay in a core's cache
FEW_ROWS = 192  # pixels below which PyTorch's attention is faster


@lru_cache
def pays() -> bool:
    """Whether oneDNN is there, on a processor on which it was measured to be faster."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return known and torch.backends.cpu.get_cpu_capability() == "AVX512"


def depthwise_norm(x: Tensor, convolution: nn.Conv2d, _bias: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm, in its place, of a depthwise convolution of a map (B, H, W, C); and the map."""
    y = pixels_last(convolution(channels_first(x)))
    for rows in row_spans(y.shape[1], y[:, 0].numel(), "cpu")[0]:
        y[:, rows] = F.layer_norm(y[:, rows], y.shape[-1:], eps=LAYER_NORM_EPS)
    return y, x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times the weight (C, K), transposed, plus the bias."""
    y = torch.ops.mkldnn._linear_pointwise(_rows(x), weight, bias, "none", [], "")
    return y.view(*x.shape[:-1], len(weight))


def hidden(x: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """GELU of a layer's output (B, N, K), and the sums of its squares (B, K)."""
    g = torch.ops.mkldnn._linear_pointwise(_rows(x), layer.weight, layer.bias, "gelu", [], "none")
    g = g.view(*x.shape[:-1], layer.out_features)
    return g, (g * g).sum(dim=1)


def add_product(residual: Tensor, x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """residual (B, N, C) + x (B, N, K) times weights (B or 1, C, K), transposed, + bias (C)."""
    if len(weights) == 1:
        return _added(residual, x, weights[0], bias)
    return torch.stack([_added(*parts, bias) for parts in zip(residual, x, weights, strict=True)])


def _added(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    rows = _rows(x), _rows(residual)
    return torch.ops.mkldnn._linear_pointwise.binary(*rows, weight, bias, "add").view(residual.shape)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def rowwise_attention(q: Tensor, k: Tensor, v: Tensor, condition: KeysValues) -> Tensor:
    """Attention (B, N, C) over k, v and the condition's, each (B, heads, tokens, C / heads)."""
    rows, width = q.shape[2:]
    if rows < FEW_ROWS:
        return attention(q, k, v, condition)
    keys, values = (torch.cat(pair, dim=2).flatten(0, 1) for pair in zip((k, v), condition, strict=True))
    values = values.transpose(1, 2).contiguous()  # (B·heads, C / heads, tokens)
    queries = (q * width**-0.5).flatten(0, 1)
    out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format)
    count = max(16, SCORES // keys.shape[1] // 16 * 16)
    for n, (query, key, value) in enumerate(zip(queries, keys, values, strict=True)):
        head = out[n // q.shape[1], :, n % q.shape[1]]
        for start in range(0, rows, count):
            scores = linear(query[start : start + count], key).softmax(dim=-1)
            head[start : start + count] = linear(scores, value)
    return out.flatten(2)


OPERATORS = Operators(
    depthwise_norm, modulated_norm, linear, hidden, grn_weight, add_product, rowwise_attention
)
