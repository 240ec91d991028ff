"""The nodes: what each takes and gives, in the first version of ComfyUI's protocol, which all can read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from core.config.control_types import CONTROL_TYPES
from core.config.offloading import OFFLOAD_NAMES, STAGE
from core.config.presets import DEFAULT, PRESETS
from core.config.schema import ControlConfig, stage_c_sizes
from core.config.settings import Job, Settings
from core.pictures.images import to_image
from core.pipeline.given import original
from core.pipeline.passes import B_LATENT, C_LATENT
from core.pipeline.resolution import STAGE_A_COMPRESSION
from core.pipeline.sources import Source
from core.pipeline.steering import given_source, with_suffix
from core.pipeline.upscaling import Upscaling, without_idle_cfg
from core.weights.checkpoint import check_files
from core.weights.lora.merging import load_loras, uncalled
from gdf.names import SAMPLER_NAMES
from modules.stage_a import LATENT_SCALE

from .files import names_in, path_in, stage_b_config, stage_c_config
from .model import READ, Controlled, Model, condition_of, conditioning_of
from .running import Run, Texts, as_elsewhere

CATEGORY = "UltraPixel"
MODEL, OWN = "ULTRAPIXEL", "the preset's"
DTYPES = {"as configured": None, "bfloat16": "bfloat16", "float32": "float32"}
MAX_SEED = 2**64 - 1
LOG = logging.getLogger("ultrapixel")

Inputs = dict[str, dict[str, tuple]]


# --- inputs that several nodes have ---------------------------------------------------------------


def _whole(default: int, least: int, most: int, tip: str, **more: Any) -> tuple:
    return "INT", {"default": default, "min": least, "max": most, "tooltip": tip, **more}


def _number(default: float, least: float, most: float, step: float, tip: str) -> tuple:
    return "FLOAT", {"default": default, "min": least, "max": most, "step": step, "tooltip": tip}


def _choice(names: Sequence[str], tip: str, default: str | None = None) -> tuple:
    return list(names), {"tooltip": tip, **({} if default is None else {"default": default})}


def _text(tip: str) -> tuple:
    return "STRING", {"multiline": True, "default": "", "tooltip": tip}


def _flag(default: bool, tip: str) -> tuple:
    return "BOOLEAN", {"default": default, "tooltip": tip}


LOADED = {
    "dtype": _choice(DTYPES, "number format of the networks"),
    "offload": _choice(
        OFFLOAD_NAMES, "stage: each stage visits the device alone. none: all stay there, which is faster, "
        "but ComfyUI does not know of their memory. block: the least memory", STAGE,
    ),
    "int8": _flag(False, "weights as 8-bit integers: half the memory, and a little worse pictures"),
}  # fmt: skip
SEED = _whole(0, 0, MAX_SEED, "of the first picture; the i-th has seed + i", control_after_generate=True)
SIDE = "pixels; 0: the preset's size, or that of the picture whose hole is filled"
PREVIEW = _flag(True, "show small pictures of the latent meanwhile")
STAGE_C_SETTINGS = {
    "steps": _whole(Settings.steps, 1, 1000, "of each of Stage C's two passes"),
    "cfg": _number(Settings.cfg, 0, 100, 0.1, "how strictly the prompt is followed; published: 4, tiny: 2"),
    "shift": _number(Settings.shift, 0.01, 100, 0.1, "of the noise schedule; published: 1, with a control 2"),
    "sampler": _choice(SAMPLER_NAMES, "of Stage C", Settings.sampler),
}
STAGE_B_SETTINGS = {
    "steps_b": _whole(Settings.steps_b, 1, 1000, "of Stage B"),
    "cfg_b": _number(Settings.cfg_b, 0, 100, 0.1, "of Stage B"),
}


def _shown(pictures: Sequence[Tensor]) -> Tensor:
    """ComfyUI's IMAGE (B, H, W, 3) of pictures (3, H, W)."""
    return torch.stack(list(pictures)).permute(0, 2, 3, 1).contiguous()


def _latents(samples: Sequence[Tensor], scale: float = 1.0) -> dict[str, Tensor]:
    return {"samples": torch.cat(list(samples)).float() * scale}


def _each(latent: dict[str, Tensor]) -> list[Tensor]:
    """The samples of ComfyUI's LATENT, one by one, in memory of our own."""
    return [sample[None].float().clone() for sample in latent["samples"]]


def _texts(
    model: Model, prompt: str, negative_prompt: str, positive: list | None, negative: list | None
) -> Texts:
    width = stage_c_sizes(model.held.pipeline.config_c).c_clip_text
    given = (None if part is None else condition_of(part, width) for part in (positive, negative))
    return Texts(prompt, negative_prompt, *given)


def _tell_doubts(model: Model, texts: Texts, jobs: Sequence[Job], settings: Settings) -> None:
    """Log what in the prompts may not do what it is meant to do; another text encoder has its own ways."""
    if model.clip is None and texts.positive is None:
        called = uncalled(model.loras, [texts.prompt])
        for sentence in [*model.held.pipeline.doubts(jobs[:1], settings), *called]:
            LOG.warning("%s", sentence)


# --- models ---------------------------------------------------------------------------------------


class LoadPreset:
    DESCRIPTION = "The models of a preset. tiny is in the repository; the others' weights are fetched."
    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        folder = {"default": "", "tooltip": "where the weights lie; empty: in models/ of the repository"}
        presets = _choice(PRESETS, "which models", next(iter(PRESETS)))
        return {"required": {"preset": presets, **LOADED}, "optional": {"models": ("STRING", folder)}}

    @as_elsewhere
    def load(self, preset: str, dtype: str, offload: str, int8: bool, models: str = "") -> tuple[Model]:
        return (
            Model.of_preset(preset, models or None, dtype=DTYPES[dtype], offload=offload, int8=int8),
        )  # fmt: skip


class LoadFiles:
    DESCRIPTION = "Models from ComfyUI's own folders, with ComfyUI's text encoder of the type stable_cascade."
    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        networks, decoders = names_in("diffusion_models"), names_in("vae")
        optional = names_in("vae", none=True)
        return {
            "required": {
                "stage_c": _choice(networks, "Stage C"),
                "guidance": _choice(names_in("diffusion_models", none=True), "UltraPixel's own weights"),
                "stage_b": _choice(networks, "Stage B"),
                "stage_a": _choice(decoders, "Stage A"),
                "clip": ("CLIP", {"tooltip": "of CLIPLoader with the type stable_cascade"}),
                **LOADED,
            },
            "optional": {
                "previewer": _choice(optional, "for previews of the latent"),
                "encoder": _choice(optional, "effnet_encoder: for Upscale, and the control super_resolution"),
            },
        }  # fmt: skip

    @as_elsewhere
    def load(
        self,
        stage_c: str,
        guidance: str,
        stage_b: str,
        stage_a: str,
        clip: Any,
        dtype: str,
        offload: str,
        int8: bool,
        previewer: str = "none",
        encoder: str = "none",
    ) -> tuple[Model]:
        c, b, own = (path_in("diffusion_models", name) for name in (stage_c, stage_b, guidance))
        a, small, coded = (path_in("vae", name) for name in (stage_a, previewer, encoder))
        configs = stage_c_config(c, coded, small), stage_b_config(b, a)
        if DTYPES[dtype] is not None:
            configs = tuple(replace(config, dtype=DTYPES[dtype]) for config in configs)
        return (Model.of_files(*configs, own, clip, offload=offload, int8=int8),)


class AddLora:
    DESCRIPTION = "The model with a LoRA; several follow one another. `tokens` are what calls it in a prompt."
    CATEGORY, FUNCTION = CATEGORY, "add"
    RETURN_TYPES, RETURN_NAMES = (MODEL, "STRING"), ("model", "tokens")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        files = _choice(names_in("loras"), "of Stage C, in any of the layouts that are known")
        strength = _number(1.0, -10, 10, 0.05, "how much of it is added")
        return {"required": {"model": (MODEL,), "lora": files, "strength": strength}}

    @as_elsewhere
    def add(self, model: Model, lora: str, strength: float) -> tuple[Model, str]:
        path = path_in("loras", lora)
        (read,) = load_loras([f"{path}:{strength!r}"], model.held.pipeline.config_c)
        return model.with_lora(read), " ".join(read.tokens)


class AddControl:
    DESCRIPTION = "The model under the control of a picture: its edges, a hole in it, or itself made large."
    CATEGORY, FUNCTION = CATEGORY, "add"
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        files = [OWN, *names_in("controlnet")]
        return {
            "required": {
                "model": (MODEL,), "image": ("IMAGE",),
                "control": _choice(CONTROL_TYPES, "what the ControlNet sees"),
                "controlnet": _choice(files, "its weights"),
                "strength": _number(
                    DEFAULT.control_weight, -10, 10, 0.05, "of the ControlNet; published: 0.7, tiny: 1.3"
                ),
                "ready": _flag(False, "the image shows the edges already, white on black"),
            },
            "optional": {"mask": ("MASK", {"tooltip": "what inpainting fills"})},
        }  # fmt: skip

    @as_elsewhere
    def add(
        self,
        model: Model,
        image: Tensor,
        control: str,
        controlnet: str,
        strength: float,
        ready: bool,
        mask: Tensor | None = None,
    ) -> tuple[Model]:
        own = model.held.pipeline.preset.control_file.format(control=control)
        path = own if controlnet == OWN else path_in("controlnet", controlnet)
        hole = None if mask is None else to_image(mask.reshape(-1, *mask.shape[-2:])[:1].expand(3, -1, -1))
        source = given_source(control, _pictures(image)[0], hole, ready)
        config = ControlConfig(controlnet_filter=control, controlnet_checkpoint_path=path)
        return (replace(model, control=Controlled(config, source, strength, ready)),)


def _pictures(images: Tensor) -> list[Image.Image]:
    """ComfyUI's images (B, H, W, 3 or 4) as pictures, without their alpha."""
    return [to_image(image[..., :3].permute(2, 0, 1)) for image in images]


# --- pictures -------------------------------------------------------------------------------------


class EncodePrompt:
    DESCRIPTION = "A prompt's conditioning, by the model's text encoder, with the tokens of its LoRAs."
    CATEGORY, FUNCTION = CATEGORY, "encode"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"model": (MODEL,), "prompt": _text("what the picture shows")}}

    @as_elsewhere
    def encode(self, model: Model, prompt: str) -> tuple[list]:
        model.ready()
        return (conditioning_of(model.encode([prompt])[prompt]),)


class TextToImage:
    DESCRIPTION = "Pictures of a prompt, or of conditionings, and the latents of their Stages C and B."
    CATEGORY, FUNCTION = CATEGORY, "make"
    RETURN_TYPES = ("IMAGE", "LATENT", "LATENT")
    RETURN_NAMES = ("images", "stage_c", "stage_b")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {
                "model": (MODEL,), "prompt": _text("what the picture shows"),
                "negative_prompt": _text("what it should not show"),
                "width": _whole(0, 0, 16384, SIDE, step=8), "height": _whole(0, 0, 16384, SIDE, step=8),
                "seed": SEED, "num_images": _whole(1, 1, 64, "how many"),
                **STAGE_C_SETTINGS, **STAGE_B_SETTINGS, "preview": PREVIEW,
            },
            "optional": {
                "positive": ("CONDITIONING", {"tooltip": "instead of the prompt"}),
                "negative": ("CONDITIONING", {"tooltip": "instead of the negative prompt"}),
                "guide": ("LATENT", {"tooltip": "of Stage C, small: stands for the low-resolution pass"}),
            },
        }  # fmt: skip

    @as_elsewhere
    def make(
        self,
        model: Model,
        prompt: str,
        negative_prompt: str,
        width: int,
        height: int,
        seed: int,
        num_images: int,
        preview: bool,
        positive: list | None = None,
        negative: list | None = None,
        guide: dict[str, Tensor] | None = None,
        **settings: Any,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        texts = _texts(model, prompt, negative_prompt, positive, negative)
        run = Run(model, texts, Settings(**settings, **READ), preview)
        jobs = texts.jobs(*model.size(height, width), seed, num_images)
        _tell_doubts(model, texts, jobs, run.settings)
        if model.control is not None and positive is None:
            jobs = [with_suffix(job) for job in jobs]
        made = run.whole(jobs, [] if guide is None else _guides(guide, num_images))
        return _shown(made.pictures), _latents(made.stage_c), _latents(made.stage_b, LATENT_SCALE)


def _guides(guide: dict[str, Tensor], count: int) -> list[Source]:
    """A source for each picture, of one latent for all or of as many; ValueError for what is none."""
    latents = _each(guide)
    if len(latents) not in (1, count) or latents[0].shape[1] != C_LATENT:
        shape = " x ".join(map(str, guide["samples"].shape))
        raise ValueError(
            f"the guide must be 1 or {count} latents of Stage C ({C_LATENT} channels), not {shape}"
        )
    return [Source(guide=latent) for latent in (latents * count)[:count]]


class Decode:
    DESCRIPTION = "The pictures of latents: Stage C's go through Stages B and A, Stage B's through Stage A."
    CATEGORY, FUNCTION = CATEGORY, "decode"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "LATENT"), ("images", "stage_b")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        side = "pixels; 0: as the latent has it"
        return {
            "required": {
                "model": (MODEL,), "samples": ("LATENT",), "prompt": _text("what the picture shows"),
                "width": _whole(0, 0, 16384, side, step=8), "height": _whole(0, 0, 16384, side, step=8),
                "seed": SEED, **STAGE_B_SETTINGS,
            },
            "optional": {"positive": ("CONDITIONING", {"tooltip": "instead of the prompt"})},
        }  # fmt: skip

    @as_elsewhere
    def decode(
        self,
        model: Model,
        samples: dict[str, Tensor],
        prompt: str,
        width: int,
        height: int,
        seed: int,
        positive: list | None = None,
        **settings: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        latents = _each(samples)
        channels, rows, columns = latents[0].shape[1:]
        if channels not in (C_LATENT, B_LATENT):
            raise ValueError(
                f"a latent of Stage C has {C_LATENT} channels and one of Stage B {B_LATENT}, not {channels}"
            )
        geometry = model.held.pipeline.config_c.geometry
        cell = geometry.compression if channels == C_LATENT else STAGE_A_COMPRESSION
        texts = _texts(model, prompt, "", positive, None)
        run = Run(model, texts, Settings(**settings, **READ))
        jobs = texts.jobs(height or int(rows * cell), width or int(columns * cell), seed, len(latents))
        if channels == C_LATENT:
            made = run.from_stage_c(jobs, latents)
        else:
            made = run.from_stage_b(jobs, [latent / LATENT_SCALE for latent in latents])
        return _shown(made.pictures), _latents(made.stage_b, LATENT_SCALE)


class Upscale:
    DESCRIPTION = "Images made large, each as a whole: itself at low resolution guides the high resolution."
    CATEGORY, FUNCTION = CATEGORY, "upscale"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "LATENT"), ("images", "stage_c")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        side = "pixels, where factor is 0; an image keeps its shape, and lies within both"
        return {
            "required": {
                "model": (MODEL,), "image": ("IMAGE",),
                "factor": _number(2.0, 0, 64, 0.25, "so many times as high; 0: as width and height say"),
                "width": _whole(0, 0, 16384, side, step=8), "height": _whole(0, 0, 16384, side, step=8),
                "prompt": _text("what the images show"),
                "negative_prompt": _text("what they should not show"),
                "strength": _number(1.0, 0.05, 1, 0.05, "how much is made anew"),
                "match_colours": _flag(True, "keep the colours of the image"),
                "seed": SEED, **STAGE_C_SETTINGS, **STAGE_B_SETTINGS, "preview": PREVIEW,
            }
        }  # fmt: skip

    @as_elsewhere
    def upscale(
        self,
        model: Model,
        image: Tensor,
        factor: float,
        width: int,
        height: int,
        prompt: str,
        negative_prompt: str,
        strength: float,
        match_colours: bool,
        seed: int,
        preview: bool,
        **settings: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        pipeline, texts = model.ready(), Texts(prompt, negative_prompt)
        check_files(pipeline.upscaling_files())
        given = [original("image", picture) for picture in _pictures(image)]
        box = pipeline.preset.height, pipeline.preset.width
        how = Upscaling(box, height or None, width or None, factor or None, strength, match_colours)
        jobs = texts.jobs(*how.size(given[0].size), seed, len(given))
        how_made = without_idle_cfg(Settings(**settings, **READ), jobs)
        _tell_doubts(model, texts, jobs, how_made)
        made = Run(model, texts, how_made, preview).whole(jobs, pipeline.upscaling_sources(jobs, given, how))
        return _shown(made.pictures), _latents(made.stage_c)


NODES = {
    "UltraPixelLoadPreset": (LoadPreset, "Load a preset"),
    "UltraPixelLoadFiles": (LoadFiles, "Load files"),
    "UltraPixelLora": (AddLora, "LoRA"),
    "UltraPixelControl": (AddControl, "Control"),
    "UltraPixelPrompt": (EncodePrompt, "Prompt"),
    "UltraPixelTextToImage": (TextToImage, "Text to image"),
    "UltraPixelUpscale": (Upscale, "Upscale"),
    "UltraPixelDecode": (Decode, "Decode"),
}
NODE_CLASS_MAPPINGS = {name: node for name, (node, _) in NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name: f"UltraPixel: {label}" for name, (_, label) in NODES.items()}
