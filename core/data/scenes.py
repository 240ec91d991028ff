"""A procedural world of small captioned landscapes: what a scene is, its labels, its captions, its splits.

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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "sky": ("day", "dusk", "night", "overcast"),
    "light": ("sun", "moon", "stars", "clouds", "clear"),
    "land": ("mountains", "hills", "sea", "field"),
    "subject": ("house", "tree", "boat", "lighthouse", "windmill", "balloon"),
    "colour": ("red", "yellow", "blue", "purple", "pink", "white"),
    "place": ("left", "centre", "right"),
    "size": ("small", "large"),
}
EXTRA_SUBJECTS: tuple[str, ...] = ("striped balloon",)  # never sampled: kept for personalisation
LIGHTS: dict[str, tuple[str, ...]] = {  # what can stand in which sky; an overcast sky is plain grey if clear
    "day": ("sun", "clouds", "clear"),
    "dusk": ("sun", "moon", "clouds"),
    "night": ("moon", "stars", "clouds"),
    "overcast": ("clouds", "clear"),
}
SPLITS = ("train", "held_out")
ONE_IN = 10  # the share of held-out combinations of subject, colour, land and sky

SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
SUBJECTS = {
    "house": ("house", "cottage"),
    "tree": ("tree",),
    "boat": ("boat", "sailing boat"),
    "lighthouse": ("lighthouse",),
    "windmill": ("windmill",),
    "balloon": ("balloon", "hot air balloon"),
    "striped balloon": ("striped balloon", "striped hot air balloon"),
}
PLACES = {
    "left": ("on the left", "on the left side", "to the left", "at the left"),
    "centre": ("in the centre", "in the middle", "at the centre", "in the very middle"),
    "right": ("on the right", "on the right side", "to the right", "at the right"),
}
LANDS = {
    "mountains": ("snowy mountains", "high mountains", "mountains with snow"),
    "hills": ("green hills", "rolling hills", "soft green hills"),
    "sea": ("the wide sea", "the open sea", "the sea"),
    "field": ("a golden field", "a wide field", "a field of wheat"),
}
WHERE = {  # between subject and land; what stands on the sea stands on an island
    "mountains": ("in front of", "before", "below"),
    "hills": ("on", "among"),
    "sea": ("on an island in", "on a grassy island in"),
    "field": ("in", "on"),
}
AFLOAT = {"boat": ("on", "out on"), "balloon": ("over", "above", "floating over", "high above")}
SKIES = {
    ("day", "sun"): ("on a sunny day", "in the day under a bright sun", "by day with the sun in the sky"),
    ("day", "clouds"): ("on a bright day with clouds", "by day under puffy clouds", "on a cloudy day"),
    ("day", "clear"): ("on a clear day", "by day under a clear sky", "on a day with a clear bright sky"),
    ("dusk", "sun"): (
        "at dusk with a low sun",
        "in the evening under the sun",
        "at dusk under the setting sun",
    ),
    ("dusk", "moon"): (
        "at dusk under the moon",
        "in the evening with a moon",
        "at dusk with a crescent moon",
    ),
    ("dusk", "clouds"): ("at dusk with soft clouds", "on a cloudy evening", "at dusk under clouds"),
    ("night", "moon"): ("on a moonlit night", "at night under the moon", "at night with a crescent moon"),
    ("night", "stars"): (
        "under a starry night sky",
        "at night under bright stars",
        "at night with many stars",
    ),
    ("night", "clouds"): ("on a cloudy night", "at night under clouds", "at night with soft clouds"),
    ("overcast", "clouds"): (
        "on an overcast day with heavy clouds",
        "under grey clouds in an overcast sky",
        "in grey weather with dark clouds",
    ),
    ("overcast", "clear"): (
        "under a plain grey sky",
        "under an even grey sky",
        "on an overcast day with a plain sky",
    ),
}
TEMPLATES = (
    "{what} {place} {land}, {sky}",
    "{what} {land} {sky}, {place}",
    "{what} {place}, {land}, {sky}",
    "{sky}, {what} {land}, {place}",
    "{sky}: {what} {place}, {land}",
    "{place}, {what} {land}, {sky}",
    "{place} there is {what} {land} {sky}",
    "a picture of {what} {land} {sky}, {place}",
    "a landscape {sky} with {what} {place}, {land}",
    "there is {what} {place}, {land}, {sky}",
)


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


def sample_scene(seed: int, split: str = "train", subjects: Sequence[str] = ATTRIBUTES["subject"]) -> Scene:
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


def caption(scene: Scene, seed: int, with_colour: bool = True) -> str:
    """A plain English sentence of at most 40 lower-case words that states all attributes.

    seed: chooses the words and their order. with_colour: False leaves out the subject's colour. That of an
    extra subject is never stated, as it has its own.
    """
    draw = random.Random(f"caption/{seed}")
    named = scene.subject in EXTRA_SUBJECTS
    adjectives = draw.choice(SIZES[scene.size]) + (f" {scene.colour}" if with_colour and not named else "")
    kind = "balloon" if named else scene.subject
    sea = scene.land == "sea"
    where = AFLOAT[kind] if kind in AFLOAT and (sea or kind == "balloon") else WHERE[scene.land]
    return draw.choice(TEMPLATES).format(
        what=f"a {adjectives} {draw.choice(SUBJECTS[scene.subject])}",
        place=draw.choice(PLACES[scene.place]),
        land=f"{draw.choice(where)} {draw.choice(LANDS[scene.land])}",
        sky=draw.choice(SKIES[scene.sky, scene.light]),
    )


def render(
    scene: Scene, height: int, width: int, window: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """The picture of a scene, (height, width, 3) uint8 RGB: the same one at any size, but for antialiasing.

    A wider picture shows more of the land. `window` (top, left, height, width) cuts out a part. ValueError
    for sides below 16 pixels, ImportError without skia.
    """
    if min(height, width) < 16:
        raise ValueError(f"{height} x {width} pixels are too few for a scene: both sides need at least 16")
    try:
        from core.data.scene_drawing import draw  # here, as only drawing needs skia
    except ModuleNotFoundError as error:
        if error.name == "skia":
            raise ImportError("scenes are drawn with skia-python: pip install skia-python") from error
        raise
    return draw(scene, height, width, window or (0, 0, height, width))


def _values(name: str) -> tuple[str, ...]:
    return ATTRIBUTES[name] + (EXTRA_SUBJECTS if name == "subject" else ())


def _lands(subject: str) -> tuple[str, ...]:
    return ("sea",) if subject == "boat" else ATTRIBUTES["land"]


def _check(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(allowed)}")
