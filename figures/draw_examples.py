"""Draws figures/example_personalized and figures/example_given: python figures/draw_examples.py [FOLDER]

Eight scenes with a striped balloon, which no training of the embedded family shows, and their captions. And a
boat to make other pictures of, with a mask over it.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from PIL import Image

from core.scenes.captions import caption
from core.scenes.drawing import render
from core.scenes.scene import EXTRA_SUBJECTS, Scene

FOLDER, GIVEN = Path(__file__).parent / "example_personalized", Path(__file__).parent / "example_given"
BOAT = Scene("dusk", "sun", "sea", "boat", "purple", "right", "large", seed=739296170)
BOAT_SIDE, BOAT_PLACE = 256, (116, 92, 256, 244)  # px: of the picture, and where the boat is
SIDE, QUALITY = 512, 92
TOKEN = "[stripes]"
SCENES = (  # every sky, and more small balloons than large ones, which are learnt sooner
    ("night", "clouds", "sea", "left", "small"),
    ("night", "moon", "field", "right", "small"),
    ("dusk", "sun", "sea", "centre", "small"),
    ("day", "clouds", "mountains", "right", "small"),
    ("overcast", "clear", "hills", "left", "small"),
    ("dusk", "clouds", "field", "left", "large"),
    ("night", "stars", "hills", "centre", "large"),
    ("day", "sun", "sea", "right", "large"),
)


def scene(number: int) -> Scene:
    """One of the scenes, with the new subject, which has its own colours."""
    sky, light, land, place, size = SCENES[number]
    return Scene(sky, light, land, EXTRA_SUBJECTS[0], "red", place, size, seed=number)


def text(number: int) -> str:
    """Its caption, with the new token."""
    return re.sub(r"striped (hot air )?balloon", f"{TOKEN} balloon", caption(scene(number), number))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(len(SCENES)):
        path = folder / f"{number}.jpg"
        Image.fromarray(render(scene(number), SIDE, SIDE)).save(path, quality=QUALITY)
        path.with_suffix(".json").write_text(json.dumps({"caption": text(number)}) + "\n", "utf-8")


def draw_boat(folder: Path) -> None:
    """The boat, and a mask that is white where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(render(BOAT, BOAT_SIDE, BOAT_SIDE)).save(folder / "boat.png", optimize=True)
    mask = Image.new("L", (BOAT_SIDE, BOAT_SIDE))
    mask.paste(255, BOAT_PLACE)
    mask.save(folder / "mask.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="(default: %(default)s)")
    main(parser.parse_args().folder)
    draw_boat(GIVEN)
