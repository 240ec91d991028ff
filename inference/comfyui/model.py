"""What goes along the ULTRAPIXEL sockets: a pipeline, and with which LoRAs and control it makes pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from comfy.model_management import get_torch_device

from core.config.schema import ControlConfig, StageBConfig, StageCConfig
from core.config.settings import Job, Settings
from core.config.sizes import Size
from core.pipeline.control import Control, Source
from core.pipeline.networks import load_encoder, load_previewer
from core.pipeline.pipeline import UltraPixelPipeline
from core.pipeline.steering import Steering
from core.weights.checkpoint import check_files
from core.weights.clip import TextCondition
from core.weights.lora.merging import WeightedLora
from modules.previewer import Previewer

READ = {"weighted_prompts": True, "long_prompts": True}  # as everybody's nodes read prompts


@dataclass(frozen=True)
class Controlled:
    """A ControlNet, and the picture that it is to see."""

    config: ControlConfig
    source: Source
    weight: float
    ready: bool


class Held:
    """A pipeline, which the models of several sockets share, with what was set in it last."""

    def __init__(self, pipeline: UltraPixelPipeline) -> None:
        self.pipeline = pipeline
        self._loras: tuple[WeightedLora, ...] = ()
        self._control: ControlConfig | None = None
        self._previewer: Previewer | None = None

    def with_loras(self, loras: tuple[WeightedLora, ...]) -> None:
        """Use these LoRAs and no others from now on."""
        if loras is not self._loras:  # merging them takes seconds
            self.pipeline.set_loras(loras)
            self._loras = loras

    def with_control(self, config: ControlConfig | None) -> None:
        """Use this ControlNet, or none, from now on."""
        if config != self._control:
            self.pipeline.set_control(config)
            self._control = config

    def previewer(self) -> Previewer | None:
        """What makes small pictures of latents; None where no file of it is named, or it is not there."""
        path = self.pipeline.config_c.previewer_checkpoint_path
        if self._previewer is None and path is not None and Path(path).is_file():
            self._previewer = load_previewer(self.pipeline.config_c, self.pipeline.device)
        return self._previewer


@dataclass(frozen=True)
class Model:
    """A pipeline, and how it is used; the nodes of LoRAs and control make changed ones of it."""

    held: Held
    loras: tuple[WeightedLora, ...] = ()
    control: Controlled | None = None
    clip: Any = None  # ComfyUI's text encoder, which stands for the pipeline's own

    @classmethod
    def of_preset(cls, name: str, models: str | None, **options: Any) -> Model:
        """That of a preset, whose weights lie in the folder `models` (None: the project's own models/)."""
        pipeline = UltraPixelPipeline.from_preset(name, get_torch_device(), models, **options)
        return cls(Held(pipeline)).checked()

    @classmethod
    def of_files(
        cls, config_c: StageCConfig, config_b: StageBConfig, guidance: str | None, clip: Any, **options: Any
    ) -> Model:
        """That of two configurations and a file of guidance (None: without)."""
        pipeline = UltraPixelPipeline(config_c, config_b, guidance, get_torch_device(), **options)
        return cls(Held(pipeline), clip=clip).checked()

    def checked(self) -> Model:
        """The same; an error of one sentence says what is wrong with a weight file."""
        pipeline = self.held.pipeline
        if self.clip is None:
            pipeline.check_files()
        else:
            files = {what: path for what, path in pipeline.files().items() if what != "text encoder"}
            check_files({path: what for what, path in files.items()})
        return self

    def ready(self) -> UltraPixelPipeline:
        """The pipeline, with this model's LoRAs and ControlNet set in it."""
        self.held.with_loras(self.loras)
        self.held.with_control(None if self.control is None else self.control.config)
        self.checked()
        return self.held.pipeline

    def with_lora(self, lora: WeightedLora) -> Model:
        """The same with one more LoRA."""
        return replace(self, loras=(*self.loras, lora))

    @property
    def steering(self) -> Steering | None:
        """How the control of a model that is ready steers pictures; None without one."""
        if self.control is None:
            return None
        kind, size = self.control.config.controlnet_filter, self.held.pipeline.controls.files[0].control_size
        return Steering(kind, self.control.source, size, self.control.weight, ready=self.control.ready)

    def size(self, height: int, width: int) -> Size:
        """The asked (height, width); a side of 0 is that of a picture with a hole, or the preset's."""
        self.ready()
        sides = height or None, width or None
        if (steering := self.steering) is not None:
            sides = steering.shape(*sides)
        own = self.held.pipeline.preset
        return sides[0] or own.height, sides[1] or own.width

    def controls(self, jobs: Sequence[Job]) -> list[Control]:
        """What steers pictures of one size; none without a control."""
        if (steering := self.steering) is None:
            return []
        config, shape = self.held.pipeline.config_c, (jobs[0].height, jobs[0].width)
        encoder = partial(load_encoder, config, f"the control {steering.kind}")
        return [steering.control(shape, config.geometry, encoder)] * len(jobs)

    def encode(self, prompts: Sequence[str]) -> dict[str, TextCondition]:
        """The conditions of prompts, and of the empty one, by prompt; parts may be weighted, as elsewhere."""
        if self.clip is None:
            jobs = [Job(prompt, 0, 0, 0) for prompt in (*prompts, "")]
            return self.held.pipeline.encode_text(jobs, Settings(**READ))
        return {prompt: encoded_by(self.clip, prompt) for prompt in dict.fromkeys([*prompts, ""])}


# --- ComfyUI's conditioning -----------------------------------------------------------------------


def encoded_by(clip: Any, prompt: str) -> TextCondition:
    """A prompt's condition by ComfyUI's text encoder."""
    tokens, pooled = clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)
    return TextCondition(tokens.clone(), pooled[:, None].clone())


def condition_of(conditioning: Sequence[Any], width: int) -> TextCondition:
    """The condition in ComfyUI's CONDITIONING; `width` is that of Stage C's text.

    ValueError for one of several parts, and for one of another kind of model.
    """
    if len(conditioning) != 1:
        raise ValueError(
            f"the conditioning has {len(conditioning)} parts, but one is used here: leave out the nodes that "
            "combine several, or limit them to an area"
        )
    tokens, others = conditioning[0]
    pooled = others.get("pooled_output")
    if pooled is None or tokens.shape[-1] != width:
        raise ValueError(
            f"the conditioning is not one of Stable Cascade, {width} wide and with a pooled output: load the "
            "text encoder with the type stable_cascade"
        )
    return TextCondition(tokens[:1].clone(), pooled[:1, None].clone())


def conditioning_of(condition: TextCondition) -> list[Any]:
    """ComfyUI's CONDITIONING with a prompt's condition."""
    return [[condition.tokens.float().cpu(), {"pooled_output": condition.pooled[:, 0].float().cpu()}]]
