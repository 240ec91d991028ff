"""Control of the low-resolution pass: pictures to what a ControlNet sees, and what stays around a hole."""

from __future__ import annotations

import http.client
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from core.config.control_types import CONTROL_TYPES, control_type, controlnet_name, no_weights
from core.config.presets import DEFAULT
from core.config.schema import ControlConfig, LatentGeometry, check_proj_blocks
from core.config.sizes import ControlNetSizes, Size, StageCSizes
from core.paths import located
from core.pictures.images import NamedBytes, load_image, open_image, upright_parts
from core.pipeline.resolution import MAX_SIDE
from core.weights.checkpoint import CheckpointError, read_config, read_shapes
from core.weights.layouts import A_CONTROLNET, control_channels, describe_mismatch, identify
from modules.effnet import imagenet_normalise

CONTROL_WEIGHT = DEFAULT.control_weight
CONTROL_SIZE = 224  # px, the side of the picture that the published ControlNet's edges are found in
METADATA_KEY = "control"
CANNY_THRESHOLDS = (100, 200)
HOLE_LEVEL = 0.5  # a mask's pixels from this on are the hole
BLEND_WIDTH = 16  # px inside a hole's edge in which the made picture takes over from the colours around it,
BLEND_SHARE = 0.75  # but in a small hole this share of the way to its middle
READY_MODES = {1: "L", 3: "RGB"}  # of pictures that show what is seen, by its channels
TILE_SCALE = 8  # how much smaller the picture is that is enlarged for `tile`
SR_SCALE = 2  # how much smaller the picture is that a super resolution's latents are of
FETCH_SECONDS, FETCH_BYTES = 30, 1 << 26
FETCH_BLOCK = 1 << 16

Encoder = Callable[[Tensor], Tensor]


# --- the file -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ControlNetFile:
    """A ControlNet's weights, and how it is used."""

    path: str
    filter: str  # a name of core.config.control_types
    control_size: int
    sizes: ControlNetSizes

    @property
    def name(self) -> str:
        """As errors and `core.weights.layouts.identify` call it."""
        return controlnet_name(self.filter)


def open_controlnet(config: ControlConfig, stage_c: StageCSizes) -> ControlNetFile:
    """The ControlNet that a configuration names, with the sizes of its file, for a Stage C of these sizes.

    CheckpointError, or ValueError, if the file is of another network, of another ControlNet or of one for
    another Stage C, or if it is not there and of a type that none is published of. A published file that is
    not there yet is taken for a fitting one: it is missed at loading.
    """
    name, kind = config.controlnet_filter, control_type(config.controlnet_filter)
    default = kind.file or DEFAULT.control_file.format(control=name)
    path = located(config.controlnet_checkpoint_path or default)
    published = replace(kind.sizes, c_proj=stage_c.c_hidden[0])
    file = ControlNetFile(path, name, config.control_size or CONTROL_SIZE, config.controlnet or published)
    if not Path(path).exists():
        if kind.file is None:
            raise ValueError(f"{path} does not exist, and {no_weights(name)}")
        return file
    shapes = read_shapes(path)
    told = read_config(path, METADATA_KEY) or {}
    if (found := _network(shapes, told.get("filter"), file)) != file.name:
        raise CheckpointError(f"{path} {describe_mismatch(found, file.name)}")
    width = shapes["projections.0.2.weight"][0]
    stored = read_config(path)
    own = ControlNetSizes(**stored) if stored else replace(published, c_proj=width)
    file = replace(file, sizes=config.controlnet or own)
    try:
        check_proj_blocks(replace(file.sizes, c_proj=width), stage_c)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return replace(file, control_size=config.control_size or told.get("control_size", CONTROL_SIZE))


def _network(shapes: Mapping[str, tuple[int, ...]], told: str | None, asked: ControlNetFile) -> str:
    """The network of a file; of ControlNets with the channels of the asked one, its metadata tells which."""
    found = identify(shapes)
    fits = control_channels(shapes) == control_type(asked.filter).sizes.c_in
    if fits and (told in CONTROL_TYPES or found == A_CONTROLNET):
        return controlnet_name(told or asked.filter)
    return found


# --- pictures that are given ----------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A picture that is given as control, and its hole, if it has one (8-bit grey of its size, white)."""

    picture: Image.Image
    hole: Image.Image | None = None
    unmixed: Image.Image | None = None  # without the white that shows through half-transparent parts


def read_source(place: str | Path, mask: str | Path | None = None) -> Source:
    """A picture from a file or a URL; its hole is what `mask` shows white, else what is transparent in it.

    A mask's own transparent parts are no hole, whatever their colour. OSError or ValueError, of one sentence,
    for what cannot be read, and for a mask of another size.
    """
    content = fetch(str(place)) if "://" in str(place) else place
    picture = load_image(content)
    if mask is None:
        return _with_transparent_hole(content, picture)
    hole = load_image(mask, ground="black").convert("L")
    if hole.size != picture.size:
        raise ValueError(
            f"{mask}: the mask has {hole.height} x {hole.width} pixels (height x width), but the picture has "
            f"{picture.height} x {picture.width}: give a mask of the picture's size"
        )
    return Source(picture, hole)


def outpainted(source: Source, sides: Sequence[int]) -> Source:
    """The picture with room around it, of so many pixels (left, top, right, bottom), as a part of its hole.

    ValueError for what is no such room.
    """
    if len(sides) != 4 or min(sides) < 0 or not any(sides):
        raise ValueError(
            "outpainting needs four numbers of pixels, left, top, right and bottom, from 0 up and not all 0, "
            f"not {' '.join(map(str, sides))}"
        )
    left, top, right, bottom = sides
    size = source.picture.width + left + right, source.picture.height + top + bottom
    if max(size) > MAX_SIDE:
        raise ValueError(
            f"with this room the picture has {size[1]} x {size[0]} pixels (height x width): at most "
            f"{MAX_SIDE} a side can be"
        )
    picture, hole = Image.new("RGB", size, "white"), Image.new("L", size, 255)
    picture.paste(source.unmixed or source.picture, (left, top))
    hole.paste(source.hole or Image.new("L", source.picture.size), (left, top))
    return Source(picture, hole)


def _with_transparent_hole(content: str | Path | NamedBytes, picture: Image.Image) -> Source:
    with open_image(content) as image:
        unmixed, alpha = upright_parts(image, content)
    return Source(picture) if alpha is None else Source(picture, ImageOps.invert(alpha), unmixed)


def fetch(url: str) -> NamedBytes:
    """The content of an http or https URL, also over redirects to such.

    OSError or ValueError if it cannot be had, has more than FETCH_BYTES or takes longer than FETCH_SECONDS.
    """
    if url.partition("://")[0].lower() not in ("http", "https"):
        raise ValueError(f"{url}: pictures are fetched by http and https only; give such a URL or a file")
    end, content = time.monotonic() + FETCH_SECONDS, b""
    try:
        with _web().open(urllib.request.Request(url), timeout=FETCH_SECONDS) as response:
            while block := response.read1(FETCH_BLOCK):
                content += block
                if len(content) > FETCH_BYTES:
                    raise OSError(f"it has more than {FETCH_BYTES >> 20} MiB, the most that is fetched")
                if time.monotonic() > end:
                    raise OSError(f"it took more than {FETCH_SECONDS} s")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise OSError(f"{url}: the picture cannot be fetched ({error})") from None
    return NamedBytes(content, url)


def _web() -> urllib.request.OpenerDirector:
    """Opens http and https and nothing else, which a redirect could lead to."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, urllib.request.UnknownHandler, urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler, urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor,
    ):  # fmt: skip
        opener.add_handler(handler())
    return opener


# --- filters --------------------------------------------------------------------------------------


def edges(pictures: Tensor, size: int, keep_aspect: bool = False) -> Tensor:
    """Canny edges (B, 1, H, W) in [0, 1] of pictures (B, 3, H, W) in [0, 1].

    As published they are found in the picture squeezed to size x size (with `keep_aspect`: its shorter side)
    and enlarged to H x W again.
    """
    height, width = pictures.shape[-2:]
    scale = size / min(height, width)
    reduced = (round(scale * height), round(scale * width)) if keep_aspect else (size, size)
    small = F.interpolate(pictures, size=reduced, mode="bilinear")
    eight_bit = (small * 255).byte().permute(0, 2, 3, 1).cpu().contiguous().numpy()
    import cv2  # late: most pictures have no control

    found = np.stack([cv2.Canny(picture, *CANNY_THRESHOLDS) for picture in eight_bit])
    lines = torch.from_numpy(found)[:, None].to(pictures) / 255
    return F.interpolate(lines, size=(height, width), mode="bilinear")


def with_hole(pictures: Tensor, holes: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) with holes (B, 1, H, W), 0 or 1, painted white, and the holes: (B, 4, H, W)."""
    return torch.cat([torch.where(holes > 0, 1.0, pictures), holes], dim=1)


def blurred(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) without their details: reduced by TILE_SCALE, and enlarged to H x W again."""
    size = pictures.shape[-2:]
    small = F.interpolate(pictures, size=[max(1, side // TILE_SCALE) for side in size], mode="area")
    return F.interpolate(small, size=size, mode="bilinear")


@torch.no_grad()
def half_size_latents(pictures: Tensor, encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Latents (B, 16, h, w) of pictures (B, 3, H, W) in [0, 1] at half size, and those (B, 3, H, W).

    Both are enlarged again, by nearest neighbour.
    """
    small = F.interpolate(pictures, scale_factor=1 / SR_SCALE, mode="nearest")
    latents = encoder(imagenet_normalise(small))
    return tuple(F.interpolate(x, scale_factor=SR_SCALE, mode="nearest") for x in (latents, small))


# --- what a picture is made under -----------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """What stays as it is around a hole."""

    picture: Tensor  # (3, H, W) in [0, 1], carried on into the hole
    inside: Tensor  # (H, W): 0 outside the hole, rising to 1 within it, as `blend` gives it

    def around(self, pixels: Tensor) -> Tensor:
        """The picture with pixels (3, H, W) in its hole; reduced to their size, if they have another one."""
        size = pixels.shape[-2:]
        picture, inside = (
            x if x.shape[-2:] == size else F.interpolate(x[None], size, mode="area")[0]
            for x in (self.picture, self.inside[None])
        )
        return torch.lerp(picture, pixels.to(picture), inside)


@dataclass(frozen=True)
class Control:
    """What steers the low-resolution pass of a picture."""

    seen: Tensor  # (1, c_in, H, W), the ControlNet's input
    shown: Tensor  # (1 or 3, H, W) in [0, 1], the same to look at
    weight: float = CONTROL_WEIGHT  # of the ControlNet's entries
    kept: Kept | None = None
    start: float = 1.0  # it acts from this time t of the pass
    end: float = 0.0  # down to this one
    hr: bool = False  # in the high-resolution pass too


def control_size(height: int, width: int, geometry: LatentGeometry) -> Size:
    """The (height, width) of what a ControlNet sees of a picture of height x width.

    The shorter side is that of a low-resolution picture in training (published: 768 px), the longer one as
    near to the picture's shape as whole cells of the encoder at half size allow. As a whole it lies over the
    whole low-resolution latent.
    """
    step = SR_SCALE * geometry.stride
    scale = geometry.lr_train_cells * geometry.stride / min(height, width)
    rows, columns = (max(1, round(scale * side / step)) for side in (height, width))
    return rows * step, columns * step


def fitted(image: Image.Image, size: Size, shape: Size) -> Tensor:
    """The largest middle part of a picture that has the shape of `shape`, resized to `size` (height, width).

    (3, *size), or (1, *size) of a grey picture, in [0, 1].
    """
    scale = min(image.height / shape[0], image.width / shape[1])
    height, width = scale * shape[0], scale * shape[1]
    top, left = (image.height - height) / 2, (image.width - width) / 2
    box = (left, top, left + width, top + height)
    pixels = np.array(image.resize(size[::-1], Image.Resampling.BILINEAR, box))  # antialiased
    return torch.from_numpy(pixels.reshape(*size, -1)).permute(2, 0, 1).float() / 255


def edge_control(
    source: Source, shape: Size, geometry: LatentGeometry, size: int, keep_aspect: bool = False
) -> Control:
    """Control by the edges of a picture, for pictures of `shape` (height, width); `size` as in `edges`."""
    picture = fitted(source.picture, control_size(*shape, geometry), shape)
    found = edges(picture[None], size, keep_aspect)
    return Control(found, found[0])


def ready_control(picture: Image.Image, shape: Size, geometry: LatentGeometry, channels: int) -> Control:
    """Control by a picture that shows what the ControlNet sees, such as edges, white on black."""
    seen = fitted(picture.convert(READY_MODES[channels]), control_size(*shape, geometry), shape)
    return Control(seen[None], seen)


def hole_control(source: Source, shape: Size, geometry: LatentGeometry) -> Control:
    """Control by what lies around a picture's hole, which stays; ValueError if there is no hole.

    Of what lies in the hole nothing is seen or kept, not even in pixels of another size that touch its edge.
    """
    if source.hole is None or max(source.hole.getextrema()) < HOLE_LEVEL * 255:
        raise ValueError(
            "inpainting needs a hole to fill: a mask with white in it, or a picture with transparent parts"
        )
    around, size = carried_on(source), control_size(*shape, geometry)
    hole, large = (_binary(fitted(source.hole, target, shape)) for target in (size, shape))
    if not large.any():
        raise ValueError(
            f"no hole is left at {shape[0]} x {shape[1]} (height x width): ask for the picture's own size"
        )
    seen = with_hole(fitted(around, size, shape)[None], hole[None])
    return Control(seen, seen[0, :3], kept=Kept(fitted(around, shape, shape), blend(large)))


def _binary(hole: Tensor) -> Tensor:
    return (hole >= HOLE_LEVEL).float()


def carried_on(source: Source) -> Image.Image:
    """The picture, each pixel of its hole in the colour of the nearest one outside; if any is."""
    picture = source.unmixed or source.picture
    return Image.fromarray(filled(np.array(picture), np.array(source.hole) >= HOLE_LEVEL * 255))


def filled(pixels: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """Pixels (H, W, 3), those where the hole (H, W) is true as the nearest one outside; if any is."""
    if hole.all() or not hole.any():
        return pixels
    import cv2  # late: most pictures have no control

    _, labels = cv2.distanceTransformWithLabels(
        hole.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5, labelType=cv2.DIST_LABEL_PIXEL
    )
    nearest = np.empty((labels.max() + 1, 3), pixels.dtype)
    nearest[labels[~hole]] = pixels[~hole]  # each pixel outside has a label, those inside its label
    return np.where(hole[..., None], nearest[labels], pixels)


def blend(hole: Tensor) -> Tensor:
    """The made picture's share (H, W) for holes (1, H, W): 0 outside, inside rising smoothly from the edge.

    It is 1 from BLEND_WIDTH on, in a small hole from BLEND_SHARE of its middle's depth. A hole's edge at the
    picture's border is none: nothing is kept there.
    """
    inside = hole[0].byte().numpy()
    import cv2  # late: most pictures have no control

    to_outside = cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    depth = (to_outside - 0.5).clip(min=0)  # px from the edge, which lies between two pixels
    count, labels = cv2.connectedComponents(inside, connectivity=8)
    deepest = np.full(count, 0.5, np.float32)
    np.maximum.at(deepest, labels, depth)
    way = (depth / np.minimum(BLEND_WIDTH, BLEND_SHARE * deepest)[labels]).clip(max=1)
    return torch.from_numpy((3 - 2 * way) * way**2)


def half_size_control(source: Source, shape: Size, geometry: LatentGeometry, encoder: Encoder) -> Control:
    """Control by the encoder's latents of a small picture that is to be made large."""
    picture = fitted(source.picture, control_size(*shape, geometry), shape)
    latents, small = half_size_latents(picture[None], encoder)
    return Control(latents, small[0])
