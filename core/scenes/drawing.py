"""Drawing scenes: sky, land, subject. The unit is the picture's height, in a subject the subject's height."""

from __future__ import annotations

import numpy as np

from core.scenes.pen import Colour, Pen, curve, lighter, mix, ovals, poly, rect, skia, wave
from core.scenes.scene import Scene
from core.scenes.subjects import draw_subject

HORIZON = 0.62  # of the height, from the top
GROUND = {"small": 0.77, "large": 0.9}  # where the subject stands
HOVER = {"small": 0.43, "large": 0.57}  # the lower end of a balloon
SIZE = {"small": 0.24, "large": 0.48}  # the subject's height
PLACE = {"left": 0.25, "centre": 0.5, "right": 0.75}  # of the width
PLACE_JITTER, HEIGHT_JITTER, SIZE_JITTER = 0.025, 0.012, 0.05
GRASS, MEADOW, WHEAT, PINE = (82, 168, 62), (124, 158, 88), (226, 182, 86), (44, 96, 62)
SAND, ROCK, SNOW = (232, 208, 150), (134, 128, 132), (250, 252, 255)


def render(
    scene: Scene, height: int, width: int, window: tuple[int, int, int, int] | None = None
) -> np.ndarray:
    """The picture of a scene, (height, width, 3) uint8 RGB: the same one at any size, but for antialiasing.

    A wider picture shows more of the land. `window` (top, left, height, width) cuts out a part. ValueError
    for sides below 16 pixels.
    """
    if min(height, width) < 16:
        raise ValueError(f"{height} x {width} pixels are too few for a scene: both sides need at least 16")
    return _draw(scene, height, width, window or (0, 0, height, width))


def _draw(scene: Scene, height: int, width: int, window: tuple[int, int, int, int]) -> np.ndarray:
    """A window (top, left, height, width) of the picture of a scene, uint8 RGB."""
    top, left, *size = window
    pixels = np.zeros((*size, 4), np.uint8)
    surface = skia.Surface(pixels, skia.kRGBA_8888_ColorType)  # draws into the array
    canvas = surface.getCanvas()
    canvas.translate(-left, -top)
    canvas.scale(height, height)
    pen = Pen(canvas, height, width / height, scene)
    flies, swims = scene.subject.endswith("balloon"), scene.subject == "boat"
    jitter = pen.stream("subject").uniform(-1, 1, 3)
    x = pen.aspect * (PLACE[scene.place] + PLACE_JITTER * jitter[0])
    y = (HOVER if flies else GROUND)[scene.size] + HEIGHT_JITTER * jitter[1]
    unit = SIZE[scene.size] * (1 + SIZE_JITTER * jitter[2]) * min(1, pen.aspect)
    _sky(pen)
    LANDS[scene.land](pen)
    with pen.at(x, y, unit) as own:
        if scene.land == "sea" and not (flies or swims):
            _island(own)
        elif not (flies or swims):
            own.fill(ovals((0.1, 0.01, 0.5, 0.04)), (20, 20, 40), alpha=0.25)
        draw_subject(own)
        if scene.land != "sea" and not flies:
            _tuft(own)
    picture = np.empty((*size, 3), np.uint8)
    for channel in range(3):  # four times faster than a copy of the slice
        picture[:, :, channel] = pixels[:, :, channel]
    return picture


# ---- sky ----------------------------------------------------------------------------------------------


def _sky(pen: Pen) -> None:
    tones = pen.tones
    pen.fill(rect(0, 0, pen.aspect, 1), tones.top, tones.bottom, (0, 0, 0, HORIZON))
    draw = pen.stream("light")
    opposite = {"left": 0.72, "centre": draw.choice([0.15, 0.85]), "right": 0.28}[pen.scene.place]
    x = pen.aspect * (opposite + draw.uniform(-0.04, 0.04))
    if pen.scene.sky == "night":
        _dust(pen)
    else:
        _birds(pen)
    if pen.scene.light == "sun":
        _sun(pen, x, draw.uniform(0.13, 0.18))
    elif pen.scene.light == "moon":
        _moon(pen, x, draw.uniform(0.14, 0.19))
    elif pen.scene.light == "stars":
        _stars(pen, draw)
    elif pen.scene.light == "clouds":
        _clouds(pen, draw)


def _sun(pen: Pen, x: float, y: float) -> None:
    dusk = pen.scene.sky == "dusk"
    y += 0.06 if dusk else 0
    disc, radius = ((255, 84, 40), 0.095) if dusk else ((255, 226, 60), 0.08)
    pen.glow(x, y, 4 * radius, (255, 190, 90) if dusk else (255, 250, 200), 0.85)
    if pen.shows(0.002):
        for turn in np.arange(0, 360, 15):
            with pen.at(x, y, radius, turn) as ray:
                ray.fill(
                    poly([(1.1, -0.035), (1.45 + 0.25 * (turn % 30 > 0), 0), (1.1, 0.035)]), disc, alpha=0.5
                )
    pen.fill(ovals((x, y, radius, radius)), disc, lighter(disc, 0.35), (x, y + radius, x, y - radius))


def _moon(pen: Pen, x: float, y: float) -> None:
    radius, pale = 0.085, (255, 250, 222)
    pen.glow(x, y, 3 * radius, (220, 226, 255), 0.5)
    whole, bite = ovals((x, y, radius, radius)), ovals((x + 0.045, y - 0.02, 0.82 * radius, 0.82 * radius))
    crescent = skia.Op(whole, bite, skia.PathOp.kDifference_PathOp)
    pen.fill(crescent, pale)
    with pen.kept(crescent):
        for dx, dy, r in (
            (-0.058, 0.01, 0.012),
            (-0.035, 0.048, 0.014),
            (0.012, 0.066, 0.009),
            (-0.06, -0.03, 0.008),
        ):
            pen.fill(ovals((x + dx, y + dy, r, r)), (226, 218, 196))
            pen.fill(ovals((x + dx + 0.002, y + dy + 0.002, r * 0.8, r * 0.8)), (240, 232, 208))


def _star(pen: Pen, x: float, y: float, radius: float) -> None:
    turns = np.arange(8) * np.pi / 4 + np.pi / 2
    reach = np.where(np.arange(8) % 2, 0.3, 1.0) * radius
    pen.glow(x, y, 1.5 * radius, (200, 214, 255), 0.45)
    pen.fill(poly(np.stack([x + reach * np.cos(turns), y + reach * np.sin(turns)], 1)), (255, 252, 226))


def _stars(pen: Pen, draw: np.random.Generator) -> None:
    columns = max(2, round(5 * pen.aspect))
    step = pen.aspect / columns
    for i in range(columns):
        for j in range(3):
            x = step * (i + 0.5 + 0.34 * draw.uniform(-1, 1))
            _star(
                pen,
                x,
                0.07 + 0.14 * (j + 0.5 * (i % 2)) + draw.uniform(-0.03, 0.03),
                draw.uniform(0.022, 0.036),
            )


def _dust(pen: Pen) -> None:
    """Stars too small for a small picture."""
    if not pen.shows(0.0016):
        return
    spots = pen.stream("dust").random((round(260 * pen.aspect), 2)) * (pen.aspect, HORIZON)
    pen.strokes(np.concatenate([spots, spots + 1e-4], 1), 0.0016, (214, 222, 255), alpha=0.8)


def _birds(pen: Pen) -> None:
    """A few birds too thin for a small picture."""
    if not pen.shows(0.0028):
        return
    draw, wings = pen.stream("birds"), []
    x, y = draw.uniform(0.2, 0.8) * pen.aspect, draw.uniform(0.26, 0.34)
    for dx, dy in draw.normal(0, (0.07, 0.03), (5, 2)):
        for side in (-0.014, 0.014):
            joint = x + dx + 0.5 * side, y + dy - 0.008
            wings += [(x + dx, y + dy, *joint), (*joint, x + dx + side, y + dy - 0.005)]
    pen.strokes(np.array(wings), 0.0028, lighter(pen.tones.top, -0.5))


def _clouds(pen: Pen, draw: np.random.Generator) -> None:
    count = max(2, round(3 * pen.aspect))
    for i in range(count):
        x = pen.aspect * (i + 0.5 + draw.uniform(-0.2, 0.2)) / count
        y = (0.13, 0.24)[i % 2] + draw.uniform(-0.03, 0.03)
        with pen.at(x, y, draw.uniform(0.3, 0.38)) as own:
            _cloud(own, draw)
    if pen.scene.sky == "overcast":
        with pen.at(pen.aspect * draw.uniform(0.3, 0.7), 0.05, 0.45) as own:
            _cloud(own, draw)


def _cloud(pen: Pen, draw: np.random.Generator) -> None:
    xs = np.linspace(-0.38, 0.38, 6) + draw.uniform(-0.03, 0.03, 6)
    radii = (0.11 + 0.13 * np.cos(xs * 3.4)) * draw.uniform(0.85, 1.2, 6)
    puffs = [(x, -0.5 * r, r, r) for x, r in zip(xs, radii, strict=True)]
    turns, along = draw.uniform(-np.pi, 0, 40), draw.integers(0, 6, 40)
    bumps = [
        (puffs[i][0] + radii[i] * np.cos(t), puffs[i][1] + radii[i] * np.sin(t), 0.035, 0.03)
        for i, t in zip(along, turns, strict=True)
    ]
    bumps = bumps if pen.shows(0.01) else []
    body = ovals(*puffs, *bumps)
    tones = pen.tones
    with pen.kept(rect(-1, -1, 1, 0.07)):
        pen.fill(body, tones.shade, mix(tones.shade, tones.bottom, 0.4), (0, -0.2, 0, 0.1))
        with pen.kept(body):
            bright = [(x - 0.02, y - 0.05, rx, ry) for x, y, rx, ry in puffs]
            bright += [(x - 0.004, y - 0.012, rx, ry) for x, y, rx, ry in bumps if y < -0.06]
            pen.fill(ovals(*bright), tones.cloud)
            if pen.shows(0.006):
                for x, y, r, _ in puffs:
                    pen.fill(ovals((x + 0.02, y + 0.01, 0.75 * r, 0.7 * r)), tones.shade, alpha=0.28)
                    pen.fill(ovals((x, y - 0.02, 0.72 * r, 0.66 * r)), tones.cloud)


# ---- land ---------------------------------------------------------------------------------------------


def _grass(pen: Pen, top: float, colour: Colour, count: int = 2600, reach: float = 0.03) -> None:
    """Blades on the ground from top down to the lower edge, the nearer the larger."""
    if not pen.shows(0.002):
        return
    draw = pen.stream("grass")
    count = round(count * pen.aspect)
    depth = np.sort(draw.random(count))
    x, y = draw.random(count) * pen.aspect, top + (1.02 - top) * depth
    length = reach * (0.25 + 0.75 * depth) * draw.uniform(0.6, 1.2, count)
    ends = np.stack([x, y, x + length * draw.uniform(-0.45, 0.45, count), y - length], 1)
    for part, width in zip(np.array_split(ends, 3), (0.0009, 0.0014, 0.002), strict=True):
        pen.strokes(part, width, lighter(colour, 0.16), lighter(colour, -0.22))


def _flowers(pen: Pen, top: float, colours: tuple[Colour, ...]) -> None:
    if not pen.shows(0.006):
        return
    draw = pen.stream("flowers")
    count = round(90 * pen.aspect)
    spots = draw.random((count, 2)) * (pen.aspect, 1 - top) + (0, top)
    pen.strokes(np.concatenate([spots, spots + 1e-4], 1), 0.006, *map(pen.tinted, colours), alpha=0.9)


def _trees_afar(pen: Pen, y: float, height: float, colour: Colour, pointed: bool) -> None:
    """A dark line of woods at the horizon."""
    draw = pen.stream("woods")
    count = round(55 * pen.aspect)
    xs = np.linspace(0, pen.aspect, count) + draw.uniform(-0.01, 0.01, count)
    tall = height * draw.uniform(0.6, 1.3, count)
    if pointed:
        across = np.array([0.34, 0.14, 0.24, 0.08, 0.15, 0])  # half of the outline of a tree with three tiers
        up = np.array([0, 0.38, 0.38, 0.7, 0.7, 1])
        left = np.stack([xs[:, None] - across * tall[:, None], y - up * tall[:, None]], 2)
        right = np.stack([xs[:, None] + across * tall[:, None], y - up * tall[:, None]], 2)[:, ::-1]
        path = poly(np.concatenate([left, right], 1).reshape(-1, 2))
    else:
        path = ovals(
            *((x, y - 0.3 * h, 0.7 * h, 0.7 * h) for x, h in zip(xs.tolist(), tall.tolist(), strict=True))
        )
    path.addRect(skia.Rect.MakeLTRB(0, y - 0.25 * height, pen.aspect, y + 0.2 * height))
    pen.fill(path, colour, lighter(colour, -0.25), (0, y - height, 0, y))


def _mountains(pen: Pen) -> None:
    draw = pen.stream("mountains")
    count = max(3, round(3.4 * pen.aspect))
    tops = draw.uniform(0.24, 0.36, count)
    for i in np.argsort(tops):
        x = pen.aspect * (i + 0.5 + draw.uniform(-0.22, 0.22)) / count
        _mountain(pen, x, tops[i], draw)
    meadow = pen.tinted(MEADOW)
    edge = 0.012 * np.sin(np.linspace(0, 9 * pen.aspect, 60)) + HORIZON + 0.01
    outline = np.stack([np.linspace(0, pen.aspect, 60), edge], 1)
    _trees_afar(pen, HORIZON + 0.015, 0.05, pen.tinted(PINE), pointed=True)
    ground = poly([*outline, (pen.aspect, 1), (0, 1)])
    pen.fill(ground, lighter(meadow, 0.12), lighter(meadow, -0.18), (0, HORIZON, 0, 1))
    _grass(pen, HORIZON + 0.03, meadow)
    _flowers(pen, HORIZON + 0.05, ((250, 250, 250), (250, 226, 120)))
    spots = draw.random((round(16 * pen.aspect), 2)) * (pen.aspect, 0.95 - HORIZON) + (0, HORIZON + 0.04)
    _rocks(pen, spots, 0.05 * (spots[:, 1] - 0.5) * draw.uniform(0.6, 1.6, len(spots)), draw)


def _mountain(pen: Pen, x: float, top: float, draw: np.random.Generator) -> None:
    rock, snow = pen.tinted(ROCK), pen.tinted(SNOW)
    base, steps = HORIZON + 0.04, 26
    share = np.linspace(0, 1, steps)
    rough = np.minimum(share, 0.25) * 0.08
    y = top + (base - top) * share
    half = (base - top) * draw.uniform(0.8, 1.1)
    left = x - half * share + rough * draw.uniform(-1, 1, steps)
    right = x + half * share + rough * draw.uniform(-1, 1, steps)
    middle = x + 0.15 * half * np.sin(share * draw.uniform(3, 6)) + rough * draw.uniform(-1.5, 1.5, steps)
    bright = poly(np.stack([np.r_[left, middle[::-1]], np.r_[y, y[::-1]]], 1))
    whole = poly(np.stack([np.r_[left, right[::-1]], np.r_[y, y[::-1]]], 1))
    pen.fill(whole, lighter(rock, -0.34), mix(rock, pen.tones.bottom, 0.35), (0, top, 0, base))
    pen.fill(bright, lighter(rock, 0.14), mix(rock, pen.tones.bottom, 0.45), (0, top, 0, base))
    with pen.kept(whole):
        zigzag = np.linspace(x - half, x + half, 17)
        teeth = np.where(np.arange(17) % 2, 1, -1) * draw.uniform(0.3, 1.4, 17)
        depth = top + 0.4 * (base - top) + 0.035 * teeth
        cap = poly([(x - half, 0), *np.stack([zigzag, depth], 1), (x + half, 0)])
        pen.fill(cap, lighter(mix(snow, pen.tones.top, 0.22), -0.06))
        with pen.kept(bright):
            pen.fill(cap, snow)
        _cracks(pen, x, top, half, base)


def _cracks(pen: Pen, x: float, top: float, half: float, base: float, count: int = 260) -> None:
    """Lines that run down both sides of a mountain."""
    if not pen.shows(0.0013):
        return
    rock, draw = pen.tinted(ROCK), pen.stream(f"cracks {x}")
    down, side = draw.uniform(0.06, 1, count), draw.uniform(-1, 1, count)
    starts = np.stack([x + side * half * down, top + (base - top) * down], 1)
    slope = np.stack([side + draw.uniform(-0.5, 0.5, count), np.ones(count)], 1)
    ends = np.concatenate([starts, starts + draw.uniform(0.008, 0.03, (count, 1)) * slope], 1)
    pen.strokes(ends, 0.0013, lighter(rock, 0.3), lighter(rock, -0.4), alpha=0.6)


def _rocks(pen: Pen, spots: np.ndarray, sizes: np.ndarray, draw: np.random.Generator) -> None:
    """Rocks at spots, (n, 2): a dark right side, a lit left side and a bright facet on top."""
    turns = np.linspace(np.pi, 2 * np.pi, 6)
    reach = sizes[:, None, None] * draw.uniform(0.75, 1.1, (len(spots), 6, 1))
    points = spots[:, None] + reach * np.stack([1.3 * np.cos(turns), np.sin(turns)], 1)
    middle = spots[:, None] - np.stack([0 * sizes, 0.3 * sizes], 1)[:, None]
    foot = spots[:, None] + np.stack([0.25 * sizes, 0 * sizes], 1)[:, None]
    rock = pen.tinted(ROCK)
    faces = (points, -0.22), (np.concatenate([points[:, :4], middle, foot], 1), 0.1)
    for corners, light in (*faces, (np.concatenate([points[:, 2:4], middle], 1), 0.4)):
        path = skia.Path()
        for face in corners:
            path.addPath(poly(face))
        pen.fill(path, lighter(rock, light))


def _hills(pen: Pen) -> None:
    draw = pen.stream("hills")
    xs = np.linspace(-0.02, pen.aspect + 0.02, round(70 * max(1, pen.aspect)))
    grass = pen.tinted(GRASS)
    _grassland(pen, xs, 0.45 + curve(xs, draw, 0.055, 0.9), mix(grass, pen.tones.bottom, 0.42))
    _grassland(pen, xs, 0.56 + curve(xs, draw, 0.05, 1.1), mix(lighter(grass, -0.22), pen.tones.bottom, 0.16))
    _bushes(pen, xs, draw)
    _grassland(pen, xs, 0.68 + curve(xs, draw, 0.03, 0.8), grass)
    _grass(pen, 0.72, grass)
    _flowers(pen, 0.75, ((255, 255, 255), (255, 190, 220), (255, 236, 120)))


def _grassland(pen: Pen, xs: np.ndarray, ys: np.ndarray, colour: Colour) -> None:
    ridge = np.stack([xs, ys], 1)
    ends = (0, ys.min(), 0, ys.min() + 0.3)
    hill = poly([*ridge, (xs[-1], 1), (xs[0], 1)])
    pen.fill(hill, lighter(colour, 0.2), lighter(colour, -0.14), ends)
    pen.line(poly(ridge, closed=False), lighter(colour, 0.35), 0.005, alpha=0.7)
    for down in (0.03, 0.06, 0.09):  # paths of sheep, along the slope
        if pen.shows(0.0015):
            pen.line(poly(ridge + (0, down), closed=False), lighter(colour, -0.3), 0.0015, alpha=0.5)


def _bushes(pen: Pen, xs: np.ndarray, draw: np.random.Generator) -> None:
    leaf = pen.tinted(PINE)
    for x in draw.choice(xs, 9, replace=False):
        y, r = 0.62 + draw.uniform(-0.02, 0.06), draw.uniform(0.008, 0.016)
        pen.fill(ovals((x, y, 1.2 * r, r), (x + r, y + 0.3 * r, r, 0.7 * r)), leaf)
        pen.fill(ovals((x - 0.3 * r, y - 0.3 * r, 0.6 * r, 0.4 * r)), lighter(leaf, 0.2))
        spots = draw.normal((x + 0.4 * r, y), (0.5 * r, 0.3 * r), (40, 2))
        pen.strokes(np.c_[spots, spots + (0.0016, 0.001)], 0.0018, lighter(leaf, 0.35), lighter(leaf, -0.3))


def _sea(pen: Pen) -> None:
    water = pen.tones.water
    far = mix(water, pen.tones.bottom, 0.45)
    pen.fill(rect(0, HORIZON, pen.aspect, 1), far, lighter(water, -0.2), (0, HORIZON, 0, 1))
    draw = pen.stream("waves")
    for count, width, reach in ((70, 0.005, 0.1), (200, 0.0026, 0.05), (700, 0.0013, 0.025)):
        if not pen.shows(width):
            continue
        count = round(count * pen.aspect)
        crests, troughs = skia.Path(), skia.Path()  # lenses, thicker in the middle
        for x, depth, scale in draw.random((count, 3)).tolist():
            y = HORIZON + 0.012 + (1 - HORIZON) * depth**1.4
            length = reach * (0.25 + depth) * (0.6 + 0.6 * scale)
            wave(crests, x * pen.aspect, y, length, 0.04 * length, 0.2 * length)
            wave(troughs, x * pen.aspect, y, length, -0.12 * length, 0.04 * length)
        pen.fill(troughs, lighter(water, -0.4), alpha=0.5)
        pen.fill(crests, lighter(water, 0.5), alpha=0.7)
    glints = draw.random((round(240 * pen.aspect), 2)) * (pen.aspect, 0.97 - HORIZON) + (0, HORIZON + 0.01)
    ends = np.concatenate([glints, glints + (0.006, 0)], 1)
    pen.strokes(ends, 0.0014, lighter(mix(water, pen.tones.bottom, 0.7), 0.5))


def _field(pen: Pen) -> None:
    wheat, draw = pen.tinted(WHEAT), pen.stream("field")
    _trees_afar(pen, HORIZON, 0.03, pen.tinted(PINE), pointed=False)
    box = rect(0, HORIZON, pen.aspect, 1)
    pen.fill(box, lighter(wheat, 0.12), lighter(wheat, -0.08), (0, HORIZON, 0, 1))
    vanish = pen.aspect * draw.uniform(0.4, 0.6)
    with pen.kept(box):
        rows = np.arange(-3.0, 3.0 + pen.aspect, 0.22) + draw.uniform(0, 0.2)
        for x in rows.tolist():
            furrow = poly([(vanish, HORIZON - 0.03), (x, 1), (x + 0.1, 1)])
            pen.fill(furrow, lighter(wheat, -0.3), lighter(wheat, -0.24), (0, HORIZON, 0, 1))
    _grass(pen, HORIZON + 0.01, lighter(wheat, -0.06), 3400, 0.04)
    _flowers(pen, HORIZON + 0.06, ((250, 236, 170), (206, 150, 60)))


def _island(pen: Pen) -> None:
    sand, grass = pen.tinted(SAND), pen.tinted(GRASS)
    pen.fill(ovals((0, 0.06, 0.86, 0.13)), lighter(pen.tones.water, 0.65), alpha=0.8)
    pen.fill(ovals((0, 0.045, 0.8, 0.115)), sand, lighter(sand, -0.25), (-0.8, 0, 0.8, 0))
    pen.fill(ovals((0, 0.02, 0.68, 0.08)), grass, lighter(grass, -0.25), (-0.7, 0, 0.7, 0))
    draw = pen.stream("island")
    turns = draw.uniform(0.15, 3.0, 12)
    shore = np.stack([0.76 * np.cos(turns), 0.05 + 0.1 * np.sin(turns)], 1)
    _rocks(pen, shore, draw.uniform(0.015, 0.045, 12), draw)
    spots = draw.uniform(-1, 1, (260, 2)) * (0.6, 0.055) + (0, 0.02)
    pen.strokes(
        np.concatenate([spots, spots + (0.008, -0.03)], 1), 0.004, lighter(grass, 0.2), lighter(grass, -0.3)
    )


def _tuft(pen: Pen) -> None:
    """Blades in front of the subject's foot, which they tie to the ground."""
    ground = pen.tinted({"mountains": MEADOW, "hills": GRASS, "field": WHEAT}[pen.scene.land])
    if not pen.shows(0.005):
        return
    draw = pen.stream("tuft")
    x = draw.uniform(-0.6, 0.6, 110)
    y = draw.uniform(0.0, 0.05, 110)
    ends = np.stack([x, y, x + draw.uniform(-0.02, 0.02, 110), y - draw.uniform(0.02, 0.06, 110)], 1)
    pen.strokes(ends, 0.005, lighter(ground, 0.12), lighter(ground, -0.25))


LANDS = {"mountains": _mountains, "hills": _hills, "sea": _sea, "field": _field}
