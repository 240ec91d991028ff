"""Sheets of pictures: over the values of two settings, and contact sheets."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageOps

SIDE = 512  # pixels of a picture's longer side, at most
LEAST = 160  # pixels of a cell's sides, so that words fit in
MARGIN, FONT = 16, 20  # pixels around a picture, and of letters
LETTER, LINE = 0.55 * FONT, 1.3 * FONT  # pixels of a letter's width, about, and of a line's height
COLUMNS, LETTERS = 4, 40  # of a contact sheet: pictures in a row, and letters of a line beneath one
GROUND, INK, NONE = "white", "black", "#dddddd"  # colours; NONE: where there is no picture

Cell = Image.Image | str  # a picture, or why there is none


def grid_sheet(
    rows: Sequence[Sequence[Cell]], columns: Sequence[str], names: Sequence[str], title: str = ""
) -> Image.Image:
    """A sheet of cells with a label above each column and, in `names`, one to the left of each row.

    Large pictures are made smaller. A cell without a picture says why. There may be labels without letters.
    """
    small = [[_reduced(cell) for cell in row] for row in rows]
    pictures = [cell for row in small for cell in row if isinstance(cell, Image.Image)]
    width, height = (max([LEAST, *(getattr(p, side) for p in pictures)]) for side in ("width", "height"))
    left = round(max(map(_length, names), default=0)) + MARGIN
    full = left + len(columns) * (width + MARGIN)
    heading = _wrapped(title, full - 2 * MARGIN)
    labels = [_wrapped(column, width) for column in columns]
    top = MARGIN + _height(heading) + max(map(_height, labels)) + MARGIN // 2
    sheet = Image.new("RGB", (full, top + len(rows) * (height + MARGIN)), GROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN // 2), heading, INK, font_size=FONT)
    for x, label in enumerate(labels):
        place = left + x * (width + MARGIN), MARGIN // 2 + _height(heading)
        draw.text(place, label, INK, font_size=FONT)
    for y, (name, row) in enumerate(zip(names, small, strict=True)):
        down = top + y * (height + MARGIN)
        draw.text((MARGIN // 2, down), name, INK, font_size=FONT)
        for x, cell in enumerate(row):
            sheet.paste(_filled(cell, width, height), (left + x * (width + MARGIN), down))
    return sheet


def _reduced(cell: Cell) -> Cell:
    if isinstance(cell, str) or max(cell.size) <= SIDE:
        return cell
    return ImageOps.contain(cell, (SIDE, SIDE), Image.Resampling.LANCZOS)


def _filled(cell: Cell, width: int, height: int) -> Image.Image:
    """A cell of that size, with the picture or the words in it."""
    if isinstance(cell, str):
        filled = Image.new("RGB", (width, height), NONE)
        ImageDraw.Draw(filled).text((8, 8), _wrapped(cell, width - 16), INK, font_size=FONT)
        return filled
    filled = Image.new("RGB", (width, height), GROUND)
    filled.paste(cell, ((width - cell.width) // 2, (height - cell.height) // 2))
    return filled


def _length(text: str) -> float:
    return LETTER * len(text)


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, max(8, int(width / LETTER)))


def _height(text: str) -> int:
    return round(LINE * (text.count("\n") + 1)) if text else 0


def contact_sheet(cells: Sequence[tuple[Image.Image, str]], columns: int = COLUMNS) -> Image.Image:
    """Pictures in columns, each with its text beneath."""
    texts = [textwrap.fill(text, LETTERS) for _, text in cells]
    width, height = (max(getattr(image, side) for image, _ in cells) for side in ("width", "height"))
    columns, across = min(columns, len(cells)), width + MARGIN
    down = height + max(map(_height, texts)) + 2 * MARGIN
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * across + MARGIN, rows * down + MARGIN), GROUND)
    for number, ((image, _), text) in enumerate(zip(cells, texts, strict=True)):
        x, y = MARGIN + number % columns * across, MARGIN + number // columns * down
        sheet.paste(image, (x + (width - image.width) // 2, y))
        ImageDraw.Draw(sheet).text((x, y + height + MARGIN // 2), text, INK, font_size=FONT)
    return sheet
