"""The nodes for ComfyUI, run in a stub of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui_stub import InterruptProcessingException, Stub, call
from conftest import ROOT
from PIL import Image
from torch import Tensor

from core.config.settings import Job
from core.pipeline.pipeline import UltraPixelPipeline

FOLDER = ROOT / "inference" / "comfyui"
TINY_FOLDER = ROOT / "models" / "tiny"
WORKFLOWS = {path.stem: json.loads(path.read_text("utf-8")) for path in (FOLDER / "workflows").glob("*.json")}
PROMPT = "a red house by the sea"
ASKED = {"height": 128, "width": 128, "seed": 5, "steps": 2, "steps_b": 1, "cfg": 2.0}
MORE = {
    "shift": 1.0,
    "sampler": "ddpm",
    "cfg_b": 1.1,
    "num_images": 1,
    "preview": False,
}
TEXTS = {"prompt": PROMPT, "negative_prompt": ""}
LOADED = {"dtype": "as configured", "offload": "stage", "int8": False}
LORA, CONTROLNET = "lora_striped_balloon.safetensors", "controlnet_canny.safetensors"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Stub:
    """ComfyUI with the embedded family's files in its own model folders."""
    root = tmp_path_factory.mktemp("ComfyUI")
    for folder in ("diffusion_models", "vae", "loras", "controlnet"):
        (root / "models" / folder).mkdir(parents=True)
    for folder, names in {
        "diffusion_models": ("stage_c", "stage_b", "ultrapixel_t2i"), "vae": ("stage_a", "previewer")
    }.items():  # fmt: skip
        for name in names:
            path = TINY_FOLDER / f"{name}.safetensors"
            (root / "models" / folder / path.name).symlink_to(path)
    (root / "models" / "loras" / LORA).symlink_to(TINY_FOLDER / LORA)
    (root / "models" / "controlnet" / CONTROLNET).symlink_to(TINY_FOLDER / CONTROLNET)
    (root / "input").mkdir()
    draw().save(root / "input" / "example.png")
    return Stub(root)


def draw() -> Image.Image:
    picture = Image.new("RGB", (96, 96), "white")
    picture.paste("red", (30, 30, 70, 70))
    return picture


def shown(picture: Image.Image) -> Tensor:
    """ComfyUI's IMAGE of a picture."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(1, picture.height, picture.width, 3) / 255


@pytest.fixture(scope="module")
def loaded(program: Stub) -> Iterator[ModuleType]:
    with program.running(FOLDER) as (module,):
        yield module


@pytest.fixture
def stub(program: Stub) -> Stub:
    program.cancel_after, program.checks, program.emptied = None, 0, 0
    for kept in (program.asked, program.shown, program.saved):
        kept.clear()
    return program


@pytest.fixture
def nodes(loaded: ModuleType, stub: Stub) -> ModuleType:
    return loaded


@pytest.fixture(scope="module")
def model(loaded: ModuleType) -> Any:
    return node(loaded, "LoadPreset", preset="tiny", **LOADED)[0]


def node(nodes: ModuleType, name: str, **given: Any) -> tuple:
    return call(nodes.NODE_CLASS_MAPPINGS[f"UltraPixel{name}"], **given)


def made(nodes: ModuleType, model: Any, **changes: Any) -> tuple:
    return node(nodes, "TextToImage", model=model, **{**TEXTS, **ASKED, **MORE, **changes})


@pytest.fixture(scope="module")
def pipeline() -> UltraPixelPipeline:
    return UltraPixelPipeline.from_preset("tiny", "cpu")


def alone(pipeline: UltraPixelPipeline, prompt: str = PROMPT, **changes: Any) -> Tensor:
    """The picture (H, W, 3) that the pipeline itself makes."""
    return pipeline(prompt, progress=False, **{**ASKED, **changes})[0].pixels.permute(1, 2, 0)


# --- pictures -------------------------------------------------------------------------------------


def test_pictures_are_those_of_the_pipeline(
    nodes: ModuleType, stub: Stub, model: Any, pipeline: UltraPixelPipeline
) -> None:
    images, latent_c, latent_b = made(nodes, model, num_images=2)
    assert images.shape == (2, 128, 128, 3) and images.dtype == torch.float32 and not images.is_inference()
    assert torch.equal(images[0], alone(pipeline)) and torch.equal(images[1], alone(pipeline, seed=6))
    assert latent_c["samples"].shape == (2, 16, 12, 12) and latent_b["samples"].shape == (2, 4, 32, 32)
    assert [value for value, _, _ in stub.shown] == list(range(1, 13)) and stub.shown[0][1] == 12
    ((needed, device),) = stub.asked
    assert needed > 10e6 and device == torch.device("cpu") and stub.emptied == 1


def test_latents_are_decoded_as_they_were(nodes: ModuleType, model: Any) -> None:
    images, latent_c, latent_b = made(nodes, model)
    given = {"model": model, "prompt": PROMPT, "width": 0, "height": 0, "seed": 5, "steps_b": 1, "cfg_b": 1.1}
    again, again_b = node(nodes, "Decode", samples=latent_c, **given)
    assert torch.equal(again, images) and torch.equal(again_b["samples"], latent_b["samples"])
    (last, _) = node(nodes, "Decode", samples=latent_b, **given)
    assert torch.allclose(last, images, atol=1e-5)  # divided and multiplied by the scale of ComfyUI's latents
    with pytest.raises(ValueError, match="16 channels and one of Stage B 4, not 3"):
        node(nodes, "Decode", samples={"samples": torch.zeros(1, 3, 8, 8)}, **given)


def test_stage_b_latents_have_the_scale_of_comfyui(nodes: ModuleType, model: Any) -> None:
    """Its Stage A decodes them without the factor that ours multiplies by."""
    images, _, latent = made(nodes, model)
    with model.held.pipeline.stage_a.on_device() as stage_a, torch.no_grad():
        pixels = stage_a.decode_unscaled(latent["samples"])[0].permute(1, 2, 0)
    assert torch.allclose(pixels.clamp(0, 1), images[0], atol=1e-5)


def test_conditionings_stand_for_prompts(nodes: ModuleType, model: Any) -> None:
    images = made(nodes, model, negative_prompt="a tree")[0]
    (positive,), (negative,) = (node(nodes, "Prompt", model=model, prompt=p) for p in (PROMPT, "a tree"))
    assert positive[0][0].shape[2:] == (128,) and positive[0][1]["pooled_output"].shape == (1, 128)
    given = {"positive": positive, "negative": negative, "prompt": "x", "negative_prompt": "y"}
    assert torch.equal(made(nodes, model, **given)[0], images)
    twice = [[positive[0][0].repeat(1, 2, 1), positive[0][1]]]  # a prompt of two chunks
    assert made(nodes, model, **{**given, "positive": twice})[0].shape == images.shape


def test_parts_of_prompts_are_weighted(nodes: ModuleType, model: Any, pipeline: UltraPixelPipeline) -> None:
    prompt = "a (red:1.4) house by the sea"
    wanted = alone(pipeline, prompt, weighted_prompts=True)
    assert torch.equal(made(nodes, model, prompt=prompt)[0][0], wanted)


@pytest.mark.parametrize(
    ("conditioning", "parts"),
    [
        ([[torch.zeros(1, 5, 128), {}]], "not one of Stable Cascade, 128 wide"),
        ([[torch.zeros(1, 5, 64), {"pooled_output": torch.zeros(1, 64)}]], "not one of Stable Cascade"),
        ([[torch.zeros(1, 5, 128), {"pooled_output": torch.zeros(1, 128)}]] * 2, "has 2 parts"),
    ],
)
def test_other_conditionings_are_refused(nodes: ModuleType, model: Any, conditioning, parts: str) -> None:
    with pytest.raises(ValueError, match=parts):
        made(nodes, model, positive=conditioning)


def test_a_latent_guides_in_place_of_the_low_pass(nodes: ModuleType, stub: Stub, model: Any) -> None:
    guide = {"samples": torch.randn(1, 16, 12, 12)}
    images = made(nodes, model, guide=guide, num_images=2)[0]
    assert stub.shown[-1][:2] == (8, 8) and not torch.equal(images[0], made(nodes, model)[0][0])
    with pytest.raises(ValueError, match="1 or 2 latents of Stage C .* not 3 x 16 x 12 x 12"):
        made(nodes, model, guide={"samples": torch.zeros(3, 16, 12, 12)}, num_images=2)


def test_sides_of_0_are_the_presets(nodes: ModuleType, model: Any) -> None:
    assert model.size(0, 0) == (512, 512) and model.size(128, 0) == (128, 512)


# --- the program's own hooks ----------------------------------------------------------------------


@pytest.mark.parametrize("calls", [0, 2, 4])
def test_cancelling_ends_a_run_at_the_next_step(
    nodes: ModuleType, stub: Stub, model: Any, calls: int, pipeline: UltraPixelPipeline
) -> None:
    stub.cancel_after = calls
    with pytest.raises(InterruptProcessingException):
        made(nodes, model)
    assert len(stub.shown) == calls and stub.emptied == 1
    stub.cancel_after = None
    assert torch.equal(made(nodes, model)[0][0], alone(pipeline))


def test_previews_are_pictures(nodes: ModuleType, stub: Stub, model: Any) -> None:
    made(nodes, model, preview=True)
    previews = [preview for _, _, preview in stub.shown]
    assert [preview is not None for preview in previews] == [True, True, False, True, False, False]
    format, picture, side = previews[0]
    assert format == "JPEG" and isinstance(picture, Image.Image) and side == 512


@pytest.mark.parametrize("offload", ["none", "block"])
def test_other_ways_to_offload(nodes: ModuleType, model: Any, offload: str) -> None:
    other = node(nodes, "LoadPreset", preset="tiny", **{**LOADED, "offload": offload})[0]
    assert torch.equal(made(nodes, other)[0], made(nodes, model)[0])


# --- LoRAs, control, files ------------------------------------------------------------------------


def test_a_lora_is_of_its_own_model_alone(
    nodes: ModuleType, stub: Stub, model: Any, pipeline: UltraPixelPipeline
) -> None:
    changed, tokens = node(nodes, "Lora", model=model, lora=LORA, strength=0.5)
    pipeline.set_loras(f"{stub.root}/models/loras/{LORA}:0.5")
    wanted = alone(pipeline)
    pipeline.set_loras(None)
    assert tokens == "[stripes]" and torch.equal(made(nodes, changed)[0][0], wanted)
    assert torch.equal(made(nodes, model)[0][0], alone(pipeline)) and not torch.equal(wanted, alone(pipeline))


def test_control_is_of_its_own_model_alone(
    nodes: ModuleType, stub: Stub, model: Any, pipeline: UltraPixelPipeline
) -> None:
    pixels = shown(draw())
    given = {"control": "canny", "controlnet": CONTROLNET, "strength": 1.0, "ready": False}
    (changed,) = node(nodes, "Control", model=model, image=pixels, **given)
    file = stub.root / "models" / "controlnet" / CONTROLNET
    pipeline.set_control("canny", draw(), weight=1.0, file=file)
    wanted = alone(pipeline, shift=1.0)
    pipeline.set_control(None)
    assert torch.equal(made(nodes, changed)[0][0], wanted)
    assert torch.equal(made(nodes, model)[0][0], alone(pipeline)) and not torch.equal(wanted, alone(pipeline))
    with pytest.raises(ValueError, match="a mask is for the control inpainting, not for canny"):
        node(nodes, "Control", model=model, image=pixels, mask=torch.zeros(1, 96, 96), **given)


def test_what_lies_around_a_hole_stays(nodes: ModuleType, model: Any) -> None:
    pixels, hole = shown(draw().resize((128, 128))), torch.zeros(1, 128, 128)
    hole[:, 40:88, 40:88] = 1
    given = {"control": "inpainting", "controlnet": "the preset's", "strength": 1.0, "ready": False}
    (changed,) = node(nodes, "Control", model=model, image=pixels, mask=hole, **given)
    images = made(nodes, changed, width=0, height=0)[0]
    outside = hole[0] == 0
    assert torch.allclose(images[0][outside], pixels[0][outside], atol=1 / 255)
    assert not torch.allclose(images[0][~outside], pixels[0][~outside], atol=0.1)


def test_an_image_is_made_large(nodes: ModuleType, model: Any, pipeline: UltraPixelPipeline) -> None:
    few = {key: value for key, value in ASKED.items() if key not in ("height", "width")}
    given = {**TEXTS, **few, **MORE, "strength": 0.7, "match_colours": True, "width": 0, "height": 0}
    given.pop("num_images")
    image = shown(draw())
    images = node(nodes, "Upscale", model=model, image=image, factor=2.0, **given)[0]
    wanted = pipeline.upscale(draw(), factor=2.0, prompt=PROMPT, strength=0.7, progress=False, **few)[0]
    assert images.shape == (1, 192, 192, 3) and torch.equal(images[0], wanted.pixels.permute(1, 2, 0))
    with pytest.raises(ValueError, match="a factor and a height or width do not go together"):
        node(nodes, "Upscale", model=model, image=image, factor=2.0, **{**given, "width": 256})


class Clip:
    """ComfyUI's text encoder; here the embedded family's own."""

    def __init__(self, pipeline: UltraPixelPipeline) -> None:
        self._pipeline = pipeline

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens(self, tokens: str, return_pooled: bool) -> tuple[Tensor, Tensor]:
        assert return_pooled
        condition = self._pipeline.encode_text([Job(tokens, 0, 0, 0)])[tokens]
        return condition.tokens, condition.pooled[:, 0]


FILES = {"stage_c": "stage_c", "guidance": "ultrapixel_t2i", "stage_b": "stage_b", "stage_a": "stage_a"}


def test_files_of_comfyuis_own_folders(nodes: ModuleType, model: Any, pipeline: UltraPixelPipeline) -> None:
    files = {what: f"{name}.safetensors" for what, name in FILES.items()}
    clip = Clip(pipeline)
    (own,) = node(nodes, "LoadFiles", clip=clip, previewer="previewer.safetensors", **files, **LOADED)
    assert torch.equal(made(nodes, own)[0][0], alone(pipeline))
    (bare,) = node(nodes, "LoadFiles", clip=clip, **{**files, "guidance": "none"}, **LOADED)
    assert not torch.equal(made(nodes, bare, preview=True)[0][0], alone(pipeline))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"stage_c": "stage_b.safetensors"},
            "no file of Stage C in a version that is known here: 3.6B, 1B",
        ),
        ({"stage_a": "gone.safetensors"}, "gone.safetensors is not in ComfyUI's models/vae"),
    ],
)
def test_wrong_files_are_told(nodes: ModuleType, changes: dict[str, str], parts: str) -> None:
    files = {what: f"{name}.safetensors" for what, name in FILES.items()} | changes
    with pytest.raises(ValueError, match=parts):
        node(nodes, "LoadFiles", clip=None, **files, **LOADED)


def test_missing_weights_are_told_at_loading(nodes: ModuleType, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match="stage_c_bf16.safetensors"):
        node(nodes, "LoadPreset", preset="small-big", models=str(tmp_path), **LOADED)


# --- workflows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_fit_the_nodes(nodes: ModuleType, name: str) -> None:
    for step in WORKFLOWS[name].values():
        if step["class_type"].startswith("UltraPixel"):
            kinds = nodes.NODE_CLASS_MAPPINGS[step["class_type"]].INPUT_TYPES()
            known = {**kinds["required"], **kinds.get("optional", {})}
            assert kinds["required"].keys() <= step["inputs"].keys() <= known.keys()
            for key, value in step["inputs"].items():
                if isinstance(known[key][0], list) and not str(value).endswith(".safetensors"):
                    assert value in known[key][0], key


@pytest.mark.parametrize("name", ["lora", "control_edges", "upscale", "decode"])
def test_workflows_run(nodes: ModuleType, stub: Stub, name: str) -> None:
    workflow = json.loads(json.dumps(WORKFLOWS[name]))
    for step in workflow.values():
        own = step["inputs"]
        small = {"steps": 1, "steps_b": 1, **({} if "factor" in own else {"width": 128, "height": 128})}
        own.update({key: value for key, value in small.items() if key in own})
    stub.execute(nodes, workflow)
    side = 192 if name == "upscale" else 128
    assert {tuple(image.shape) for image in stub.saved} == {(side, side, 3)}


# --- beside other nodes ---------------------------------------------------------------------------

BESIDE = """
import importlib, json, os, sys, warnings
from pathlib import Path
from PIL import Image, PngImagePlugin
import torch
from comfyui_stub import Stub

root, folder = Path(sys.argv[1]), Path(sys.argv[2])
theirs = {name: importlib.import_module(name) for name in ("core", "core.memory", "gdf", "modules")}

def process():
    limits = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY
    return limits, dict(os.environ), list(warnings.filters), list(sys.path)

before, stub = process(), Stub(root)
with stub.running(folder) as (nodes,):
    assert process() == before
    workflow = json.loads((folder / "workflows" / "text_to_image.json").read_text())
    workflow["2"]["inputs"].update(width=128, height=128, steps=1, steps_b=1)
    stub.execute(nodes, workflow)
assert [tuple(image.shape) for image in stub.saved] == [(128, 128, 3)]
assert {n: m for n, m in sys.modules.items() if n.split(".")[0] in ("core", "gdf", "modules")} == theirs
assert importlib.import_module("core.late").OWNER == "theirs"
print("beside each other")
"""


def test_beside_nodes_with_packages_of_our_names(tmp_path: Path) -> None:
    for name in ("core/__init__", "core/memory", "core/late", "gdf/__init__", "modules"):
        path = tmp_path / "foreign" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("OWNER = 'theirs'", "utf-8")
    paths = os.pathsep.join(map(str, (tmp_path / "foreign", ROOT / "tests")))
    command = [sys.executable, "-c", BESIDE, str(tmp_path), str(FOLDER)]
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.stdout.strip() == "beside each other", done.stderr
