"""The way of a prompt to a picture: load what the job needs, condition, Stage C twice, Stage B, Stage A."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from threading import RLock
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
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
from core.config.offloading import AUTO, BLOCK, NONE, offload_named, smaller
from core.config.presets import DEFAULT, PRESETS, models_folder, of_project, preset_named, with_models
from core.config.schema import (
    ControlConfig,
    StageBConfig,
    StageCConfig,
    effnet_sizes,
    guidance_sizes,
    previewer_sizes,
    stage_a_sizes,
    stage_b_sizes,
    stage_c_sizes,
)
from core.config.settings import Job, Settings, changed
from core.config.sizes import GuidanceSizes
from core.config.wildcards import Wildcards
from core.config.yaml import load_stage_b, load_stage_c
from core.devices import device_named
from core.memory import free_memory, peak_host_memory, peak_memory
from core.paths import at_home, located
from core.pipeline.batches import (
    StageCRun,
    Wanted,
    at_once,
    batches,
    neighbours,
    parts,
    stage_b_latents,
)
from core.pipeline.conditioning import Conditions, conditions, of_one_length, stack
from core.pipeline.control import Control, ControlNetFile
from core.pipeline.controls import Controls, SetControls, set_given, set_nets, several
from core.pipeline.entries import Entries
from core.pipeline.estimate import (
    MIN_TILE,
    SHARE,
    StageEstimate,
    best_mode,
    estimate_stages,
    fitting_tile,
    taken,
    weights_on_disk,
)
from core.pipeline.given import Given, Original, original
from core.pipeline.graphs import LowPassGraphs
from core.pipeline.latents import Latents, family_of
from core.pipeline.made import Picture, Pictures, Record, WeightHashes
from core.pipeline.offload import Offloaded, Placement
from core.pipeline.origins import Origin, embedding, origin
from core.pipeline.passes import (
    B_LATENT,
    C_LATENT,
    LowEnd,
    NoiseSource,
    decode_picture,
    needs_unconditional,
    stage_b_pass,
)
from core.pipeline.progress import Observer, Progress, ProgressBars, Stopped, Together, harmless
from core.pipeline.prompts import doubts, unknown
from core.pipeline.resolution import MIN_SIDE, Plan, low_picture, plan_for
from core.pipeline.sources import NOISE_ALONE, Encode, Source, latent_of
from core.pipeline.split import Split
from core.pipeline.steering import CONTROLLED, SUFFIX, with_suffix
from core.pipeline.upscaling import Upscaling, without_idle_cfg
from core.weights.checkpoint import check_files, check_finite, load_module, read_config
from core.weights.clip import (
    TextCondition,
    TextEncoder,
    absent_text_files,
    find_text_encoder,
    weights_of_text_encoder,
)
from core.weights.image_encoder import CLIP, PictureEncoder, load_image_encoder
from core.weights.layouts import guidance_names
from core.weights.lora.merging import LoraMerger, WeightedLora, check_loras, load_loras, lora_files, uncalled
from core.weights.prompting import Reading, encode_prompts
from gdf.targets import target_named
from modules.controlnet import ControlNet
from modules.effnet import EfficientNetEncoder
from modules.guidance import UPSAMPLINGS, Guidance
from modules.operators import of_nvidia, try_ahead
from modules.previewer import Previewer
from modules.stage_a import MAX_TILE, StageA
from modules.stage_b import StageB
from modules.stage_c import StageC

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
GROUP = 8  # pictures that go through stages that move together: each moves to the device once for them
NO_FLAGS: Mapping[str, Any] = MappingProxyType({})


@dataclass
class StageUse:
    """Seconds of a stage over all pictures, and the most memory (bytes) up to its end, 0 where unknown.

    On a GPU `peak_memory` is the device's during the stage; on the CPU the process's since its start, which
    `host_memory` is everywhere.
    """

    name: str
    seconds: float = 0.0
    peak_memory: int = 0
    host_memory: int = 0


T = TypeVar("T")
C = TypeVar("C", StageCConfig, StageBConfig)


class UltraPixelPipeline:
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
        self.device = device_named(device)
        config_c, config_b = (_on(self.device, config) for config in (config_c, config_b))
        self.config_c, self.config_b = config_c, config_b
        self.preset = DEFAULT  # of what a call leaves open
        self.flags: dict[str, Any] = {}  # of the scripts, which tell the models
        self._hashes: WeightHashes | None = None
        self.rescued = Pictures()  # of a call that an error or Ctrl-C ended: what was done by then
        self.controls = SetControls()
        self.uses: dict[str, StageUse] = {}
        self.split: Split | None = None  # the other processes, where several make each picture
        dtype_c, dtype_b = DTYPES[config_c.dtype], DTYPES[config_b.dtype]
        mode = offload_named(offload, resident)
        self._placement = Placement(self.device, NONE if mode == AUTO and self.device.type == "cpu" else mode)
        self._tile: int | None = None  # of Stage A, once its memory was full
        self._batch = 1  # pictures of one size at once, and the most of them, once memory was full
        self._most: int | None = None

        def stage(build: Callable, path: str, dtype: torch.dtype, what: str, **named: Any) -> Offloaded:
            def load(home: torch.device, checked: bool) -> nn.Module:
                return load_module(build, path, dtype=dtype, device=home, what=what, checked=checked)

            return Offloaded(load, self._placement, check=partial(check_finite, path), **named)

        self._allow_download = allow_download
        self.plain = False  # without kernels, recordings and number formats of a GPU's own
        self._graphs = LowPassGraphs()
        self._turn = RLock()  # calls of several threads take turns, as weights move in one
        self._text_encoder: TextEncoder | None = None
        self.image_encoder = config_c.clip_image_path or CLIP  # of image prompts
        self._image_encoder: PictureEncoder | None = None
        self.set_origin(None)
        self._guidance_path = guidance_path
        build_c = partial(StageC, **asdict(stage_c_sizes(config_c)))
        self._loras = LoraMerger()
        path_c = config_c.generator_checkpoint_path
        self._int8 = int8
        merge = self._loras.into_stage_c
        self.stage_c = stage(build_c, path_c, dtype_c, "Stage C", prepare=merge, int8=int8)
        self.guidance = None
        if guidance_path is not None:
            self.guidance = Offloaded(
                lambda home, _: load_guidance(config_c, guidance_path, dtype_c, home), self._placement
            )
        self.encoder = Offloaded(
            lambda home, _: load_encoder(config_c, "a picture to go out from").to(home), self._placement
        )
        build_b = partial(StageB, **asdict(stage_b_sizes(config_b)))
        self.stage_b = stage(build_b, config_b.generator_checkpoint_path, dtype_b, "Stage B", int8=int8)
        # In bfloat16 neighbouring shades of the picture would fall together, so Stage A stays in float32.
        build_a = partial(StageA, **asdict(stage_a_sizes(config_b)))
        self.stage_a = stage(build_a, config_b.stage_a_checkpoint_path, torch.float32, "Stage A")

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
        strength: float = 1.0,
        match_colours: bool = True,
        settings: Settings | None = None,
        observer: Observer | None = None,
        progress: bool = True,
        **changes: Any,
    ) -> Pictures:
        """A picture, or each of several, as a whole made large, in its shape; the i-th has seed `seed + i`.

        It gets `factor` times its size, or a height, a width, or what lies within both (by default the
        preset's). `prompt` says what it shows. With a `strength` below 1 more of it stays as it is. The
        rest is as in a call.
        """
        settings = changed(settings, Settings(cfg=self.preset.cfg), changes)
        box = self.preset.height, self.preset.width
        how = Upscaling(box, height, width, factor, number("strength", strength), match_colours)
        first, texts = first_seed(seed), (text("prompt", prompt), text("negative_prompt", negative_prompt))
        given = [original("image", one) for one in (image if isinstance(image, list | tuple) else [image])]
        jobs = [Job(texts[0], *how.size(one.size), first + i, texts[1]) for i, one in enumerate(given)]
        _check_callable(observer)
        self.check_files(self.upscaling_files())
        sources, settings = self.upscaling_sources(jobs, given, how), without_idle_cfg(settings, jobs)
        return self.in_groups(jobs, settings, observer, None, progress, sources)

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
        with self.encoding() as encode:
            return [how.source(one, encode, sizes) for one, sizes in zip(given, plans, strict=True)]

    @contextmanager
    def encoding(self) -> Iterator[Encode]:
        """Within it, pictures become latents."""
        stride = self.config_c.geometry.stride
        with self._measured("encoder"), self.encoder.on_device() as encoder:
            yield lambda picture, size: latent_of(picture.to(self.device), encoder, size, stride).cpu()

    def doubts(self, jobs: Sequence[Job], settings: Settings) -> list[str]:
        """A sentence for everything in prompts and settings that may not do what it is meant to do."""
        reading = self.reading(settings)
        prompts = [text for job in jobs for text in (job.prompt.removesuffix(SUFFIX), job.negative_prompt)]
        texts = [reading.text(prompt).text for prompt in prompts]
        return [*doubts(jobs, settings), *unknown(texts, reading.names, self.config_c.clip_text_path)]

    def reading(self, settings: Settings) -> Reading:
        """How prompts are read: brackets of the LoRAs' tokens are no weights."""
        names = tuple(token for lora in self._loras.wanted for token in lora.tokens)
        return Reading(settings.weighted_prompts, settings.long_prompts, names)

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
        return CONTROLLED if self.controls.steerings else Settings(cfg=self.preset.cfg)

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

    @property
    def group(self) -> int:
        """How many jobs to give at a time: one, where stages stay in place, so that it is done the sooner."""
        return 1 if self._placement.mode == NONE or self.device.type == "cpu" else GROUP

    # --- where weights rest ---------------------------------------------------------------------------

    @property
    def offload(self) -> str:
        """Where the stages rest now: auto until the first picture settles it."""
        return self._placement.mode

    def settle_offload(self, height: int, width: int, settings: Settings) -> str:
        """Settle auto by what is free on the device, for pictures of this size; a sentence that tells it."""
        if self.device.type == "cpu":
            return f"offload: {self.offload} (on the CPU weights rest where they compute)"
        if self.offload != AUTO:
            return f"offload: {self.offload}"
        mode, why = self.best_offload(height, width, settings)
        self._placement.mode = mode
        return f"offload: {mode} ({why})"

    def best_offload(self, height: int, width: int, settings: Settings) -> tuple[str, str]:
        """What auto would choose now for pictures of this size, and why."""
        sizes = plan_for(self.config_c, height, width, settings.lr_size)
        stages = self.estimate(sizes, settings)
        return best_mode(stages, weights_on_disk(self.config_c.clip_text_path), free_memory(self.device))

    def estimate(self, sizes: Plan, settings: Settings) -> list[StageEstimate]:
        """Device memory of each stage for a picture, counted from the networks' sizes."""
        guidance = None if self.guidance is None else self.guidance_sizes
        both = needs_unconditional(settings)
        return estimate_stages(self.config_c, self.config_b, guidance, sizes, both, self._int8)

    def memory_needed(self, sizes: Plan, settings: Settings) -> int:
        """Bytes that should be free on the device for a picture, as the stages rest now."""
        text = weights_on_disk(self.config_c.clip_text_path)
        return int(taken(self.offload, self.estimate(sizes, settings), text) / SHARE)

    def _in_turn(self, stage: str, count: int, work: Callable[[int], Iterator[T]]) -> Iterator[T]:
        """What `work(first)` makes of jobs from the first on; where memory is full, the rest with less."""
        done = 0
        while done < count:
            try:
                for made in work(done):
                    done += 1
                    yield made
                return
            except torch.OutOfMemoryError:
                if self.split is not None or not self._shrink(stage):  # the others would wait for this one
                    raise
            self._make_room()  # here, where the error no longer holds what it found

    def _shrink(self, stage: str) -> bool:
        """Take less memory from now on, and say so; False where there is no way left."""
        tile, mode = (self._tile or MAX_TILE) // 2, smaller(self.offload)
        if stage in ("stage C", "stage B") and self._batch > 1:
            self._most = self._batch = self._batch // 2
            way = f"{self._batch} pictures at once" if self._batch > 1 else "one picture at a time"
        elif stage == "stage A" and tile >= MIN_TILE:
            self._tile, way = tile, f"tiles of {tile} latent pixels"
        elif mode is not None:
            self._placement.mode, way = mode, f"--offload {mode}"
        else:
            return False
        warnings.warn(f"the device's memory is full in {stage}: it goes on with {way}", stacklevel=2)
        return True

    def _make_room(self) -> None:
        """Let the device's memory go that the mode does not need."""
        nets = self.controls.networks
        for each in (self.encoder, self.stage_c, self.guidance, *nets, self.stage_b, self.stage_a):
            if each is not None:
                each.settle()
        if self._text_encoder is not None:
            self._text_encoder.to(self._placement.home)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

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
        if self._int8 and wanted != self._loras.wanted:  # nothing is left that could be undone
            self.stage_c.forget()
            self._loras.forget_stage_c()
        self._loras.wanted = wanted

    def _lora(self, given: str | Path | WeightedLora) -> WeightedLora:
        if isinstance(given, WeightedLora):
            return given
        if not isinstance(given, str | Path):
            raise TypeError(f"a LoRA is named by its file, as in 'cat.safetensors:0.8', not by {given!r}")
        return load_loras([at_home(str(given))], self.config_c)[0]

    @property
    def guidance_sizes(self) -> GuidanceSizes:
        """The sizes of its guidance's file, which there must be."""
        return sizes_of_guidance(self.config_c, self._guidance_path)

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

    # --- stages -----------------------------------------------------------------------------------

    def encode_text(self, jobs: Sequence[Job], settings: Settings | None = None) -> dict[str, TextCondition]:
        """Every distinct prompt's condition, on the device; the encoder leaves it again.

        Of the settings only the ways in which prompts are read count.
        """
        reading = self.reading(settings or Settings())
        distinct = list(dict.fromkeys(p for job in jobs for p in (job.prompt, job.negative_prompt, "")))
        (texts,) = self._in_turn("text", 1, lambda _: iter([self._encode(distinct, reading)]))
        return texts

    def _encode(self, distinct: Sequence[str], reading: Reading) -> dict[str, TextCondition]:
        with self._measured("text"):
            if self._text_encoder is None:
                self._text_encoder = TextEncoder.load(
                    self.config_c.clip_text_path,
                    DTYPES[self.config_c.dtype],
                    self._allow_download,
                    self._placement.home,
                )
            self._loras.into_text(self._text_encoder)
            texts = encode_prompts(self._text_encoder, distinct, self.device, reading)
            self._text_encoder.to(self._placement.home)
        return texts

    def run_controlnet(self, controls: Sequence[Controls]) -> list[list[Entries]]:
        """The entries for Stage C of every picture's controls, on the CPU; none for no controls."""
        rows, networks = [several(control) for control in controls], self.controls.networks
        for count in {len(row) for row in rows} - {len(networks)}:
            nets = f"ControlNets for {len(networks)}" if networks else "no ControlNet"
            raise ValueError(
                f"{count} controls were given, but {nets}: name one for each by set_control or set_controls"
            )
        columns = []
        for network, *column in zip(networks, *rows, strict=True) if rows else ():
            work = partial(self._controlled, network, column)
            columns.append(list(self._in_turn("control", len(column), work)))
        return [list(row) for row in zip(*columns, strict=True)]

    def _controlled(
        self, network: Offloaded[ControlNet], controls: Sequence[Control], first: int
    ) -> Iterator[Entries]:
        dtype = DTYPES[self.config_c.dtype]
        with self._measured("control"), network.on_device() as controlnet:
            for control in controls[first:]:
                maps = controlnet(control.seen.to(self.device, dtype))
                weighted = [None if entry is None else control.weight * entry for entry in maps]
                yield Entries(weighted, control.start, control.end, control.hr).to("cpu")

    def run_stage_c(
        self,
        jobs: Sequence[Job],
        plans: Sequence[Plan],
        texts: dict[str, TextCondition],
        settings: Settings,
        observer: Observer | None = None,
        entries: Sequence[Sequence[Entries]] = (),
        sources: Sequence[Source] = (),
        ends: list[LowEnd | None] | None = None,
    ) -> list[Tensor]:
        """Both passes of Stage C for every job: latents (1, 16, h, w) on the CPU.

        `entries`, where there are any, are those of `run_controlnet`.
        `ends`, if given, gets the ends of the low-resolution passes.
        """
        starts, no_entries = sources or [NOISE_ALONE] * len(jobs), [()] * len(jobs)
        both = [source.needs_unconditional(settings) for source in starts]
        every = zip(jobs, plans, both, entries or no_entries, starts, strict=True)
        wanted = [
            Wanted(job, sizes, self._conditions(job, texts, needed, source.image), own, source)
            for job, sizes, needed, own, source in every
        ]
        work = partial(self._stage_c_latents, wanted, settings, observer)
        made = list(self._in_turn("stage C", len(jobs), work))
        if ends is not None:
            ends += [end for _, end in made]
        return [latent for latent, _ in made]

    def _stage_c_latents(
        self, wanted: Sequence[Wanted], settings: Settings, observer: Observer | None, first: int
    ) -> Iterator[tuple[Tensor, LowEnd | None]]:
        target, settings = target_named(self.config_c.target), self._without_fp8(settings)
        with (
            self._measured("stage C"),
            self.stage_c.on_device() as stage_c,
            self._guidance_on_device() as guidance,
            self._recordings() as graphs,
        ):
            stage_c.plain = self.plain
            strengths, between = self.config_c.guidance_strength, self._load_decoders
            run = StageCRun(
                stage_c, guidance, strengths, target, settings, observer, graphs, self.split, between
            )
            for batch in batches(wanted[first:], self._batch, self.device):
                yield from run.latents(batch)

    def _load_decoders(self) -> None:
        """Load Stages B and A ahead: not before a low-resolution pass, as steps were being recorded."""
        self.stage_b.load_ahead(self._warm_stage_b)
        self.stage_a.load_ahead(self._warm_stage_a)

    def run_stage_b(
        self,
        jobs: Sequence[Job],
        plans: Sequence[Plan],
        texts: dict[str, TextCondition],
        latents: Sequence[Tensor],
        settings: Settings,
        observer: Observer | None = None,
    ) -> Iterator[Tensor]:
        """Stage B for every job: latents (1, 4, h, w) on the CPU, one after the other."""

        def work(first: int) -> Iterator[Tensor]:
            rest = jobs[first:], plans[first:], texts, latents[first:], settings, observer
            return self._stage_b_latents(*rest)

        return self._in_turn("stage B", len(jobs), work)

    def _stage_b_latents(
        self,
        jobs: Sequence[Job],
        plans: Sequence[Plan],
        texts: dict[str, TextCondition],
        latents: Sequence[Tensor],
        settings: Settings,
        observer: Observer | None,
    ) -> Iterator[Tensor]:
        target, settings = target_named(self.config_b.target), self._without_fp8(settings)
        both = needs_unconditional(settings)[1]
        with self._measured("stage B"), self.stage_b.on_device() as stage_b:
            stage_b.plain = self.plain
            for alike in neighbours(plans, self._batch):
                batch = jobs[alike]
                prompts = [job.prompt for job in batch] + [""] * (len(batch) if both else 0)
                pooled = torch.cat([texts[p].pooled for p in prompts]).to(self.device)
                yield from stage_b_latents(
                    stage_b, batch, plans[alike.start], latents[alike], pooled, target, settings,
                    self.device, observer, self.split,
                )  # fmt: skip

    def run_stage_a(
        self,
        jobs: Sequence[Job],
        plans: Sequence[Plan],
        latents: Sequence[Tensor],
        settings: Settings,
        observer: Observer | None = None,
    ) -> Iterator[Picture]:
        """Stage A for every job: the pictures, one after the other."""

        def work(first: int) -> Iterator[Picture]:
            return self._decoded(jobs[first:], plans[first:], latents[first:], settings, observer)

        return self._in_turn("stage A", len(jobs), work)

    def _decoded(
        self,
        jobs: Sequence[Job],
        plans: Sequence[Plan],
        latents: Sequence[Tensor],
        settings: Settings,
        observer: Observer | None,
    ) -> Iterator[Picture]:
        with self._measured("stage A"):
            _ = self.stage_a.module  # loaded; what is done with the pictures in between is not measured
        with self.stage_a.on_device() as stage_a:
            for job, sizes, latent in zip(jobs, plans, latents, strict=True):
                with self._measured("stage A"):
                    tile = fitting_tile(stage_a, sizes, free_memory(self.device), self._tile)
                    latent = latent.to(self.device)
                    tiled, tf32 = settings.stage_a_tiled, not self.plain
                    pixels = decode_picture(stage_a, latent, sizes, tiled, tile, tf32, True)
                    pixels = pixels.float().cpu()
                stop = observer is not None and observer(Progress("stage A", job, 1, 1)) is True
                yield Picture(job, pixels)
                if stop:
                    return

    # --- helpers ----------------------------------------------------------------------------------

    def _conditions(
        self, job: Job, texts: dict[str, TextCondition], both: bool, image: Tensor | None = None
    ) -> Conditions:
        """Both halves, or the conditional one; it alone sees an image's embedding (1, 1, I)."""
        width = stage_c_sizes(self.config_c).c_clip_img
        prompts = [texts[p] for p in (job.prompt, job.negative_prompt)[: 1 + both]]
        images = (image if image is None else image.to(self.device), None)[: 1 + both]
        seen = zip(of_one_length(prompts, texts[""]), images, strict=True)
        halves = [conditions(text, image, width) for text, image in seen]
        held = stack(*halves) if both else halves[0]
        return held.to(self.device, DTYPES[self.config_c.dtype])

    def _without_fp8(self, settings: Settings) -> Settings:
        """The settings, without fp8 where blocks come and go, as its weights would have to do, or on mps."""
        apple = self.device.type == "mps"  # which has no such numbers
        if settings.fp8 == "off" or not (self._int8 or self.offload == BLOCK or apple):
            return settings
        if settings.fp8 == "on":
            what = "the device mps" if apple else "int8" if self._int8 else "offload block"
            warnings.warn(f"fp8 does not go with {what}, and is left out", stacklevel=2)
        return replace(settings, fp8="off")

    def _warm_stage_b(self, stage_b: StageB) -> None:
        sizes, place = plan_for(self.config_c, MIN_SIDE, MIN_SIDE), {"device": self.device}
        latent = torch.zeros(1, C_LATENT, *sizes.hr_latent, **place)
        pooled = torch.zeros(2, 1, stage_b.clip_mapper.in_features, **place)
        noise, target = NoiseSource.of(0, 0, self.device), target_named(self.config_b.target)
        stage_b_pass(stage_b, latent, pooled, target, sizes, Settings(steps_b=1), noise)

    def _warm_stage_a(self, stage_a: StageA) -> None:
        decode_picture(
            stage_a,
            torch.zeros(1, B_LATENT, MIN_TILE, MIN_TILE, device=self.device),
            plan_for(self.config_c, MIN_SIDE, MIN_SIDE),
            tiled=False,
        )

    @contextmanager
    def _recordings(self) -> Iterator[LowPassGraphs | None]:
        """The low pass's recordings, which go before the weights that they read leave the device."""
        try:
            yield self._graphs if of_nvidia(self.device) and not self.plain else None
        finally:
            if self._placement.mode != NONE:
                self._graphs.clear()

    @contextmanager
    def _guidance_on_device(self) -> Iterator[Guidance | None]:
        if self.guidance is None:
            yield None
        else:
            with self.guidance.on_device() as guidance:
                yield guidance

    @contextmanager
    def _measured(self, name: str) -> Iterator[None]:
        use = self.uses.setdefault(name, StageUse(name))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        peak = peak_memory(self.device)
        use.peak_memory = max(use.peak_memory, peak)
        use.host_memory = max(use.host_memory, peak_host_memory() if self.device.type == "cuda" else peak)
        use.seconds += time.perf_counter() - start


def _until_error(made: Iterator[T]) -> tuple[list[T], Exception | KeyboardInterrupt | None]:
    """All that is made, or what is until an error (out of memory, Ctrl-C) ends it, and that error."""
    finished: list[T] = []
    try:
        for one in made:
            finished.append(one)
    except (Exception, KeyboardInterrupt) as error:
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


def _on(device: torch.device, config: C) -> C:
    """The configuration as it is used on a device: Apple's GPU computes in float32."""
    return replace(config, dtype="float32") if device.type == "mps" else config


def _check_callable(observer: object) -> None:
    if observer is not None and not callable(observer):
        raise TypeError(f"observer must be a function of the progress, not {observer!r}")


def load_encoder(config: StageCConfig, what_for: str) -> EfficientNetEncoder:
    """The encoder of Stage C's latents, on the CPU; ValueError (`what_for` needs it) where none is named."""
    if config.effnet_checkpoint_path is None:
        raise ValueError(f"{what_for} needs 'effnet_checkpoint_path' in the Stage C configuration")
    build = partial(EfficientNetEncoder, **asdict(effnet_sizes(config)))
    path = config.effnet_checkpoint_path
    return load_module(build, path, dtype=torch.float32, what="EfficientNet encoder")


def sizes_of_guidance(config: StageCConfig, path: str | Path) -> GuidanceSizes:
    """The sizes of a guidance file for a Stage C configuration; how it upsamples, its metadata tells.

    ValueError if that is unknown. A file that is not there yet is taken for one as configured.
    """
    sizes = guidance_sizes(config)
    stored = (read_config(path) or {}) if Path(path).exists() else {}
    upsampling = stored.get("upsampling", sizes.upsampling)
    if upsampling not in UPSAMPLINGS:
        raise ValueError(
            f"{path}: its guidance upsamples by {upsampling!r}, which is not known here: "
            f"{', '.join(UPSAMPLINGS)} are"
        )
    return replace(sizes, upsampling=upsampling)


def load_guidance(
    config: StageCConfig, path: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Guidance:
    """The guidance of a file, for a Stage C configuration."""
    build = partial(Guidance, **asdict(sizes_of_guidance(config, path)))
    return load_module(build, path, dtype=dtype, device=device, what="guidance", translate=guidance_names)


def load_previewer(config: StageCConfig, device: torch.device | str) -> Previewer:
    """The previewer of a Stage C configuration; ValueError where it names none."""
    if config.previewer_checkpoint_path is None:
        raise ValueError("a preview needs 'previewer_checkpoint_path' in the Stage C configuration")
    build = partial(Previewer, **asdict(previewer_sizes(config)))
    return load_module(
        build, config.previewer_checkpoint_path, dtype=torch.float32, device=device, what="previewer"
    )
