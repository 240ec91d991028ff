"""The subjects of scenes. The unit is the subject's height: it stands at (0, 0) and ends at y = -1."""

from __future__ import annotations

import numpy as np

from core.scenes.pen import Colour, Pen, courses, lighter, ovals, poly, rect, skia, wave

COLOURS: dict[str, Colour] = {
    "red": (222, 28, 34),
    "yellow": (255, 216, 0),
    "blue": (28, 84, 240),
    "purple": (134, 38, 190),
    "pink": (255, 112, 178),
    "white": (250, 250, 246),
}
STRIPES: tuple[Colour, ...] = ((0, 158, 112), (255, 246, 220), (255, 128, 16), (28, 36, 84))
WOOD, SLATE, CREAM, STONE = (122, 78, 48), (70, 64, 80), (252, 244, 224), (176, 168, 160)
OUTLINE = 0.012


def draw_subject(pen: Pen) -> None:
    """The scene's subject, in its colour."""
    DRAWN[pen.scene.subject](pen, pen.lit(COLOURS[pen.scene.colour]))


def _wall(
    pen: Pen,
    shape: skia.Path,
    box: tuple[float, float, float, float],  # left, top, right, bottom
    rows: int,
    colour: Colour,
    ratio: float = 2.2,  # length to height of a brick
) -> None:
    """A shape of bricks, boards or tiles, lit from the left."""
    left, top, right, bottom = box
    pen.fill(shape, lighter(colour, 0.1), lighter(colour, -0.2), (left, 0, right, 0))
    height = (bottom - top) / rows
    length = ratio * height
    if pen.shows(0.3 * height):
        with pen.kept(shape):
            spots = pen.stream("wall").random((rows * 6, 2))  # bricks that are lighter or darker than others
            rank = np.floor(spots[:, 1] * rows)
            x = left + length * (np.floor(spots[:, 0] * (right - left) / length) + 0.5 * (rank % 2))
            y = top + height * (rank + 0.5)
            ends = np.stack([x + 0.45 * height, y, x + length - 0.45 * height, y], 1)
            pen.strokes(ends, 0.8 * height, lighter(colour, 0.22), lighter(colour, -0.3), alpha=0.45)
            joints = courses(box, rows, length)
            pen.strokes(joints, 0.13 * height, lighter(colour, -0.4), alpha=0.75)
            pen.strokes(joints + 0.12 * height, 0.09 * height, lighter(colour, 0.4), alpha=0.6)
    pen.line(shape, lighter(colour, -0.5), OUTLINE)


def _window(pen: Pen, x: float, y: float, width: float, height: float) -> None:
    """A pane with a frame and glazing bars, its centre at x, y."""
    frame, glass = pen.lit(CREAM), pen.tones.window
    w, h = width / 2, height / 2
    pen.fill(rect(x - w - 0.018, y - h - 0.018, x + w + 0.018, y + h + 0.018), frame)
    pen.fill(
        rect(x - w, y - h, x + w, y + h),
        lighter(glass, 0.15),
        lighter(glass, -0.3),
        (x - w, y - h, x + w, y + h),
    )
    bars = np.array([(x, y - h, x, y + h), (x - w, y, x + w, y)])
    pen.strokes(bars, 0.014, frame)
    pen.fill(rect(x - w - 0.035, y + h + 0.015, x + w + 0.035, y + h + 0.035), lighter(frame, -0.25))


def _door(pen: Pen, x: float, width: float, height: float) -> None:
    wood, w = pen.lit(WOOD), width / 2
    pen.fill(rect(x - w - 0.02, -height - 0.02, x + w + 0.02, 0), pen.lit(CREAM))
    pen.fill(rect(x - w, -height, x + w, 0), wood, outline=0.008)
    planks = np.array([(x + w * s, -height, x + w * s, 0) for s in (-0.5, 0, 0.5)])
    pen.strokes(planks, 0.007, lighter(wood, -0.4))
    pen.fill(ovals((x + 0.6 * w, -0.45 * height, 0.012, 0.012)), (240, 200, 90))


def _house(pen: Pen, colour: Colour) -> None:
    slate, stone = pen.lit(SLATE), pen.lit(STONE)
    chimney = (0.16, -1.0, 0.29, -0.7)
    _wall(pen, rect(*chimney), chimney, 7, lighter(stone, -0.15))
    pen.fill(rect(0.145, -1.0, 0.305, -0.965), slate)
    walls = (-0.45, -0.58, 0.45, 0.0)
    _wall(pen, rect(*walls), walls, 16, colour)
    pen.fill(rect(-0.465, -0.05, 0.465, 0.01), stone, outline=0.008)
    roof = poly([(-0.55, -0.55), (-0.38, -0.92), (0.38, -0.92), (0.55, -0.55)])
    _wall(pen, roof, (-0.56, -0.92, 0.56, -0.55), 11, slate)
    pen.fill(rect(-0.55, -0.57, 0.55, -0.54), lighter(slate, -0.3))
    _door(pen, 0.0, 0.17, 0.36)
    for x in (-0.28, 0.28):
        _window(pen, x, -0.32, 0.16, 0.2)


def _tree(pen: Pen, colour: Colour) -> None:
    bark, draw = pen.lit(WOOD), pen.stream("tree")
    trunk = poly([(-0.1, 0.01), (-0.055, -0.14), (-0.05, -0.5), (0.05, -0.5), (0.055, -0.14), (0.11, 0.01)])
    pen.fill(trunk, lighter(bark, 0.12), lighter(bark, -0.35), (-0.06, 0, 0.06, 0), outline=0.008)
    x, y = draw.uniform(-0.05, 0.04, 50), draw.uniform(-0.4, -0.02, 50)
    grain = np.stack([x, y, x + draw.uniform(-0.008, 0.008, 50), y + 0.05], 1)
    pen.strokes(grain, 0.006, lighter(bark, 0.2), lighter(bark, -0.4))
    turns = np.arange(7) * 2 * np.pi / 7 + draw.uniform(-0.2, 0.2, 7)
    reach = draw.uniform(0.19, 0.24, 7)
    puffs = [
        (0.26 * np.cos(t), -0.66 + 0.16 * np.sin(t), r, 0.85 * r) for t, r in zip(turns, reach, strict=True)
    ]
    crown = ovals(*puffs, (0, -0.68, 0.3, 0.28), (0.02, -0.8, 0.2, 0.2))
    pen.line(crown, lighter(colour, -0.5), 2 * OUTLINE)
    pen.fill(crown, lighter(colour, 0.08), lighter(colour, -0.24), (-0.1, -0.9, 0.15, -0.42))
    with pen.kept(crown):
        for px, py, r, _ in puffs:
            pen.fill(ovals((px - 0.03, py - 0.04, 0.62 * r, 0.5 * r)), lighter(colour, 0.2), alpha=0.45)
    _leaves(pen, colour, draw)


def _leaves(pen: Pen, colour: Colour, draw: np.random.Generator) -> None:
    """Leaves in pairs of lighter and darker, in and a little beyond the crown."""
    for count, width, reach in ((400, 0.013, 0.022), (1100, 0.006, 0.014)):
        turn, out = draw.uniform(0, 2 * np.pi, count), np.sqrt(draw.random(count))
        x, y = 0.46 * out * np.cos(turn), -0.67 + 0.32 * out * np.sin(turn)
        lean = draw.uniform(0, np.pi, count)
        ends = np.stack([x, y, x + reach * np.cos(lean), y + reach * np.sin(lean)], 1)
        pen.strokes(
            ends,
            width,
            lighter(colour, 0.3),
            lighter(colour, -0.24),
            lighter(colour, -0.1),
            lighter(colour, 0.12),
        )


def _boat(pen: Pen, colour: Colour) -> None:
    wood, cream, water = pen.lit(WOOD), pen.lit(CREAM), pen.tones.water
    pen.fill(ovals((0, 0.03, 0.62, 0.05)), lighter(water, -0.4), alpha=0.7)
    pen.fill(rect(-0.025, -1.0, 0.015, -0.2), wood, lighter(wood, -0.4), (-0.025, 0, 0.015, 0))
    _sail(pen, [(0.03, -0.95), (0.43, -0.3), (0.03, -0.27)], colour, bulge=0.09)
    _sail(pen, [(-0.04, -0.88), (-0.42, -0.27), (-0.04, -0.3)], cream, bulge=-0.05)
    hull = skia.Path()
    hull.moveTo(-0.5, -0.22)
    hull.quadTo(0, -0.16, 0.52, -0.25)
    hull.quadTo(0.43, 0.0, 0.34, 0.04)
    hull.lineTo(-0.35, 0.04)
    hull.quadTo(-0.46, -0.06, -0.5, -0.22)
    _wall(pen, hull, (-0.6, -0.25, 0.6, 0.04), 7, colour, ratio=9)
    with pen.kept(hull):
        pen.fill(rect(-0.6, -0.012, 0.6, 0.05), lighter(wood, -0.35))
    for x in (-0.26, 0.0, 0.26):
        pen.fill(ovals((x, -0.12, 0.032, 0.032)), cream)
        pen.fill(ovals((x, -0.12, 0.022, 0.022)), pen.tones.window)
    pen.fill(poly([(-0.01, -1.0), (-0.15, -0.965), (-0.01, -0.93)]), pen.lit((255, 140, 40)))
    foam = skia.Path()
    for x in (-0.36, -0.22, -0.06, 0.1, 0.24, 0.36):
        wave(foam, x, 0.055 - 0.02 * abs(x), 0.13, -0.01, 0.045)
    pen.fill(foam, lighter(water, 0.7))


def _sail(pen: Pen, corners: list[tuple[float, float]], colour: Colour, bulge: float) -> None:
    (x0, y0), (x1, y1), (x2, y2) = corners
    cloth = skia.Path()
    cloth.moveTo(x0, y0)
    cloth.quadTo((x0 + x1) / 2 + bulge, (y0 + y1) / 2, x1, y1)
    cloth.lineTo(x2, y2)
    cloth.close()
    pen.fill(cloth, lighter(colour, 0.12), lighter(colour, -0.18), (x0, y0, x1, y1), outline=OUTLINE)
    with pen.kept(cloth):
        seams = np.array([(x0, y, x1, y + 0.04) for y in np.arange(y0 + 0.06, y2, 0.065)])
        pen.strokes(seams, 0.005, lighter(colour, -0.35), alpha=0.8)
        pen.strokes(seams + (0, 0.007, 0, 0.007), 0.005, lighter(colour, 0.35), alpha=0.8)


def _lighthouse(pen: Pen, colour: Colour) -> None:
    slate, stone, cream = pen.lit(SLATE), pen.lit(STONE), pen.lit(CREAM)
    dark = pen.scene.sky in ("night", "dusk")
    tower = poly([(-0.2, 0.0), (-0.125, -0.76), (0.125, -0.76), (0.2, 0.0)])
    _wall(pen, tower, (-0.2, -0.76, 0.2, 0.0), 22, colour)
    band = slate if pen.scene.colour == "white" else cream
    with pen.kept(tower):
        for y in (-0.56, -0.26):
            pen.fill(rect(-0.2, y - 0.035, 0.2, y + 0.035), band, lighter(band, -0.25), (-0.2, 0, 0.2, 0))
    _window(pen, 0, -0.41, 0.07, 0.09)
    _door(pen, 0, 0.11, 0.17)
    pen.fill(rect(-0.23, -0.025, 0.23, 0.015), stone, outline=0.006)
    pen.fill(rect(-0.17, -0.79, 0.17, -0.75), slate)
    pen.fill(
        rect(-0.095, -0.9, 0.095, -0.79),
        (255, 236, 150) if dark else lighter(pen.tones.window, 0.3),
        outline=0.01,
    )
    pen.strokes(np.array([(x, -0.9, x, -0.79) for x in (-0.045, 0.0, 0.045)]), 0.01, slate)
    rail = [(x, -0.79, x, -0.835) for x in np.linspace(-0.165, 0.165, 12)]
    pen.strokes(np.array([*rail, (-0.165, -0.835, 0.165, -0.835)]), 0.007, slate)
    pen.fill(poly([(-0.13, -0.895), (-0.06, -0.965), (0, -1.0), (0.06, -0.965), (0.13, -0.895)]), slate)
    if dark:
        for side in (-1, 1):
            beam = poly([(0, -0.85), (side * 0.9, -0.97), (side * 0.9, -0.76)])
            pen.fill(beam, (255, 240, 170), (255, 240, 170), (0, 0, side * 0.9, 0), alpha=0.6, to_alpha=0.0)
        pen.glow(0, -0.845, 0.22, (255, 240, 170), 0.75)


def _windmill(pen: Pen, colour: Colour) -> None:
    slate = pen.lit(SLATE)
    body = poly([(-0.25, 0.0), (-0.155, -0.58), (0.155, -0.58), (0.25, 0.0)])
    _wall(pen, body, (-0.25, -0.58, 0.25, 0.0), 18, colour)
    _door(pen, 0, 0.13, 0.2)
    _window(pen, 0, -0.34, 0.08, 0.1)
    cap = skia.Path()
    cap.moveTo(-0.185, -0.565)
    cap.cubicTo(-0.17, -0.78, 0.17, -0.78, 0.185, -0.565)
    cap.close()
    _wall(pen, cap, (-0.19, -0.74, 0.19, -0.565), 7, slate)
    turn = float(pen.stream("sails").uniform(25, 65))
    for quarter in range(4):
        with pen.at(0, -0.61, 1, turn + 90 * quarter) as arm:
            _blade(arm)
    pen.fill(ovals((0, -0.61, 0.04, 0.04)), pen.lit(WOOD), outline=0.01)


def _blade(pen: Pen) -> None:
    """One sail of a windmill: cloth on a lattice, along the x axis."""
    cream, wood = pen.lit(CREAM), pen.lit(WOOD)
    cloth = rect(0.09, 0.0, 0.44, 0.11)
    pen.fill(cloth, cream, lighter(cream, -0.1), (0.1, 0, 0.44, 0))
    bars = [(x, 0.0, x, 0.11) for x in np.arange(0.09, 0.45, 0.05)]
    lattice = np.array([*bars, (0.09, 0.037, 0.44, 0.037), (0.09, 0.074, 0.44, 0.074)])
    pen.strokes(lattice, 0.005, lighter(wood, 0.1))
    pen.line(cloth, lighter(wood, -0.2), 0.009)
    pen.strokes(np.array([(0, 0, 0.45, 0)]), 0.024, lighter(wood, -0.3), always=True)


def _balloon(pen: Pen, colour: Colour) -> None:
    _aloft(pen, [lighter(colour, 0.06), lighter(colour, -0.1)] * 4, colour)


def _striped_balloon(pen: Pen, colour: Colour) -> None:
    del colour  # it has its own
    stripes = [pen.lit(stripe) for stripe in STRIPES]
    _aloft(pen, [stripes[i] for i in (0, 1, 2, 3, 0, 1, 2)], stripes[3])


def _aloft(pen: Pen, gores: list[Colour], trim: Colour) -> None:
    """A hot-air balloon with an envelope of gores from left to right, and a basket."""
    envelope = skia.Path()
    envelope.moveTo(-0.1, -0.22)
    envelope.cubicTo(-0.16, -0.34, -0.39, -0.42, -0.39, -0.64)
    envelope.cubicTo(-0.39, -1.12, 0.39, -1.12, 0.39, -0.64)
    envelope.cubicTo(0.39, -0.42, 0.16, -0.34, 0.1, -0.22)
    envelope.close()
    wood = pen.lit(WOOD)
    ropes = np.array([(0.1 * s, -0.22, 0.075 * s, -0.12) for s in (-1, -0.35, 0.35, 1)])
    pen.strokes(ropes, 0.012, lighter(wood, -0.4), always=True)
    with pen.kept(envelope):
        count = len(gores)
        flat = np.linspace(-1, 1, count + 1)
        edges = 0.5 * flat + 0.5 * np.sin(flat * np.pi / 2)  # narrower towards the sides
        for i in reversed(range(count)):
            pen.fill(_gore(edges[i + 1]), gores[i])
            pen.line(_gore(edges[i + 1]), lighter(gores[i], -0.4), 0.006, alpha=0.8)
        hoops = skia.Path()
        for y in np.arange(-0.95, -0.25, 0.045).tolist():
            hoops.moveTo(-0.42, y)
            hoops.quadTo(0, y + 0.09, 0.42, y)
        if pen.shows(0.005):
            pen.line(hoops, lighter(trim, -0.45), 0.005, alpha=0.45)
        pen.fill(rect(-0.2, -0.27, 0.2, -0.2), lighter(trim, -0.3))
        pen.glow(-0.14, -0.78, 0.3, (255, 255, 255), 0.3)
        pen.fill(envelope, (20, 0, 50), (20, 0, 50), (0, 0, 0.4, 0), alpha=0.0, to_alpha=0.35)
    pen.line(envelope, lighter(trim, -0.5), OUTLINE)
    basket = (-0.085, -0.13, 0.085, 0.0)
    _wall(pen, rect(*basket), basket, 6, wood)
    pen.fill(rect(-0.1, -0.14, 0.1, -0.115), lighter(wood, -0.35))


def _gore(edge: float) -> skia.Path:
    """All of the envelope to the left of a seam that runs from top to mouth, through edge (-1 to 1)."""
    path = skia.Path()
    path.moveTo(-0.6, -1.1)
    path.lineTo(0, -1.02)
    path.cubicTo(0.53 * edge, -1.0, 0.53 * edge, -0.5, 0.1 * edge, -0.2)
    path.lineTo(-0.6, -0.2)
    path.close()
    return path


DRAWN = {
    "house": _house,
    "tree": _tree,
    "boat": _boat,
    "lighthouse": _lighthouse,
    "windmill": _windmill,
    "balloon": _balloon,
    "striped balloon": _striped_balloon,
}
