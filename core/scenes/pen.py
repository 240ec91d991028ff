"""What scenes are drawn with: colours, tones of the sky, and a pen on a skia canvas with its own unit.

Fine strokes come in a lighter and a darker half, so what is thinner than half a pixel can be left out
without a change of the mean colour. Every part takes its jitter from a stream of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from core.scenes.scene import Scene

try:
    import skia
except ModuleNotFoundError:
    raise ImportError(
        "scenes are drawn with skia-python, which is not installed: pip install skia-python"
    ) from None

Colour = tuple[float, float, float]  # RGB, 0 to 255
THINNEST, FULL = 0.6, 1.0  # px; finer strokes are left out, and those in between fade in


@dataclass(frozen=True)
class Tones:
    """The colours of one kind of sky."""

    top: Colour
    bottom: Colour
    tint: Colour  # factors of the land's colours, in 1/255
    subject: Colour  # likewise of the subject's, which stay recognisable at night too
    water: Colour
    cloud: Colour
    shade: Colour  # of clouds
    window: Colour


TONES = {
    "day": Tones((66, 150, 236), (190, 226, 250), (255, 255, 255), (255, 255, 255), (32, 126, 190),
                 (255, 255, 255), (196, 214, 236), (120, 170, 210)),
    "dusk": Tones((94, 64, 150), (255, 176, 112), (222, 172, 166), (255, 244, 238), (140, 92, 142),
                  (255, 178, 160), (176, 104, 146), (255, 222, 120)),
    "night": Tones((18, 26, 88), (66, 84, 166), (112, 132, 190), (226, 226, 246), (30, 54, 128),
                   (138, 150, 204), (84, 96, 160), (255, 226, 120)),
    "overcast": Tones((164, 172, 182), (204, 208, 212), (200, 206, 206), (244, 244, 244), (104, 128, 138),
                      (138, 144, 156), (98, 104, 118), (150, 170, 184)),
}  # fmt: skip


def mix(one: Colour, other: Colour, share: float) -> Colour:
    """The colour that has the given share of the other."""
    rest = 1 - share
    return (
        one[0] * rest + other[0] * share,
        one[1] * rest + other[1] * share,
        one[2] * rest + other[2] * share,
    )


def lighter(colour: Colour, share: float) -> Colour:
    """The colour mixed with white, or with near-black for a negative share."""
    return mix(colour, (255, 255, 255), share) if share > 0 else mix(colour, (12, 8, 28), -share)


def times(colour: Colour, factors: Colour) -> Colour:
    """The colour in a tinted light."""
    return colour[0] * factors[0] / 255, colour[1] * factors[1] / 255, colour[2] * factors[2] / 255


def curve(xs: np.ndarray, draw: np.random.Generator, height: float, waves: float) -> np.ndarray:
    """A smooth line of hills over xs: a sum of three sines, within plus and minus height."""
    phases = draw.random(3) * 2 * np.pi
    parts = [np.sin(xs * waves * 2 * np.pi * k + p) / k for k, p in zip((1, 1.9, 3.1), phases, strict=True)]
    return height * sum(parts) / 1.8


def courses(box: Sequence[float], rows: int, length: float, lean: float = 0.5) -> np.ndarray:
    """The joints of bricks in a box (left, top, right, bottom): (n, 4) line segments x0 y0 x1 y1."""
    left, top, right, bottom = box
    ys = np.linspace(top, bottom, rows + 1)
    level = [(left, y, right, y) for y in ys[1:-1]]
    upright = [
        (x, ys[i], x, ys[i + 1])
        for i in range(rows)
        for x in np.arange(left + length * (lean if i % 2 else 1), right, length)
    ]
    return np.array(level + upright)


class Pen:
    """A canvas in some unit of length, and how many pixels the unit has."""

    def __init__(self, canvas: skia.Canvas, pixels: float, aspect: float, scene: Scene) -> None:
        self.canvas, self.pixels, self.aspect, self.scene = canvas, pixels, aspect, scene
        self.tones = TONES[scene.sky]

    def stream(self, part: str) -> np.random.Generator:
        """The random numbers of a part of the scene."""
        return np.random.default_rng((self.scene.seed, zlib.crc32(part.encode())))

    def shows(self, width: float) -> bool:
        """Whether something of this width is more than about half a pixel."""
        return width * self.pixels >= THINNEST

    def lit(self, colour: Colour) -> Colour:
        """A colour of the subject in the light of the sky."""
        return times(colour, self.tones.subject)

    def tinted(self, colour: Colour) -> Colour:
        """A colour of the land in the light of the sky."""
        return times(colour, self.tones.tint)

    @contextmanager
    def at(self, x: float, y: float, unit: float, turn: float = 0.0) -> Iterator[Pen]:
        """A pen with its origin at x, y and its own unit, turned by degrees."""
        with self.kept():
            self.canvas.translate(x, y)
            self.canvas.rotate(turn)
            self.canvas.scale(unit, unit)
            yield Pen(self.canvas, self.pixels * unit, self.aspect, self.scene)

    @contextmanager
    def kept(self, inside: skia.Path | None = None) -> Iterator[None]:
        """The canvas as it was, afterwards; until then only what is inside a path is drawn."""
        self.canvas.save()
        if inside is not None:
            self.canvas.clipPath(inside, skia.ClipOp.kIntersect, True)
        yield
        self.canvas.restore()

    def fill(
        self,
        shape: skia.Path,
        colour: Colour,
        to: Colour | None = None,  # a gradient to this colour
        along: Sequence[float] | None = None,  # from the first two to the last two coordinates
        alpha: float = 1.0,
        to_alpha: float | None = None,  # at the end of the gradient
        outline: float = 0.0,  # the width of a line of the colour's own darker shade
    ) -> None:
        """Fill a path."""
        paint = skia.Paint(AntiAlias=True, Color=_argb(colour, alpha))
        if to is not None:
            x0, y0, x1, y1 = along
            ends = [skia.Point(x0, y0), skia.Point(x1, y1)]
            last = _argb(to, alpha if to_alpha is None else to_alpha)
            paint.setShader(skia.GradientShader.MakeLinear(ends, [_argb(colour, alpha), last]))
        self.canvas.drawPath(shape, paint)
        if outline:
            self.line(shape, lighter(colour, -0.45), outline)

    def line(self, shape: skia.Path, colour: Colour, width: float, alpha: float = 1.0) -> None:
        """Draw along a path."""
        self.canvas.drawPath(shape, _stroke(colour, width, alpha))

    def strokes(
        self, ends: np.ndarray, width: float, *colours: Colour, alpha: float = 1.0, always: bool = False
    ) -> None:
        """Draw segments, (n, 4) as x0 y0 x1 y1, in turn in each colour; nothing where they are too thin."""
        if not (always or self.shows(width)):
            return
        alpha *= 1 if always else min(1, width * self.pixels / FULL)
        for i, colour in enumerate(colours):
            points = [skia.Point(x, y) for x, y in ends[i :: len(colours)].reshape(-1, 2).tolist()]
            self.canvas.drawPoints(skia.Canvas.kLines_PointMode, points, _stroke(colour, width, alpha))

    def glow(self, x: float, y: float, radius: float, colour: Colour, alpha: float) -> None:
        """A disc that fades out."""
        shades = [_argb(colour, alpha), _argb(colour, alpha * 0.35), _argb(colour, 0)]
        paint = skia.Paint(AntiAlias=True)
        paint.setShader(skia.GradientShader.MakeRadial(skia.Point(x, y), radius, shades))
        self.canvas.drawCircle(x, y, radius, paint)


def _argb(colour: Colour, alpha: float) -> int:
    red, green, blue = colour
    return skia.Color(round(red), round(green), round(blue), round(255 * alpha))


def _stroke(colour: Colour, width: float, alpha: float) -> skia.Paint:
    return skia.Paint(
        AntiAlias=True,
        Color=_argb(colour, alpha),
        Style=skia.Paint.kStroke_Style,
        StrokeWidth=width,
        StrokeCap=skia.Paint.kRound_Cap,
        StrokeJoin=skia.Paint.kRound_Join,
    )


def poly(points: Sequence[Sequence[float]] | np.ndarray, closed: bool = True) -> skia.Path:
    """A polygon through points (x, y)."""
    return skia.Path.Polygon([skia.Point(x, y) for x, y in np.asarray(points, float).tolist()], closed)


def rect(left: float, top: float, right: float, bottom: float) -> skia.Path:
    """A rectangle."""
    return skia.Path.Rect(skia.Rect.MakeLTRB(left, top, right, bottom))


def ovals(*rows: Sequence[float]) -> skia.Path:
    """Ellipses, each of a centre x, y and radii x, y."""
    path = skia.Path()
    for x, y, rx, ry in rows:
        path.addOval(skia.Rect.MakeLTRB(x - rx, y - ry, x + rx, y + ry))
    return path


def wave(path: skia.Path, x: float, y: float, length: float, low: float, high: float) -> None:
    """Add a lens around x, y to a path: from length left to length right, between two arcs above."""
    path.moveTo(x - length, y)
    path.quadTo(x, y - high, x + length, y)
    path.quadTo(x, y - low, x - length, y)
