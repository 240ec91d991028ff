"""Draws the pictures of figures/example_personalized: python figures/draw_examples.py [FOLDER]

Eight scenes with a striped balloon, which no training of the embedded family shows, and their captions.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

from PIL import Image

from core.data.scenes import EXTRA_SUBJECTS, Scene, caption, render, sample_scene

FOLDER = Path(__file__).parent / "example_personalized"
COUNT, SIDE, QUALITY = 8, 512, 92
TOKEN = "[stripes]"
FIRST = 42  # scene; in the eight from it on lands, skies, places and sizes are well mixed


def scene(number: int) -> Scene:
    """A scene of the training world with the new subject in the place of its own."""
    return replace(sample_scene(FIRST + number), subject=EXTRA_SUBJECTS[0])


def text(number: int) -> str:
    """Its caption, with the new token."""
    return re.sub(r"striped (hot air )?balloon", f"{TOKEN} balloon", caption(scene(number), number))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(COUNT):
        path = folder / f"{number}.jpg"
        Image.fromarray(render(scene(number), SIDE, SIDE)).save(path, quality=QUALITY)
        path.with_suffix(".json").write_text(json.dumps({"caption": text(number)}) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
