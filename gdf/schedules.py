"""Noise schedules: time t (1 = pure noise, 0 = clean) to logSNR = ln(a² / b²), in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from gdf.loss_weights import LossBuckets
from gdf.names import check_name

Schedule = Callable[[Tensor], Tensor]

COSINE_S = 0.008
VARIANCE_RANGE = (1e-4, 0.9999)
RECTIFIED_RANGE = 15.0
EDM_SIGMA_MAX, EDM_SIGMA_MIN, EDM_RHO = 80.0, 0.002, 7.0
EDM_LOG_SIGMA_MEAN, EDM_LOG_SIGMA_STD = 1.2, 1.2
LINEAR_RANGE = 10.0
SD_BETA_START, SD_BETA_END, SD_TABLE_POINTS = 0.00085, 0.012, 1001
ADAPTIVE_BUCKETS, ADAPTIVE_RANGE = 100, 10.0
TIME_MIN = 0.001
KARRAS_RHO = 7.0
HALVINGS = 40  # of the times between which a schedule is searched; float32 has no finer ones


# --- schedules ------------------------------------------------------------------------------------


def _logsnr_of_variance(variance: Tensor) -> Tensor:
    variance = variance.clamp(*VARIANCE_RANGE)
    return (variance / (1 - variance)).log()


def cosine_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """The cosine schedule's s and its unscaled signal variance at t = 0, scalars."""
    # float32: the network sees 10000 r, where a last bit shows. Filled, as a GPU waits for what is copied.
    s = torch.full((), COSINE_S, device=device)
    return s, torch.cos(s / (1 + s) * math.pi / 2) ** 2


def cosine(t: Tensor) -> Tensor:
    """The published schedule: squared cosine of t, any shape (arXiv 2102.09672, eq. 17)."""
    s, variance_at_zero = cosine_constants(t.device)
    return _logsnr_of_variance(torch.cos((s + t) / (1 + s) * math.pi / 2) ** 2 / variance_at_zero)


def tan_cosine(t: Tensor, logsnr_range: float = 15.0) -> Tensor:
    """The cosine schedule written with a tangent, from -logsnr_range at t = 1 to +logsnr_range at t = 0."""
    start = math.atan(math.exp(-logsnr_range / 2))
    end = math.atan(math.exp(logsnr_range / 2))
    return -2 * torch.tan(start + t * (end - start)).log()


def square_root(t: Tensor) -> Tensor:
    """Signal variance 1 - sqrt(t), any shape."""
    return _logsnr_of_variance(1 - (t + 1e-4).sqrt())


def rectified_flow(t: Tensor) -> Tensor:
    """The straight path a = 1 - t, b = t, clamped to ±15 (arXiv 2209.03003)."""
    return ((1 - t) ** 2 / t**2).log().clamp(-RECTIFIED_RANGE, RECTIFIED_RANGE)


def edm(t: Tensor) -> Tensor:
    """EDM's sampling noise levels, sigma from 80 to 0.002 (arXiv 2206.00364, eq. 5)."""
    largest = EDM_SIGMA_MAX ** (1 / EDM_RHO)
    smallest = EDM_SIGMA_MIN ** (1 / EDM_RHO)
    return -2 * EDM_RHO * (largest + (1 - t) * (smallest - largest)).log()


def linear(t: Tensor) -> Tensor:
    """Linear in logSNR, from -10 at t = 1 to 10 at t = 0."""
    return LINEAR_RANGE - 2 * LINEAR_RANGE * t


def stable_diffusion(t: Tensor) -> Tensor:
    """Stable Diffusion's table of cumulated betas, interpolated linearly at t in [0, 1]."""
    x = torch.linspace(0, 1, SD_TABLE_POINTS, device=t.device)
    betas = (math.sqrt(SD_BETA_START) * (1 - x) + math.sqrt(SD_BETA_END) * x) ** 2
    table = (1 - betas).cumprod(0)
    position = t * (SD_TABLE_POINTS - 1)
    below = position.long().clamp(0, SD_TABLE_POINTS - 2)
    return torch.logit(table[below].lerp(table[below + 1], position - below))


def interpolate(first: Schedule, second: Schedule) -> Schedule:
    """A schedule that is `first` at t = 1 and `second` at t = 0, mixed linearly between."""
    return lambda t: first(t) * t + second(t) * (1 - t)


def logsnr_at(schedule: Schedule, t: Tensor, shift: float = 1.0) -> Tensor:
    """LogSNR at the times t (any shape), lowered by 2 ln(shift) and clamped to the unshifted schedule's ends.

    A shift above 1 spends more steps at high noise, as larger pictures need (arXiv 2301.11093, sec. 3.1).
    Raises ValueError where the shift is not positive.
    """
    if not shift > 0:
        raise ValueError(f"the schedule's shift is {shift}, but must be above 0 (1 is no shift)")
    at_noise, at_clean = schedule(torch.tensor([1.0, 0.0], device=t.device))
    return (schedule(t) - 2 * math.log(shift)).clamp(at_noise, at_clean)


# --- sampling times -------------------------------------------------------------------------------

Spacing = Callable[[Schedule, float, int], Tensor]  # (schedule, start, count) -> falling times (count + 1,)


def uniform(_schedule: Schedule, start: float, count: int) -> Tensor:
    """Equally spaced times from `start` to 0."""
    return torch.linspace(start, 0, count + 1)


def karras(schedule: Schedule, start: float, count: int) -> Tensor:
    """Times from `start` to 0 at which sigma^(1/7) is equally spaced (arXiv 2206.00364, eq. 5).

    Sigma is the noise level b / a of the schedule, without a shift.
    """
    largest, smallest = (-schedule(torch.tensor([start, 0.0])) / (2 * KARRAS_RHO)).exp().tolist()
    roots = torch.linspace(largest, smallest, count + 1)
    times = time_at(schedule, -2 * KARRAS_RHO * roots.log())
    times[0], times[-1] = start, 0.0
    return times


TIMES: Mapping[str, Spacing] = MappingProxyType({"uniform": uniform, "karras": karras})


def times_named(name: str) -> Spacing:
    """The spacing of this name; raises ValueError for an unknown one."""
    check_name("spacing of times", name, tuple(TIMES))
    return TIMES[name]


def time_at(schedule: Schedule, logsnr: Tensor) -> Tensor:
    """The times in [0, 1] at which a schedule that falls has these logSNR (any shape)."""
    low, high = torch.zeros_like(logsnr), torch.ones_like(logsnr)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        later = schedule(middle) > logsnr
        low, high = torch.where(later, middle, low), torch.where(later, high, middle)
    return (low + high) / 2


# --- training times -------------------------------------------------------------------------------
# Random numbers are drawn on the CPU and then moved, so that every device sees the same ones.


def draw_times(count: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """`count` training times (count,), uniform in [0.001, 1], from a CPU generator."""
    u = torch.rand(count, generator=generator)
    return (1 - u + TIME_MIN).clamp(TIME_MIN, 1.0).to(device)


def draw_edm_logsnr(count: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """`count` training logSNR (count,), as EDM with ln(sigma) normal around 1.2, from a CPU generator."""
    log_sigma = EDM_LOG_SIGMA_STD * torch.randn(count, generator=generator) + EDM_LOG_SIGMA_MEAN
    return (-2 * log_sigma).to(device)


class AdaptiveSchedule(LossBuckets):
    """Draws training logSNR in ±10 more often where the running mean of the loss is higher (100 buckets)."""

    def __init__(self, device: torch.device | str = "cpu"):
        edges = torch.linspace(-ADAPTIVE_RANGE, ADAPTIVE_RANGE, ADAPTIVE_BUCKETS + 1)
        super().__init__(edges[1:-1], device)  # the outermost buckets take what lies beyond the range

    def draw(self, count: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
        """`count` logSNR (count,): a bucket by its mean loss, then uniform inside, from a CPU generator."""
        bucket = torch.multinomial(self.mean.cpu(), count, replacement=True, generator=generator)
        width = 2 * ADAPTIVE_RANGE / ADAPTIVE_BUCKETS
        return ((bucket + torch.rand(count, generator=generator)) * width - ADAPTIVE_RANGE).to(device)
