"""Makes the embedded family's pictures in README and docs again: python figures/draw_family.py [NAME ...]

Each is made by the commands that its page names, so it shows what they give with the weights that are there.
All of them take about ten minutes on two cores; a name, such as grid, makes that one alone.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageOps

from core.commands.flags import Parser, run
from core.pictures.sheets import MARGIN

FIGURES = Path(__file__).parent
PROJECT = FIGURES.parent
QUALITY = 90  # of the JPEGs
GAP = 8  # pixels between pictures
SCENES, CONTROLLED = 2, 8  # of the LoRA's sheet, and of the ControlNet's


def documented(page: str, *words: str) -> list[str]:
    """The one command on a page of docs/ that has all the words, without `python`."""
    blocks = re.findall(r"```sh\n(.*?)```", (PROJECT / "docs" / page).read_text("utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if all(word in line for word in words)]
    if len(lines) != 1:
        raise ValueError(f"docs/{page} has {len(lines)} commands with {' and '.join(words)}, not one")
    return shlex.split(lines[0])[1:]


def made(command: list[str], folder: Path) -> list[Path]:
    """The pictures that a command of this repository writes into a folder, the shortest names first."""
    whole = [sys.executable, *command, "--output_dir", str(folder)]
    ended = subprocess.run(whole, cwd=PROJECT, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ValueError(f"{shlex.join(command)} ended with {ended.returncode}:\n{ended.stderr[-2000:]}")
    found = [path for path in folder.rglob("*") if path.suffix in {".png", ".jpg"}]
    return sorted(found, key=lambda path: (len(path.name), path.name))


def row(pictures: list[Image.Image], height: int | None = None) -> Image.Image:
    """Pictures beside each other, as high as `height` or as they are."""
    sized = [ImageOps.contain(p, (10 * (height or p.height), height or p.height)) for p in pictures]
    width = sum(p.width for p in sized) + GAP * (len(sized) - 1)
    sheet, x = Image.new("RGB", (width, max(p.height for p in sized)), "white"), 0
    for picture in sized:
        sheet.paste(picture, (x, 0))
        x += picture.width + GAP
    return sheet


def opened(*paths: Path | str) -> list[Image.Image]:
    """Pictures in RGB; names are those of figures/."""
    return [Image.open(FIGURES / path).convert("RGB") for path in paths]


def tiny_family(folder: Path) -> Image.Image:
    """The first sixteen held-out scenes."""
    command = ["inference/evaluate.py", "--preset", "tiny", "--height", "512", "--width", "512"]
    (sheet,) = made([*command, "--num_image", "16"], folder)
    return opened(sheet)[0]


def tiny_large(folder: Path) -> Image.Image:
    command = documented("embedded_family.md", "--height 1024")
    small, large = (
        made([*command, *more], folder / name) for name, more in (("lr", ["--lr_only"]), ("hr", []))
    )
    return row(opened(*[path for path in small if "sheet" not in path.name], *large))


def tiny_lora(folder: Path) -> Image.Image:
    """The first scenes at 512 x 512, each with the token and without it: half of what the benchmark shows."""
    command = ["benchmarks/tiny_personalized.py", "--num_image", str(SCENES)]
    (sheet,) = opened(*made(command, folder))
    down = (sheet.height - MARGIN) // SCENES
    return row([sheet.crop((0, y * down, sheet.width // 2, (y + 1) * down)) for y in range(SCENES)])


def tiny_control(folder: Path) -> Image.Image:
    """Eight scenes, the second half of them beside the first under the same titles."""
    command = ["benchmarks/tiny_control.py", "--num_image", str(CONTROLLED), "--height", "128"]
    (sheet,) = opened(*made(command, folder))
    cell = sheet.width // 4  # a square: drawing, edges, with control, without
    title = sheet.height - CONTROLLED * cell
    half = (sheet.height + title) // 2
    second = sheet.copy()
    second.paste(sheet.crop((0, half, sheet.width, sheet.height)), (0, title))
    return row([part.crop((0, 0, sheet.width, half)) for part in (sheet, second)], 608)


def explore(folder: Path) -> Image.Image:
    low, high = (
        documented("text_to_image.md", *words)
        for words in (("--lr_only", "tiny"), ("--from_image", "_lr.png"))
    )
    small = made(low, folder / "low")
    place = high.index("--from_image") + 1
    high[place] = str(folder / "low" / Path(high[place]).name)
    (large,) = made(high, folder / "high")
    return row(opened(*[path for path in small if "sheet" in path.name], large), 512)


def grid(folder: Path) -> Image.Image:
    paths = made(documented("text_to_image.md", "--grid", "cfg=1,2,4"), folder)
    return opened(*[path for path in paths if path.stem.endswith("_grid")])[0]


def given_pictures(folder: Path) -> Image.Image:
    page, first = "given_pictures.md", ("example_given/boat.png --preset tiny --factor 2",)
    commands = [documented(page, *words) for words in (first, ("--init_image", "--strength"), ("--region",))]
    paths = [made(command, folder / str(number))[0] for number, command in enumerate(commands)]
    return row(opened("example_given/boat.png", *paths), 256)


def filled(folder: Path) -> Image.Image:
    commands = [documented("controlled.md", "--preset tiny", word) for word in ("--mask", "--outpaint")]
    paths = [made(command, folder / str(number))[0] for number, command in enumerate(commands)]
    return row(opened("example_given/boat.png", *paths), 256)


def controls(folder: Path) -> Image.Image:
    command = documented("controlled.md", "--preset tiny", "canny:", "super_resolution:")
    picture, *given = made(command, folder)
    return row(opened(*given, picture), 320)


DRAWN: dict[str, Callable[[Path], Image.Image]] = {
    function.__name__: function
    for function in (
        tiny_family, tiny_large, tiny_lora, tiny_control, explore, grid, given_pictures, filled, controls,
    )
}  # fmt: skip


def main(given: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    known = ", ".join(DRAWN)
    parser.add_argument("name", nargs="*", metavar="NAME", help=f"of {known} (default: all)")
    names = parser.parse_args(given).name
    for name in names:
        if name not in DRAWN:
            raise ValueError(f"{name} is none of these pictures: {known}")
    for name in names or DRAWN:
        with TemporaryDirectory() as folder:
            picture = DRAWN[name](Path(folder))
        picture.save(FIGURES / f"{name}.jpg", quality=QUALITY)
    return 0


if __name__ == "__main__":
    run(main)
