"""Implicit-resolution guidance: what UltraPixel adds to Stage C (paper sections 3.1 and 3.2, figures 4, 5).

Features of the low-resolution pass are upsampled by a coordinate network whose weights a transformer
predicts from them, then fused into the high-resolution pass. All that depends on those features and the
target size alone is done once per picture (`Guidance.prepare`); each step only fuses
(`PreparedGuidance.fuse`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.blocks import (
    ChannelNorm,
    TimestepBlock,
    channels_first,
    pixels_last,
    timestep_embedding,
    xavier_linears,
)

FREQUENCIES = 64  # of the coordinate encoding, per axis
MAX_FREQUENCY = 1024.0
MAX_TOKENS = 1024  # positions the feature tokenizer knows
C_R = 64  # width of the embeddings of r and of the scale
BASE_PIXELS = 576  # latent pixels of the low-resolution pass (24×24), base of the scale embedding


@dataclass(frozen=True)
class GuidanceFeatures:
    """Maps (B, C, h, w) of the low-resolution pass after each level's first attention, in running order."""

    maps: tuple[Tensor, ...]

    def first(self, count: int) -> GuidanceFeatures:
        """Those of the first `count` samples (the conditional half)."""
        return GuidanceFeatures(tuple(feature[:count] for feature in self.maps))


@dataclass(frozen=True)
class PreparedSite:
    """What one site's fusion needs beside x and r, constant over the steps and for both halves."""

    hidden: (
        Tensor  # (B, H, W, C / 4), the part of the fusion's first layer that acts on the upsampled feature
    )
    scale: Tensor  # (1 or B, C, 1, 1), scale-aware normalisation
    shift: Tensor  # (1 or B, C, 1, 1)

    def part(self, samples: slice, rows: slice) -> PreparedSite:
        """That of some samples and rows; what there is once is the same for all samples."""
        hidden, scale, shift = (
            x if len(x) == 1 else x[samples] for x in (self.hidden, self.scale, self.shift)
        )
        return PreparedSite(hidden[:, rows], scale, shift)

    def for_both_halves(self, unconditional: float) -> PreparedSite:
        """That of `PreparedGuidance.for_both_halves`."""
        count = len(self.hidden)
        hidden = self.hidden if count == 1 else torch.cat([self.hidden, self.hidden])
        if unconditional == 1:
            return replace(self, hidden=hidden)
        share = self.scale.new_tensor([1.0] * count + [unconditional] * count)[:, None, None, None]
        return PreparedSite(hidden, share * self.scale, share * self.shift)


class FeatureTokenizer(nn.Module):
    """Tokens (B, h·w, ch) with learned positions from a feature map (B, ch, h, w)."""

    def __init__(self, ch: int) -> None:
        super().__init__()
        self.prefc = nn.Linear(ch, ch)
        self.posemb = nn.Parameter(torch.empty(MAX_TOKENS, ch))

    def forward(self, feature: Tensor) -> Tensor:
        tokens = pixels_last(feature).flatten(1, 2)
        if tokens.shape[1] > len(self.posemb):
            height, width = feature.shape[-2:]
            raise ValueError(
                f"a guidance feature of {height}×{width} has more than the {len(self.posemb)} known tokens"
            )
        return self.prefc(tokens) + self.posemb[: tokens.shape[1]]


class TokenAttention(nn.Module):
    """Self-attention without an output projection, tokens (B, n, ch) -> (B, n, heads·head_dim)."""

    def __init__(self, ch: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Sequential(nn.SiLU(), nn.Linear(ch, heads * head_dim))
        self.to_kv = nn.Sequential(nn.SiLU(), nn.Linear(ch, 2 * heads * head_dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(x), *self.to_kv(x).chunk(2, dim=-1))
        )  # (B, heads, n, head_dim) each
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class TokenMLP(nn.Module):
    """Linear, GELU, dropout (none here), Linear."""

    def __init__(self, ch: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(ch, hidden), nn.GELU(), nn.Dropout(0.0), nn.Linear(hidden, ch))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class PreNorm(nn.Module):
    """x + fn(LayerNorm(x)), with PyTorch's default epsilon."""

    def __init__(self, ch: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(ch)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(self.norm(x))


class TransformerEncoder(nn.Module):
    """Pre-norm transformer layers over tokens (B, n, ch)."""

    def __init__(self, ch: int, heads: int, head_dim: int, hidden: int, depth: int = 1) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [PreNorm(ch, TokenAttention(ch, heads, head_dim)), PreNorm(ch, TokenMLP(ch, hidden))]
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for attention, mlp in self.layers:
            x = mlp(attention(x))
        return x


def coordinate_encoding(
    height: int, width: int, device: torch.device | str = "cpu", max_frequency: float = MAX_FREQUENCY
) -> Tensor:
    """Fourier encoding (H, W, 256) of the pixel centres of a grid on (−1, 1)², in float32."""
    frequencies = torch.exp(torch.linspace(0, math.log(max_frequency), FREQUENCIES, device=device))
    rows, columns = (((0.5 + torch.arange(n, device=device)) / n * 2 - 1) for n in (height, width))
    row = (rows[:, None] * frequencies)[:, None, :].expand(height, width, -1)
    column = (columns[:, None] * frequencies)[None, :, :].expand(height, width, -1)
    angles = torch.cat([row, column], dim=-1) * math.pi  # (H, W, 128)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def scale_of(height: int, width: int) -> float:
    """The latent's size relative to the low-resolution one, as scale-aware normalisation sees it (eq. 4)."""
    return math.sqrt(math.log(height * width) / math.log(BASE_PIXELS))


def scale_embedding(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Embedding (1, 64) of the latent's size relative to the low-resolution one (eq. 4, under a root)."""
    return timestep_embedding(torch.full((1,), scale_of(height, width), device=device), C_R)


class ScaleAwareNorm(nn.Module):
    """Scale-aware normalisation (eq. 4): x modulated by the embedding of the latent's size, added to x.

    The embedding of a size that no training showed may be far from those of its neighbours, and what it gives
    is arbitrary then. With `sides`, of square latents that training did show, other sizes are interpolated
    linearly between their scales; those beyond are taken for the nearest.
    """

    sides: tuple[int, ...] = ()  # increasing

    def __init__(self, c: int) -> None:
        super().__init__()
        self.mapping = TimestepBlock(c, C_R)

    def affine(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Scale and shift (1, C, 1, 1) with x·scale + shift the whole of it."""
        if not self.sides:
            return self._affine(height, width)
        scales = [scale_of(side, side) for side in self.sides]
        scale = min(max(scale_of(height, width), scales[0]), scales[-1])
        below = max(i for i, known in enumerate(scales) if known <= scale)
        own = self._affine(self.sides[below], self.sides[below])
        if scale == scales[below]:
            return own
        above = self._affine(self.sides[below + 1], self.sides[below + 1])
        share = (scale - scales[below]) / (scales[below + 1] - scales[below])
        return own[0].lerp(above[0], share), own[1].lerp(above[1], share)

    def _affine(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        a, b = self.mapping.modulation(scale_embedding(height, width, self.mapping.mapper.weight.device))
        return 2 + a, b

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.affine(*x.shape[-2:])
        return torch.addcmul(shift, x, scale)


class GuidanceBlock(nn.Module):
    """One site's guidance G(x, g, r) (figure 5): `prepare` does what depends on g and the size alone.

    A kind of it upsamples the feature g in its own way: `UPSAMPLINGS`.
    """

    def add_fusion(self, ind: int) -> None:
        """Make the fusion's layers for ind channels of x and g; they follow those of the upsampling."""
        self.toout = nn.Sequential(nn.Linear(2 * ind, ind // 4), nn.GELU(), nn.Linear(ind // 4, ind))
        self.mapp_t = TimestepBlock(ind, C_R)
        self.norm = ChannelNorm()
        self.hr_norm = ScaleAwareNorm(ind)

    def init_weights(self) -> None:
        """Initial values for training from nothing."""
        xavier_linears(self)

    def upsample(self, g: Tensor, size: tuple[int, int]) -> Tensor:
        """The feature g (B, C, h, w) at size (H, W): (B, C, H, W)."""
        raise NotImplementedError

    def prepare(self, g: Tensor, size: tuple[int, int]) -> PreparedSite:
        """Steps 1 to 5, the upsampled feature's half of the fusion and the scale-aware normalisation."""
        u = pixels_last(self.upsample(g, size))
        ind = u.shape[-1]
        hidden = F.linear(u, self.toout[0].weight[:, :ind], self.toout[0].bias)
        return PreparedSite(hidden, *self.hr_norm.affine(*size))

    def fuse(self, x: Tensor, r_embed: Tensor, site: PreparedSite) -> Tensor:
        """G (B, C, H, W) for x of the same shape and the embedding (B, 64) of r (eqs. 2 to 4)."""
        hidden = F.linear(pixels_last(x), self.toout[0].weight[:, x.shape[1] :]) + site.hidden
        y = channels_first(self.toout[2](F.gelu(hidden)))
        y = self.norm(self.mapp_t(y, r_embed))
        return torch.addcmul(site.shift, y, site.scale).to(x.dtype)

    def forward(self, x: Tensor, g: Tensor, r_embed: Tensor) -> Tensor:
        return self.fuse(x, r_embed, self.prepare(g, tuple(x.shape[-2:])))


class ImplicitBlock(GuidanceBlock):
    """Upsamples by a coordinate network whose weights a transformer predicts from g (figure 4).

    ind: channels C of x and g; ch: width of the tokens and of the upsampled feature, equal to f_dim, the
    width of the coordinate network; n_groups: weight tokens per layer of that network.
    """

    max_frequency = MAX_FREQUENCY  # of the coordinate encoding

    def __init__(self, ind: int, ch: int, n_head: int, head_dim: int, n_groups: int, f_dim: int) -> None:
        super().__init__()
        if not ch == f_dim == n_head * head_dim:
            raise ValueError(
                f"guidance needs ch = f_dim = n_head·head_dim, not {ch}, {f_dim} and {n_head}·{head_dim}"
            )
        self.n_groups = n_groups
        sizes = {
            "wb0": (4 * FREQUENCIES, f_dim),
            "wb1": (f_dim, ch),
        }  # (in, out) of the coordinate network's layers
        self.wtokens = nn.Parameter(torch.empty(len(sizes) * n_groups, ch))
        self.input_layer = nn.Conv2d(ind, ch, 1)
        self.tokenizer = FeatureTokenizer(ch)
        self.transformer_encoder = TransformerEncoder(ch, n_head, head_dim, f_dim)
        self.base_params = nn.ParameterDict(
            {k: nn.Parameter(torch.empty(i + 1, o)) for k, (i, o) in sizes.items()}
        )
        self.wtoken_postfc = nn.ModuleDict(
            {k: nn.Sequential(nn.LayerNorm(f_dim), nn.Linear(f_dim, i)) for k, (i, _) in sizes.items()}
        )
        self.output_layer = nn.Conv2d(ch, ind, 1)
        self.add_fusion(ind)

    def init_weights(self) -> None:
        """Initial values for training from nothing."""
        super().init_weights()
        nn.init.normal_(self.wtokens)
        nn.init.normal_(self.tokenizer.posemb)
        for base in self.base_params.values():
            nn.init.kaiming_uniform_(
                base.data[:-1].T, a=math.sqrt(5)
            )  # a view: (out, in) as a Linear's weight
            bound = 1 / math.sqrt(len(base) - 1)
            nn.init.uniform_(base.data[-1], -bound, bound)

    def _layer(self, name: str, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (B, in, out) and bias (out) of a coordinate-network layer from tokens (B, groups, f_dim)."""
        base = self.base_params[name]
        modulation = self.wtoken_postfc[name](tokens).transpose(1, 2)  # (B, in, groups)
        columns = torch.arange(base.shape[1], device=base.device) % self.n_groups
        return F.normalize(base[:-1] * modulation[:, :, columns], dim=1), base[-1]

    def upsample(self, g: Tensor, size: tuple[int, int]) -> Tensor:
        """The feature g (B, C, h, w) as a continuous map, drawn at size (H, W): (B, C, H, W) (figure 4)."""
        height, width = size
        tokens = self.tokenizer(self.input_layer(g))
        tokens = torch.cat([tokens, self.wtokens.expand(len(g), -1, -1)], dim=1)
        weight_tokens = self.transformer_encoder(tokens)[:, -len(self.wtokens) :]
        first, last = weight_tokens.split(self.n_groups, dim=1)
        weight, bias = self._layer("wb0", first)
        points = coordinate_encoding(height, width, g.device, self.max_frequency)
        points = points.to(g.dtype).flatten(0, 1)  # (H·W, 256)
        hidden = F.relu(points @ weight + bias)  # (B, H·W, f_dim)
        weight, bias = self._layer("wb1", last)
        u = channels_first((hidden @ weight + bias).unflatten(1, size))  # (B, ch, H, W)
        return self.output_layer(u) + F.interpolate(g, size=size, mode="nearest")


class BilinearBlock(GuidanceBlock):
    """Upsamples bilinearly and adds a convolution (section 4.3, the ablation of table 3)."""

    def __init__(self, ind: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(ind, ind, 3, padding=1)
        self.add_fusion(ind)

    def upsample(self, g: Tensor, size: tuple[int, int]) -> Tensor:
        """The feature g (B, C, h, w) at size (H, W): (B, C, H, W)."""
        u = F.interpolate(g, size=size, mode="bilinear", align_corners=False)
        return self.convolution(u) + u


# How the features get to the size of the high-resolution pass: each makes a site's block from the sizes
# (ind, ch, n_head, head_dim, n_groups, f_dim).
UPSAMPLINGS: dict[str, Callable[[int, int, int, int, int, int], GuidanceBlock]] = {
    "implicit": ImplicitBlock,
    "bilinear": lambda ind, *_: BilinearBlock(ind),
}


@dataclass(frozen=True)
class PreparedGuidance:
    """Guidance bound to one picture, or to several: `fuse` adds it at a site of the high-resolution pass.

    One picture's is the same for all samples of a batch, or for each half of it; that of several has a sample
    for each of a batch.
    """

    blocks: tuple[GuidanceBlock, ...]  # per site in running order: down levels, then up levels
    sites: tuple[PreparedSite, ...]
    strengths: tuple[float, ...]

    def part(self, samples: slice, rows: slice) -> PreparedGuidance:
        """That of some samples, and of some rows of maps, which have one size at all sites."""
        return replace(self, sites=tuple(site.part(samples, rows) for site in self.sites))

    def for_both_halves(self, unconditional: float = 1.0) -> PreparedGuidance:
        """That for batches that have all pictures twice; the second half gets a share of it.

        The guidance is added to maps, so that a share is what is added, times `unconditional`.
        """
        return replace(self, sites=tuple(site.for_both_halves(unconditional) for site in self.sites))

    def cut(self, corners: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]]) -> PreparedGuidance:
        """That of a part of the maps, by its corner (row, column) and size (H, W) at each site."""
        parts = zip(self.sites, corners, sizes, strict=True)
        sites = tuple(
            replace(site, hidden=site.hidden[:, y : y + height, x : x + width])
            for site, (y, x), (height, width) in parts
        )
        return replace(self, sites=sites)

    def fuse(self, site: int, x: Tensor, r_embed: Tensor) -> Tensor:
        """x + strength·G at a site, x (B, C, H, W), r_embed (B, 64)."""
        return x + self.strengths[site] * self.blocks[site].fuse(x, r_embed, self.sites[site])


class Guidance(nn.Module):
    """The added parameters: a guidance block per down level and per up level of Stage C (under 3 % of it).

    `scale_sides` are the sides of `ScaleAwareNorm`. ValueError for an upsampling that is not one of
    `UPSAMPLINGS`, and for sides that are not positive and increasing.
    """

    def __init__(
        self,
        ind: int = 2048,
        ch: int = 1024,
        n_head: int = 32,
        head_dim: int = 32,
        n_groups: int = 64,
        f_dim: int = 1024,
        levels: int = 2,
        upsampling: str = "implicit",
        scale_sides: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if upsampling not in UPSAMPLINGS:
            raise ValueError(f"the upsampling {upsampling!r} is not one of {', '.join(UPSAMPLINGS)}")
        if list(scale_sides) != sorted({side for side in scale_sides if side > 0}):
            raise ValueError(f"'scale_sides' must be above 0 and increase, not {list(scale_sides)}")
        make, sizes = UPSAMPLINGS[upsampling], (ind, ch, n_head, head_dim, n_groups, f_dim)
        down, up = ([make(*sizes) for _ in range(levels)] for _ in "du")
        for block in (*down, *up):
            block.hr_norm.sides = tuple(scale_sides)
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)

    def init_weights(self) -> None:
        """Initial values for training from nothing."""
        for block in (*self.down, *self.up):
            block.init_weights()

    def prepare(
        self, features: GuidanceFeatures, sizes: Sequence[tuple[int, int]], up_strength: float = 1.0
    ) -> PreparedGuidance:
        """Bind to the features of a low-resolution pass, for maps of these sizes (H, W) at the sites.

        `up_strength` scales the guidance on the up path (1 in training, less at smaller sizes in inference).
        """
        blocks = (*self.down, *self.up)
        bound = zip(blocks, features.maps, sizes, strict=True)
        sites = tuple(block.prepare(g, size) for block, g, size in bound)
        strengths = (1.0,) * len(self.down) + (up_strength,) * len(self.up)
        return PreparedGuidance(blocks, sites, strengths)
