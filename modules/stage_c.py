"""Stage C: the text-conditional prior of 16-channel latents, at low and, guided, at high resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.blocks import LAYER_NORM_EPS, ChannelNorm
from modules.guidance import GuidanceFeatures, PreparedGuidance
from modules.unet import CascadeUNet, InnerMaps, LevelKeysValues, Times, sliced_keys_values


@dataclass(frozen=True)
class StageCConditions:
    """What Stage C needs of the prompt, computed once per picture: keys and values per level and block."""

    keys_values: list[LevelKeysValues]

    def first(self, count: int) -> StageCConditions:
        """Those of the first `count` samples (the conditional half)."""
        return self.part(slice(count))

    def part(self, samples: slice, _rows: slice = slice(None)) -> StageCConditions:
        """Those of some samples and rows of the map; all rows have the same."""
        return StageCConditions(sliced_keys_values(self.keys_values, samples))


class _HalfSize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=True)


class _DoubleSize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class LevelChange(nn.Module):
    """A 1×1 convolution between levels, before halving or after doubling the size where they switch."""

    def __init__(self, c_in: int, c_out: int, up: bool, switch: bool) -> None:
        super().__init__()
        mapping = nn.Conv2d(c_in, c_out, 1)
        if up:
            self.blocks = nn.ModuleList([_DoubleSize() if switch else nn.Identity(), mapping])
        else:
            self.blocks = nn.ModuleList([mapping, _HalfSize() if switch else nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class StageC(CascadeUNet):
    """Stage C (paper section 3; published sizes 3.6B, the default, and 1B). Predicts the noise of a latent.

    `predict` and `predict_with_features` take prepared conditions; `forward` and `forward_lr` do the same
    from the prompt's embeddings. Latents are (B, 16, H, W), r and the conditions sca and crp (B,).
    """

    def __init__(
        self,
        c_in: int = 16,
        c_out: int = 16,
        c_r: int = 64,
        patch_size: int = 1,
        c_cond: int = 2048,
        c_hidden: Sequence[int] = (2048, 2048),
        nhead: Sequence[int] = (32, 32),
        blocks: Sequence[Sequence[int]] = ((8, 24), (24, 8)),
        block_repeat: Sequence[Sequence[int]] = ((1, 1), (1, 1)),
        level_config: Sequence[str] = ("CTA", "CTA"),
        c_clip_text: int = 1280,
        c_clip_text_pooled: int = 1280,
        c_clip_img: int = 768,
        c_clip_seq: int = 4,
        kernel_size: int = 3,
        dropout: Sequence[float] = (0.1, 0.1),
        self_attn: bool = True,
        t_conds: Sequence[str] = ("sca", "crp"),
        switch_level: Sequence[bool] = (False,),
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
            down_scaler=lambda i, c1, c2: nn.Sequential(
                ChannelNorm(), LevelChange(c1, c2, False, switch_level[i - 1])
            ),
            up_scaler=lambda i, c1, c2: nn.Sequential(
                ChannelNorm(), LevelChange(c1, c2, True, switch_level[i - 1])
            ),
        )
        self.c_cond, self.c_clip_seq = c_cond, c_clip_seq
        self.patch_size, self.switch_level = patch_size, tuple(switch_level)
        self.clip_txt_mapper = nn.Linear(c_clip_text, c_cond)
        self.clip_txt_pooled_mapper = nn.Linear(c_clip_text_pooled, c_cond * c_clip_seq)
        self.clip_img_mapper = nn.Linear(c_clip_img, c_cond * c_clip_seq)
        self.embedding = nn.Sequential(
            nn.PixelUnshuffle(patch_size), nn.Conv2d(c_in * patch_size**2, c_hidden[0], 1), ChannelNorm()
        )
        self.clf = nn.Sequential(
            ChannelNorm(), nn.Conv2d(c_hidden[0], c_out * patch_size**2, 1), nn.PixelShuffle(patch_size)
        )

    def init_weights(self) -> None:
        """Initial values for training from nothing."""
        self.init_trunk()
        for mapper in (self.clip_txt_mapper, self.clip_txt_pooled_mapper, self.clip_img_mapper):
            nn.init.normal_(mapper.weight, std=0.02)
        nn.init.xavier_uniform_(self.embedding[1].weight, gain=0.02)
        nn.init.zeros_(self.clf[1].weight)

    @property
    def row_grain(self) -> int | None:
        """Rows of the latent by which maps can be cut; None where levels interpolate across any cut."""
        return None if any(self.switch_level) else self.patch_size

    def site_sizes(self, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Sizes (H, W) of the maps that guidance meets for a latent of this size, in running order."""
        height, width = (side // self.patch_size for side in size)
        sizes = [(height, width)]
        for switch in self.switch_level:
            height, width = (height // 2, width // 2) if switch else (height, width)
            sizes.append((height, width))
        return (*sizes, *reversed(sizes))

    def entry_sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Sizes (H, W) of the maps that control entries are added to, for a latent of this size."""
        runs = zip(self.resblock_runs(), self.site_sizes(size), strict=True)
        return [site for count, site in runs for _ in range(count)]

    def condition_tokens(self, clip_text: Tensor, clip_text_pooled: Tensor, clip_img: Tensor) -> Tensor:
        """The condition tokens (B, L + 2·c_clip_seq, c_cond).

        clip_text (B, L, c_clip_text), clip_text_pooled (B, 1, c_clip_text_pooled), clip_img (B, 1, ...).
        """
        text = self.clip_txt_mapper(clip_text)  # (B, L, c_cond)
        pooled = (
            self.clip_txt_pooled_mapper(clip_text_pooled).unflatten(-1, (self.c_clip_seq, -1)).flatten(1, 2)
        )
        image = self.clip_img_mapper(clip_img).unflatten(-1, (self.c_clip_seq, -1)).flatten(1, 2)
        return F.layer_norm(torch.cat([text, pooled, image], dim=1), (self.c_cond,), eps=LAYER_NORM_EPS)

    def prepare(self, clip_text: Tensor, clip_text_pooled: Tensor, clip_img: Tensor) -> StageCConditions:
        """Everything that depends on the prompt alone; shapes as in `condition_tokens`."""
        return StageCConditions(
            self.level_keys_values(self.condition_tokens(clip_text, clip_text_pooled, clip_img))
        )

    def pass_times(self, r: Tensor, sca: Tensor | None = None, crp: Tensor | None = None) -> Times:
        """What depends on the times r (S,) of a pass alone; `predict` takes one of them, `times.at(i)`."""
        return self.times(r, [sca, crp][: len(self.t_conds)])

    def _time(self, r: Tensor | Times, sca: Tensor | None, crp: Tensor | None) -> Times:
        return r if isinstance(r, Times) else Times(self.embed_time(r, [sca, crp][: len(self.t_conds)]))

    def predict(
        self,
        x: Tensor,
        r: Tensor | Times,
        conditions: StageCConditions,
        *,
        sca: Tensor | None = None,
        crp: Tensor | None = None,
        control: Sequence[Tensor | None] | None = None,
        guidance: PreparedGuidance | None = None,
        inner: InnerMaps | None = None,
        control_guided: bool = False,
    ) -> Tensor:
        """The prediction (B, 16, H, W) for a latent of the same shape at noise condition r (B,).

        `r` may be what `pass_times` made of it. With guidance, control is ignored, as it acts on the
        low-resolution pass and arrives through that; unless `control_guided`. `inner` as in `run_levels`.
        """
        time = self._time(r, sca, crp)
        if guidance is None:
            return self._denoise(x, time, conditions, control, inner=inner)
        own = time.embed[:, : self.c_r]
        control = control if control_guided else None
        return self._denoise(
            x, time, conditions, control, lambda site, y: guidance.fuse(site, y, own), inner=inner
        )

    def predict_with_features(
        self,
        x: Tensor,
        r: Tensor | Times,
        conditions: StageCConditions,
        *,
        sca: Tensor | None = None,
        crp: Tensor | None = None,
        control: Sequence[Tensor | None] | None = None,
    ) -> tuple[Tensor, GuidanceFeatures]:
        """The low-resolution pass (section 3.1): the prediction and the features that guide the high one."""
        maps: list[Tensor] = []

        def keep(_: int, feature: Tensor) -> Tensor:
            maps.append(feature)
            return feature

        prediction = self._denoise(x, self._time(r, sca, crp), conditions, control, keep)
        return prediction, GuidanceFeatures(tuple(maps))

    def forward(
        self,
        x: Tensor,
        r: Tensor,
        clip_text: Tensor,
        clip_text_pooled: Tensor,
        clip_img: Tensor,
        sca: Tensor | None = None,
        crp: Tensor | None = None,
        control: Sequence[Tensor | None] | None = None,
        guidance: PreparedGuidance | None = None,
    ) -> Tensor:
        conditions = self.prepare(clip_text, clip_text_pooled, clip_img)
        return self.predict(x, r, conditions, sca=sca, crp=crp, control=control, guidance=guidance)

    def forward_lr(
        self,
        x: Tensor,
        r: Tensor,
        clip_text: Tensor,
        clip_text_pooled: Tensor,
        clip_img: Tensor,
        sca: Tensor | None = None,
        crp: Tensor | None = None,
        control: Sequence[Tensor | None] | None = None,
    ) -> tuple[Tensor, GuidanceFeatures]:
        """`predict_with_features` from the prompt's embeddings."""
        conditions = self.prepare(clip_text, clip_text_pooled, clip_img)
        return self.predict_with_features(x, r, conditions, sca=sca, crp=crp, control=control)

    def _denoise(self, x, time: Times, conditions, control=None, at_site=None, inner=None) -> Tensor:
        x = self.embedding(x.contiguous(memory_format=torch.channels_last))  # (B, C, H / patch, W / patch)
        x = self.run_levels(x, time, conditions.keys_values, control, at_site, inner)
        return self.clf(x)
