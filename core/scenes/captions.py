"""Captions of scenes: plain English sentences that state their attributes."""

from __future__ import annotations

import random

from core.scenes.scene import EXTRA_SUBJECTS, Scene

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
