"""Blocks that Stage B and Stage C share. Feature maps are (B, C, H, W) in channels-last memory throughout."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_PERIOD = 10000  # of the timestep embedding, and the scale its argument is multiplied by
LAYER_NORM_EPS = 1e-6
GRN_EPS = 1e-6

KeysValues = tuple[Tensor, Tensor]  # of the condition tokens, each (B, heads, tokens, C / heads)


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
        wider = torch.float32 if x.element_size() < 4 else None  # naming the dtype x has slows the sum
        energy = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wider)  # (B, 1, 1, C)
        response = energy / (energy.mean(dim=-1, keepdim=True) + GRN_EPS)
        return torch.addcmul(self.beta, x, 1 + self.gamma * response.to(x.dtype))


class ResBlock(nn.Module):
    """Depthwise convolution and a per-pixel MLP with global response normalisation, added to the input.

    x (B, C, H, W), skip (B, c_skip, H, W) or None -> (B, C, H, W).
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

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        y = pixels_last(self.norm(self.depthwise(x)))
        if skip is not None:
            y = torch.cat([y, pixels_last(skip)], dim=-1)  # (B, H, W, C + c_skip)
        return x + channels_first(self.channelwise(y))


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

    x (B, C, H, W); the condition's keys and values come from `keys_values`, once per picture.
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

    def forward(self, x: Tensor, condition: KeysValues) -> Tensor:
        return x + self.attention(self.norm(x), condition, self.self_attn)


def xavier_linears(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer and convolution."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
