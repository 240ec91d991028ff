"""Blocks that Stage B and Stage C share. Feature maps are (B, C, H, W) in channels-last memory throughout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_PERIOD = 10000  # of the timestep embedding, and the scale its argument is multiplied by
LAYER_NORM_EPS = 1e-6
GRN_EPS = 1e-6
SMALLEST = 1e-30  # sum of squares: the root of 0 has no gradient

# Elements of a per-pixel MLP's hidden layer that are kept between its two products, by device: a larger one
# is computed twice, in chunks of rows (level 0 of Stage B: above 3600 pixels a side on a GPU, 600 on a CPU).
KEPT_HIDDEN = {"cpu": 2**24, "cuda": 2**29}
CHUNK_HIDDEN = {"cpu": 2**20, "cuda": 2**27}  # elements of a chunk

KeysValues = tuple[Tensor, Tensor]  # of the condition tokens, each (B, heads, tokens, C / heads)
Modulation = tuple[Tensor, Tensor]  # scale (with the 1 in it) and shift, each (B or 1, C)


def timestep_embedding(r: Tensor, c_r: int = 64) -> Tensor:
    """Sinusoidal embedding of a value in [0, 1], always in float32.

    r (B,) -> (B, c_r): sines then cosines of 10000·r times c_r // 2 frequencies, zero-padded when c_r is odd.
    """
    half = c_r // 2
    k = torch.arange(half, device=r.device, dtype=torch.float32)
    frequencies = torch.exp(k * (-(math.log(MAX_PERIOD) / (half - 1))))
    angles = (r.float() * MAX_PERIOD)[:, None] * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return F.pad(embedding, (0, c_r % 2))


def pixels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W, C), without a copy in channels-last memory."""
    return x.permute(0, 2, 3, 1)


def channels_first(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), the inverse view of `pixels_last`."""
    return x.permute(0, 3, 1, 2)


def resize_like(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear resize with aligned corners to (H, W), in float32; the same tensor where the size is right."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x.float(), size=tuple(size), mode="bilinear", align_corners=True).to(x.dtype)


# --- what blocks compute without gradients --------------------------------------------------------


@dataclass(frozen=True)
class Operators:
    """How the blocks compute where no gradient is asked for: `PLAIN`, or a device's own of the same results.

    Maps are (B, H, W, C), tokens (B, N, C). A bias that comes with a residual is added by one of both
    functions that get it: the first may hand over the residual with the bias in it.
    """

    # (x, convolution, bias) -> its normalised output, and the residual x for `add_product`
    depthwise_norm: Callable[[Tensor, nn.Conv2d, Tensor], tuple[Tensor, Tensor]]
    # (x, scale and shift or None, bias) -> the modulated x normalised, and as the residual for `add_product`
    modulated_norm: Callable[[Tensor, Modulation | None, Tensor], tuple[Tensor, Tensor]]
    linear: Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, weight, bias)
    # (x, layer) -> GELU of the layer's output (B, N, K), and the sums of its squares (B, K)
    hidden: Callable[[Tensor, nn.Linear], tuple[Tensor, Tensor]]
    # (weight, sums of squares, gamma) -> the weight times GRN's scale, per sample (B, C, K)
    grn_weight: Callable[[Tensor, Tensor, Tensor], Tensor]
    # (residual (B, N, C), x (B, N, K), weights (B or 1, C, K), bias) -> their sum; the residual may be lost
    add_product: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    # (q, k, v, condition) -> attention over k, v and the condition's keys and values together, (B, N, C)
    attention: Callable[[Tensor, Tensor, Tensor, KeysValues], Tensor]
    # (sums of squares of a map's pixels) -> those of all pixels, where the map is a part of a larger one
    total: Callable[[Tensor], Tensor] = lambda squares: squares


def depthwise_norm(x: Tensor, convolution: nn.Conv2d, _bias: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm of a depthwise convolution of a map (B, H, W, C), and the map."""
    y = pixels_last(convolution(channels_first(x)))
    return F.layer_norm(y, y.shape[-1:], eps=LAYER_NORM_EPS), x


def modulated_norm(x: Tensor, modulation: Modulation | None, _bias: Tensor) -> tuple[Tensor, Tensor]:
    """LayerNorm of x·scale + shift, and that; x (B, H, W, C)."""
    y = x if modulation is None else modulated(x, modulation)
    return F.layer_norm(y, y.shape[-1:], eps=LAYER_NORM_EPS), y


def modulated(x: Tensor, modulation: Modulation) -> Tensor:
    """x·scale + shift; x (B, H, W, C)."""
    scale, shift = (part[:, None, None] for part in modulation)
    return torch.addcmul(shift, x, scale)


def hidden(x: Tensor, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """GELU of a layer's output (B, N, K), and the sums of its squares (B, K)."""
    g = torch.ops.aten.gelu_(layer(x))
    if g.device.type == "cpu":
        return g, _sums_of_squares(g, (1,))
    return g, torch.linalg.vector_norm(g, dim=1, dtype=_wider(g)).square()


def _wider(x: Tensor) -> torch.dtype | None:
    """What a sum of many is counted in; naming the dtype x has would slow it."""
    return torch.float32 if x.element_size() < 4 else None


def _sums_of_squares(x: Tensor, dim: tuple[int, ...], keepdim: bool = False) -> Tensor:
    """In at least float32; on a CPU a norm takes up to ten times as long."""
    wide = x.to(_wider(x) or x.dtype)
    return (wide * wide).sum(dim, keepdim)


def grn_scale(squares: Tensor, gamma: Tensor) -> Tensor:
    """What GlobalResponseNorm multiplies by (B, K), from the sums of squares (B, K)."""
    energy = squares.sqrt()
    response = energy / (energy.mean(dim=-1, keepdim=True) + GRN_EPS)
    return 1 + gamma.flatten() * response.to(gamma.dtype)


def grn_weight(weight: Tensor, squares: Tensor, gamma: Tensor) -> Tensor:
    """The weight (C, K) times GlobalResponseNorm's scale, per sample: (B, C, K)."""
    return weight * grn_scale(squares, gamma)[:, None]


def add_product(residual: Tensor, x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """residual (B, N, C) + x (B, N, K) times weights (B or 1, C, K), transposed, + bias (C)."""
    if len(weights) == 1:
        return F.linear(x, weights[0], bias).add_(residual)
    return torch.baddbmm(bias, x, weights.transpose(1, 2)).add_(residual)


def attention(q: Tensor, k: Tensor, v: Tensor, condition: KeysValues) -> Tensor:
    """Attention (B, N, C) over k, v and the condition's, each (B, heads, tokens, C / heads)."""
    keys, values = (torch.cat(pair, dim=2) for pair in zip((k, v), condition, strict=True))
    return F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)


PLAIN = Operators(depthwise_norm, modulated_norm, F.linear, hidden, grn_weight, add_product, attention)


def row_spans(rows: int, row_elements: int, device: str) -> tuple[list[slice], bool]:
    """The chunks of rows to compute a hidden layer in, and whether it is kept until all are computed."""
    keep = rows * row_elements <= KEPT_HIDDEN.get(device, KEPT_HIDDEN["cpu"])
    if keep and device != "cpu":
        return [slice(0, rows)], True
    count = max(1, CHUNK_HIDDEN.get(device, CHUNK_HIDDEN["cpu"]) // row_elements)
    return [slice(start, min(start + count, rows)) for start in range(0, rows, count)], keep


# --- blocks ---------------------------------------------------------------------------------------


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of a feature map (B, C, H, W), eps 1e-6, without learned parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return channels_first(F.layer_norm(pixels_last(x), x.shape[1:2], eps=LAYER_NORM_EPS))


class GlobalResponseNorm(nn.Module):
    """Global response normalisation (ConvNeXt-V2) of a map (B, H, W, C), over all pixels of a sample."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # where all is 0 its gradient is
            energy = _sums_of_squares(x, (1, 2), keepdim=True).clamp_min(SMALLEST).sqrt()  # (B, 1, 1, C)
        else:
            energy = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=_wider(x))
        response = energy / (energy.mean(dim=-1, keepdim=True) + GRN_EPS)
        return torch.addcmul(self.beta, x, 1 + self.gamma * response.to(x.dtype))


class ResBlock(nn.Module):
    """Depthwise convolution and a per-pixel MLP with global response normalisation, added to the input.

    x (B, C, H, W), skip (B, c_skip, H, W) or None -> (B, C, H, W). With `ops` it is computed by these,
    without gradients and dropout.
    """

    def __init__(self, c: int, c_skip: int = 0, kernel_size: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, kernel_size, padding=kernel_size // 2, groups=c)
        self.norm = ChannelNorm()
        self.channelwise = nn.Sequential(
            nn.Linear(c + c_skip, 4 * c),
            nn.GELU(),
            GlobalResponseNorm(4 * c),
            nn.Dropout(dropout),
            nn.Linear(4 * c, c),
        )

    def forward(self, x: Tensor, skip: Tensor | None = None, ops: Operators | None = None) -> Tensor:
        if ops is not None and type(self.channelwise[0]) is type(self.channelwise[4]) is nn.Linear:
            return self._without_gradients(x, skip, ops)
        y = pixels_last(self.norm(self.depthwise(x)))
        if skip is not None:
            y = torch.cat([y, pixels_last(skip)], dim=-1)  # (B, H, W, C + c_skip)
        return x + channels_first(self.channelwise(y))

    def _without_gradients(self, x: Tensor, skip: Tensor | None, ops: Operators) -> Tensor:
        """The same, with the scale and the shift of the response norm in the last product."""
        grn, last = self.channelwise[2], self.channelwise[4]
        bias = F.linear(grn.beta.flatten(), last.weight, last.bias)
        y, residual = ops.depthwise_norm(pixels_last(x), self.depthwise, bias)
        tokens = [
            None if t is None else t.flatten(1, 2) for t in (y, None if skip is None else pixels_last(skip))
        ]
        out = self._mix(*tokens, residual.flatten(1, 2), bias, ops)
        return channels_first(out.view(y.shape))

    def _mix(self, y: Tensor, skip: Tensor | None, residual: Tensor, bias: Tensor, ops: Operators) -> Tensor:
        """The per-pixel MLP's output, added to the residual; y, which is lost, and all others (B, N, C)."""
        first, grn, last = self.channelwise[0], self.channelwise[2], self.channelwise[4]

        def computed(rows: slice) -> tuple[Tensor, Tensor]:
            part = y[:, rows] if skip is None else torch.cat([y[:, rows], skip[:, rows]], dim=-1)
            return ops.hidden(part, first)

        spans, keep = row_spans(y.shape[1], len(y) * last.in_features, y.device.type)
        kept: list[Tensor] = []
        squares: Tensor | float = 0.0
        for rows in spans:
            g, part = computed(rows)
            squares = squares + part
            if keep:
                kept.append(g)
        squares = ops.total(squares)
        # The scale goes into the smaller of both factors of the product.
        into_weight = y.shape[1] >= last.out_features
        if into_weight:
            weights = ops.grn_weight(last.weight, squares, grn.gamma)
        else:
            weights, scale = last.weight[None], grn_scale(squares, grn.gamma)[:, None]
        for rows in spans:
            g = kept.pop(0) if keep else computed(rows)[0]
            added = ops.add_product(residual[:, rows], g if into_weight else g.mul_(scale), weights, bias)
            if len(spans) == 1:
                return added
            y[:, rows] = added
        return y


class TimestepBlock(nn.Module):
    """Scales and shifts the channels by the embedding of r and of further timestep-like conditions.

    x (B, C, H, W), r_embed (B, c_r·(1 + number of conditions)): the embeddings side by side, r's first.
    """

    def __init__(self, c: int, c_r: int, conditions: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.names = ["mapper"] + [f"mapper_{name}" for name in conditions]
        for name in self.names:
            self.add_module(name, nn.Linear(c_r, 2 * c))

    def modulation(self, r_embed: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift, each (B, C, 1, 1)."""
        parts = r_embed.to(self.mapper.weight.dtype).chunk(len(self.names), dim=1)
        # Alike on all pixels, so that rounding would not average out: autocast stays away.
        with torch.autocast(r_embed.device.type, enabled=False):
            total = sum(getattr(self, name)(part) for name, part in zip(self.names, parts, strict=True))
        a, b = total[:, :, None, None].chunk(2, dim=1)
        return a, b

    def scale_shift(self, r_embed: Tensor) -> Modulation:
        """What the channels are multiplied by, and what is added, each (B, C)."""
        a, b = self.modulation(r_embed)
        return 1 + a[:, :, 0, 0], b[:, :, 0, 0]

    def forward(self, x: Tensor, r_embed: Tensor) -> Tensor:
        a, b = self.modulation(r_embed)
        return torch.addcmul(b, x, 1 + a)


class PackedAttention(nn.Module):
    """Multi-head attention whose query, key and value projections are one packed matrix (3C, C)."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or c % heads:
            raise ValueError(f"the attention width {c} does not divide into {heads} heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * c, c))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * c))
        self.out_proj = nn.Linear(c, c)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, tokens, C / heads)

    def keys_values(self, tokens: Tensor) -> KeysValues:
        """Keys and values of condition tokens (B, tokens, C)."""
        c = self.out_proj.in_features
        keys, values = F.linear(tokens, self.in_proj_weight[c:], self.in_proj_bias[c:]).chunk(2, dim=-1)
        return self._split_heads(keys), self._split_heads(values)

    def forward(self, x: Tensor, condition: KeysValues, self_attn: bool) -> Tensor:
        keys, values = condition
        c = self.out_proj.in_features
        if self_attn:
            q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(
                3, dim=-1
            )  # (B, tokens, C) each
            keys = torch.cat([self._split_heads(k), keys], dim=2)
            values = torch.cat([self._split_heads(v), values], dim=2)
        else:
            q = F.linear(x, self.in_proj_weight[:c], self.in_proj_bias[:c])
        y = F.scaled_dot_product_attention(self._split_heads(q), keys, values)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def added(self, x: Tensor, residual: Tensor, condition: KeysValues, ops: Operators) -> Tensor:
        """Self-attention, computed by `ops` and without gradients, added to the residual; both (B, N, C)."""
        packed = ops.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (self._split_heads(part) for part in packed.chunk(3, dim=-1))
        y = ops.attention(q, k, v, condition)
        return ops.add_product(residual, y, self.out_proj.weight[None], self.out_proj.bias)


class SpatialAttention(nn.Module):
    """Attention of the pixels of a map among each other and to the condition tokens, row by row."""

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.attn = PackedAttention(c, heads)

    def forward(self, x: Tensor, condition: KeysValues, self_attn: bool) -> Tensor:
        batch, c, height, width = x.shape
        tokens = pixels_last(x).reshape(batch, height * width, c)
        y = self.attn(tokens, condition, self_attn)
        return channels_first(y.view(batch, height, width, c))


class AttnBlock(nn.Module):
    """Attention over the map's normalised pixels and the condition tokens, added to the input.

    x (B, C, H, W); the condition's keys and values come from `keys_values`, once per picture. With `ops` it
    is computed by these, without gradients, of x with the modulation of the timestep block before it.
    """

    def __init__(self, c: int, c_cond: int, heads: int, self_attn: bool = True) -> None:
        super().__init__()
        self.self_attn = self_attn
        self.norm = ChannelNorm()
        self.attention = SpatialAttention(c, heads)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(c_cond, c))

    def keys_values(self, tokens: Tensor) -> KeysValues:
        """Keys and values of condition tokens (B, tokens, c_cond)."""
        return self.attention.attn.keys_values(self.kv_mapper(tokens))

    def forward(
        self,
        x: Tensor,
        condition: KeysValues,
        ops: Operators | None = None,
        modulation: Modulation | None = None,
    ) -> Tensor:
        if ops is not None and self.self_attn:
            return self._without_gradients(x, condition, ops, modulation)
        if modulation is not None:
            x = channels_first(modulated(pixels_last(x), modulation))
        return x + self.attention(self.norm(x), condition, self.self_attn)

    def _without_gradients(
        self, x: Tensor, condition: KeysValues, ops: Operators, modulation: Modulation | None
    ) -> Tensor:
        packed = self.attention.attn
        normed, residual = ops.modulated_norm(pixels_last(x), modulation, packed.out_proj.bias)
        out = packed.added(normed.flatten(1, 2), residual.flatten(1, 2), condition, ops)
        return channels_first(out.view(normed.shape))


def xavier_linears(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer and convolution."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
