"""What a picture takes, before anything is loaded: bytes of each stage's weights and of its largest maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from torch import nn

from core.config.offloading import BLOCK, NONE, STAGE
from core.config.schema import StageBConfig, StageCConfig, stage_a_sizes, stage_b_sizes, stage_c_sizes
from core.config.sizes import GuidanceSizes
from core.pipeline.graphs import RECORDED_PIXELS
from core.pipeline.offload import STREAMED
from core.pipeline.resolution import Plan
from core.weights.checkpoint import build_empty
from modules.blocks import CHUNK_HIDDEN, KEPT_HIDDEN
from modules.fp8 import replaced_layers
from modules.guidance import Guidance
from modules.stage_a import MAX_TILE, StageA
from modules.stage_b import StageB
from modules.stage_c import StageC

GIB = 2**30
ELEMENT = {"bfloat16": 2, "float32": 4}  # bytes of a number

# Maps of a ResBlock's width that live at its peak: input, normed, and the hidden layer (4 times as wide)
# before and after GELU and normalisation; a level's skip and the guidance are counted with them.
MAPS_AT_PEAK = 16
MAPS_BESIDE_CHUNKS = 8  # the same where the hidden layer is computed in chunks, and is never whole
# Of Stage A's width at the latent's size. Its last block has half the width at twice the size, so twice as
# many: the hidden layer before and after GELU, the input of the block and of its MLP, and what is normed.
STAGE_A_MAPS = 22
MIN_TILE = 32  # latent pixels: smaller tiles are hardly more than their margin
SHARE = 0.9  # of what is free; the rest is for what is not counted, and is lost between the pieces


@dataclass(frozen=True)
class StageEstimate:
    """Device memory of one stage, in bytes."""

    name: str
    weights: int
    activations: int
    kept: int = 0  # by recorded steps, where the weights stay on the device
    by_blocks: int | None = None  # weights where they come and go block by block; None: as ever

    @property
    def total(self) -> int:
        return self.weights + self.activations

    def weights_in(self, mode: str) -> int:
        """Those that are on the device, where weights rest as `mode` says."""
        return self.weights if mode != BLOCK or self.by_blocks is None else self.by_blocks


def weight_bytes(module: nn.Module, element: int, fp8: bool = False) -> int:
    """Bytes of a module's weights, `element` bytes each; with `fp8` also of their copies in float8."""
    beside = sum(layer.weight.numel() for _, _, layer in replaced_layers(module)) if fp8 else 0
    return element * parameter_count(module) + beside


def bytes_by_blocks(module: nn.Module, element: int, int8: bool = False) -> int:
    """Bytes of a module's weights where two blocks at a time are on the device, of 8-bit integers opened."""
    blocks = [parameter_count(block) for block in module.modules() if isinstance(block, STREAMED)]
    beside = parameter_count(module) - sum(blocks)
    largest = max(blocks, default=0)
    return element * beside + largest * (2 + element if int8 else 2 * element)


def parameter_count(module: nn.Module) -> int:
    """Number of a module's parameters."""
    return sum(p.numel() for p in module.parameters())


def stage_c_activations(plan: Plan, width: int, halves: int, element: int) -> int:
    """Bytes of Stage C's maps in the larger of its passes, `element` bytes each."""
    pixels = max(height * columns for height, columns in (plan.lr_latent, plan.hr_latent))
    return pixels * width * halves * element * MAPS_AT_PEAK


def stage_b_activations(plan: Plan, width: int, halves: int, element: int) -> int:
    """Bytes of Stage B's maps on a GPU at its first level, whose patches are 2 latent pixels wide."""
    pixels = plan.stage_b_latent[0] * plan.stage_b_latent[1] // 4
    numbers = pixels * width * halves
    if 4 * numbers <= KEPT_HIDDEN["cuda"]:
        return numbers * element * MAPS_AT_PEAK
    return (numbers * MAPS_BESIDE_CHUNKS + 2 * CHUNK_HIDDEN["cuda"]) * element


def stage_a_activations(plan: Plan, width: int, halo: int, tile: int = MAX_TILE) -> int:
    """Bytes of Stage A's maps for its largest tile, float32, and of the picture itself."""
    rows, columns = (min(side, tile + 2 * halo) for side in plan.stage_b_latent)
    return rows * columns * width * 4 * STAGE_A_MAPS + 3 * 4 * plan.decoded_height * plan.decoded_width


def fitting_tile(stage_a: StageA, plan: Plan, free: int, largest: int | None) -> int | None:
    """The largest tile (None: the usual one) that fits into `free` bytes, at most `largest`."""
    tile = MAX_TILE if largest is None else largest
    needed = partial(stage_a_activations, plan, stage_a.up_blocks[0][0].out_channels, stage_a.halo)
    while tile > MIN_TILE and needed(tile) > SHARE * free:
        tile //= 2
    return largest if tile == MAX_TILE else tile


def estimate_stages(
    config_c: StageCConfig,
    config_b: StageBConfig,
    guidance: GuidanceSizes | None,
    sizes: Plan,
    both: tuple[bool, bool],
    int8: bool = False,
    fp8: bool = False,
) -> list[StageEstimate]:
    """Device memory of each stage for a picture; `both` as `core.pipeline.passes.needs_unconditional`.

    With `int8` all weights of Stages C and B are counted as 8-bit integers, which nearly all of them are.
    With `fp8` there are copies in float8 during the high-resolution pass and Stage B.
    """
    c, b, a = stage_c_sizes(config_c), stage_b_sizes(config_b), stage_a_sizes(config_b)
    bytes_c, bytes_b = (ELEMENT[config.dtype] for config in (config_c, config_b))
    stage_c, stage_b = (build_empty(partial(kind, **asdict(own))) for kind, own in ((StageC, c), (StageB, b)))
    beside = 0
    if guidance is not None:
        beside = bytes_c * parameter_count(build_empty(partial(Guidance, **asdict(guidance))))
    weights_c = beside + weight_bytes(stage_c, 1 if int8 else bytes_c, fp8)
    weights_b = weight_bytes(stage_b, 1 if int8 else bytes_b, fp8)
    stage_a = build_empty(partial(StageA, **asdict(a)))
    maps_c = stage_c_activations(sizes, c.c_hidden[0], 1 + both[0], bytes_c)
    maps_b = stage_b_activations(sizes, b.c_hidden[0], 1 + both[1], bytes_b)
    maps_a = stage_a_activations(sizes, a.c_hidden, stage_a.halo)
    recorded = sizes.height * sizes.width <= RECORDED_PIXELS
    return [
        StageEstimate(
            "stage C", weights_c, maps_c, maps_c * recorded, beside + bytes_by_blocks(stage_c, bytes_c, int8)
        ),
        StageEstimate(
            "stage B", weights_b, maps_b, maps_b * recorded, bytes_by_blocks(stage_b, bytes_b, int8)
        ),
        StageEstimate("stage A", sum(p.numel() for p in stage_a.parameters()) * 4, maps_a),
    ]


def taken(mode: str, stages: Sequence[StageEstimate], text: int) -> int:
    """Bytes of the device's memory at most, where weights rest as `mode` says."""
    if mode == NONE:
        stay = sum(stage.weights + stage.kept for stage in stages)
        return text + stay + max(stage.activations - stage.kept for stage in stages)
    return max(text, *(stage.weights_in(mode) + stage.activations for stage in stages))


def best_mode(stages: Sequence[StageEstimate], text: int, free: int) -> tuple[str, str]:
    """The fastest way to offload that fits into `free` bytes, and why; `text`: bytes of the text encoder."""
    resident, largest = taken(NONE, stages, text), taken(STAGE, stages, text)
    told = f"{free / GIB:.1f} GiB are free on the device"
    if resident <= SHARE * free:
        return NONE, f"{told}, all stages together take about {resident / GIB:.1f}"
    if largest <= SHARE * free:
        return STAGE, f"{told}, the largest stage takes about {largest / GIB:.1f}, all {resident / GIB:.1f}"
    return BLOCK, f"{told}, the largest stage alone would take about {largest / GIB:.1f}"


def weights_on_disk(source: str) -> int:
    """Bytes of the text encoder's file; 0 where it is not in a folder."""
    target = Path(source)
    folder = target / "text_encoder" if (target / "text_encoder").is_dir() else target
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
