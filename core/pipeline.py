"""The way of a prompt to a picture: load what the job needs, condition, Stage C twice, Stage B, Stage A."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from core.checkpoint import check_files, load_module, read_config
from core.conditioning import (
    Conditions,
    TextCondition,
    TextEncoder,
    absent_text_files,
    conditions,
    find_text_encoder,
    stack,
)
from core.config import (
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
from core.config_files import load_stage_b, load_stage_c
from core.control import Control, ControlNetFile, open_controlnet
from core.layouts import guidance_names
from core.loras import LoraMerger, WeightedLora, check_loras, lora_files
from core.memory import peak_memory
from core.offload import Offloaded
from core.passes import (
    NoiseSource,
    decode_picture,
    high_resolution_pass,
    low_resolution_pass,
    needs_unconditional,
    prepare_stage_c,
    stage_b_pass,
)
from core.paths import located
from core.resolution import Plan, guidance_strength, plan
from core.settings import Job, Settings
from core.sizes import GuidanceSizes
from gdf.samplers import Estimate, Step
from gdf.targets import target_named
from modules.controlnet import ControlNet
from modules.effnet import EfficientNetEncoder
from modules.guidance import UPSAMPLINGS, Guidance
from modules.previewer import Previewer
from modules.stage_a import StageA
from modules.stage_b import StageB
from modules.stage_c import StageC

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
GROUP = 8  # pictures that go through stages that move together: each moves to the device once for them
NOISE_STREAMS = {"lr": 0, "hr": 1, "stage_b": 2}


@dataclass(frozen=True)
class Picture:
    """A finished picture: its job and its pixels (3, height, width) in [0, 1], float32 on the CPU."""

    job: Job
    pixels: Tensor


@dataclass(frozen=True)
class Progress:
    """Where a run stands: a step of a picture's stage, and the estimate of the clean latent so far."""

    stage: str
    job: Job
    step: int  # of `steps`, counted from 1
    steps: int
    latent: Tensor | None = None


@dataclass
class StageUse:
    """Seconds of a stage over all pictures, and the most memory (bytes) up to its end, 0 where unknown.

    On a GPU the memory is the device's during the stage; on the CPU the process's since its start.
    """

    name: str
    seconds: float = 0.0
    peak_memory: int = 0


Observer = Callable[[Progress], None]
T = TypeVar("T")
ControlEntries = list[Tensor | None] | None  # of one picture: as `modules.controlnet.ControlNet` returns them


class UltraPixelPipeline:
    """Text to image: `UltraPixelPipeline.from_config(...)("a fox in the snow", 2048, 2048, seed=1)`.

    Stages are loaded at their first use and lie on the device one at a time, unless `resident`.
    """

    def __init__(
        self,
        config_c: StageCConfig,
        config_b: StageBConfig,
        guidance_path: str | Path | None,
        device: torch.device | str = "cpu",
        resident: bool = False,
        allow_download: bool = False,
    ) -> None:
        self.config_c, self.config_b = config_c, config_b
        self.device = torch.device(device)
        self.uses: dict[str, StageUse] = {}
        self.control_file: ControlNetFile | None = None
        self.controlnet: Offloaded[ControlNet] | None = None
        dtype_c, dtype_b = DTYPES[config_c.dtype], DTYPES[config_b.dtype]
        offloaded = partial(Offloaded, device=self.device, resident=resident)

        def stage(build: Callable, path: str, dtype: torch.dtype, what: str) -> Offloaded:
            return offloaded(lambda: load_module(build, path, dtype=dtype, what=what))

        self._resident, self._allow_download = resident, allow_download
        self._text_encoder: TextEncoder | None = None
        self._guidance_path = guidance_path
        build_c = partial(StageC, **asdict(stage_c_sizes(config_c)))
        self._loras = LoraMerger()
        self.stage_c = offloaded(
            lambda: load_module(build_c, config_c.generator_checkpoint_path, dtype=dtype_c, what="Stage C"),
            prepare=self._loras.into_stage_c,
        )
        self.guidance = None
        if guidance_path is not None:
            self.guidance = offloaded(lambda: load_guidance(config_c, guidance_path, dtype_c))
        build_b = partial(StageB, **asdict(stage_b_sizes(config_b)))
        self.stage_b = stage(build_b, config_b.generator_checkpoint_path, dtype_b, "Stage B")
        # In bfloat16 neighbouring shades of the picture would fall together, so Stage A stays in float32.
        build_a = partial(StageA, **asdict(stage_a_sizes(config_b)))
        self.stage_a = stage(build_a, config_b.stage_a_checkpoint_path, torch.float32, "Stage A")

    @classmethod
    def from_config(
        cls,
        config_c: str | Path,
        config_b: str | Path,
        pretrained_path: str | Path | None,
        device: torch.device | str = "cpu",
        dtype: str | None = None,
        resident: bool = False,
        allow_download: bool = False,
    ) -> UltraPixelPipeline:
        """The pipeline of two configuration files and a file of guidance weights (None: without guidance)."""
        guidance_path = None if pretrained_path is None else located(str(pretrained_path))
        overrides = [] if dtype is None else [f"dtype={dtype}"]
        loaded = load_stage_c(config_c, overrides), load_stage_b(config_b, overrides)
        return cls(*loaded, guidance_path, device, resident, allow_download)

    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int = 2048,
        width: int = 2048,
        seed: int = 0,
        num_images: int = 1,
        negative_prompt: str = "",
        settings: Settings | None = None,
        observer: Observer | None = None,
        control: Control | None = None,
    ) -> list[Picture]:
        """Pictures of a prompt, or `num_images` of each of several; the i-th of all has seed `seed + i`."""
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        wanted = [p for p in prompts for _ in range(num_images)]
        jobs = [Job(p, height, width, seed + i, negative_prompt) for i, p in enumerate(wanted)]
        controls = () if control is None else [control] * len(jobs)
        return self.run(jobs, settings or Settings(), observer, controls)

    @torch.no_grad()
    def run(
        self,
        jobs: Sequence[Job],
        settings: Settings,
        observer: Observer | None = None,
        controls: Sequence[Control] = (),
    ) -> list[Picture]:
        """The pictures of `pictures`, once all are made."""
        return list(self.pictures(jobs, settings, observer, controls))

    @torch.no_grad()
    def pictures(
        self,
        jobs: Sequence[Job],
        settings: Settings,
        observer: Observer | None = None,
        controls: Sequence[Control] = (),
    ) -> Iterator[Picture]:
        """Pictures of the jobs, stage by stage, so that each stage visits the device once.

        Each comes as soon as it is decoded. Where Stage B breaks off, those come that are through it, and
        then the error. An observer that fails ends nothing: it costs a warning, and is not called again.
        `controls`, where there are any, are one for each job, for the ControlNet of `set_control`.
        """
        observer = observer and harmless(observer)
        plans = [plan(job.height, job.width, self.config_c.geometry) for job in jobs]
        texts = self.encode_text(jobs)
        entries = self.run_controlnet(controls)
        latents = self.run_stage_c(jobs, plans, texts, settings, observer, entries)
        latents, error = _until_error(self.run_stage_b(jobs, plans, texts, latents, settings, observer))
        through = len(latents)
        decoded = self.run_stage_a(jobs[:through], plans[:through], latents, settings, observer)
        for number, picture in enumerate(decoded if through else ()):
            yield _kept(picture, controls[number]) if controls else picture
        if error is not None:
            raise error

    @property
    def group(self) -> int:
        """How many jobs to give at a time: one, where stages stay in place, so that it is done the sooner."""
        return 1 if self._resident or self.device.type == "cpu" else GROUP

    def set_control(self, config: ControlConfig) -> ControlNetFile:
        """Use this ControlNet from now on, for jobs that come with a control; return what its file tells.

        ValueError if it is not one, or one for another Stage C.
        """
        file = open_controlnet(config, stage_c_sizes(self.config_c))
        build, dtype = partial(ControlNet, **asdict(file.sizes)), DTYPES[self.config_c.dtype]
        self.control_file = file
        self.controlnet = Offloaded(
            lambda: load_module(build, file.path, dtype=dtype, what=file.name), self.device, self._resident
        )
        return file

    def set_loras(self, loras: Sequence[WeightedLora]) -> None:
        """Use these LoRAs and no others from now on: merged into the weights before their next use.

        Those of before are undone exactly. ValueError if one is for another size, or two bring one token.
        """
        check_loras(loras, self.config_c)
        self._loras.wanted = tuple(loras)

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
        if self.control_file is not None:
            named["ControlNet"] = self.control_file.path
        named["Stage B"] = self.config_b.generator_checkpoint_path
        named["Stage A"] = self.config_b.stage_a_checkpoint_path
        return {**named, "text encoder": self.config_c.clip_text_path}

    def check_files(self) -> None:
        """Raise what is wrong with any of the files, before the first of them is loaded.

        All that do not exist are named at once.
        """
        files = {path: what for what, path in self.files().items()}
        text_encoder = self.config_c.clip_text_path
        del files[text_encoder]
        check_files(files | absent_text_files(text_encoder))
        find_text_encoder(text_encoder, self._allow_download)

    # --- stages -----------------------------------------------------------------------------------

    def encode_text(self, jobs: Sequence[Job]) -> dict[str, TextCondition]:
        """Every distinct prompt's condition, on the device; the encoder leaves it again."""
        distinct = list(dict.fromkeys(p for job in jobs for p in (job.prompt, job.negative_prompt, "")))
        with self._measured("text"):
            if self._text_encoder is None:
                self._text_encoder = TextEncoder.load(
                    self.config_c.clip_text_path, DTYPES[self.config_c.dtype], self._allow_download
                )
            self._loras.into_text(self._text_encoder)
            texts = self._text_encoder.encode(distinct, self.device)
            if not self._resident:
                self._text_encoder.to("cpu")
        return texts

    def run_controlnet(self, controls: Sequence[Control]) -> list[ControlEntries]:
        """The entries for Stage C of every control, times its weight, on the CPU; none for no controls."""
        if not controls:
            return []
        if self.controlnet is None:
            raise ValueError("a control was given, but no ControlNet: name one with set_control")
        dtype = DTYPES[self.config_c.dtype]
        with self._measured("control"), self.controlnet.on_device() as network:
            made = [network(control.seen.to(self.device, dtype)) for control in controls]
            return [
                [None if entry is None else (control.weight * entry).cpu() for entry in entries]
                for control, entries in zip(controls, made, strict=True)
            ]

    def run_stage_c(
        self,
        jobs: Sequence[Job],
        plans: Sequence[Plan],
        texts: dict[str, TextCondition],
        settings: Settings,
        observer: Observer | None = None,
        entries: Sequence[ControlEntries] = (),
    ) -> list[Tensor]:
        """Both passes of Stage C for every job: latents (1, 16, h, w) on the CPU.

        `entries`, where there are any, are those of `run_controlnet`; they act on the low-resolution pass.
        """
        target = target_named(self.config_c.target)
        with (
            self._measured("stage C"),
            self.stage_c.on_device() as stage_c,
            self._guidance_on_device() as guidance,
        ):
            latents = []
            for job, sizes, control in zip(jobs, plans, entries or [None] * len(jobs), strict=True):
                held = prepare_stage_c(stage_c, self._conditions(job, texts, settings))
                low, features = low_resolution_pass(
                    stage_c,
                    held,
                    target,
                    sizes,
                    settings,
                    self._noise(job, "lr"),
                    control=control and [e if e is None else e.to(self.device) for e in control],
                    on_step=_report(observer, "stage C, low resolution", job),
                )
                prepared = None
                if guidance is not None:
                    strength = guidance_strength(sizes.hr_latent, self.config_c.guidance_strength)
                    prepared = guidance.prepare(features, stage_c.site_sizes(sizes.hr_latent), strength)
                high = high_resolution_pass(
                    stage_c,
                    held,
                    prepared,
                    target,
                    sizes,
                    settings,
                    self._noise(job, "hr"),
                    on_step=_report(observer, "stage C, high resolution", job),
                )
                latents.append(high.x0.cpu())
        return latents

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
        target = target_named(self.config_b.target)
        both = needs_unconditional(settings)[1]
        with self._measured("stage B"), self.stage_b.on_device() as stage_b:
            for job, sizes, latent in zip(jobs, plans, latents, strict=True):
                pooled = torch.cat([texts[p].pooled for p in (job.prompt, "")[: 1 + both]]).to(self.device)
                sampled = stage_b_pass(
                    stage_b,
                    latent.to(self.device),
                    pooled,
                    target,
                    sizes,
                    settings,
                    self._noise(job, "stage_b"),
                    on_step=_report(observer, "stage B", job),
                )
                yield sampled.x0.cpu()

    def run_stage_a(
        self,
        jobs: Sequence[Job],
        plans: Sequence[Plan],
        latents: Sequence[Tensor],
        settings: Settings,
        observer: Observer | None = None,
    ) -> Iterator[Picture]:
        """Stage A for every job: the pictures, one after the other."""
        with self._measured("stage A"):
            _ = self.stage_a.module  # loaded; what is done with the pictures in between is not measured
        with self.stage_a.on_device() as stage_a:
            for job, sizes, latent in zip(jobs, plans, latents, strict=True):
                with self._measured("stage A"):
                    pixels = decode_picture(stage_a, latent.to(self.device), sizes, settings.stage_a_tiled)
                    pixels = pixels.float().cpu()
                if observer is not None:
                    observer(Progress("stage A", job, 1, 1))
                yield Picture(job, pixels)

    # --- helpers ----------------------------------------------------------------------------------

    def _conditions(self, job: Job, texts: dict[str, TextCondition], settings: Settings) -> Conditions:
        width = stage_c_sizes(self.config_c).c_clip_img
        halves = [conditions(texts[p], None, width) for p in (job.prompt, job.negative_prompt)]
        held = stack(*halves) if needs_unconditional(settings)[0] else halves[0]
        return held.to(self.device, DTYPES[self.config_c.dtype])

    def _noise(self, job: Job, stream: str) -> NoiseSource:
        return NoiseSource.of(job.seed, NOISE_STREAMS[stream], self.device)

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
        use.peak_memory = max(use.peak_memory, peak_memory(self.device))
        use.seconds += time.perf_counter() - start


def harmless(observer: Observer) -> Observer:
    """The observer, but that its first error costs a warning, and its being called."""
    failed = False

    def called(progress: Progress) -> None:
        nonlocal failed
        if failed:
            return
        try:
            observer(progress)
        except Exception as error:  # whatever it is: the picture does not depend on it
            failed = True
            warnings.warn(f"{_name(observer)} failed ({error}); the run goes on without it", stacklevel=2)

    return called


def _name(observer: Observer) -> str:
    return getattr(observer, "__name__", type(observer).__name__)


def _until_error(made: Iterator[T]) -> tuple[list[T], Exception | KeyboardInterrupt | None]:
    """All that is made, or what is until an error (out of memory, Ctrl-C) ends it, and that error."""
    finished: list[T] = []
    try:
        for one in made:
            finished.append(one)
    except (Exception, KeyboardInterrupt) as error:
        return finished, error
    return finished, None


def _kept(picture: Picture, control: Control) -> Picture:
    """The picture, with what its control keeps."""
    return picture if control.kept is None else replace(picture, pixels=control.kept.around(picture.pixels))


def _report(observer: Observer | None, stage: str, job: Job) -> Callable[[Step, Estimate], None] | None:
    if observer is None:
        return None
    return lambda step, estimate: observer(Progress(stage, job, step.index + 1, step.count, estimate.x0))


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
