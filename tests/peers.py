"""Networks of diffusers with our weights, for comparing outputs (tests) and speed (benchmarks)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

import modules.torchvision_operators  # noqa: F401  before diffusers
from modules.stage_a import LATENT_SCALE, StageA
from modules.stage_b import StageB
from modules.stage_c import StageC

from diffusers.models.unets import StableCascadeUNet  # isort: skip
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel  # isort: skip

TEXT, IMAGE = 48, 32
RES, TIME, ATTN = "SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"


def randomised(network: nn.Module, std: float) -> nn.Module:
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=std)
    return network.eval()


def random_stage_c(c: int, heads: int, blocks: Sequence[Sequence[int]]) -> StageC:
    sizes = dict(c_clip_text=TEXT, c_clip_text_pooled=TEXT, c_clip_img=IMAGE)
    return randomised(StageC(c_cond=c, c_hidden=(c, c), nhead=(heads, heads), blocks=blocks, **sizes), 0.05)


def random_stage_b(widths: Sequence[int], blocks: Sequence[Sequence[int]]) -> StageB:
    heads, repeats = (-1, -1, 4, 4), ((1, 1, 1, 1), (2, 2, 2, 2))
    sizes = dict(
        c_hidden=widths, nhead=heads, blocks=blocks, block_repeat=repeats, c_cond=widths[-1], c_clip=TEXT
    )
    return randomised(StageB(**sizes), 0.05)


def random_stage_a(c: int, blocks: int) -> StageA:
    return randomised(StageA(c_hidden=c, bottleneck_blocks=blocks, codebook_size=64), 0.2)


def renamed(state: Mapping[str, Tensor], stage_b: bool) -> dict[str, Tensor]:
    """Our names as diffusers' own."""
    out = {}
    for name, tensor in state.items():
        head, packed, kind = name.partition("attn.in_proj_")
        if packed:
            out |= {f"{head}to_{q}.{kind}": part for q, part in zip("qkv", tensor.chunk(3), strict=True)}
        elif stage_b and name.startswith("clip_mapper"):
            out[name.replace("clip_mapper", "clip_txt_pooled_mapper")] = tensor
        else:
            out[name.replace("attn.out_proj", "to_out.0")] = tensor
    return out


def unet_of(network: StageB | StageC) -> StableCascadeUNet:
    """StableCascadeUNet with the weights of a Stage B or C made here."""
    stage_b = isinstance(network, StageB)
    pooled = network.clip_mapper if stage_b else network.clip_txt_pooled_mapper
    widths = tuple(level[0].depthwise.in_channels for level in network.down_blocks)
    attends = [any(hasattr(block, "kv_mapper") for block in level) for level in network.down_blocks]
    heads = tuple(
        next((block.attention.attn.heads for block in level if hasattr(block, "kv_mapper")), -1)
        for level in network.down_blocks
    )
    period = [3 if attention else 2 for attention in attends]
    counts = [len(level) // n for level, n in zip(network.down_blocks, period, strict=True)]
    up_counts = [len(level) // n for level, n in zip(network.up_blocks, reversed(period), strict=True)]
    common = dict(
        timestep_ratio_embedding_dim=64, conditioning_dim=network.c_cond, block_out_channels=widths,
        num_attention_heads=heads, down_num_layers_per_block=counts, up_num_layers_per_block=up_counts,
        down_blocks_repeat_mappers=[len(m) + 1 for m in network.down_repeat_mappers],
        up_blocks_repeat_mappers=[len(m) + 1 for m in network.up_repeat_mappers],
        block_types_per_layer=[(RES, TIME, ATTN) if attention else (RES, TIME) for attention in attends],
        clip_text_pooled_in_channels=pooled.in_features, clip_seq=4,
        timestep_conditioning_type=network.t_conds, dropout=[0.0] * len(widths),
    )  # fmt: skip
    if stage_b:
        own = dict(in_channels=4, out_channels=4, patch_size=2, effnet_in_channels=16,
                   pixel_mapper_in_channels=3, switch_level=None)  # fmt: skip
    else:
        own = dict(in_channels=16, out_channels=16, patch_size=1,
                   clip_text_in_channels=network.clip_txt_mapper.in_features,
                   clip_image_in_channels=network.clip_img_mapper.in_features,
                   switch_level=[False])  # fmt: skip
    theirs = StableCascadeUNet(**common, **own)
    theirs.load_state_dict(renamed(network.state_dict(), stage_b), strict=True)
    return theirs.eval()


def paella_of(stage_a: StageA) -> PaellaVQModel:
    """PaellaVQModel with the weights of a Stage A made here."""
    entries, _ = stage_a.vquantizer.codebook.weight.shape
    theirs = PaellaVQModel(
        embed_dim=stage_a.out_block[0].in_channels * 2, bottleneck_blocks=stage_a.bottleneck_blocks,
        num_vq_embeddings=entries, scale_factor=LATENT_SCALE,
    )  # fmt: skip
    state = {name.replace("codebook", "embedding"): t for name, t in stage_a.state_dict().items()}
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()
