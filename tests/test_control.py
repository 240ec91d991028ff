"""Filters of control, pictures that are given for it, ControlNet files, and the pipeline under control."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, random_pipeline
from PIL import Image, ImageFilter
from random_family import Family, randomise
from torch import Tensor
from torch.nn import functional as F

import core.pipeline.control
from core.config.control_types import CONTROL_TYPES, control_type
from core.config.schema import ControlConfig, ControlTrainConfig, LatentGeometry, controlnet_sizes
from core.config.settings import Job, Settings
from core.config.sizes import TINY, ControlNetSizes, StageCSizes
from core.config.yaml import ConfigError, load, load_control, load_stage_c
from core.pictures.images import load_image, to_image
from core.pipeline.control import (
    BLEND_WIDTH,
    Control,
    Kept,
    Source,
    blend,
    blurred,
    control_size,
    edge_control,
    edges,
    fetch,
    fitted,
    half_size_latents,
    hole_control,
    open_controlnet,
    read_source,
    ready_control,
    with_hole,
)
from core.pipeline.pipeline import UltraPixelPipeline
from core.training.control import what_is_seen
from core.weights.checkpoint import CheckpointError, config_metadata, save_tensors
from modules.controlnet import ControlNet
from modules.effnet import imagenet_normalise

PUBLISHED, FAMILY = LatentGeometry(), Family()
GEOMETRY = FAMILY.geometry
SIZES = ControlNetSizes(c_in=1, c_proj=64, proj_blocks=(0, 2, 5), bottleneck_mode="simple")
QUICK = Settings(steps=2, steps_b=2, cfg=1.0, shift=2.0)


def noise_picture(height: int, width: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.NEAREST)


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


# --- filters --------------------------------------------------------------------------------------


def test_edges_are_those_of_the_published_filter() -> None:
    picture = pixels(noise_picture(300, 420))[None]
    small = F.interpolate(picture, size=(224, 224), mode="bilinear")
    lines = cv2.Canny((small[0] * 255).numpy().transpose(1, 2, 0).astype(np.uint8), 100, 200)
    expected = F.interpolate(torch.tensor(lines)[None, None] / 255, size=(300, 420), mode="bilinear")
    found = edges(picture, 224)
    assert found.shape == (1, 1, 300, 420) and 0 < found.mean() < 0.5
    assert torch.equal(found, expected)


def test_finer_edges_and_edges_without_squeezing() -> None:
    picture = pixels(noise_picture(96, 192))[None]
    native = cv2.Canny(np.array(to_image(picture[0])), 100, 200)
    found = edges(picture, 96, keep_aspect=True)[0, 0]
    assert ((found > 0) != torch.from_numpy(native > 0)).float().mean() < 0.01
    assert (edges(picture, 96) - edges(picture, 96, keep_aspect=True)).abs().mean() > 0.01
    assert edges(picture, 192)[0, 0].count_nonzero() < edges(picture, 48)[0, 0].count_nonzero()


def test_a_hole_is_painted_white_and_given_along() -> None:
    picture, hole = torch.rand(2, 3, 8, 8), torch.zeros(2, 1, 8, 8)
    hole[:, :, 2:5] = 1
    seen = with_hole(picture, hole)
    assert torch.equal(seen[:, 3:], hole)
    assert (seen[:, :3, 2:5] == 1).all() and torch.equal(seen[:, :3, 5:], picture[:, :, 5:])


def test_super_resolution_sees_latents_of_half_the_picture() -> None:
    picture = torch.rand(1, 3, 16, 32)
    halved = picture[:, :, ::2, ::2]
    latents, small = half_size_latents(picture, lambda x: x[:, :, ::4, ::4])
    assert torch.equal(small, halved.repeat_interleave(2, -1).repeat_interleave(2, -2))
    assert latents.shape == (1, 3, 4, 8)
    assert torch.equal(latents[:, :, ::2, ::2], imagenet_normalise(halved)[:, :, ::4, ::4])


def test_tile_sees_a_picture_without_its_details() -> None:
    board = (torch.arange(64) % 2).float().expand(2, 3, 64, 64)
    assert torch.allclose(blurred(board), torch.full((2, 3, 64, 64), 0.5))
    halves = (torch.arange(64) >= 32).float().expand(1, 3, 64, 64)
    assert torch.equal(blurred(halves).round(), halves)
    assert blurred(torch.rand(1, 3, 5, 90)).shape == (1, 3, 5, 90)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_ready_picture_is_seen_as_it_is(channels: int) -> None:
    picture = noise_picture(96, 96)
    control = ready_control(picture, (512, 512), GEOMETRY, channels)
    assert control.seen.shape == (1, channels, 96, 96)
    assert torch.equal(control.shown, pixels(picture) if channels == 3 else control.seen[0])


@pytest.mark.parametrize(
    ("shape", "geometry", "expected"),
    [
        ((4096, 4096), PUBLISHED, (768, 768)),
        ((2048, 4096), PUBLISHED, (768, 1536)),
        ((3840, 2160), PUBLISHED, (1344, 768)),
        ((512, 512), GEOMETRY, (96, 96)),
        ((128, 200), GEOMETRY, (96, 144)),
    ],
)
def test_the_control_has_the_low_resolutions_shape(shape, geometry, expected) -> None:
    assert control_size(*shape, geometry) == expected


def test_pictures_are_cut_in_the_middle() -> None:
    picture = noise_picture(60, 100)
    assert torch.equal(fitted(picture, (60, 100), (60, 100)), pixels(picture))
    assert torch.equal(fitted(picture, (60, 60), (512, 512)), pixels(picture)[:, :, 20:80])
    assert fitted(picture.convert("L"), (96, 144), (128, 200)).shape == (1, 96, 144)


# --- holes ----------------------------------------------------------------------------------------


def round_hole(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    inside = np.hypot(y - height / 2, x - width / 2) < min(height, width) / 4
    return Image.fromarray((255 * inside).astype(np.uint8))


def rectangle(shape: tuple[int, int], *corners: int) -> Tensor:
    top, left, bottom, right = corners
    hole = torch.zeros(1, *shape)
    hole[:, top:bottom, left:right] = 1
    return hole


def as_mask(hole: Tensor) -> Image.Image:
    return to_image(hole.expand(3, -1, -1)).convert("L")


def depth(hole: Tensor) -> Tensor:
    """How far inside a hole (1, H, W) a pixel lies, outside how far from it, negative; px."""
    inside, outside = (
        cv2.distanceTransform(side[0].byte().numpy(), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        for side in (hole, 1 - hole)
    )
    return torch.from_numpy(inside - outside)


@pytest.mark.parametrize("size", [256, 1024])
def test_the_blend_lies_inside_the_hole(size: int) -> None:
    hole = rectangle((size, size), size // 4, size // 4, 3 * size // 4, 3 * size // 4)
    share, deep = blend(hole), depth(hole)
    assert torch.equal(share > 0, hole[0] > 0)
    assert (share[deep > BLEND_WIDTH] == 1).all()
    row = share[size // 2, size // 4 : size // 4 + BLEND_WIDTH]
    assert (row.diff() > 0).all() and row[0] < 0.01 and row[-1] > 0.99


def test_small_holes_are_filled_too_and_each_for_itself() -> None:
    hole = rectangle((200, 300), 10, 10, 11, 60) + rectangle((200, 300), 40, 40, 64, 64)
    alone = blend(hole)
    assert (alone[10, 10:60] == 1).all()  # a line of one pixel
    assert (alone[51:53, 51:53] == 1).all() and alone[40, 40] < 0.05
    both = blend(hole + rectangle((200, 300), 80, 100, 190, 280))
    assert torch.equal(both[:70], alone[:70])


def test_where_a_hole_ends_with_the_picture_there_is_no_edge() -> None:
    assert (blend(torch.ones(1, 40, 60)) == 1).all()
    share = blend(rectangle((100, 100), 0, 0, 60, 100))
    assert (share[:40] == 1).all() and (share[60:] == 0).all()


def sky(height: int, width: int) -> Image.Image:
    y = np.linspace(0, 1, height)[:, None, None]
    colours = (1 - y) * np.array([90, 140, 210]) + y * np.array([170, 200, 235])
    return Image.fromarray(np.broadcast_to(colours, (height, width, 3)).astype(np.uint8))


@pytest.mark.parametrize("made", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(512, 512), (1024, 1400), (300, 300)])
@pytest.mark.parametrize("under", ["black", "white", "red"])
def test_no_frame_is_seen_on_a_plain_sky(made: float, shape: tuple[int, int], under: str) -> None:
    height, width = 512, 700
    hole = rectangle((height, width), 150, 200, 370, 460)
    picture = sky(height, width)
    picture.paste(under, mask=as_mask(hole))
    control = hole_control(Source(picture, as_mask(hole)), shape, GEOMETRY)
    around = control.kept.around(torch.full((3, *shape), made))
    deep = depth((control.kept.inside > 0).float()[None])
    inside, outside = (around[:, (near >= 1) & (near <= 3)].mean(1) for near in (deep, -deep))
    assert (inside - outside).abs().max() <= 10 / 255
    if shape != (512, 700):  # what lies in the hole does not reach pixels at its edge either
        before = fitted(sky(height, width), shape, shape)
        assert (around - before)[:, deep <= 0].abs().max() <= 6 / 255


@pytest.mark.parametrize("soft", [0, 6])
def test_a_transparent_picture_gets_no_frame(tmp_path: Path, soft: int) -> None:
    hole = as_mask(rectangle((256, 256), 60, 80, 180, 200))
    alpha = Image.eval(hole.filter(ImageFilter.GaussianBlur(soft)), lambda value: 255 - value)
    picture = sky(256, 256)
    picture.putalpha(alpha)
    picture.save(tmp_path / "a.png")
    source = read_source(tmp_path / "a.png")
    control = hole_control(source, (256, 256), GEOMETRY)
    around = control.kept.around(torch.zeros(3, 256, 256))
    outside = np.array(alpha) >= 128
    assert np.array_equal(np.array(to_image(around))[outside], np.array(sky(256, 256))[outside])
    assert around.max() <= 235 / 255  # the sky's lightest colour
    edge = edge_control(source, (256, 256), GEOMETRY, 96)  # sees what people see: white shows through
    assert torch.equal(
        edge.seen, edge_control(Source(load_image(tmp_path / "a.png")), (256, 256), GEOMETRY, 96).seen
    )


@pytest.mark.parametrize("shape", [(120, 160), (100, 100)])
def test_what_is_around_a_hole_stays_pixel_for_pixel(shape: tuple[int, int]) -> None:
    picture, hole = noise_picture(120, 160), round_hole(120, 160)
    control = hole_control(Source(picture, hole), shape, GEOMETRY)
    made = np.array(to_image(control.kept.around(torch.rand(3, *shape))))
    outside = fitted(hole, shape, shape)[0] == 0
    assert np.array_equal(made[outside], np.array(to_image(fitted(picture, shape, shape)))[outside])
    if shape == (120, 160):
        assert np.array_equal(made[outside], np.array(picture)[outside])
    assert control.seen.shape == (1, 4, *control_size(*shape, GEOMETRY))
    assert (control.shown[:, control.seen[0, 3] == 1] == 1).all()


def test_transparent_parts_are_a_hole(tmp_path: Path) -> None:
    picture = noise_picture(40, 60)
    picture.putalpha(Image.fromarray(255 - np.array(round_hole(40, 60))))
    picture.save(tmp_path / "a.png")
    source = read_source(tmp_path / "a.png")
    assert np.array_equal(np.array(source.hole), np.array(round_hole(40, 60)))
    round_hole(40, 60).save(tmp_path / "mask.png")
    noise_picture(40, 60).save(tmp_path / "b.png")
    assert read_source(tmp_path / "b.png").hole is None
    masked = read_source(tmp_path / "b.png", tmp_path / "mask.png")
    assert np.array_equal(np.array(masked.hole), np.array(source.hole))


MASKS = {
    "1": lambda hole: (hole.convert("1"), {}),
    "L": lambda hole: (hole, {}),
    "LA": lambda hole: (Image.merge("LA", (Image.new("L", hole.size, 255), hole)), {}),
    "RGBA": lambda hole: (Image.merge("RGBA", (*[Image.new("L", hole.size, 255)] * 3, hole)), {}),
    "P": lambda hole: (hole.point(lambda v: v > 0).convert("P"), {"transparency": 0}),
    "1 with transparency": lambda hole: (hole.convert("1"), {"transparency": 0}),
    "L with white transparency": lambda hole: (
        hole.point(lambda v: 200 if v else 255),
        {"transparency": 255},
    ),
    "16 bits": lambda hole: (Image.fromarray(np.array(hole).astype(np.uint16) * 257), {}),
    "16 bits with transparency": lambda hole: (
        Image.fromarray(np.where(np.array(hole) > 0, 50000, 65535).astype(np.uint16)),
        {"transparency": 65535},
    ),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_masks_transparent_parts_are_no_hole(tmp_path: Path, kind: str) -> None:
    hole = round_hole(40, 60)
    mask, options = MASKS[kind](hole)
    if mask.mode == "P":
        mask.putpalette([255, 255, 255] * 256)
    mask.save(tmp_path / "mask.png", **options)
    noise_picture(40, 60).save(tmp_path / "a.png")
    found = read_source(tmp_path / "a.png", tmp_path / "mask.png").hole
    assert np.array_equal(np.array(found) >= 128, np.array(hole) > 0)


def test_a_hole_that_is_cut_off_or_too_small_is_told() -> None:
    hole = as_mask(rectangle((100, 300), 20, 10, 60, 50))
    with pytest.raises(ValueError, match="no hole is left at 100 x 100"):
        hole_control(Source(noise_picture(100, 300), hole), (100, 100), GEOMETRY)


def test_a_mask_of_another_size_and_no_hole_at_all_are_told(tmp_path: Path) -> None:
    noise_picture(40, 60).save(tmp_path / "a.png")
    round_hole(40, 64).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match=r"mask.png.* 40 x 64 .*40 x 60"):
        read_source(tmp_path / "a.png", tmp_path / "mask.png")
    for hole in (None, Image.new("L", (60, 40))):
        with pytest.raises(ValueError, match="needs a hole"):
            hole_control(Source(noise_picture(40, 60), hole), (64, 96), GEOMETRY)


# --- URLs -----------------------------------------------------------------------------------------


class Pages(BaseHTTPRequestHandler):
    """/picture.png, /text, and redirects to a file and to the picture."""

    def do_GET(self) -> None:
        places = {"/to_file": "file:///etc/hostname", "/to_ftp": "ftp://x/y.png", "/moved": "/picture.png"}
        if self.path in places:
            self.send_response(302)
            self.send_header("Location", places[self.path])
            self.end_headers()
            return
        stream = BytesIO()
        noise_picture(40, 60).save(stream, "png")
        content = {"/picture.png": stream.getvalue(), "/text": b"hello"}.get(self.path)
        self.send_response(404 if content is None else 200)
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_picture_is_fetched(site: str) -> None:
    for page in ("picture.png", "moved"):
        assert np.array_equal(
            np.array(read_source(f"{site}/{page}").picture), np.array(noise_picture(40, 60))
        )


@pytest.mark.parametrize("page", ["missing", "to_file", "to_ftp", "text"])
def test_what_cannot_be_fetched_is_told(site: str, page: str) -> None:
    with pytest.raises((OSError, ValueError), match=f"{page}: "):
        read_source(f"{site}/{page}")


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://x/y.png", "http://127.0.0.1:1/x.png"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises((OSError, ValueError), match=f"{url}: "):
        fetch(url)


def test_what_is_too_large_or_too_slow_is_not_read(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.pipeline.control, "FETCH_BYTES", 100)
    with pytest.raises(OSError, match="the most that is fetched"):
        fetch(f"{site}/picture.png")
    monkeypatch.setattr(core.pipeline.control, "FETCH_BYTES", 1 << 20)
    clock = iter((0.0, 1e6))
    monkeypatch.setattr(core.pipeline.control.time, "monotonic", lambda: next(clock))
    with pytest.raises(OSError, match="it took more than"):
        fetch(f"{site}/picture.png")


# --- ControlNet files and configurations ----------------------------------------------------------


def write_controlnet(path: Path, sizes: ControlNetSizes, control: dict | None = None) -> ControlConfig:
    torch.manual_seed(1)
    network = ControlNet(**asdict(sizes))
    randomise(network)
    for parameter in network.parameters():
        parameter.data *= 3  # so that it is seen in few steps
    metadata = config_metadata(asdict(sizes)) | config_metadata(control, "control") if control else {}
    save_tensors(path, network.state_dict(), metadata)
    return ControlConfig(controlnet_checkpoint_path=str(path))


def test_a_file_brings_its_own_sizes(tmp_path: Path) -> None:
    config = write_controlnet(tmp_path / "c.safetensors", SIZES, {"filter": "canny", "control_size": 96})
    file = open_controlnet(config, FAMILY.stage_c)
    assert (file.control_size, file.sizes.proj_blocks) == (96, list(SIZES.proj_blocks))
    assert open_controlnet(replace(config, control_size=300), FAMILY.stage_c).control_size == 300
    missing = open_controlnet(replace(config, controlnet_checkpoint_path="nowhere"), FAMILY.stage_c)
    assert (missing.control_size, missing.sizes.c_proj) == (224, 64)


@pytest.mark.parametrize(
    ("sizes", "filter", "parts"),
    [
        (replace(SIZES, c_in=4), "canny", "is the inpainting ControlNet, but the canny ControlNet"),
        (SIZES, "super_resolution", "is the canny ControlNet, but the super resolution ControlNet"),
        (replace(SIZES, c_proj=96), "canny", "of width 96, but the configured one has 64"),
        (replace(SIZES, proj_blocks=(0, 9)), "canny", r"ResBlocks \[0, 9\].* 0 to 5"),
    ],
)
def test_a_controlnet_for_something_else_is_told(tmp_path: Path, sizes, filter: str, parts: str) -> None:
    config = write_controlnet(tmp_path / "c.safetensors", sizes, {"filter": "x", "control_size": 96})
    with pytest.raises(ValueError, match=f"c.safetensors.*{parts}"):
        open_controlnet(replace(config, controlnet_filter=filter), FAMILY.stage_c)


@pytest.mark.parametrize(
    ("channels", "told", "asked", "message"),
    [
        (3, "depth", "depth", None),
        (3, "tile", "tile", None),
        (3, None, "depth", None),  # of others, who do not tell
        (1, "canny", "canny", None),
        (3, "tile", "depth", "is the tile ControlNet, but the depth ControlNet was asked for"),
        (3, "pose", "depth", "is the pose ControlNet, but the depth ControlNet"),
        (3, "tile", "canny", "is a ControlNet, but the canny ControlNet"),
        (1, "canny", "depth", "is the canny ControlNet, but the depth ControlNet"),
        (1, "depth", "canny", "is the depth ControlNet, but the canny ControlNet"),
    ],
)
def test_types_of_as_many_channels_are_told_apart_by_what_their_files_say(
    tmp_path: Path, channels: int, told: str | None, asked: str, message: str | None
) -> None:
    told_there = {"filter": told, "control_size": 96} if told else {"control_size": 96}
    config = write_controlnet(tmp_path / "c.safetensors", replace(SIZES, c_in=channels), told_there)
    config = replace(config, controlnet_filter=asked)
    if message is None:
        assert open_controlnet(config, FAMILY.stage_c).name == f"the {asked} ControlNet"
        return
    with pytest.raises(CheckpointError, match=message):
        open_controlnet(config, FAMILY.stage_c)


@pytest.mark.parametrize("name", ["depth", "tile"])
def test_a_type_without_published_weights_says_so(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"no ControlNet for {name} is shipped.*--control_file FILE"
    ) as error:
        open_controlnet(ControlConfig(controlnet_filter=name), FAMILY.stage_c)
    assert ("train_ultrapixel_control" in str(error.value)) == (name == "tile")


@pytest.mark.parametrize(
    "ask",
    [
        control_type,
        lambda name: ControlConfig(controlnet_filter=name),
        lambda name: what_is_seen(name, None, lambda x: x),
    ],
)
def test_an_unknown_type_is_told_with_the_known_ones(ask) -> None:
    with pytest.raises(
        ValueError, match="'pose' is not one of canny, inpainting, super_resolution, depth, t"
    ):
        ask("pose")


def test_a_published_file_of_another_width_or_another_network_is_told(
    family_folder: Path, tmp_path: Path
) -> None:
    config = write_controlnet(
        tmp_path / "c.safetensors", replace(SIZES, proj_blocks=CONTROL_TYPES["canny"].sizes.proj_blocks)
    )
    with pytest.raises(ValueError, match="of width 64, but the configured one has 1536"):
        open_controlnet(config, StageCSizes(c_hidden=(1536, 1536)))
    config = ControlConfig(controlnet_checkpoint_path=str(family_folder / "stage_a.safetensors"))
    with pytest.raises(CheckpointError, match="is Stage A, but the canny ControlNet"):
        open_controlnet(config, FAMILY.stage_c)


def test_configurations_name_stage_c_and_its_controlnet_together() -> None:
    for kind, known in CONTROL_TYPES.items():
        if known.file is None:
            continue
        path = ROOT / "configs" / "inference" / f"controlnet_c_3b_{kind}.yaml"
        assert load_stage_c(path).model_version == "3.6B"
        control = load_control(path)
        assert control.controlnet_filter == kind and kind in control.controlnet_checkpoint_path
        assert open_controlnet(control, StageCSizes()).sizes == known.sizes
    path = ROOT / "configs" / "training" / "cfg_control_lr.yaml"
    assert load_stage_c(path).model_version == "3.6B"
    assert controlnet_sizes(load(ControlTrainConfig, path)) == CONTROL_TYPES["canny"].sizes
    tiny = load(ControlTrainConfig, ROOT / "configs" / "tiny" / "train_control_canny.yaml")
    assert controlnet_sizes(tiny) == TINY.controlnet


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("controlnet.c_in=4", "'controlnet.c_in' must be 1 for the filter canny, not 4"),
        ("controlnet_filter=pose", "'pose'.* canny, inpainting, super_resolution, depth, tile"),
        ("controlnet_filter=depth", "a ControlNet for depth cannot be trained here: what it sees"),
        ("control_size=3", "from 16 to 4096 pixels, not 3"),
        ("model_version=1B", "width 2048.* 1536"),
        ("controlnet.proj_blocks=[64]", "0 to 63"),
    ],
)
def test_wrong_keys_of_a_training_are_told(override: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        load(ControlTrainConfig, ROOT / "configs" / "training" / "cfg_control_lr.yaml", [override])


# --- the pipeline ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(family_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> UltraPixelPipeline:
    made = random_pipeline(family_folder)
    path = tmp_path_factory.mktemp("control") / "c.safetensors"
    made.set_control(write_controlnet(path, SIZES, {"filter": "canny", "control_size": 96}))
    return made


JOB = Job("a red boat", 96, 128, seed=7)


def make(pipeline: UltraPixelPipeline, control: Control | None, settings: Settings = QUICK) -> Tensor:
    return pipeline.run([JOB], settings, None, [control] if control else ())[0].pixels


def test_control_steers_by_what_it_sees_and_its_weight(pipeline: UltraPixelPipeline) -> None:
    free = make(pipeline, None)
    control = edge_control(Source(noise_picture(96, 128)), (96, 128), GEOMETRY, 96)
    steered = make(pipeline, control)
    assert not torch.equal(steered, free)
    assert torch.equal(make(pipeline, replace(control, weight=0.0)), free)
    ready = ready_control(to_image(control.shown.expand(3, -1, -1)), (96, 128), GEOMETRY, 1)
    assert (ready.seen - control.seen).abs().max() < 0.01
    other = edge_control(Source(noise_picture(96, 128, seed=1)), (96, 128), GEOMETRY, 96)
    assert not torch.equal(make(pipeline, other), steered)
    assert torch.equal(pipeline(JOB.prompt, 96, 128, 7, settings=QUICK, control=control)[0].pixels, steered)


def test_control_acts_in_both_halves(pipeline: UltraPixelPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    stage_c, seen = pipeline.stage_c.module, []
    run_levels = stage_c.run_levels

    def watched(x: Tensor, r_embed: Tensor, keys_values: list, control=None, *others) -> Tensor:
        if control is not None:
            seen.append((len(x), [None if e is None else len(e) for e in control]))
        return run_levels(x, r_embed, keys_values, control, *others)

    monkeypatch.setattr(stage_c, "run_levels", watched)
    control = edge_control(Source(noise_picture(96, 128)), (96, 128), GEOMETRY, 96)
    make(pipeline, control, replace(QUICK, cfg=4.0))
    entries = [1, None, 1, None, None, 1]  # broadcast over the halves
    assert seen == [(2, entries), (2, entries), (1, entries)]  # the last: the guiding features at r = 0.05


def test_the_pipeline_keeps_what_a_control_keeps(pipeline: UltraPixelPipeline) -> None:
    control = edge_control(Source(noise_picture(96, 128)), (96, 128), GEOMETRY, 96)
    inside = torch.zeros(96, 128)
    inside[:, 64:] = 1
    kept = replace(control, kept=Kept(torch.rand(3, 96, 128), inside))
    made = make(pipeline, kept)
    assert torch.equal(made[:, :, :64], kept.kept.picture[:, :, :64])
    assert torch.equal(made[:, :, 64:], make(pipeline, control)[:, :, 64:])


def test_a_control_without_a_controlnet_is_told(family_folder: Path) -> None:
    control = Control(torch.rand(1, 1, 96, 96), torch.rand(1, 96, 96))
    with pytest.raises(ValueError, match="no ControlNet"):
        random_pipeline(family_folder).run_controlnet([control])
