"""Sizes: of maps, and of the networks, whose constructor values the published models have by version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Size = tuple[int, int]  # (height, width)
Upsampling = Literal["implicit", "bilinear"]  # of the guidance: modules.guidance.UPSAMPLINGS


@dataclass(frozen=True)
class StageCSizes:
    """Constructor values of `modules.stage_c.StageC`; the defaults are the published 3.6B model."""

    c_cond: int = 2048  # width of the condition tokens
    c_hidden: tuple[int, ...] = (2048, 2048)  # width per level
    nhead: tuple[int, ...] = (32, 32)  # attention heads per level
    blocks: tuple[tuple[int, ...], tuple[int, ...]] = ((8, 24), (24, 8))  # down; up, deepest level first
    c_clip_text: int = 1280  # width of the text tokens
    c_clip_text_pooled: int = 1280  # width of the pooled text
    c_clip_img: int = 768  # width of the image embedding
    c_clip_seq: int = 4  # tokens per pooled embedding
    dropout: tuple[float, ...] = (0.1, 0.1)  # in training, per level
    switch_level: tuple[bool, ...] = (False,)  # between levels: whether the lower one has half the size


@dataclass(frozen=True)
class GuidanceSizes:
    """Sizes of one guidance block; the defaults are the published ones for the 3.6B model (section 3.1)."""

    ind: int = 2048  # width of Stage C's features
    ch: int = 1024  # width of the guidance tokens
    n_head: int = 32  # attention heads
    head_dim: int = 32  # width of a head
    n_groups: int = 64  # weight tokens per layer of the coordinate MLP
    f_dim: int = 1024  # width of the coordinate MLP
    upsampling: Upsampling = "implicit"  # how the features get to the high resolution
    # sides of square latents between which scale-aware normalisation is interpolated; none: as published
    scale_sides: tuple[int, ...] = ()


@dataclass(frozen=True)
class StageBSizes:
    """Constructor values of `modules.stage_b.StageB`; -1 heads for a level without attention."""

    c_hidden: tuple[int, ...]  # width per level
    nhead: tuple[int, ...]  # attention heads per level
    blocks: tuple[tuple[int, ...], tuple[int, ...]]  # down; up, deepest level first
    block_repeat: tuple[tuple[int, ...], tuple[int, ...]]  # how often a level's blocks run, in the same order
    c_cond: int = 1280  # width of the condition tokens
    c_clip: int = 1280  # width of the pooled text
    level_config: tuple[str, ...] = ("CT", "CT", "CTA", "CTA")  # C: ResBlock, T: TimestepBlock, A: AttnBlock
    dropout: tuple[float, ...] = (0.0, 0.0, 0.1, 0.1)  # in training, per level


@dataclass(frozen=True)
class StageASizes:
    """Constructor values of `modules.stage_a.StageA`; the defaults are the published model."""

    c_hidden: int = 384  # width of the deepest level
    bottleneck_blocks: int = 12  # blocks at the deepest level
    codebook_size: int = 8192  # entries that latents can be quantised to


@dataclass(frozen=True)
class EffnetSizes:
    """Constructor values of `modules.effnet.EfficientNetEncoder`; the default is the published model.

    `stages` None: EfficientNetV2-S. Else rows as `modules.effnet.StageRow` has them.
    """

    stem: int = 24  # width of the first layer
    # [kind, expansion, blocks, width, stride] of each stage; none: those of EfficientNetV2-S
    stages: tuple[tuple[str, int, int, int, int], ...] | None = None
    head: int = 1280  # width of the last layer


@dataclass(frozen=True)
class PreviewerSizes:
    """Constructor values of `modules.previewer.Previewer`; the default is the published model."""

    c_hidden: int = 512  # width of the first layers


@dataclass(frozen=True)
class ControlNetSizes:
    """Constructor values of `modules.controlnet.ControlNet`; the default is the published one for edges.

    `stem`, `stages` and `head` as in `EffnetSizes`, for the backbone of that name.
    """

    c_in: int = 1  # channels of what it sees
    c_proj: int = 2048  # Stage C's width
    proj_blocks: tuple[int, ...] = (0, 4, 8, 12, 51, 55, 59, 63)  # ResBlocks it acts before
    bottleneck_mode: str = "effnet"  # the backbone: effnet, simple or large
    stem: int = 24  # width of the first layer
    # [kind, expansion, blocks, width, stride] of each stage; none: those of EfficientNetV2-S
    stages: tuple[tuple[str, int, int, int, int], ...] | None = None
    head: int = 1280  # width of the last layer


@dataclass(frozen=True)
class TextSizes:
    """Sizes of a CLIP text encoder of our own; the defaults are the tiny family's."""

    width: int = 128  # width of the tokens and of the pooled embedding
    layers: int = 2  # blocks of attention and MLP
    heads: int = 2  # attention heads
    hidden: int = 256  # width inside the MLPs
    length: int = 48  # tokens of a prompt; captions of scenes have about 30 at most


@dataclass(frozen=True)
class RecogniserSizes:
    """Constructor values of `modules.recogniser.Recogniser`, but for what it tells apart."""

    c_hidden: tuple[int, ...] = (24, 48, 64, 96)  # width after each halving
    blocks: tuple[int, ...] = (0, 1, 2, 2)  # number of blocks after each halving
    c_features: int = 64  # width of the features that distances are taken of
    c_embedding: int | None = None  # width of an image encoder's embedding; none: a recogniser


@dataclass(frozen=True)
class Sizes:
    """All networks of a family."""

    stage_c: StageCSizes
    stage_b: StageBSizes | None = None
    guidance: GuidanceSizes | None = None  # None: the published ones at Stage C's width
    stage_a: StageASizes = StageASizes()
    effnet: EffnetSizes = EffnetSizes()
    previewer: PreviewerSizes = PreviewerSizes()
    controlnet: ControlNetSizes = ControlNetSizes()


PUBLISHED = Sizes(StageCSizes())
TINY = Sizes(
    stage_c=StageCSizes(
        c_cond=128, c_hidden=(192, 192), nhead=(3, 3), blocks=((2, 4), (4, 2)), c_clip_text=128,
        c_clip_text_pooled=128, c_clip_img=16, dropout=(0.0, 0.0), switch_level=(True,),
    ),
    stage_b=StageBSizes(
        c_hidden=(64, 128, 128), nhead=(-1, -1, 2), blocks=((2, 3, 3), (3, 3, 2)),
        block_repeat=((1, 1, 1), (1, 1, 1)), c_cond=128, c_clip=128, level_config=("CT", "CT", "CTA"),
        dropout=(0.0, 0.0, 0.0),
    ),
    guidance=GuidanceSizes(
        ind=192, ch=128, n_head=2, head_dim=64, n_groups=16, f_dim=128, scale_sides=(12, 24, 36, 48, 96),
    ),
    stage_a=StageASizes(c_hidden=64, bottleneck_blocks=3, codebook_size=1024),
    effnet=EffnetSizes(
        stem=16, stages=(("fused", 2, 2, 32, 1), ("fused", 2, 2, 64, 2), ("fused", 2, 1, 96, 2)), head=256,
    ),
    previewer=PreviewerSizes(c_hidden=64),
    controlnet=ControlNetSizes(
        c_proj=192, proj_blocks=(0, 1, 2, 3, 4, 5, 10, 11), stem=16, head=128,
        stages=(("fused", 2, 2, 32, 1), ("fused", 2, 2, 64, 2), ("fused", 2, 1, 96, 2)),
    ),
)  # fmt: skip

TINY_VERSION = "tiny"  # of the embedded family; the others are published
STAGE_C_VERSIONS: dict[str, StageCSizes] = {
    "3.6B": StageCSizes(),
    "1B": StageCSizes(c_cond=1536, c_hidden=(1536, 1536), nhead=(24, 24), blocks=((4, 12), (12, 4))),
    TINY_VERSION: TINY.stage_c,
}
STAGE_B_VERSIONS: dict[str, StageBSizes] = {
    "3B": StageBSizes(
        (320, 640, 1280, 1280), (-1, -1, 20, 20), ((2, 6, 28, 6), (6, 28, 6, 2)), ((1, 1, 1, 1), (3, 3, 2, 2))
    ),
    "700M": StageBSizes(
        (320, 576, 1152, 1152), (-1, 9, 18, 18), ((2, 4, 14, 4), (4, 14, 4, 2)), ((1, 1, 1, 1), (2, 2, 2, 2))
    ),
    TINY_VERSION: TINY.stage_b,
}
