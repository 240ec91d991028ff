"""The stages that a picture goes through: their networks, where the weights rest, and what each makes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from core.config.offloading import AUTO, BLOCK, NONE, offload_named, smaller
from core.config.schema import StageBConfig, StageCConfig, stage_a_sizes, stage_b_sizes, stage_c_sizes
from core.config.settings import Job, Settings
from core.config.sizes import GuidanceSizes
from core.devices import device_named
from core.memory import free_memory, peak_host_memory, peak_memory
from core.pipeline.batches import StageCRun, Wanted, batches, neighbours, stage_b_latents
from core.pipeline.conditioning import Conditions, conditions, of_one_length, stack
from core.pipeline.control import Control
from core.pipeline.controls import Controls, SetControls, several
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
from core.pipeline.graphs import PassRecordings
from core.pipeline.made import Picture
from core.pipeline.networks import DTYPES, load_encoder, load_guidance, sizes_of_guidance
from core.pipeline.offload import Offloaded, Placement
from core.pipeline.passes import (
    B_LATENT,
    C_LATENT,
    LowEnd,
    NoiseSource,
    decode_picture,
    needs_unconditional,
    stage_b_pass,
)
from core.pipeline.progress import Observer, Progress
from core.pipeline.resolution import MIN_SIDE, Plan, low_picture, plan_for
from core.pipeline.sources import NOISE_ALONE, Encode, Source, latent_of
from core.pipeline.split import Split
from core.weights.checkpoint import check_finite, load_module
from core.weights.clip import TextCondition, TextEncoder
from core.weights.lora.merging import LoraMerger
from core.weights.prompting import Reading, encode_prompts
from gdf.targets import target_named
from modules.controlnet import ControlNet
from modules.fp8 import uses_fp8
from modules.guidance import Guidance
from modules.operators import of_nvidia
from modules.stage_a import MAX_TILE, StageA
from modules.stage_b import StageB
from modules.stage_c import StageC

GROUP = 8  # pictures that go through stages that move together: each moves to the device once for them


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


class Stages:
    """The networks of a family, each loaded at its first use, and the passes that they make.

    The arguments are those of `UltraPixelPipeline`. Where the device's memory is full, the work goes on with
    less of it.
    """

    def __init__(
        self,
        config_c: StageCConfig,
        config_b: StageBConfig,
        guidance_path: str | Path | None,
        device: torch.device | str | None,
        resident: bool,
        allow_download: bool,
        offload: str,
        int8: bool,
    ) -> None:
        self.device = device_named(device)
        config_c, config_b = (_on(self.device, config) for config in (config_c, config_b))
        self.config_c, self.config_b = config_c, config_b
        _warn_of_bfloat16(self.device, config_c.dtype, config_b.dtype)
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
        self._kept = PassRecordings.of_all()
        self._filled = False  # the device's memory was full while there were recordings
        self._text_encoder: TextEncoder | None = None
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
        sizes = low_picture(sizes, self.config_c.geometry) if settings.lr_only else sizes
        both = needs_unconditional(settings)
        fp8 = self._against_fp8() is None and uses_fp8(self.device, settings.fp8)
        return estimate_stages(self.config_c, self.config_b, guidance, sizes, both, self._int8, fp8)

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
        if self._filled or self._kept.are_any:
            self._kept, self._filled = PassRecordings(), False
            way = "steps that are not recorded"
        elif stage in ("stage C", "stage B") and self._batch > 1:
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

    @property
    def guidance_sizes(self) -> GuidanceSizes:
        """The sizes of its guidance's file, which there must be."""
        return sizes_of_guidance(self.config_c, self._guidance_path)

    def reading(self, settings: Settings) -> Reading:
        """How prompts are read: brackets of the LoRAs' tokens are no weights."""
        names = tuple(token for lora in self._loras.wanted for token in lora.tokens)
        return Reading(settings.weighted_prompts, settings.long_prompts, names)

    @contextmanager
    def encoding(self) -> Iterator[Encode]:
        """Within it, pictures become latents."""
        stride = self.config_c.geometry.stride
        with self._measured("encoder"), self.encoder.on_device() as encoder:
            yield lambda picture, size: latent_of(picture.to(self.device), encoder, size, stride).cpu()

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
            self._recordings() as recordings,
        ):
            stage_c.plain = self.plain
            strengths, ahead = self.config_c.guidance_strength, self._load_decoders
            run = StageCRun(
                stage_c, guidance, strengths, target, settings, observer, recordings, self.split, ahead
            )
            for batch in batches(wanted[first:], self._batch, self.device):
                yield from run.latents(batch)

    def _load_decoders(self) -> None:
        """Load Stages B and A ahead, which must not be while steps are recorded."""
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
        with (
            self._measured("stage B"),
            self.stage_b.on_device() as stage_b,
            self._recordings() as recordings,
        ):
            stage_b.plain = self.plain
            for alike in neighbours(plans, self._batch):
                batch = jobs[alike]
                prompts = [job.prompt for job in batch] + [""] * (len(batch) if both else 0)
                pooled = torch.cat([texts[p].pooled for p in prompts]).to(self.device)
                yield from stage_b_latents(
                    stage_b, batch, plans[alike.start], latents[alike], pooled, target, settings,
                    self.device, observer, self.split, recordings.stage_b,
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

    def _against_fp8(self) -> str | None:
        """What fp8 does not go with; None where it goes with all."""
        reasons = {
            "the device mps": self.device.type == "mps",  # which has no such numbers
            "int8": self._int8,
            "offload block": self.offload == BLOCK,  # its weights would have to come and go
            "--split": self.split is not None,  # whose processes share what is inside the blocks
        }
        return next((what for what, true in reasons.items() if true), None)

    def _without_fp8(self, settings: Settings) -> Settings:
        """The settings, without fp8 where it does not go with something else."""
        what = self._against_fp8()
        if settings.fp8 == "off" or what is None:
            return settings
        if settings.fp8 == "on":
            # Named as of this line, so that it is said once for all stages.
            warnings.warn(f"fp8 does not go with {what}, and is left out", stacklevel=1)
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
            tf32=False,  # that is set for all threads, of which others compute
        )

    @contextmanager
    def _recordings(self) -> Iterator[PassRecordings]:
        """Recordings of steps, which go before the weights that they read leave the device."""
        try:
            yield self._kept if of_nvidia(self.device) and not self.plain else PassRecordings()
        except torch.OutOfMemoryError:
            self._filled = self._kept.are_any
            raise
        finally:
            if self._placement.mode != NONE:
                self._kept.clear()

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
            torch.cuda.init()  # PyTorch does not by itself for a device with a number
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        peak = peak_memory(self.device)
        use.peak_memory = max(use.peak_memory, peak)
        use.host_memory = max(use.host_memory, peak_host_memory() if self.device.type == "cuda" else peak)
        use.seconds += time.perf_counter() - start


def _warn_of_bfloat16(device: torch.device, *dtypes: str) -> None:
    """Say so where a card does not compute in bfloat16, which PyTorch then does slowly and in more memory."""
    if "bfloat16" in dtypes and of_nvidia(device) and torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        warnings.warn(f"the card {name} does not compute in bfloat16: use --dtype float32", stacklevel=2)


def _on(device: torch.device, config: C) -> C:
    """The configuration as it is used on a device: Apple's GPU computes in float32."""
    return replace(config, dtype="float32") if device.type == "mps" else config
