"""The guidance's training forward once more, plainly and in float64, from the formulas alone.

Weights are dicts of tensors under the names of the project's state dicts. Feature maps are (B, H, W, C)
inside, latents (B, 16, H, W). Schedule, timestep embeddings and coordinate encoding are evaluated in float32,
as the project does, because the networks see their last bits; everything else is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Guide = Callable[[int, Tensor], Tensor]  # (site in running order, x) -> what is added to x there

C_R = 64
COSINE_S = 0.008
LR_TIME = 0.05
SITES = ("down.0", "down.1", "up.0", "up.1")


@dataclass(frozen=True)
class Sizes:
    """What the weights' shapes do not tell."""

    blocks: tuple[tuple[int, ...], tuple[int, ...]]  # down; up, deepest level first
    heads: int  # of Stage C
    guidance_heads: int


@dataclass(frozen=True)
class Batch:
    """Clean latents, their random numbers and conditions, float64 but for t."""

    z: Tensor  # (B, 16, H, W)
    z_lr: Tensor  # (B, 16, h, w)
    epsilon: Tensor  # (B, 16, H, W)
    epsilon_lr: Tensor  # (B, 16, h, w)
    t: Tensor  # (B,), float32
    clip_text: Tensor  # (B, L, D)
    clip_text_pooled: Tensor  # (B, 1, P)
    clip_img: Tensor  # (B, 1, I)


def below(weights: Weights, prefix: str) -> Weights:
    """The weights of one part, under its own names."""
    return {k.removeprefix(prefix + "."): v for k, v in weights.items() if k.startswith(prefix + ".")}


# --- elements -------------------------------------------------------------------------------------


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    """A linear layer, or a 1×1 convolution, over the last axis."""
    return torch.einsum("...i,oi->...o", x, weights[f"{name}.weight"].flatten(1)) + weights[f"{name}.bias"]


def layer_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def affine_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return layer_norm(x, eps=1e-5) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head attention, (B, n, C) and twice (B, m, C) -> (B, n, C), one head after the other."""
    width = q.shape[-1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = torch.einsum("bnc,bmc->bnm", q[..., part], k[..., part]) * width**-0.5
        outputs.append(scores.softmax(dim=-1) @ v[..., part])
    return torch.cat(outputs, dim=-1)


# --- schedule and embeddings, float32 -------------------------------------------------------------


def timestep_embedding(r: Tensor) -> Tensor:
    """(B,) -> (B, 64)."""
    half = C_R // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
    angles = (10000 * r.float())[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).double()


def cosine_logsnr(t: Tensor) -> Tensor:
    s = torch.tensor(COSINE_S)
    variance = torch.cos((s + t) / (1 + s) * math.pi / 2) ** 2 / torch.cos(s / (1 + s) * math.pi / 2) ** 2
    variance = variance.clamp(1e-4, 0.9999)
    return torch.log(variance / (1 - variance))


def noise_condition(logsnr: Tensor) -> Tensor:
    """The cosine schedule's inverse."""
    s = torch.tensor(COSINE_S)
    variance = logsnr.sigmoid() * torch.cos(s / (1 + s) * math.pi / 2) ** 2
    return torch.acos(variance.sqrt()) / (math.pi / 2) * (1 + s) - s


def signal_and_noise(t: Tensor) -> tuple[Tensor, Tensor]:
    """a and b of x_t = a·x0 + b·ε, each (B, 1, 1, 1), float64."""
    logsnr = cosine_logsnr(t)
    a, b = logsnr.sigmoid().sqrt(), (-logsnr).sigmoid().sqrt()
    return a[:, None, None, None].double(), b[:, None, None, None].double()


def target(kind: str, x0: Tensor, epsilon: Tensor, t: Tensor) -> Tensor:
    a, b = signal_and_noise(t)
    kinds = {
        "epsilon": epsilon,
        "x0": x0,
        "v": a * epsilon - b * x0,
        "rectified_flow": epsilon - x0,
    }
    return kinds[kind]


def noisy(x0: Tensor, epsilon: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x_t and the r that the network is told."""
    a, b = signal_and_noise(t)
    return a * x0 + b * epsilon, noise_condition(cosine_logsnr(t))


def coordinate_encoding(height: int, width: int) -> Tensor:
    """(H·W, 256)."""
    frequencies = torch.exp(torch.linspace(0, math.log(1024), 64))
    points = []
    for row in (0.5 + torch.arange(height)) / height * 2 - 1:
        for column in (0.5 + torch.arange(width)) / width * 2 - 1:
            angles = math.pi * torch.cat([row * frequencies, column * frequencies])
            points.append(torch.cat([angles.cos(), angles.sin()]))
    return torch.stack(points).double()


# --- Stage C --------------------------------------------------------------------------------------


def depthwise(weights: Weights, name: str, x: Tensor) -> Tensor:
    """3×3 convolution of each channel for itself, zero padding."""
    height, width = x.shape[1:3]
    kernel = weights[f"{name}.weight"]  # (C, 1, 3, 3)
    padded = torch.zeros(len(x), height + 2, width + 2, x.shape[3], dtype=x.dtype)
    padded[:, 1:-1, 1:-1] = x
    y = weights[f"{name}.bias"]
    for i in range(3):
        for j in range(3):
            y = y + padded[:, i : i + height, j : j + width] * kernel[:, 0, i, j]
    return y


def response_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    energy = x.square().sum(dim=(1, 2), keepdim=True).sqrt()
    response = energy / (energy.mean(dim=-1, keepdim=True) + 1e-6)
    return weights[f"{name}.gamma"] * (x * response) + weights[f"{name}.beta"] + x


def res_block(weights: Weights, x: Tensor, skip: Tensor | None) -> Tensor:
    y = layer_norm(depthwise(weights, "depthwise", x))
    if skip is not None:
        y = torch.cat([y, skip], dim=-1)
    y = gelu(linear(weights, "channelwise.0", y))
    return x + linear(weights, "channelwise.4", response_norm(weights, "channelwise.2", y))


def timestep_block(weights: Weights, x: Tensor, embeddings: Mapping[str, Tensor]) -> Tensor:
    """`embeddings`: (B, 64) per mapper."""
    total = sum(linear(weights, mapper, embedding) for mapper, embedding in embeddings.items())
    a, b = total[:, None, None].chunk(2, dim=-1)
    return x * (1 + a) + b


def attn_block(weights: Weights, x: Tensor, condition: Tensor, heads: int) -> Tensor:
    tokens = layer_norm(x).flatten(1, 2)
    context = torch.cat([tokens, linear(weights, "kv_mapper.1", silu(condition))], dim=1)
    packed = weights["attention.attn.in_proj_weight"].chunk(3)
    biases = weights["attention.attn.in_proj_bias"].chunk(3)
    q, k, v = (y @ w.T + b for y, w, b in zip((tokens, context, context), packed, biases, strict=True))
    y = linear(weights, "attention.attn.out_proj", attend(q, k, v, heads))
    return x + y.unflatten(1, x.shape[1:3])


def condition_tokens(weights: Weights, batch: Batch) -> Tensor:
    text = linear(weights, "clip_txt_mapper", batch.clip_text)
    width = text.shape[-1]
    pooled = linear(weights, "clip_txt_pooled_mapper", batch.clip_text_pooled).reshape(len(text), -1, width)
    image = linear(weights, "clip_img_mapper", batch.clip_img).reshape(len(text), -1, width)
    return layer_norm(torch.cat([text, pooled, image], dim=1))


def stage_c(
    weights: Weights, sizes: Sizes, latent: Tensor, r: Tensor, condition: Tensor, guide: Guide | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The prediction (B, 16, H, W), and x after the first attention of each level."""
    zero = timestep_embedding(torch.zeros_like(r))
    embeddings = {"mapper": timestep_embedding(r), "mapper_sca": zero, "mapper_crp": zero}
    features: list[Tensor] = []

    def level(name: str, count: int, x: Tensor, skip: Tensor | None) -> Tensor:
        for n in range(count):
            x = res_block(below(weights, f"{name}.{3 * n}"), x, None if n else skip)
            x = timestep_block(below(weights, f"{name}.{3 * n + 1}"), x, embeddings)
            x = attn_block(below(weights, f"{name}.{3 * n + 2}"), x, condition, sizes.heads)
            if n == 0:
                features.append(x)
                x = x if guide is None else x + guide(len(features) - 1, x)
        return x

    x = layer_norm(linear(weights, "embedding.1", latent.permute(0, 2, 3, 1)))
    down, up = sizes.blocks
    outputs = []
    for i, count in enumerate(down):
        if i > 0:
            x = linear(weights, f"down_downscalers.{i}.1.blocks.0", layer_norm(x))
        x = level(f"down_blocks.{i}", count, x, None)
        outputs.append(x)
    for k, count in enumerate(up):
        x = level(f"up_blocks.{k}", count, x, outputs[-1 - k] if k > 0 else None)
        if k < len(up) - 1:
            x = linear(weights, f"up_upscalers.{k}.1.blocks.1", layer_norm(x))
    return linear(weights, "clf.1", layer_norm(x)).permute(0, 3, 1, 2), features


# --- the guidance G(x, g, r), steps 1 to 8 --------------------------------------------------------


def transformer(weights: Weights, x: Tensor, heads: int) -> Tensor:
    y = silu(affine_norm(weights, "0.norm", x))
    q = linear(weights, "0.fn.to_q.1", y)
    k, v = linear(weights, "0.fn.to_kv.1", y).chunk(2, dim=-1)
    x = x + attend(q, k, v, heads)
    y = gelu(linear(weights, "1.fn.net.0", affine_norm(weights, "1.norm", x)))
    return x + linear(weights, "1.fn.net.3", y)


def coordinate_layer(weights: Weights, layer: str, tokens: Tensor, x: Tensor) -> Tensor:
    """A layer of the coordinate network, its weight modulated by tokens (B, groups, f_dim)."""
    base = weights[f"base_params.{layer}"]  # (in + 1, out), the bias last
    modulation = affine_norm(weights, f"wtoken_postfc.{layer}.0", tokens)
    modulation = linear(weights, f"wtoken_postfc.{layer}.1", modulation)  # (B, groups, in)
    groups = tokens.shape[1]
    columns = []
    for j in range(base.shape[1]):
        column = base[:-1, j] * modulation[:, j % groups]  # (B, in)
        columns.append(column / column.square().sum(dim=1, keepdim=True).sqrt())
    return torch.einsum("bpi,bio->bpo", x, torch.stack(columns, dim=2)) + base[-1]


def upsampled(weights: Weights, g: Tensor, size: tuple[int, int], heads: int) -> Tensor:
    """Steps 1 to 5: g (B, h, w, C) -> u (B, H, W, C)."""
    batch, rows, columns, _ = g.shape
    (height, width), count = size, rows * columns
    tokens = linear(weights, "input_layer", g).flatten(1, 2)  # step 1
    tokens = linear(weights, "tokenizer.prefc", tokens) + weights["tokenizer.posemb"][:count]
    sequence = torch.cat([tokens, weights["wtokens"].expand(batch, -1, -1)], dim=1)  # step 2
    sequence = transformer(below(weights, "transformer_encoder.layers.0"), sequence, heads)
    first, second = sequence[:, count:].chunk(2, dim=1)  # step 3
    points = coordinate_encoding(height, width).expand(batch, -1, -1)  # step 4
    hidden = coordinate_layer(weights, "wb0", first, points).clamp(min=0)
    drawn = coordinate_layer(weights, "wb1", second, hidden).unflatten(1, size)
    nearest = [[g[:, i * rows // height, j * columns // width] for j in range(width)] for i in range(height)]
    resized = torch.stack([torch.stack(row, dim=1) for row in nearest], dim=1)
    return linear(weights, "output_layer", drawn) + resized  # step 5


def guidance(weights: Weights, x: Tensor, g: Tensor, r: Tensor, heads: int) -> Tensor:
    """G (B, H, W, C) for x of the same shape, g (B, h, w, C) and r (B,)."""
    height, width = x.shape[1:3]
    u = upsampled(weights, g, (height, width), heads)
    y = gelu(linear(weights, "toout.0", torch.cat([u, x], dim=-1)))  # step 6
    y = linear(weights, "toout.2", y)
    y = layer_norm(timestep_block(below(weights, "mapp_t"), y, {"mapper": timestep_embedding(r)}))  # step 7
    scale = torch.tensor([math.sqrt(math.log(height * width) / math.log(576))])  # step 8
    return timestep_block(below(weights, "hr_norm.mapping"), y, {"mapper": timestep_embedding(scale)}) + y


# --- the step -------------------------------------------------------------------------------------


def guided_prediction(base: Weights, added: Weights, sizes: Sizes, batch: Batch) -> Tensor:
    """Stage C's prediction at high resolution, guided by its features of the low-resolution latent."""
    condition = condition_tokens(base, batch)
    x_lr, r_lr = noisy(batch.z_lr, batch.epsilon_lr, torch.full_like(batch.t, LR_TIME))
    _, features = stage_c(base, sizes, x_lr, r_lr, condition)
    x, r = noisy(batch.z, batch.epsilon, batch.t)

    def guide(site: int, y: Tensor) -> Tensor:
        return guidance(below(added, SITES[site]), y, features[site], r, sizes.guidance_heads)

    return stage_c(base, sizes, x, r, condition, guide)[0]


def guided_loss(base: Weights, added: Weights, sizes: Sizes, batch: Batch, weight: Tensor) -> Tensor:
    """Mean over the samples of weight (B,) times the mean over pixels of (prediction - noise)²."""
    difference = guided_prediction(base, added, sizes, batch) - batch.epsilon
    return (weight * difference.square().mean(dim=(1, 2, 3))).mean()
