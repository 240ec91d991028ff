"""Where the weights of the stages rest while they do not compute, by name."""

from __future__ import annotations

AUTO, NONE, STAGE, BLOCK = "auto", "none", "stage", "block"
MODES = (NONE, STAGE, BLOCK)  # from the fastest to the one that takes the least memory
OFFLOAD_NAMES = (AUTO, *MODES)


def offload_named(name: str, resident: bool = False) -> str:
    """The mode of this name; `resident` stands for none. ValueError for an unknown one, or for two."""
    if name not in OFFLOAD_NAMES:
        raise ValueError(f"offload must be one of {', '.join(OFFLOAD_NAMES)}, not {name!r}")
    if resident and name not in (AUTO, NONE):
        raise ValueError(f"resident=True is another name of offload='none', but offload is {name!r}: use one")
    return NONE if resident else name


def smaller(mode: str) -> str | None:
    """The mode that takes less memory than this one; None for the last."""
    place = MODES.index(mode) + 1 if mode in MODES else MODES.index(BLOCK)
    return MODES[place] if place < len(MODES) else None
