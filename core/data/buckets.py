"""Aspect-ratio buckets: the sizes that training pictures are brought to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from core.config.sizes import Size

FACTOR = 32  # px; bucket sides are multiples of it
ROW, MARGIN, LABELS, BARS, COUNTS = 28, 12, 170, 480, 90  # px in the picture of the buckets


@dataclass(frozen=True)
class Buckets:
    """The sizes (height, width) in pixels of every ratio, in the order of the image sizes."""

    areas: tuple[int, ...]  # image_size²
    by_ratio: tuple[tuple[float, tuple[Size, ...]], ...]  # (width / height, a size per area)

    def nearest(self, height: int, width: int) -> Size:
        """The bucket of a picture of height x width pixels: nearest ratio first, then nearest area."""
        ratio, area = width / height, height * width
        _, sizes = min(self.by_ratio, key=lambda row: abs(row[0] - ratio))
        return sizes[min(range(len(sizes)), key=lambda i: abs(self.areas[i] - area))]


def make_buckets(image_size: int | Sequence[int], ratios: Sequence[str]) -> Buckets:
    """Buckets of about image_size² pixels for ratios such as "2/3" (width/height), each also inverted.

    ValueError where a side would be shorter than 32 pixels.
    """
    image_sizes = (image_size,) if isinstance(image_size, int) else tuple(image_size)
    both_ways: dict[float, None] = {}  # in order, without repeats
    for text in ratios:
        width, height = map(int, text.split("/"))
        both_ways |= {width / height: None, height / width: None}
    rows = tuple((ratio, tuple(_size(side, ratio) for side in image_sizes)) for ratio in both_ways)
    return Buckets(tuple(side * side for side in image_sizes), rows)


def _size(side: int, ratio: float) -> Size:
    root = math.sqrt(ratio)
    size = FACTOR * math.floor(side / root / FACTOR), FACTOR * math.floor(side * root / FACTOR)
    if 0 in size:
        least = math.ceil(FACTOR * max(root, 1 / root))
        raise ValueError(
            f"image_size {side} is too small for pictures of the ratio {ratio:.3g}: choose at least {least}"
        )
    return size


def cover_size(height: int, width: int, bucket: Size) -> Size:
    """The least (height, width) to which a picture can be resized so that both sides cover the bucket."""
    return (
        max(bucket[0], -(-height * bucket[1] // width)),  # -(-a // b): the quotient rounded up
        max(bucket[1], -(-width * bucket[0] // height)),
    )


def draw_counts(counts: Mapping[Size, int]) -> Image.Image:
    """A bar chart of the pictures per bucket (height, width), each with its shape; by shape, then size."""
    rows = sorted(counts.items(), key=lambda item: (item[0][1] / item[0][0], item[0]))
    image = Image.new(
        "RGB", (2 * MARGIN + LABELS + BARS + COUNTS, 2 * MARGIN + ROW * (len(rows) + 1)), "white"
    )
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    draw.text((MARGIN, MARGIN), "height x width, pictures", "black", font)
    for number, ((height, width), count) in enumerate(rows, 1):
        top = MARGIN + ROW * number
        _draw_shape(draw, MARGIN + ROW / 2, top + ROW / 2, height, width)
        draw.text((MARGIN + ROW + 8, top + 5), f"{height} x {width}", "black", font)
        left, length = MARGIN + LABELS, max(2, BARS * count / max(counts.values()))
        draw.rectangle((left, top + 4, left + length, top + ROW - 6), "#4472a8")
        draw.text((left + length + 8, top + 5), str(count), "black", font)
    return image


def _draw_shape(draw: ImageDraw.ImageDraw, x: float, y: float, height: int, width: int) -> None:
    half = (ROW - 6) / 2 / max(height, width)
    draw.rectangle(
        (x - width * half, y - height * half, x + width * half, y + height * half), "#d0d8e4", "#4472a8"
    )
