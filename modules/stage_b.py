"""Stage B: turns Stage C's latent into the 4-channel latent that Stage A decodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.blocks import LAYER_NORM_EPS, ChannelNorm, resize_like, row_spans
from modules.unet import CascadeUNet, LevelKeysValues, Times, sliced_keys_values

PIXELS_SIZE = 8  # side of the all-zero pixel condition


@dataclass(frozen=True)
class StageBConditions:
    """What stays the same over the steps: the map added to the embedding, keys and values per block."""

    spatial: Tensor  # (B, C0, H / patch, W / patch)
    keys_values: list[LevelKeysValues]

    def first(self, count: int) -> StageBConditions:
        """Those of the first `count` samples (the conditional half)."""
        return self.part(slice(count))

    def part(self, samples: slice, rows: slice = slice(None)) -> StageBConditions:
        """Those of some samples and rows of the map."""
        return StageBConditions(self.spatial[samples, :, rows], sliced_keys_values(self.keys_values, samples))


def _feature_mapper(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, 4 * c_out, 1), nn.GELU(), nn.Conv2d(4 * c_out, c_out, 1), ChannelNorm()
    )


def _mapped(mapper: nn.Sequential, x: Tensor) -> Tensor:
    """A feature mapper's map; without gradients in rows, as it is four times as wide in between."""
    x = x.contiguous(memory_format=torch.channels_last)
    if torch.is_grad_enabled():
        return mapper(x)
    spans, _ = row_spans(x.shape[2], x.shape[3] * len(x) * mapper[0].out_channels, x.device.type)
    if len(spans) == 1:
        return mapper(x)
    return torch.cat([mapper(x[:, :, rows]) for rows in spans], dim=2)


class StageB(CascadeUNet):
    """Stage B (published sizes 700M, the default, and 3B): predicts the noise of a latent (B, 4, H, W).

    H and W are even. Conditions: effnet (B, 16, h, w), Stage C's latent of any size; clip (B, 1, c_clip),
    the pooled text; pixels (B, 3, h, w), zeros when None.
    """

    def __init__(
        self,
        c_in: int = 4,
        c_out: int = 4,
        c_r: int = 64,
        patch_size: int = 2,
        c_cond: int = 1280,
        c_hidden: Sequence[int] = (320, 576, 1152, 1152),
        nhead: Sequence[int] = (-1, 9, 18, 18),
        blocks: Sequence[Sequence[int]] = ((2, 4, 14, 4), (4, 14, 4, 2)),
        block_repeat: Sequence[Sequence[int]] = ((1, 1, 1, 1), (2, 2, 2, 2)),
        level_config: Sequence[str] = ("CT", "CT", "CTA", "CTA"),
        c_clip: int = 1280,
        c_clip_seq: int = 4,
        c_effnet: int = 16,
        c_pixels: int = 3,
        kernel_size: int = 3,
        dropout: Sequence[float] = (0.0, 0.0, 0.1, 0.1),
        self_attn: bool = True,
        t_conds: Sequence[str] = ("sca",),
    ) -> None:
        super().__init__(
            c_hidden=c_hidden,
            nhead=nhead,
            blocks=blocks,
            block_repeat=block_repeat,
            level_config=level_config,
            c_cond=c_cond,
            c_r=c_r,
            t_conds=t_conds,
            kernel_size=kernel_size,
            dropout=dropout,
            self_attn=self_attn,
            down_scaler=lambda _, c1, c2: nn.Sequential(ChannelNorm(), nn.Conv2d(c1, c2, 2, stride=2)),
            up_scaler=lambda _, c1, c2: nn.Sequential(ChannelNorm(), nn.ConvTranspose2d(c1, c2, 2, stride=2)),
        )
        self.c_cond, self.c_clip_seq, self.c_pixels, self.patch_size = (
            c_cond,
            c_clip_seq,
            c_pixels,
            patch_size,
        )
        self.effnet_mapper = _feature_mapper(c_effnet, c_hidden[0])
        self.pixels_mapper = _feature_mapper(c_pixels, c_hidden[0])
        self.clip_mapper = nn.Linear(c_clip, c_cond * c_clip_seq)
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(patch_size), nn.Conv2d(c_in * patch_size**2, c_hidden[0], 1), ChannelNorm()
        )
        self.clf = nn.Sequential(
            ChannelNorm(), nn.Conv2d(c_hidden[0], c_out * patch_size**2, 1), nn.PixelShuffle(patch_size)
        )

    @property
    def row_grain(self) -> int:
        """Rows of the latent by which the maps of all levels can be cut."""
        return self.patch_size * 2 ** (len(self.down_blocks) - 1)

    def init_weights(self) -> None:
        """Initial values for training from nothing."""
        self.init_trunk()
        nn.init.normal_(self.clip_mapper.weight, std=0.02)
        for mapper in (self.effnet_mapper, self.pixels_mapper):
            nn.init.normal_(mapper[0].weight, std=0.02)
            nn.init.normal_(mapper[2].weight, std=0.02)
        nn.init.xavier_uniform_(self.embedding[1].weight, gain=0.02)
        nn.init.zeros_(self.clf[1].weight)

    def prepare(
        self, size: tuple[int, int], effnet: Tensor, clip: Tensor, pixels: Tensor | None = None
    ) -> StageBConditions:
        """Everything that depends on the conditions and the latent's size (H, W) alone."""
        grid = (size[0] // self.patch_size, size[1] // self.patch_size)
        if pixels is None:
            pixels = effnet.new_zeros(len(effnet), self.c_pixels, PIXELS_SIZE, PIXELS_SIZE)
        spatial = _mapped(self.effnet_mapper, resize_like(effnet, grid))
        spatial = spatial + resize_like(self.pixels_mapper(pixels), grid)
        tokens = (
            self.clip_mapper(clip).unflatten(-1, (self.c_clip_seq, -1)).flatten(1, 2)
        )  # (B, c_clip_seq, c_cond)
        tokens = F.layer_norm(tokens, (self.c_cond,), eps=LAYER_NORM_EPS)
        return StageBConditions(spatial, self.level_keys_values(tokens))

    def pass_times(self, r: Tensor, sca: Tensor | None = None) -> Times:
        """What depends on the times r (S,) of a pass alone; `predict` takes one of them, `times.at(i)`."""
        return self.times(r, [sca][: len(self.t_conds)])

    def predict(
        self, x: Tensor, r: Tensor | Times, conditions: StageBConditions, *, sca: Tensor | None = None
    ) -> Tensor:
        """The prediction (B, 4, H, W) for a latent of the same shape at noise condition r (B,).

        `r` may be what `pass_times` made of it.
        """
        time = r if isinstance(r, Times) else Times(self.embed_time(r, [sca][: len(self.t_conds)]))
        x = x.contiguous(memory_format=torch.channels_last)
        # No name here for the embedding: at large sizes one map more would lie in memory all the time.
        return self.clf(self.run_levels(self.embedding(x) + conditions.spatial, time, conditions.keys_values))

    def forward(
        self,
        x: Tensor,
        r: Tensor,
        effnet: Tensor,
        clip: Tensor,
        pixels: Tensor | None = None,
        sca: Tensor | None = None,
    ) -> Tensor:
        if x.shape[-2] % self.patch_size or x.shape[-1] % self.patch_size:
            raise ValueError(
                f"Stage B takes latents whose sides divide by {self.patch_size}, not {tuple(x.shape)}"
            )
        return self.predict(x, r, self.prepare(tuple(x.shape[-2:]), effnet, clip, pixels), sca=sca)
