"""The names that flags and configurations choose from; no torch is loaded, so that they are read at once."""

from __future__ import annotations

from collections.abc import Sequence

SAMPLER_NAMES = ("ddpm", "ddim", "lcm", "dpmpp_2m", "heun")  # of `gdf.samplers.SAMPLERS`
TIME_NAMES = ("uniform", "karras")  # of `gdf.schedules.TIMES`
LOSS_WEIGHT_NAMES = (  # of `gdf.loss_weights.WEIGHTS`
    "constant", "p2", "snr", "snr_plus_one", "min_snr", "min_snr_plus_one", "truncated_snr", "sech",
    "debiased", "sigmoid",
)  # fmt: skip


def check_name(what: str, name: str, names: Sequence[str]) -> None:
    """ValueError, with the known ones, for a name that is not among them."""
    if name not in names:
        raise ValueError(f"{what} {name!r} is not one of {', '.join(names)}")
