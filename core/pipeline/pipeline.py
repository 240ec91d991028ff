"""The way of a prompt to a picture: load what the job needs, condition, Stage C twice, Stage B, Stage A."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from threading import RLock
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from tqdm import auto

from core.config.arguments import (
    first_seed,
    number,
    number_format,
    picture_count,
    prompts_of,
    text,
    whole_number,
)
from core.config.given_control import GivenControl, check_hr
from core.config.offloading import AUTO
from core.config.presets import DEFAULT, PRESETS, models_folder, of_project, preset_named, with_models
from core.config.schema import ControlConfig, StageBConfig, StageCConfig, stage_c_sizes
from core.config.settings import Job, Settings, changed
from core.config.wildcards import Wildcards
from core.config.yaml import load_stage_b, load_stage_c
from core.paths import at_home, located
from core.pipeline.batches import at_once, parts
from core.pipeline.control import Control, ControlNetFile
from core.pipeline.controls import Controls, set_given, set_nets, several
from core.pipeline.given import Given, Original, original
from core.pipeline.latents import Latents, family_of
from core.pipeline.made import Picture, Pictures, Record, WeightHashes
from core.pipeline.networks import DTYPES, load_encoder
from core.pipeline.offload import Placement
from core.pipeline.origins import Origin, embedding, origin
from core.pipeline.progress import Observer, ProgressBars, Stopped, Together, harmless
from core.pipeline.prompts import doubts, unknown
from core.pipeline.resolution import low_picture, plan_for
from core.pipeline.sources import Source
from core.pipeline.stages import Stages
from core.pipeline.steering import CONTROLLED, SUFFIX, with_suffix
from core.pipeline.upscaling import Upscaling, without_idle_cfg
from core.weights.checkpoint import check_files
from core.weights.clip import absent_text_files, find_text_encoder, weights_of_text_encoder
from core.weights.image_encoder import CLIP, PictureEncoder, load_image_encoder
from core.weights.lora.merging import WeightedLora, check_loras, load_loras, lora_files, uncalled
from modules.effnet import EfficientNetEncoder
from modules.operators import try_ahead

NO_FLAGS: Mapping[str, Any] = MappingProxyType({})


T = TypeVar("T")
C = TypeVar("C", StageCConfig, StageBConfig)


class UltraPixelPipeline(Stages):
    """Text to image: `UltraPixelPipeline.from_preset("tiny")("a red house by the sea", seed=1)[0].image`.

    Stages are loaded at their first use. `offload` says where they rest: all on the device (none, or
    `resident`), there one at a time (stage), or block by block (block); auto chooses by what is free. Where
    the device's memory is full, the run goes on with the next smaller of these. With `int8` the large
    blocks of Stages C and B rest as 8-bit integers: half the memory, and a little worse pictures.
    """

    def __init__(
        self,
        config_c: StageCConfig,
        config_b: StageBConfig,
        guidance_path: str | Path | None,
        device: torch.device | str | None = None,
        resident: bool = False,
        allow_download: bool = False,
        offload: str = AUTO,
        int8: bool = False,
    ) -> None:
        super().__init__(config_c, config_b, guidance_path, device, resident, allow_download, offload, int8)
        self.preset = DEFAULT  # of what a call leaves open
        self.flags: dict[str, Any] = {}  # of the scripts, which tell the models
        self._hashes: WeightHashes | None = None
        self.rescued = Pictures()  # of a call that an error or Ctrl-C ended: what was done by then
        self._turn = RLock()  # calls of several threads take turns, as weights move in one
        self.image_encoder = config_c.clip_image_path or CLIP  # of image prompts
        self._image_encoder: PictureEncoder | None = None
        self.set_origin(None)

    @classmethod
    def from_config(
        cls,
        config_c: str | Path,
        config_b: str | Path,
        pretrained_path: str | Path | None,
        device: torch.device | str | None = None,
        dtype: str | None = None,
        resident: bool = False,
        allow_download: bool = False,
        offload: str = AUTO,
        int8: bool = False,
    ) -> UltraPixelPipeline:
        """The pipeline of two configuration files and a file of guidance weights (None: without guidance).

        `device` None is the GPU where there is one, else the CPU. Nothing is loaded before it is used.
        """
        guidance_path = None if pretrained_path is None else located(str(pretrained_path))
        overrides = [] if dtype is None else [f"dtype={number_format(dtype)}"]
        loaded = load_stage_c(config_c, overrides), load_stage_b(config_b, overrides)
        pipeline = cls(*loaded, guidance_path, device, resident, allow_download, offload, int8)
        pipeline.flags = _model_flags(config_c, config_b, pretrained_path, dtype, int8)
        return pipeline

    @classmethod
    def from_preset(
        cls,
        name: str,
        device: torch.device | str | None = None,
        models: str | Path | None = None,
        dtype: str | None = None,
        resident: bool = False,
        allow_download: bool = False,
        offload: str = AUTO,
        int8: bool = False,
    ) -> UltraPixelPipeline:
        """The pipeline of a preset (`core.config.PRESETS`), whose size and cfg are the calls' defaults.

        `models` is the folder that stands for models/, where the preset's weights lie, from any working
        directory. The rest is as in `from_config`. ValueError for an unknown name and a missing folder.
        """
        preset = preset_named(name)
        folder = models_folder(models)
        guidance = None if preset.pretrained_path == "none" else with_models(preset.pretrained_path, folder)
        named = preset.pretrained_path if folder is None else guidance
        overrides = [] if dtype is None else [f"dtype={number_format(dtype)}"]
        loaded = (
            load_stage_c(of_project(preset.config_c), overrides),
            load_stage_b(of_project(preset.config_b), overrides),
        )
        pipeline = cls(
            *(_with_models(config, folder) for config in loaded), guidance, device, resident,
            allow_download, offload, int8,
        )  # fmt: skip
        pipeline.preset = replace(preset, control_file=with_models(preset.control_file, folder))
        pipeline.flags = _model_flags(preset.config_c, preset.config_b, named, dtype, int8)
        return pipeline

    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        num_images: int | None = None,
        negative_prompt: str = "",
        settings: Settings | None = None,
        observer: Observer | None = None,
        control: Controls | None = None,
        progress: bool = True,
        num_image: int | None = None,
        wildcards: str | Path | None = None,
        init_image: Given | None = None,
        strength: float | None = None,
        region: Sequence[int] | None = None,
        image_prompt: object = None,
        batch: int = 1,
        **changes: Any,
    ) -> Pictures:
        """Pictures of a prompt, or `num_images` of each of several; the i-th of all has seed `seed + i`.

        What is left open is the preset's. Values of `Settings` may be given by name, as in `steps=10`. Seed
        -1 draws one. With `wildcards`, a folder, prompts are templates (`core.config.wildcards`).
        `init_image` is a picture to go out from, `strength` how much is made anew, `region` (x, y, width,
        height) where; `image_prompt` is as in `core.pipeline.origins.origin`. `batch` pictures are made at
        once, or fewer where memory is full. `progress` shows bars. An observer is told of every step; where
        it returns True, the run ends, and the pictures that are done come back. After an error, or Ctrl-C,
        they lie in `rescued`. TypeError or ValueError names a wrong argument.
        """
        settings = changed(settings, self._default_settings(), changes)
        count = picture_count(num_images, num_image)
        wanted = [p for p in prompts_of(prompt) for _ in range(count)]
        begun = origin(init_image, strength, region, image_prompt)
        if begun is not None:
            height, width = begun.size(height, width)
        size, first = self._size(height, width), first_seed(seed)
        negative = text("negative_prompt", negative_prompt)
        jobs = [Job(p, *size, first + i, negative) for i, p in enumerate(wanted)]
        if wildcards is not None:
            jobs = list(map(Wildcards(wildcards).fill, jobs))
        plan_for(self.config_c, *size, settings.lr_size)  # raises what is wrong with the size
        _check_callable(observer)
        self.check_files(self.encoder_file() if begun is not None and begun.picture is not None else None)
        if self.controls.steerings and control is None:
            jobs = [with_suffix(job) for job in jobs]
            control = self.controls_for(size)
        called = uncalled(
            self._loras.wanted, list(dict.fromkeys(job.prompt.removesuffix(SUFFIX) for job in jobs))
        )
        for sentence in [*self.doubts(jobs, settings), *called]:
            warnings.warn(sentence, stacklevel=2)
        sources = [] if begun is None else [self.source_of(begun, size)] * len(jobs)
        flags = NO_FLAGS if begun is None else begun.flags
        return self.in_groups(jobs, settings, observer, control, progress, sources, flags, at_once(batch))

    def set_origin(self, begun: Origin | None) -> None:
        """Let the jobs of `pictures` that come without sources go out from this; None ends it."""
        self.origin, self._sources = begun, {}

    def own_sources(self, jobs: Sequence[Job]) -> list[Source]:
        """Those of `set_origin`, one for each job."""
        if self.origin is None:
            return []
        for size in dict.fromkeys((job.height, job.width) for job in jobs):
            if size not in self._sources:
                self._sources[size] = self.source_of(self.origin, size)
        return [self._sources[job.height, job.width] for job in jobs]

    def source_of(self, begun: Origin, size: tuple[int, int]) -> Source:
        """What the passes of pictures of a size (height, width) go out from, by what a user named."""
        with self._turn:
            return self._source_of(begun, size)

    def _source_of(self, begun: Origin, size: tuple[int, int]) -> Source:
        begun.size(*size)
        sizes, stage_c = plan_for(self.config_c, *size), stage_c_sizes(self.config_c)
        unit = 2 ** sum(stage_c.switch_level)
        source = Source()
        if begun.picture is not None:
            with self.encoding() as encode:
                source = begun.source(sizes, encode, unit)
        if not begun.prompts:
            return source
        if self._image_encoder is None:
            dtype = DTYPES[self.config_c.dtype]
            self._image_encoder = load_image_encoder(self.image_encoder, dtype, self._allow_download)
        with self._measured("image"):
            image = embedding(begun.prompts, self._image_encoder, stage_c.c_clip_img, self.device)
            self._image_encoder.to(self._placement.home)
        return replace(source, image=image)

    def upscale(
        self,
        image: Given | Sequence[Given],
        height: int | None = None,
        width: int | None = None,
        factor: float | None = None,
        prompt: str = "",
        seed: int = 0,
        negative_prompt: str = "",
        strength: float | None = None,
        match_colours: bool = True,
        settings: Settings | None = None,
        observer: Observer | None = None,
        progress: bool = True,
        **changes: Any,
    ) -> Pictures:
        """A picture, or each of several, as a whole made large, in its shape; the i-th has seed `seed + i`.

        It gets `factor` times its size, or a height, a width, or what lies within both (by default the
        preset's). `prompt` says what it shows. With a `strength` below 1 more of it stays as it is; None is
        the preset's. The rest is as in a call.
        """
        settings = changed(settings, self.preset.settings, changes)
        box = self.preset.height, self.preset.width
        strength = self.preset.upscale_strength if strength is None else number("strength", strength)
        how = Upscaling(box, height, width, factor, strength, match_colours)
        first, texts = first_seed(seed), (text("prompt", prompt), text("negative_prompt", negative_prompt))
        given = [original("image", one) for one in (image if isinstance(image, list | tuple) else [image])]
        jobs = [Job(texts[0], *how.size(one.size), first + i, texts[1]) for i, one in enumerate(given)]
        _check_callable(observer)
        self.check_files(self.upscaling_files())
        sources, settings = self.upscaling_sources(jobs, given, how), without_idle_cfg(settings, jobs)
        return self.in_groups(jobs, settings, observer, None, progress, sources, {"strength": how.strength})

    def upscaling_files(self) -> dict[str, str]:
        """The weight file that upscaling needs besides, by path; ValueError where there is no guidance."""
        if self.guidance is None:
            raise ValueError("a picture is made large by guidance: use a preset or --pretrained_path with it")
        return self.encoder_file()

    def encoder_file(self) -> dict[str, str]:
        """The weight file of the encoder of pictures: what it holds, by path."""
        path = self.config_c.effnet_checkpoint_path
        return {} if path is None else {path: "EfficientNet encoder"}

    def upscaling_sources(
        self, jobs: Sequence[Job], given: Sequence[Original], how: Upscaling
    ) -> list[Source]:
        """What the passes of pictures that are made large go out from."""
        plans = [plan_for(self.config_c, job.height, job.width) for job in jobs]
        with self._turn, self.encoding() as encode:
            return [how.source(one, encode, sizes) for one, sizes in zip(given, plans, strict=True)]

    def doubts(self, jobs: Sequence[Job], settings: Settings) -> list[str]:
        """A sentence for everything in prompts and settings that may not do what it is meant to do."""
        reading = self.reading(settings)
        prompts = [text for job in jobs for text in (job.prompt.removesuffix(SUFFIX), job.negative_prompt)]
        texts = [reading.text(prompt).text for prompt in prompts]
        return [*doubts(jobs, settings), *unknown(texts, reading.names, self.config_c.clip_text_path)]

    def in_groups(
        self,
        jobs: Sequence[Job],
        settings: Settings,
        observer: Observer | None = None,
        control: Controls | None = None,
        progress: bool = True,
        sources: Sequence[Source] = (),
        flags: Mapping[str, Any] = NO_FLAGS,
        batch: int = 1,
    ) -> Pictures:
        """What a call returns; `control` and `source` are those of all jobs."""
        with self._turn:
            self.rescued = made = Pictures()
            largest = max(jobs, key=lambda job: job.height * job.width)
            self.settle_offload(largest.height, largest.width, settings)
            record = self.record(settings, {**self._flags(), **flags})
            with ExitStack() as stack:
                bars = [stack.enter_context(closing(ProgressBars(jobs, auto.tqdm)))] if progress else []
                told = Together([*bars, *([] if observer is None else [observer])])
                for numbers in parts(range(len(jobs)), max(self.group, batch)):
                    group, own = jobs[numbers[0] : numbers[-1] + 1], sources[numbers[0] : numbers[-1] + 1]
                    controls = () if control is None else [control] * len(group)
                    for picture in self.pictures(group, settings, told, controls, own, batch):
                        made.append(replace(picture, record=record))
                    if told.stopped:
                        break
            self.rescued = Pictures()
            return made

    def _default_settings(self) -> Settings:
        return CONTROLLED if self.controls.steerings else self.preset.settings

    def _size(self, height: int | None, width: int | None) -> tuple[int, int]:
        height, width = self.controls.shape(height, width)
        asked = {"height": height, "width": width}
        return tuple(
            getattr(self.preset, side) if value is None else whole_number(side, value)
            for side, value in asked.items()
        )

    def controls_for(self, size: tuple[int, int]) -> tuple[Control, ...]:
        """What the set controls' pictures make of pictures of a size (height, width)."""
        return self.controls.controls(size, self.config_c.geometry, self._encoder)

    def _encoder(self) -> EfficientNetEncoder:
        return load_encoder(self.config_c, "the control super_resolution")

    def record(self, settings: Settings, models: Mapping[str, Any] | None = None) -> Record:
        """How pictures are made now; `models` are values of the scripts' flags, None: this pipeline's."""
        files = self.files()
        hashed = {**files, "text encoder": weights_of_text_encoder(files["text encoder"])}
        self._hashes = WeightHashes(hashed, self._hashes)
        name = Path(files.get("guidance", files["Stage C"])).stem
        return Record(settings, self._flags() if models is None else models, name, self._hashes)

    def _flags(self) -> dict[str, Any]:
        loras = [f"{lora.path}:{lora.weight:g}" for lora in self._loras.wanted]
        return {**self.flags, **({"lora": loras} if loras else {}), **self.controls.flags(alone=not loras)}

    @torch.no_grad()
    def run(
        self,
        jobs: Sequence[Job],
        settings: Settings,
        observer: Observer | None = None,
        controls: Sequence[Controls] = (),
        sources: Sequence[Source] = (),
        batch: int = 1,
    ) -> Pictures:
        """The pictures of `pictures`, once all are made; their files will tell how they were made."""
        with self._turn:
            record = self.record(settings)
            made = self.pictures(jobs, settings, observer, controls, sources, batch)
            return Pictures(replace(picture, record=record) for picture in made)

    @torch.no_grad()
    def pictures(
        self,
        jobs: Sequence[Job],
        settings: Settings,
        observer: Observer | None = None,
        controls: Sequence[Controls] = (),
        sources: Sequence[Source] = (),
        batch: int = 1,
    ) -> Iterator[Picture]:
        """Pictures of the jobs, stage by stage, so that each stage visits the device once.

        Each comes as soon as it is decoded. Where Stage B breaks off, those come that are through it, and
        then the error. An observer that fails ends nothing: it costs a warning, and is not called again.
        Where one returns True, no further step is made, and those come that are through Stage B.
        `controls`, where there are any, are one for each job, for the ControlNet of `set_control` (or
        several, one for each of `set_controls`), and so are `sources`: what the passes begin at, by default
        that of `set_origin`. `batch` neighbours of one size are made at once, or fewer where memory is full.
        """
        self._batch = min(at_once(batch), self._most or batch)
        told, done, sources = observer and harmless(observer), 0, sources or self.own_sources(jobs)
        with suppress(Stopped):
            for own, group in groupby(jobs, lambda job: job.settings or settings):
                alike = list(group)
                part = slice(done, done + len(alike))
                yield from self._pictures(alike, own, told, controls[part], sources[part])
                done = part.stop

    def _pictures(
        self,
        jobs: Sequence[Job],
        settings: Settings,
        observer: Observer | None,
        controls: Sequence[Controls],
        sources: Sequence[Source],
    ) -> Iterator[Picture]:
        region = any(source.part is not None for source in sources)
        check_hr([one for control in controls for one in several(control)], settings.reuse, region)
        plans = [plan_for(self.config_c, job.height, job.width, settings.lr_size) for job in jobs]
        if sources:
            pairs = zip(sources, plans, strict=True)
            plans = [whole if source.part is None else source.part.sizes for source, whole in pairs]
        latents, ends = [source.latent for source in sources], [source.ended for source in sources]
        passes = not latents or any(latent is None for latent in latents)
        for stage in (self.stage_c, self.guidance) if passes else ():
            if stage is not None:
                stage.load_ahead()
        if passes and not self.plain and DTYPES[self.config_c.dtype] == torch.bfloat16:
            try_ahead(self.device, stage_c_sizes(self.config_c).c_hidden)
        texts = self.encode_text(jobs, settings)
        if passes:
            entries, ends = self.run_controlnet(controls), []
            latents = self.run_stage_c(jobs, plans, texts, settings, observer, entries, sources, ends)
        if settings.lr_only:
            plans = [low_picture(sizes, self.config_c.geometry) for sizes in plans]
        decoded, error = _until_error(self.run_stage_b(jobs, plans, texts, latents, settings, observer))
        through = len(decoded)
        told = None if isinstance(error, Stopped) else observer
        pictures = self.run_stage_a(jobs[:through], plans[:through], decoded, settings, told)
        for index, picture in enumerate(pictures if through else ()):
            high = None if settings.lr_only else latents[index]
            kept = Latents(decoded[index], high, ends[index], family_of(self.config_c))
            own = several(controls[index]) if controls else ()
            given = () if settings.lr_only else sources[index : index + 1]
            yield finished(replace(picture, latents=kept), own, given)
        if error is not None:
            raise error

    def set_control(
        self,
        control: ControlConfig | str | None,
        picture: Given | None = None,
        mask: Given | None = None,
        weight: float | None = None,
        file: str | Path | None = None,
        size: int | None = None,
        keep_aspect: bool = False,
        ready: bool = False,
        outpaint: Sequence[int] | None = None,
    ) -> ControlNetFile | None:
        """Let a picture control all calls from now on: by "canny", "inpainting" or "super_resolution".

        The picture is a file, a URL or a PIL picture, and so is `mask`, white where inpainting fills;
        `outpaint` is the room (px, left, top, right, bottom) that it fills around the picture.
        `weight` is the ControlNet's, `file` its weights, `size` (px) and `keep_aspect` are as in
        `core.pipeline.control.edges`; `ready` says that the picture shows edges. None ends it. A
        ControlConfig names only the ControlNet, for jobs that come with a control. What its file tells comes
        back.
        """
        if control is None or isinstance(control, ControlConfig):
            configs = [] if control is None else [control]
            self.controls = set_nets(configs, stage_c_sizes(self.config_c), *self._for_controls())
        else:
            given = GivenControl(
                control, picture, mask, weight, file, size, keep_aspect, ready, outpaint=outpaint
            )
            self.set_controls([given])
        return next(iter(self.controls.files), None)

    def set_controls(self, controls: Sequence[GivenControl | str]) -> tuple[ControlNetFile, ...]:
        """Let several pictures control all calls from now on; what their ControlNets add to Stage C adds up.

        A control is a `GivenControl`, or text, KIND:PICTURE[:WEIGHT[:START:END]]. An empty list ends it.
        What the ControlNets' files tell comes back; errors are those of `set_control`.
        """
        sizes = stage_c_sizes(self.config_c)
        self.controls = set_given(controls, self.preset, sizes, *self._for_controls())
        return self.controls.files

    def _for_controls(self) -> tuple[torch.dtype, Placement]:
        return DTYPES[self.config_c.dtype], self._placement

    def set_loras(self, loras: str | Path | Sequence[str | Path | WeightedLora] | None) -> None:
        """Use these LoRAs and no others from now on: merged into the weights before their next use.

        A LoRA is its file, as in "cat.safetensors", or with how much of it is added, "cat.safetensors:0.8".
        None, or an empty list, ends it.
        Those of before are undone exactly. ValueError if one is for another size, or two bring one token.
        """
        given = [loras] if isinstance(loras, str | Path | WeightedLora) else list(loras or ())
        wanted = tuple(self._lora(lora) for lora in given)
        check_loras(wanted, self.config_c)
        if wanted == self._loras.wanted:  # of the same files as they were read: what is merged stays
            return
        if self._int8:  # nothing is left that could be undone
            self.stage_c.forget()
            self._loras.forget_stage_c()
        self._loras.wanted = wanted

    def _lora(self, given: str | Path | WeightedLora) -> WeightedLora:
        if isinstance(given, WeightedLora):
            return given
        if not isinstance(given, str | Path):
            raise TypeError(f"a LoRA is named by its file, as in 'cat.safetensors:0.8', not by {given!r}")
        return load_loras([at_home(str(given))], self.config_c)[0]

    def files(self) -> dict[str, str]:
        """The weight files of the job, by what they hold; the text encoder may be a folder or a hub id."""
        named = {"Stage C": self.config_c.generator_checkpoint_path}
        if self._guidance_path is not None:
            named["guidance"] = str(self._guidance_path)
        named |= lora_files(self._loras.wanted)
        named |= self.controls.named_files()
        named["Stage B"] = self.config_b.generator_checkpoint_path
        named["Stage A"] = self.config_b.stage_a_checkpoint_path
        return {**named, "text encoder": self.config_c.clip_text_path}

    def check_files(self, others: Mapping[str, str] | None = None) -> None:
        """Raise what is wrong with any of the files, before the first of them is loaded.

        All that do not exist are named at once, those of `others` too: what each holds, by path.
        """
        files = {path: what for what, path in self.files().items()} | dict(others or {})
        if self.origin is not None and self.origin.picture is not None:
            files |= self.encoder_file()
        text_encoder = self.config_c.clip_text_path
        del files[text_encoder]
        check_files(files | absent_text_files(text_encoder))
        find_text_encoder(text_encoder, self._allow_download)

    def __repr__(self) -> str:
        named = next((name for name, preset in PRESETS.items() if preset == self.preset), None)
        weights = self.config_c.generator_checkpoint_path
        return f"UltraPixelPipeline({weights}, preset {named}, on {self.device})"


def _until_error(made: Iterator[T]) -> tuple[list[T], Exception | KeyboardInterrupt | None]:
    """All that is made, or what is until an error (out of memory, Ctrl-C) ends it, and that error."""
    finished: list[T] = []
    try:
        for one in made:
            finished.append(one)
    except (Exception, KeyboardInterrupt) as error:
        traceback.clear_frames(error.__traceback__)  # which hold what filled the device's memory
        return finished, error
    return finished, None


def finished(picture: Picture, controls: Sequence[Control], sources: Sequence[Source]) -> Picture:
    """The picture, with what its controls keep, and what its source does to it."""
    steps = [control.kept.around for control in controls if control.kept is not None]
    for step in [*steps, *(source.after for source in sources if source.after is not None)]:
        picture = replace(picture, pixels=step(picture.pixels))
    return picture


def _model_flags(
    config_c: str | Path, config_b: str | Path, guidance: str | Path | None, dtype: str | None, int8: bool
) -> dict[str, Any]:
    """The values of the scripts' flags that tell the models."""
    named = {"config_c": config_c, "config_b": config_b, "pretrained_path": guidance or "none"}
    return {**{flag: str(value) for flag, value in named.items()}, "dtype": dtype, "int8": int8}


def _with_models(config: C, folder: Path | None) -> C:
    """The configuration with the paths below models/ as `with_models` has them."""
    paths = {key: value for key, value in vars(config).items() if key.endswith("_path")}
    return replace(
        config, **{key: with_models(value, folder) for key, value in paths.items() if isinstance(value, str)}
    )


def _check_callable(observer: object) -> None:
    if observer is not None and not callable(observer):
        raise TypeError(f"observer must be a function of the progress, not {observer!r}")
