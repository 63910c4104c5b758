"""Composes a scene: camera, surfaces, objects from far to near, light and camera noise."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from expedite_d2.d2.data.scenes.shapes import THINGS, Array, Pen
from expedite_d2.d2.data.scenes.surfaces import STUFF, Frame, Paint

#: Side of an image in pixels.
SIZE = 384
#: A segment with fewer visible pixels than this is void.
LEAST_AREA = 20
#: Categories in the order of their contiguous ids: things, then stuff.
THING_CLASSES = list(THINGS)
STUFF_CLASSES = list(STUFF)
#: Depth of the farthest thing or ground, in metres; the sky has none.
FARTHEST = 100.0


@dataclass(frozen=True)
class Segment:
    """One segment of a scene: its number in the map and its contiguous category."""

    id: int
    category: int
    isthing: bool


@dataclass(frozen=True)
class Scene:
    """A rendered scene.

    Attributes:
        image: RGB (H, W, 3) uint8.
        segments: Number of the segment at each pixel (H, W) int32, 0 = void.
        infos: The segments in `segments`, in the order of their numbers.
        depth: Metres (H, W) float32, 0 = none (sky).
    """

    image: NDArray[np.uint8]
    segments: NDArray[np.int32]
    infos: list[Segment]
    depth: Array


@dataclass
class _Canvas:
    """The picture while it is painted, from far to near."""

    rng: np.random.Generator
    horizon: float
    focal: float
    camera: float
    light: float
    image: Array = field(init=False)
    depth: Array = field(init=False)
    stuff: NDArray[np.uint8] = field(init=False)
    thing: NDArray[np.uint8] = field(init=False)
    ground: Array = field(init=False)
    wall_base: Array = field(init=False)
    wall_foot: Array = field(init=False)
    haze: Array = field(init=False)
    slant: float = 0.0

    def __post_init__(self) -> None:
        self.image = np.zeros((3, SIZE, SIZE), np.float32)
        self.depth = np.zeros((SIZE, SIZE), np.float32)
        self.stuff = np.zeros((SIZE, SIZE), np.uint8)
        self.thing = np.zeros((SIZE, SIZE), np.uint8)
        below = np.maximum(np.arange(SIZE, dtype=np.float32) + 0.5 - self.horizon, 1e-3)
        far = np.minimum(self.focal * self.camera / below, FARTHEST)
        self.ground = np.broadcast_to(far[:, None], (SIZE, SIZE)).astype(np.float32)
        # Row where the ground begins in each column: on a plan, and as it is drawn (uneven).
        self.wall_base = np.full(SIZE, self.horizon, np.float32)
        self.wall_foot = self.wall_base
        self.haze = _rgb(float(self.rng.choice([0.55, 0.6, 0.1, 0.9])), 0.15, 0.9)

    def paint(self, name: str, alpha: Array, depth: Array | float) -> None:
        """Paints a surface where `alpha` (H, W) is above 0 and labels it where it is above 1/2."""
        rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
        if rows.size == 0:
            return
        down, across = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        area = (down, across)
        pixels = self.image[:, down, across]
        y = np.arange(rows[0], rows[-1] + 1, dtype=np.float32)[:, None] + 0.5 - self.horizon
        x = np.arange(columns[0], columns[-1] + 1, dtype=np.float32)[None] + 0.5 - SIZE / 2
        # Features shrink to a sixth at the horizon, not to nothing: they stay recognisable.
        scale = np.maximum(y, 0.0) + np.float32(0.14 * SIZE)
        top = np.minimum(y, 0.0) / np.float32(0.14 * SIZE)
        frame = Frame(x, y, x / scale, np.log(scale) + top + 0 * x, scale, SIZE, self.slant)
        texture, hues = STUFF[name]
        colour = texture(frame, self._colours(hues))
        if name != "sky":
            metres = depth[area] if isinstance(depth, np.ndarray) else np.float32(depth)
            fog = np.clip((metres - 12.0) / np.float32(160.0), 0.0, 0.4)
            colour += (self.haze - colour) * fog
        cover = alpha[area]
        pixels += (colour - pixels) * cover
        inside = cover >= 0.5
        self.stuff[area][inside] = STUFF_CLASSES.index(name)
        self.depth[area] = np.where(
            inside, depth[area] if isinstance(depth, np.ndarray) else depth, self.depth[area]
        )

    def _colours(self, hues: tuple[float, ...]) -> Paint:
        """Usual hues are likely, but one scene in six has any hue."""
        rng = self.rng
        likely = np.array([0.34, 0.22, 0.16, 0.1, 0.09, 0.09])
        hue = float(rng.choice(hues, p=likely)) + rng.normal(0, 0.02)
        if rng.random() < 1 / 6:
            hue = rng.random()
        saturation, value = rng.uniform(0.22, 0.62), rng.uniform(0.5, 0.82)
        base = _rgb(hue, saturation, value)
        light = _rgb(hue + rng.normal(0, 0.03), saturation * 0.5, min(1.0, value + 0.24))
        dark = _rgb(hue + rng.normal(0, 0.03), min(1.0, saturation * 1.2), value * 0.62)
        return Paint(rng, base, light, dark, int(rng.integers(0, 1 << 20)))


def _rgb(hue: float, saturation: float, value: float) -> Array:
    """A colour of shape (3, 1, 1)."""
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), np.float32)[:, None, None]


def _curve(rng: np.random.Generator, t: Array, strength: float) -> Array:
    """A smooth random curve over t (0 to 1), within about +-`strength`."""
    total = np.zeros_like(t)
    for frequency in (1.0, 2.3, 5.1):
        turn = rng.uniform(0, 2 * np.pi)
        size = rng.uniform(0.3, 1.0) * strength / frequency
        total += np.float32(size) * np.sin(np.float32(2 * np.pi * frequency) * t + turn)
    return total.astype(np.float32)


def _lay_ground(canvas: _Canvas, names: list[str]) -> None:
    """Covers the ground with the surfaces in `names`, divided by curved borders."""
    rng = canvas.rng
    y = np.arange(SIZE, dtype=np.float32)[:, None] + 0.5
    x = np.arange(SIZE, dtype=np.float32)[None] + 0.5
    below = np.clip(y - canvas.wall_foot[None] + 0.5, 0.0, 1.0)
    canvas.paint(names[0], below, canvas.ground)
    span = SIZE - canvas.horizon
    if len(names) == 3:
        cuts = [rng.uniform(0.14, 0.32), rng.uniform(0.5, 0.75)]
    else:
        cuts = [rng.uniform(0.2, 0.6)]
    for name, cut in zip(names[1:], cuts, strict=False):
        if rng.random() < 0.62:
            line = canvas.horizon + span * cut + _curve(rng, x / SIZE, span * 0.13)
            line = line + (x - SIZE / 2) * np.float32(rng.uniform(-0.2, 0.2))
            alpha = np.clip(y - line + 0.5, 0.0, 1.0)
        else:
            side = np.float32(rng.choice([-1.0, 1.0]))
            t = (y - canvas.horizon) / span
            width = 0.35 + 0.65 * np.clip(t, 0, 1)
            line = SIZE * (0.5 + side * (rng.uniform(-0.1, 0.25) + rng.uniform(0, 0.25) * t))
            line = line + _curve(rng, t, SIZE * 0.13) * width
            alpha = np.clip((x - line) * side + 0.5, 0.0, 1.0)
        canvas.paint(name, alpha * below, canvas.ground)


def _lay_hill(canvas: _Canvas) -> None:
    """A hill or dune on the horizon."""
    rng = canvas.rng
    x = np.arange(SIZE, dtype=np.float32)[None] / SIZE
    y = np.arange(SIZE, dtype=np.float32)[:, None] + 0.5
    high = SIZE * rng.uniform(0.04, 0.16)
    crest = canvas.horizon - high * 0.5 - _curve(rng, x, high * 0.7)
    alpha = np.clip(y - crest + 0.5, 0.0, 1.0) * (y < canvas.horizon + 1)
    canvas.paint(str(rng.choice(["grass", "sand"])), alpha, FARTHEST)


def _lay_wall(canvas: _Canvas, full: bool) -> None:
    """A brick wall that faces the camera or recedes; `full` reaches the top of the image."""
    rng = canvas.rng
    distance = rng.uniform(3.5, 9.0)
    canvas.slant = float(rng.choice([0.0, rng.uniform(-0.0022, 0.0022)]))
    x = np.arange(SIZE, dtype=np.float32)[None] + 0.5 - SIZE / 2
    y = np.arange(SIZE, dtype=np.float32)[:, None] + 0.5
    closeness = np.maximum(1.0 + canvas.slant * x, 0.2) / distance
    base = canvas.horizon + canvas.focal * canvas.camera * closeness
    foot = base + _curve(rng, (x + SIZE / 2) / SIZE * 4, 2.0)
    # The ground is painted over it from `foot` down; a pixel more leaves no gap at the border.
    alpha = np.clip(foot + 1.0 - y + 0.5, 0.0, 1.0)
    if not full:
        tall = rng.uniform(1.4, 2.5) * canvas.camera
        # The top is stepped like broken courses.
        step = np.floor((x + SIZE / 2) / (SIZE * rng.uniform(0.05, 0.12))).astype(np.int32)
        heights = rng.choice([0.0, 0.0, 0.07, 0.14, 0.22], size=int(step.max()) + 1)
        rise = (tall * (1 - heights[step]) - canvas.camera).astype(np.float32)
        alpha = alpha * np.clip(y - (canvas.horizon - canvas.focal * rise * closeness) + 0.5, 0, 1)
        if rng.random() < 0.4:
            end = float(int(SIZE * rng.uniform(0.35, 0.7)) - SIZE // 2)
            side = rng.choice([-1.0, 1.0])
            # Ragged in the air alone: on the ground, a column is either wall or open.
            ragged = np.repeat(rng.uniform(-9, 9, SIZE // 12), 12)[:, None]
            ragged = ragged * (y < canvas.horizon - 9)
            alpha = alpha * np.clip((x - end - ragged) * side + 0.5, 0, 1)
            open_side = (x[0] - end) * side < 0
            base, foot = (np.where(open_side[None], canvas.horizon, line) for line in (base, foot))
    covered = alpha.astype(np.float32)
    canvas.paint("brick wall", covered, np.broadcast_to(1.0 / closeness, (SIZE, SIZE)))
    walled = covered.max(0) > 0
    canvas.wall_base = np.where(walled, base[0], canvas.horizon).astype(np.float32)
    canvas.wall_foot = np.where(walled, foot[0], canvas.horizon).astype(np.float32)
    if full and rng.random() < 0.6:
        _open_window(canvas)


def _open_window(canvas: _Canvas) -> None:
    """A window in the wall, through which the sky is seen; its frame belongs to the wall."""
    rng = canvas.rng
    x = np.arange(SIZE, dtype=np.float32)[None] + 0.5
    y = np.arange(SIZE, dtype=np.float32)[:, None] + 0.5
    low = float(canvas.wall_base.min()) - SIZE * rng.uniform(0.1, 0.16)
    half = SIZE * rng.uniform(0.1, 0.2)
    high = SIZE * rng.uniform(0.2, 0.4)
    centre = rng.uniform(half, SIZE - half)
    if low - high - 12 < 0:
        return
    arch = np.hypot(x - centre, np.minimum(y - (low - high + half), 0.0)) - half
    distance = np.maximum(np.maximum(arch, np.abs(x - centre) - half), y - low)
    frame = np.clip(0.5 - (distance - 6.0), 0.0, 1.0)
    canvas.image += (_rgb(rng.random(), 0.25, 0.85) - canvas.image) * frame
    bars = np.minimum(np.abs(x - centre), np.abs(y - (low - high * 0.45))) - 2.0
    canvas.paint("sky", np.clip(0.5 - distance, 0, 1) * np.clip(bars + 0.5, 0, 1), 0.0)


def _lay_stuff(canvas: _Canvas) -> None:
    rng = canvas.rng
    above = np.arange(SIZE)[:, None] < canvas.horizon + 2
    above = np.broadcast_to(above, (SIZE, SIZE)).astype(np.float32)
    kind = rng.choice(["open", "yard", "room", "pier"], p=[0.42, 0.26, 0.18, 0.14])
    if kind != "room":
        canvas.paint("sky", above, 0.0)
    if kind in ("open", "pier") and rng.random() < 0.6:
        _lay_hill(canvas)
    if kind == "open":
        names = list(rng.permutation(["grass", "sand", "water"]))[: int(rng.integers(1, 4))]
    elif kind == "pier":
        names = [str(rng.choice(["water", "water", "sand"])), "wood floor"]
    else:
        _lay_wall(canvas, full=kind == "room")
        floor = ["wood floor", "sand", "grass"]
        if kind == "yard":
            floor = ["grass", "sand", "wood floor"]
        count = int(rng.integers(1, 3))
        names = list(rng.choice(floor, size=count, replace=False, p=[0.6, 0.2, 0.2]))
        if kind == "yard" and rng.random() < 0.25:
            names.append("water")
    _lay_ground(canvas, [str(name) for name in names])


@dataclass(frozen=True)
class _Placed:
    name: str
    x: float
    y: float
    height: float
    depth: float
    lift: float


def _place(canvas: _Canvas) -> list[_Placed]:
    """Chooses 4 to 14 objects, far to near, that do not hide one another completely."""
    rng = canvas.rng
    count = int(rng.integers(4, 15))
    weights = np.array([thing.weight for thing in THINGS.values()])
    weights /= weights.sum()
    placed: list[_Placed] = []
    boxes: list[tuple[float, float, float, float]] = []
    span = SIZE * 1.06 - canvas.horizon
    for _ in range(count * 6):
        if len(placed) == count:
            break
        name = str(rng.choice(THING_CLASSES, p=weights))
        thing = THINGS[name]
        below = float(np.exp(rng.uniform(np.log(0.09 * SIZE), np.log(span))))
        x = float(rng.uniform(0.0, SIZE))
        base = canvas.horizon + below
        if base < canvas.wall_base[min(int(x), SIZE - 1)] + 2:
            continue
        under = STUFF_CLASSES[canvas.stuff[min(int(base), SIZE - 1), min(int(x), SIZE - 1)]]
        if under == "water" and not thing.floats:
            continue
        height = below * float(np.exp(rng.uniform(*np.log(thing.heights))))
        if not 16.0 <= height <= 0.9 * SIZE:
            continue
        lift = 0.0
        if name == "balloon":
            lift = float(rng.uniform(0.05, 1.0)) * max(0.0, base - height)
        width = height * thing.aspect
        left, top = max(0.0, x - width / 2), max(0.0, base - lift - height)
        right, low = min(float(SIZE), x + width / 2), min(float(SIZE), base - lift)
        area = max(0.0, right - left) * max(0.0, low - top)
        box = (left, top, right, low)
        if area < 0.4 * width * height or any(_hides(one, box) for one in boxes):
            continue
        boxes.append(box)
        depth = canvas.focal * canvas.camera / below
        placed.append(_Placed(name, x, base, height, depth, lift))
    return sorted(placed, key=lambda one: -one.depth)


def _hides(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    """Whether two boxes overlap by more than 55 % of the smaller one."""
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    if wide <= 0 or high <= 0:
        return False
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return wide * high > 0.55 * smaller


def _window(low: float, high: float) -> tuple[int, int]:
    return max(0, int(np.floor(low))), min(SIZE, int(np.ceil(high)))


def _cast_shadow(canvas: _Canvas, one: _Placed, width: float) -> None:
    """A soft ellipse on the ground, away from the light; it never falls on another object."""
    reach, flat = 0.62 * width, 0.17 * width
    cx = one.x - canvas.light * 0.28 * width
    x0, x1 = _window(cx - 1.7 * reach, cx + 1.7 * reach)
    y0, y1 = _window(one.y - 1.7 * flat, one.y + 1.7 * flat)
    if x0 >= x1 or y0 >= y1:
        return
    x = np.arange(x0, x1, dtype=np.float32)[None] + 0.5 - cx
    y = np.arange(y0, y1, dtype=np.float32)[:, None] + 0.5 - one.y
    fade = np.clip(1.5 - np.hypot(x / reach, y / flat), 0.0, 1.0)
    on_ground = (canvas.thing[y0:y1, x0:x1] == 0) & (
        np.arange(y0, y1)[:, None] > canvas.wall_base[None, x0:x1]
    )
    strength = 0.5 if one.lift == 0 else 0.25
    canvas.image[:, y0:y1, x0:x1] *= 1.0 - np.float32(strength) * fade * on_ground


def _draw(canvas: _Canvas, one: _Placed, number: int) -> None:
    rng = canvas.rng
    thing = THINGS[one.name]
    width = one.height * thing.aspect
    base = one.y - one.lift
    _cast_shadow(canvas, one, width)
    x0, x1 = _window(one.x - width / 2 - 2, one.x + width / 2 + 2)
    y0, y1 = _window(base - one.height - 2, base + 2)
    hue, saturation, value = rng.random(), rng.uniform(0.3, 0.8), rng.uniform(0.5, 0.95)
    detail = _rgb(hue + rng.uniform(0.3, 0.7), rng.uniform(0.05, 0.5), rng.uniform(0.8, 1.0))
    dark = _rgb(rng.random(), 0.35, rng.uniform(0.25, 0.45))
    pen = Pen(rng, 1.0 / one.height, canvas.light, _rgb(hue, saturation, value), detail, dark)
    height = np.float32(one.height)
    x = (np.arange(x0, x1, dtype=np.float32)[None] + 0.5 - np.float32(one.x)) / height
    y = (np.float32(base) - np.arange(y0, y1, dtype=np.float32)[:, None] - 0.5) / height
    sprite = thing.draw(x, y, pen)
    area = np.s_[y0:y1, x0:x1]
    fog = np.float32(np.clip((one.depth - 12.0) / 160.0, 0.0, 0.4))
    colour = sprite.colour + (canvas.haze - sprite.colour) * fog
    cover = sprite.alpha if sprite.trim is None else np.maximum(sprite.alpha, sprite.trim)
    pixels = canvas.image[:, y0:y1, x0:x1]
    pixels += (colour - pixels) * cover
    inside = sprite.alpha >= 0.5
    canvas.thing[area][inside] = number
    metres = one.depth - sprite.bulge * np.float32(one.height * one.depth / canvas.focal)
    before = canvas.depth[area]
    # Nearer objects hide farther ones: a bulging object behind must not show a smaller depth.
    nearest = np.where(before > 0, np.minimum(metres, before), metres)
    canvas.depth[area] = np.where(inside, nearest, before)


def _photograph(canvas: _Canvas) -> NDArray[np.uint8]:
    """Exposure, tint, vignette, a little blur and noise; the result is uint8 (H, W, 3)."""
    rng = canvas.rng
    image = np.clip(canvas.image, 0.0, 1.0)
    grid = (np.arange(SIZE, dtype=np.float32) + 0.5) / SIZE - 0.5
    falloff = 1.0 - np.float32(rng.uniform(0.0, 0.3)) * (grid[:, None] ** 2 + grid[None] ** 2)
    lean = 1.0 + np.float32(rng.uniform(0, 0.25) * canvas.light) * grid[None]
    gain = rng.uniform(0.8, 1.18) * (1.0 + rng.normal(0, 0.05, 3))
    image *= (falloff * lean) * gain.astype(np.float32)[:, None, None]
    contrast = np.float32(rng.uniform(0.82, 1.1))
    image = (image - np.float32(0.5)) * contrast + np.float32(0.5)
    if rng.random() < 0.4:
        side = np.float32(rng.uniform(0.08, 0.25))
        for _ in range(int(rng.integers(1, 3))):
            image[:, 1:-1] += side * (image[:, 2:] + image[:, :-2] - 2 * image[:, 1:-1])
            image[..., 1:-1] += side * (image[..., 2:] + image[..., :-2] - 2 * image[..., 1:-1])
    grain = rng.standard_normal((SIZE, SIZE), np.float32) * np.float32(rng.uniform(0.003, 0.016))
    image += grain
    pixels = (np.clip(image, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def render_scene(seed: int, index: int) -> Scene:
    """Renders scene number `index` of the series `seed`.

    Args:
        seed: Seed of the series (a split has its own).
        index: Number of the scene, 0 and up.

    Returns:
        The scene. The same arguments give the same scene in any process, and numpy's global
        generator is neither read nor changed.
    """
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, index])))
    canvas = _Canvas(
        rng=rng,
        horizon=float(SIZE * rng.uniform(0.24, 0.48)),
        focal=float(SIZE * rng.uniform(0.9, 1.2)),
        camera=float(rng.uniform(1.2, 2.0)),
        light=float(rng.choice([-1.0, 1.0]) * rng.uniform(0.35, 1.0)),
    )
    _lay_stuff(canvas)
    placed = _place(canvas)
    for number, one in enumerate(placed, 1):
        _draw(canvas, one, number)
    first = 1 + len(placed)
    segments = np.where(canvas.thing > 0, canvas.thing, canvas.stuff + first).astype(np.int32)
    areas = np.bincount(segments.ravel(), minlength=first + len(STUFF_CLASSES))
    renumber = np.zeros(len(areas), np.int32)
    infos: list[Segment] = []
    for old in np.flatnonzero(areas >= LEAST_AREA):
        isthing = bool(old < first)
        category = (
            THING_CLASSES.index(placed[old - 1].name)
            if isthing
            else len(THING_CLASSES) + int(old) - first
        )
        infos.append(Segment(len(infos) + 1, category, isthing))
        renumber[old] = len(infos)
    return Scene(_photograph(canvas), renumber[segments], infos, canvas.depth)
