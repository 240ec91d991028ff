"""Sampling: the steps of a pass, the update rules, the loop that all passes share, and guidance (cfg)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from gdf.cfg import CfgSettings
from gdf.names import check_name
from gdf.scalers import Scaler, variance_preserving
from gdf.schedules import Schedule, Spacing, logsnr_at, uniform
from gdf.targets import Target

FEW_STEPS = 15  # below this, DPM-Solver++(2M) takes its last step in first order


# --- steps ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step of a pass, from time t to t_next; the tensors are scalars (shape ()) in float32."""

    index: int
    count: int
    t: float
    t_next: float
    logsnr: Tensor
    logsnr_next: Tensor
    a: Tensor
    b: Tensor
    a_next: Tensor
    b_next: Tensor

    @property
    def is_last(self) -> bool:
        """Whether this step's x0 estimate is the one a pass hands on."""
        return self.index == self.count - 1


def steps(
    schedule: Schedule,
    count: int,
    shift: float = 1.0,
    scaler: Scaler = variance_preserving,
    device: torch.device | str = "cpu",
    start: float = 1.0,
    spacing: Spacing = uniform,
) -> list[Step]:
    """The `count` steps between count + 1 times from 1, or from `start`, to 0, equally spaced by default.

    Scalars on the CPU combine with tensors of any device without a wait, so leave them there in general.
    Raises ValueError for a count below 1, a shift that is not positive, or a start outside (0, 1].
    """
    if count < 1:
        raise ValueError(f"the number of sampling steps is {count}, but must be at least 1")
    if not 0 < start <= 1:
        raise ValueError(f"sampling starts at the time {start}, but that must be above 0 and at most 1")
    times = spacing(schedule, start, count)
    logsnr = logsnr_at(schedule, times, shift)
    a, b = scaler(logsnr)
    t, logsnr, a, b = times.tolist(), logsnr.to(device), a.to(device), b.to(device)
    return [
        Step(i, count, t[i], t[i + 1], logsnr[i], logsnr[i + 1], a[i], b[i], a[i + 1], b[i + 1])
        for i in range(count)
    ]


# --- update rules ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What the network makes of a noisy latent: the clean latent and the noise in it, both shaped like it."""

    x0: Tensor
    epsilon: Tensor


Denoise = Callable[[Tensor, Step], Estimate]
Noise = Callable[[Tensor], Tensor]  # standard normal noise shaped like its argument
History = tuple[Estimate, Step] | None  # the step before, None at the first
Ahead = Callable[[Tensor], Estimate]  # what the network makes of an x at t_next; not at the last step
Rule = Callable[[Tensor, Estimate, Step, History, Noise, Ahead], Tensor]  # (x, …) -> x at t_next


def ddim_with(eta: float) -> Rule:
    """DDIM with `eta` from 0 (deterministic) to 1 (ancestral) (arXiv 2010.02502, eq. 12 and 16).

    Raises ValueError for any other eta.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"DDIM's eta is {eta}, but must lie between 0 (deterministic) and 1 (ancestral)")

    def rule(
        _x: Tensor,
        estimate: Estimate,
        step: Step,
        _history: History,
        noise: Noise,
        _ahead: Ahead | None = None,
    ) -> Tensor:
        # b'²·fresh is sigma² = eta²·b'²/b²·(1 - a²/a'²) where a² + b² = 1, in the form that holds for every
        # scaler and does not round below zero. A mixed schedule may step back in places, hence the clamp.
        fresh = eta**2 * -torch.expm1(step.logsnr - step.logsnr_next).clamp(max=0)
        x_next = step.a_next * estimate.x0 + step.b_next * (1 - fresh).sqrt() * estimate.epsilon
        return x_next + step.b_next * fresh.sqrt() * noise(estimate.x0) if eta > 0 else x_next

    return rule


ddpm: Rule = ddim_with(1.0)  # arXiv 2006.11239; the published sampler, with noise also at the last step
ddim: Rule = ddim_with(0.0)


def lcm(
    _x: Tensor, estimate: Estimate, step: Step, _history: History, noise: Noise, _ahead: Ahead | None = None
) -> Tensor:
    """Multistep consistency sampling: noises the clean estimate anew (arXiv 2310.04378, alg. 3)."""
    return step.a_next * estimate.x0 + step.b_next * noise(estimate.x0)


def dpmpp_2m(
    x: Tensor, estimate: Estimate, step: Step, history: History, _noise: Noise, _ahead: Ahead | None = None
) -> Tensor:
    """DPM-Solver++(2M): second order from the x0 estimates of two steps (arXiv 2211.01095, alg. 2)."""
    h = (step.logsnr_next - step.logsnr) / 2
    x0 = estimate.x0
    if history is not None and not (step.is_last and step.count < FEW_STEPS):
        previous, previous_step = history
        h_previous = (previous_step.logsnr_next - previous_step.logsnr) / 2
        if h_previous > 0:  # a shift can clamp the first times to one logSNR
            x0 = x0 + h / (2 * h_previous) * (x0 - previous.x0)
    return step.b_next / step.b * x - step.a_next * torch.expm1(-h) * x0


def heun(
    _x: Tensor, estimate: Estimate, step: Step, _history: History, _noise: Noise, ahead: Ahead
) -> Tensor:
    """Heun's second order with two evaluations a step, one at the last (arXiv 2206.00364, alg. 1)."""
    x_next = step.a_next * estimate.x0 + step.b_next * estimate.epsilon  # Euler in x / a over b / a
    if step.is_last:
        return x_next
    change = ahead(x_next).epsilon - estimate.epsilon
    return x_next + (step.b_next - step.a_next * step.b / step.a) / 2 * change


SAMPLERS: Mapping[str, Rule] = MappingProxyType(
    {"ddpm": ddpm, "ddim": ddim, "lcm": lcm, "dpmpp_2m": dpmpp_2m, "heun": heun}
)


def sampler_named(name: str) -> Rule:
    """The update rule of this name; raises ValueError for an unknown one."""
    check_name("sampler", name, tuple(SAMPLERS))
    return SAMPLERS[name]


# --- the loop -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampled:
    """The end of a pass: x at t = 0, and the last step's clean estimate, which is what a pass hands on."""

    x: Tensor
    x0: Tensor


def _ahead(denoise: Denoise, dtype: torch.dtype, after: Step | None, x_next: Tensor) -> Estimate:
    assert after is not None, "nothing is evaluated after the last step"
    return denoise(x_next.to(dtype), after)


def sample(
    denoise: Denoise,
    x: Tensor,
    steps: Sequence[Step],
    rule: Rule = ddpm,
    noise: Noise = torch.randn_like,
    callback: Callable[[Step, Estimate], None] | None = None,
) -> Sampled:
    """Takes x (B, …), noise at t = 1, through the steps; `callback` runs after each of them.

    x keeps its dtype. `noise(like)` gives standard normal noise shaped and placed like its argument.
    """
    assert steps, "a pass needs at least one step"
    history: History = None
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        estimate = denoise(x, step)

        x = rule(x, estimate, step, history, noise, partial(_ahead, denoise, x.dtype, after)).to(x.dtype)
        history = (estimate, step)
        if callback is not None:
            callback(step, estimate)
    return Sampled(x=x, x0=estimate.x0)


# --- classifier-free guidance -----------------------------------------------------------------------


def combine_cfg(conditional: Tensor, unconditional: Tensor, weight: float, rho: float) -> Tensor:
    """Guided prediction from both halves (B, …), its deviation drawn to the conditional one's by `rho`.

    The deviation is per sample, so that a picture does not depend on its batch (arXiv 2305.08891, sec. 3.4).
    """
    guided = unconditional + weight * (conditional - unconditional)
    axes = tuple(range(1, guided.ndim))
    wanted, found = conditional.std(axes, keepdim=True), guided.std(axes, keepdim=True)
    ratio = torch.where(found > 0, wanted / found, 1.0)  # (B, 1, …)
    return guided * (rho * ratio + 1 - rho)


def denoiser(predict: Callable[[Tensor, Step, bool], Tensor], target: Target, cfg: CfgSettings) -> Denoise:
    """Hides network, guidance and target behind one `denoise(x, step)`.

    `predict(x, step, both)` gets x (B, …) and returns the conditional prediction (B, …) or, where `both`, the
    conditional and the unconditional one stacked (2B, …). What follows is computed in x's dtype.
    """

    def denoise(x: Tensor, step: Step) -> Estimate:
        both = cfg.needed_at(step.t)
        prediction = predict(x, step, both).to(x.dtype)
        assert len(prediction) == len(x) * (2 if both else 1), "the prediction has the wrong number of halves"
        if both:
            conditional, unconditional = prediction.chunk(2)
            prediction = combine_cfg(conditional, unconditional, cfg.weight_at(step.t), cfg.rho)
        return Estimate(
            x0=target.x0(x, prediction, step.a, step.b),
            epsilon=target.epsilon(x, prediction, step.a, step.b),
        )

    return denoise
