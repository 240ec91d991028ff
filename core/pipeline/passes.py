"""The passes of a picture: Stage C at low and at high resolution, Stage B, Stage A (paper section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from core.config.settings import TRAINING_R, Settings
from core.memory import host_memory
from core.pipeline.conditioning import Conditions
from core.pipeline.entries import Entries, Maps, PassEntries
from core.pipeline.graphs import Recordings
from core.pipeline.resolution import Plan
from core.pipeline.split import Shares, Split
from core.pipeline.steps import high_step, low_step, of_short_steps, predicted, step_b
from core.random_keys import generator_of
from gdf.noise_conditions import cosine_t
from gdf.samplers import Denoise, Estimate, Sampled, Step, denoiser, sample, sampler_named, steps
from gdf.scalers import variance_preserving
from gdf.schedules import cosine, times_named
from gdf.targets import Target
from modules.fp8 import products_in_fp8
from modules.guidance import GuidanceFeatures, PreparedGuidance
from modules.operators import of_nvidia
from modules.stage_a import MAX_TILE, StageA
from modules.stage_b import StageB, StageBConditions
from modules.stage_c import StageC, StageCConditions
from modules.unet import InnerMaps, Times

C_LATENT = 16  # channels of Stage C's latent
B_LATENT = 4  # channels of Stage B's latent
NOISE_STREAMS = {"lr": 0, "hr": 1, "stage_b": 2}


OnStep = Callable[[Step, Estimate], None]
Prepared = TypeVar("Prepared", StageCConditions, "Guided", StageBConditions)
Predict = Callable[[Tensor, Times, Prepared, Step], Tensor]  # (x, time, conditions, step)


@dataclass(frozen=True)
class NoiseSource:
    """One picture's noise for one pass, drawn on the CPU in float32 so that every device sees the same."""

    generator: torch.Generator
    device: torch.device
    count = 1  # pictures

    @classmethod
    def of(cls, seed: int, pass_index: int, device: torch.device) -> NoiseSource:
        """The stream of a seed for a pass: each has its own, so that steps of one do not move another."""
        return cls(generator_of((seed % 2**64, pass_index)), device)

    def draw(self, *shape: int) -> Tensor:
        """Standard normal noise of a shape, float32."""
        return _placed(torch.randn(shape, generator=self.generator), self.device)

    def like(self, x: Tensor) -> Tensor:
        """Standard normal noise shaped like x."""
        return self.draw(*x.shape).to(x.dtype)


@dataclass(frozen=True)
class NoiseSources:
    """Several pictures' noise for one pass, each its own, so that none depends on what is made beside it."""

    sources: tuple[NoiseSource, ...]

    @property
    def count(self) -> int:
        """How many pictures."""
        return len(self.sources)

    @property
    def device(self) -> torch.device:
        """Where it is placed."""
        return self.sources[0].device

    def draw(self, _count: int, *shape: int) -> Tensor:
        """Standard normal noise (pictures, *shape), float32."""
        drawn = [torch.randn((1, *shape), generator=s.generator) for s in self.sources]
        return _placed(torch.cat(drawn), self.device)

    def like(self, x: Tensor) -> Tensor:
        """Standard normal noise shaped like x (pictures, ...)."""
        return self.draw(*x.shape).to(x.dtype)


def _placed(drawn: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; a GPU's work is not waited for."""
    if device.type != "cuda":
        return drawn.to(device)
    return host_memory(drawn.shape, drawn.dtype, pinned=True).copy_(drawn).to(device, non_blocking=True)


def _r(logsnr: Tensor, x: Tensor) -> Tensor:
    return cosine_t(logsnr).to(x.device).expand(len(x))


def in_halves(
    predict: Predict,
    conditions: Prepared,
    network: StageB | StageC,
    times: Sequence[Step],
    device: torch.device,
    shares: Shares | None = None,
) -> Callable[..., Tensor]:
    """`predict(x, time, conditions, step)` as samplers call it, on one half or both, in the network's dtype.

    What depends on the steps' times alone is computed here, for all of them. Not all weights need lie on the
    device between the steps. `shares` are this process's of one half and of both, where several make a
    picture.
    """
    dtype = next(network.parameters()).dtype
    halves = {True: conditions}
    every = network.pass_times(cosine_t(torch.stack([step.logsnr for step in times])).to(device))

    def on_halves(x: Tensor, step: Step, both: bool) -> Tensor:
        batch = (torch.cat([x, x]) if both else x).to(dtype)
        if both not in halves:
            halves[both] = conditions.first(len(x))
        return predict(batch, every.at(step.index), halves[both], step)

    def on_a_share(x: Tensor, step: Step, both: bool) -> Tensor:
        share, batch = shares[both], (torch.cat([x, x]) if both else x).to(dtype)
        if both not in parts:
            held = conditions if both else conditions.first(len(x))
            parts[both] = held.part(share.samples(len(batch)), share.map_rows(network.patch_size))
        with share.within(network):
            return share.whole(predict(share.of(batch), every.at(step.index), parts[both], step))

    parts: dict[bool, Prepared] = {}
    return on_halves if shares is None else on_a_share


def prepare_stage_c(stage_c: StageC, conditions: Conditions) -> StageCConditions:
    """Keys and values of the conditions, whose batch is [conditional] or [conditional, unconditional]."""
    return stage_c.prepare(conditions.clip_text, conditions.clip_text_pooled, conditions.clip_img)


# --- Stage C --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Where a pass begins instead of at noise alone: at a latent (1, 16, H, W), noised to a time.

    With `inside` (1, 1, H, W), 0 or 1, the latent stays as it is where that is 0.
    ValueError for a strength, which that time is, that is not above 0 and at most 1.
    """

    latent: Tensor
    strength: float
    inside: Tensor | None = None

    def __post_init__(self) -> None:
        check_strength(self.strength)

    def steps(self, count: int) -> int:
        """How many of a whole pass's steps are left, at least one."""
        return max(1, math.ceil(count * self.strength - 1e-6))


def check_strength(strength: float) -> None:
    """ValueError for a strength that no pass can begin with."""
    if not 0 < strength <= 1:  # a NaN is neither
        raise ValueError(f"strength must be above 0 and at most 1, not {strength}")


def pass_steps(settings: Settings, low: bool, start: Start | None = None) -> list[Step]:
    """The steps of the low-resolution pass, or of the high one."""
    count, spacing = settings.steps_low if low else settings.steps, times_named(settings.times)
    if start is None or start.strength == 1:
        return steps(cosine, count, settings.shift, spacing=spacing)
    return steps(cosine, start.steps(count), settings.shift, start=start.strength, spacing=spacing)


def _begun(
    start: Start | None, noise: NoiseSource | NoiseSources, size: tuple[int, int], times: Sequence[Step]
) -> Tensor:
    """The noisy latent that a pass begins with."""
    x = noise.draw(noise.count, C_LATENT, *size)
    if start is None or (start.strength == 1 and start.inside is None):
        return x
    if start.latent.shape[1:] != x.shape[1:]:
        raise ValueError(f"the pass begins at a latent of {_shape(start.latent)}, but it is of {_shape(x)}")
    return x if start.strength == 1 else times[0].a * start.latent.to(x) + times[0].b * x


def _holding(denoise: Denoise, start: Start | None) -> Denoise:
    """Denoises to what a pass began at, where that is held."""
    if start is None or start.inside is None:
        return denoise

    def held(x: Tensor, step: Step) -> Estimate:
        x0 = torch.where(start.inside > 0, denoise(x, step).x0, start.latent.to(x))
        return Estimate(x0, (x - step.a * x0) / step.b)

    return held


@dataclass(frozen=True)
class LowEnd:
    """The end of a low-resolution pass, from which its features can be made again; (B, 16, h, w), float32."""

    x0: Tensor  # the clean latent
    epsilon: Tensor  # the noise that was found in the last step's
    noised: Tensor  # what the last step began with
    settings: Settings  # of the pass
    strength: float = 1.0  # as `Start` has it

    def mapped(self, change: Callable[[Tensor], Tensor]) -> LowEnd:
        """The same with changed tensors."""
        return replace(self, x0=change(self.x0), epsilon=change(self.epsilon), noised=change(self.noised))


def low_resolution_pass(
    stage_c: StageC,
    conditions: StageCConditions,
    target: Target,
    plan: Plan,
    settings: Settings,
    noise: NoiseSource | NoiseSources,
    controls: Sequence[Entries] = (),
    on_step: OnStep | None = None,
    recordings: Recordings | None = None,
    split: Split | None = None,
    start: Start | None = None,
) -> tuple[LowEnd, GuidanceFeatures]:
    """Denoise a latent at low resolution and take the features that guide the high one (section 3.1).

    The features are the conditional half's, at the last step or, with few steps, at r = 0.05 (`Settings`).
    `recordings` run its steps; `split` shares out the halves, but no rows: there are few.
    The entries of `controls` are added at their times.
    """
    times, taken = pass_steps(settings, True, start), []
    added = PassEntries.of(controls, stage_c, plan.lr_latent)
    halves = _low_halves(
        stage_c, conditions, times, settings, noise.device, noise.count, added, taken, recordings, split
    )
    denoise, last = _holding(denoiser(halves, target, settings.cfg_low), start), []

    def kept(x: Tensor, step: Step) -> Estimate:
        estimate = denoise(x, step)
        last[:] = x, estimate
        return estimate

    begun = _begun(start, noise, plan.lr_latent, times)
    _sample_stage_c(kept, begun, times, settings, noise, on_step)
    noised, estimate = last
    strength = 1.0 if start is None else start.strength
    end = LowEnd(estimate.x0, estimate.epsilon, noised, settings, strength)
    features = taken[0] if taken else _features_at_r(stage_c, conditions, end, controls)
    return end, features if split is None else split.from_first(features)


def _low_halves(
    stage_c: StageC,
    conditions: StageCConditions,
    times: Sequence[Step],
    settings: Settings,
    device: torch.device,
    count: int,
    added: PassEntries | None,
    taken: list[GuidanceFeatures],
    recordings: Recordings | None = None,
    split: Split | None = None,
) -> Callable[..., Tensor]:
    """The low-resolution pass's predictions; the last step's features go into `taken`, if it gives them."""
    recorded = None if recordings is None else recordings.for_pass(device, stage_c)
    step_of = partial(low_step, stage_c)

    def predict(x: Tensor, time: Times, held: StageCConditions, step: Step) -> Tensor:
        takes = step.is_last and settings.extra_guidance_r is None
        control = None if added is None else _of_samples(added.at(step.t), len(x))
        if recorded is not None:
            prediction, *maps = recorded.run(step_of, (x, time), (held, control))
            prediction, features = prediction.clone(), GuidanceFeatures(tuple(maps))
        elif takes:
            prediction, features = stage_c.predict_with_features(x, time, held, control=control)
        else:
            return stage_c.predict(x, time, held, control=control)
        if takes:
            taken[:] = [features.first(count)]  # Heun's rule comes here twice: the second time counts
        return prediction

    shares = None if split is None else split.shares(stage_c, None)
    return in_halves(predict, conditions, stage_c, times, device, shares)


def _of_samples(control: Maps | None, count: int) -> Maps | None:
    """Entries of a ControlNet for so many samples: those of several pictures twice, where both halves run."""
    if control is None:
        return None
    return [e if e is None or len(e) in (1, count) else torch.cat([e, e]) for e in control]


def features_after(
    stage_c: StageC,
    conditions: StageCConditions,
    end: LowEnd,
    guidance_r: float | str | None,
    controls: Sequence[Entries] = (),
) -> GuidanceFeatures:
    """The features that `low_resolution_pass` gave with an end, or gives with another `guidance_r`."""
    settings = replace(end.settings, guidance_r=guidance_r)
    if settings.extra_guidance_r is not None:
        return _features_at_r(stage_c, conditions, replace(end, settings=settings), controls)
    times, taken = pass_steps(settings, True, Start(end.x0, end.strength)), []
    added = PassEntries.of(controls, stage_c, tuple(end.x0.shape[-2:]))
    halves = _low_halves(stage_c, conditions, times, settings, end.x0.device, len(end.x0), added, taken)
    halves(end.noised, times[-1], settings.cfg_low.needed_at(times[-1].t))
    return taken[0]


def _features_at_r(
    stage_c: StageC, conditions: StageCConditions, end: LowEnd, controls: Sequence[Entries]
) -> GuidanceFeatures:
    return features_of(stage_c, conditions, end.x0, end.epsilon, end.settings.extra_guidance_r, controls)


def _shape(latent: Tensor) -> str:
    return " x ".join(map(str, latent.shape[1:]))


def features_of(
    stage_c: StageC,
    conditions: StageCConditions,
    latent: Tensor,
    epsilon: Tensor,
    r: float = TRAINING_R,
    controls: Sequence[Entries] = (),
) -> GuidanceFeatures:
    """The guiding features of clean low-resolution latents (B, 16, h, w) with noise, at the condition r.

    This is how the guidance was trained, on the latents of pictures at r = 0.05 (section 4.1). The entries of
    `controls` are added if they act at the time r.
    """
    entries = PassEntries.of(controls, stage_c, tuple(latent.shape[-2:]))
    control = None if entries is None else entries.at(r)
    logsnr = cosine(torch.tensor(r))
    a, b = variance_preserving(logsnr)
    noised = (a * latent + b * epsilon).to(next(stage_c.parameters()).dtype)
    held = conditions.first(len(latent))
    return stage_c.predict_with_features(noised, _r(logsnr, noised), held, control=control)[1]


@dataclass(frozen=True)
class Guided:
    """Conditions, guidance and entries of the high-resolution pass.

    One picture's entries are both halves', and so is its guidance, or a share of it in the second.
    """

    conditions: StageCConditions
    guidance: PreparedGuidance | None
    entries: PassEntries | None = None

    def first(self, count: int) -> Guided:
        """Those of the first `count` samples (the conditional half)."""
        return self.part(slice(count), slice(None))

    def part(self, samples: slice, rows: slice) -> Guided:
        """Those of some samples and rows of the map."""
        guidance = None if self.guidance is None else self.guidance.part(samples, rows)
        entries = None if self.entries is None else self.entries.of_rows(rows)
        return Guided(self.conditions.part(samples, rows), guidance, entries)

    def control_at(self, t: float, count: int) -> Maps | None:
        """The entries that are added at time t, for so many samples."""
        return None if self.entries is None else _of_samples(self.entries.at(t), count)


def high_resolution_pass(
    stage_c: StageC,
    conditions: StageCConditions,
    guidance: PreparedGuidance | None,
    target: Target,
    plan: Plan,
    settings: Settings,
    noise: NoiseSource | NoiseSources,
    on_step: OnStep | None = None,
    split: Split | None = None,
    start: Start | None = None,
    controls: Sequence[Entries] = (),
    recordings: Recordings | None = None,
) -> Sampled:
    """Denoise a latent at the asked resolution, guided in both halves at every step (section 3.2).

    The entries of those `controls` that act here are resized to its maps. `recordings` run the steps where
    these are short.
    """
    entries = PassEntries.of([control for control in controls if control.hr], stage_c, plan.hr_latent)
    inner = InnerMaps(settings.reuse) if settings.reuse > 1 else None

    shares = None if split is None else split.shares(stage_c, plan.hr_latent[0])

    networks = [stage_c] if guidance is None else [stage_c, *guidance.blocks]
    alone, pixels = inner is None and shares is None, noise.count * plan.height * plan.width
    recorded = of_short_steps(recordings, pixels, settings, noise.device, networks) if alone else None
    step_of = partial(high_step, stage_c, inner=inner)

    def predict(x: Tensor, time: Times, held: Guided, step: Step) -> Tensor:
        inputs = held.conditions, held.guidance, held.control_at(step.t, len(x))
        return predicted(recorded, step_of, (x, time), inputs)

    times = pass_steps(settings, False, start)
    x = _begun(start, noise, plan.hr_latent, times)
    denoise = denoiser(
        in_halves(predict, Guided(conditions, guidance, entries), stage_c, times, noise.device, shares),
        target,
        settings.cfg_high,
    )
    with products_in_fp8(stage_c, settings.fp8):
        return _sample_stage_c(_holding(denoise, start), x, times, settings, noise, on_step)


def _sample_stage_c(
    denoise: Denoise,
    x: Tensor,
    times: Sequence[Step],
    settings: Settings,
    noise: NoiseSource | NoiseSources,
    on_step: OnStep | None,
) -> Sampled:
    return sample(denoise, x, times, sampler_named(settings.sampler), noise.like, on_step)


# --- Stage B and Stage A --------------------------------------------------------------------------


def stage_b_pass(
    stage_b: StageB,
    latent: Tensor,
    pooled: Tensor,
    target: Target,
    plan: Plan,
    settings: Settings,
    noise: NoiseSource | NoiseSources,
    on_step: OnStep | None = None,
    split: Split | None = None,
    recordings: Recordings | None = None,
) -> Sampled:
    """Denoise Stage B's latent under Stage C's (1, 16, h, w) and the pooled texts [conditional, empty].

    The unconditional half gets a latent of zeros and the empty prompt. `recordings` run the steps where these
    are short.
    """
    dtype = next(stage_b.parameters()).dtype
    latent = latent.to(dtype)
    effnet = torch.cat([latent, torch.zeros_like(latent)])[: len(pooled)]
    conditions = stage_b.prepare(plan.stage_b_latent, effnet, pooled.to(dtype))

    def predict(x: Tensor, time: Times, held: StageBConditions, _: Step) -> Tensor:
        return predicted(recorded, partial(step_b, stage_b), (x, time), held)

    x = noise.draw(noise.count, B_LATENT, *plan.stage_b_latent)
    times = steps(cosine, settings.steps_b)
    shares = None if split is None else split.shares(stage_b, plan.stage_b_latent[0])
    alone, pixels = shares is None, noise.count * plan.height * plan.width
    recorded = of_short_steps(recordings, pixels, settings, noise.device, [stage_b]) if alone else None
    halves = in_halves(predict, conditions, stage_b, times, noise.device, shares)
    denoise = denoiser(halves, target, settings.cfg_stage_b)
    with products_in_fp8(stage_b, settings.fp8):
        return sample(denoise, x, times, sampler_named(settings.sampler_b), noise.like, on_step)


def needs_unconditional(
    settings: Settings, low: Start | None = None, high: Start | None = None
) -> tuple[bool, bool]:
    """Whether any step of Stage C, and of Stage B, computes the unconditional half.

    `low` and `high` are where the passes begin.
    """
    passes = [(settings.cfg_low, pass_steps(settings, True, low))]
    if not settings.lr_only:
        passes.append((settings.cfg_high, pass_steps(settings, False, high)))
    needed = any(cfg.needed_at(step.t) for cfg, times in passes for step in times)
    return needed, settings.cfg_stage_b.needed_at(1.0)


def decode_picture(
    stage_a: StageA,
    latent: Tensor,
    plan: Plan,
    tiled: bool,
    tile: int | None = None,
    tf32: bool = True,
    to_host: bool = False,
) -> Tensor:
    """Stage B's latent (1, 4, h, w) -> pixels (3, height, width) in [0, 1], cropped to the asked size.

    What has more than `tile` latent pixels a side (None: MAX_TILE) is decoded in tiles. `tf32` lets a GPU
    multiply in TF32, 1e-4 off at most. `to_host` puts the picture into the CPU's memory, where a GPU writes
    it without a copy in between.
    """
    tile = MAX_TILE if tile is None else tile
    latent = latent.to(next(stage_a.parameters()).dtype)
    with tensor_float32(tf32 and of_nvidia(latent.device)):
        if tiled or max(latent.shape[-2:]) > tile:
            shape = stage_a.picture_shape(latent)
            if to_host:
                pixels = host_memory(shape, latent.dtype, pinned=latent.is_cuda)
            else:
                pixels = latent.new_empty(shape)
            stage_a.decode_tiled(latent, tile, out=pixels)
        else:
            pixels = stage_a.decode(latent).clamp(0, 1)
    return pixels[0, :, : plan.height, : plan.width]


@contextmanager
def tensor_float32(allowed: bool) -> Iterator[None]:
    """Within it, CUDA multiplies float32 in TF32 if that is allowed; after it, as before."""
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn.conv) if allowed else ()
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "tf32"
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision
