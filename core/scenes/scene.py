"""A procedural world of small captioned landscapes: what a scene is, its labels, its splits.

A scene is seven attributes and a seed for everything else (the shapes of hills, the jitter of places). It
is drawn at any resolution from the same description, with detail that only shows at high resolution, so a
small family of models can be trained, and judged attribute by attribute, without any collected pictures.
All functions are plain and deterministic, so they work in the worker processes of a data loader.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "sky": ("day", "dusk", "night", "overcast"),
    "light": ("sun", "moon", "stars", "clouds", "clear"),
    "land": ("mountains", "hills", "sea", "field"),
    "subject": ("house", "tree", "boat", "lighthouse", "windmill", "balloon"),
    "colour": ("red", "yellow", "blue", "purple", "pink", "white"),
    "place": ("left", "centre", "right"),
    "size": ("small", "large"),
}
SAMPLED = ATTRIBUTES["subject"]
EXTRA_SUBJECTS: tuple[str, ...] = ("striped balloon",)  # never sampled: kept for personalisation
LIGHTS: dict[str, tuple[str, ...]] = {  # what can stand in which sky; an overcast sky is plain grey if clear
    "day": ("sun", "clouds", "clear"),
    "dusk": ("sun", "moon", "clouds"),
    "night": ("moon", "stars", "clouds"),
    "overcast": ("clouds", "clear"),
}
SPLITS = ("train", "held_out")
ONE_IN = 10  # the share of held-out combinations of subject, colour, land and sky


@dataclass(frozen=True)
class Scene:
    """One picture's description: a value of each attribute, and the seed of all that they leave open.

    ValueError for a value that is not in ATTRIBUTES, a light that its sky does not have, a boat off the sea.
    """

    sky: str
    light: str
    land: str
    subject: str
    colour: str  # of the subject's main body; an extra subject has its own colours and ignores it
    place: str
    size: str
    seed: int

    def __post_init__(self) -> None:
        for name in ATTRIBUTES:
            _check(name, getattr(self, name), _values(name))
        _check(f"light of a {self.sky} sky", self.light, LIGHTS[self.sky])
        _check(f"land of a {self.subject}", self.land, _lands(self.subject))
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed {self.seed!r} is not a whole number of at least 0")


def sample_scene(seed: int, split: str = "train", subjects: Sequence[str] = SAMPLED) -> Scene:
    """The scene of a seed: every attribute is drawn evenly from what the earlier ones leave possible.

    split: "train", or "held_out" for combinations of attributes that the other never shows (is_held_out).
    subjects: what to draw from; one that is given twice comes twice as often. ValueError for another split.
    """
    _check("split", split, SPLITS)
    draw = random.Random(f"{split}/{seed}")
    while True:
        subject = draw.choice(subjects)
        sky = draw.choice(ATTRIBUTES["sky"])
        scene = Scene(
            sky=sky,
            light=draw.choice(LIGHTS[sky]),
            land=draw.choice(_lands(subject)),
            subject=subject,
            colour=draw.choice(ATTRIBUTES["colour"]),
            place=draw.choice(ATTRIBUTES["place"]),
            size=draw.choice(ATTRIBUTES["size"]),
            seed=draw.getrandbits(31),
        )
        if is_held_out(scene) == (split == "held_out"):
            return scene


def is_held_out(scene: Scene) -> bool:
    """Whether training never shows the scene's subject, colour, land and sky together.

    About one combination in ten is held out. Training still shows every value, and every two together.
    """
    together = f"{scene.sky}-{scene.land}-{scene.colour}-{scene.subject}"
    return scene.subject not in EXTRA_SUBJECTS and zlib.crc32(together.encode()) % ONE_IN == 0


def labels(scene: Scene) -> tuple[int, ...]:
    """The index of every attribute's value, in the order of ATTRIBUTES; extra subjects follow the others."""
    return tuple(_values(name).index(getattr(scene, name)) for name in ATTRIBUTES)


def _values(name: str) -> tuple[str, ...]:
    return ATTRIBUTES[name] + (EXTRA_SUBJECTS if name == "subject" else ())


def _lands(subject: str) -> tuple[str, ...]:
    return ("sea",) if subject == "boat" else ATTRIBUTES["land"]


def _check(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(allowed)}")
