"""The ten thing classes of the scenes, drawn with signed-distance functions.

Every shape is drawn in its own frame: x to the right, y up, the origin where it touches the
ground, one unit = the height of the object. A drawing function gets the coordinates (h, w), the
size of a pixel in units, a random generator and the light, and returns a ``Sprite``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: float32 throughout; numpy's stubs lose that in mixed arithmetic.
Array = NDArray[Any]


@dataclass(frozen=True)
class Pen:
    """What a shape is drawn with.

    Attributes:
        rng: Random generator of this object.
        pixel: Side of a pixel in units of the object's height.
        light: Horizontal direction of the light, -1 (from the left) to 1 (from the right).
        body: Main colour (3, 1, 1), 0 to 1.
        detail: Colour of the details (3, 1, 1).
        dark: Colour of dark parts (3, 1, 1).
    """

    rng: np.random.Generator
    pixel: float
    light: float
    body: Array
    detail: Array
    dark: Array

    def cover(self, distance: Array) -> Array:
        """Turns a signed distance (negative inside) into a coverage of 0 to 1."""
        return np.clip(0.5 - distance / np.float32(self.pixel), 0.0, 1.0)


@dataclass
class Sprite:
    """A drawn object.

    Attributes:
        alpha: Coverage (h, w), which also decides the mask (at one half).
        colour: Colours (3, h, w).
        bulge: How far the surface stands out towards the camera, in units of the height (h, w).
        trim: Coverage of parts that are drawn but are too thin to be labelled, or None.
    """

    alpha: Array
    colour: Array
    bulge: Array
    trim: Array | None = None


def _segment(x: Array, y: Array, ax: float, ay: float, bx: float, by: float) -> Array:
    """Distance to the line from (ax, ay) to (bx, by)."""
    dx, dy = bx - ax, by - ay
    t = np.clip(((x - ax) * dx + (y - ay) * dy) / np.float32(dx * dx + dy * dy), 0.0, 1.0)
    return np.hypot(x - ax - t * dx, y - ay - t * dy)


def _rect(x: Array, y: Array, cx: float, cy: float, hx: float, hy: float) -> Array:
    """Distance to an axis-aligned rectangle with half sides (hx, hy); exact inside only."""
    return np.maximum(np.abs(x - cx) - hx, np.abs(y - cy) - hy)


def _convex(x: Array, y: Array, points: list[tuple[float, float]]) -> Array:
    """Distance to a convex polygon with corners in counter-clockwise order."""
    distance = np.full(np.broadcast_shapes(x.shape, y.shape), -1e9, np.float32)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        dx, dy = bx - ax, by - ay
        length = np.float32(max(np.hypot(dx, dy), 1e-6))
        np.maximum(distance, ((x - ax) * dy - (y - ay) * dx) / length, out=distance)
    return distance


def _ellipse(x: Array, y: Array, cx: float, cy: float, rx: float, ry: float) -> Array:
    """Distance to an ellipse, to first order."""
    k = np.hypot((x - cx) / rx, (y - cy) / ry)
    return (k - 1.0) * np.float32(min(rx, ry))


def _fill(shape: tuple[int, ...], colour: Array) -> Array:
    return np.broadcast_to(colour, (3, *shape)).astype(np.float32)


def _mix(below: Array, colour: Array, alpha: Array) -> None:
    """Paints `colour` over `below` in place."""
    below += (colour - below) * alpha


def _lambert(pen: Pen, nx: Array, ny: Array, nz: Array) -> Array:
    """Brightness of a surface with the normal (nx, ny, nz)."""
    lx, ly, lz = 0.62 * pen.light, 0.55, 0.56
    return np.float32(0.56) + np.float32(0.6) * np.clip(nx * lx + ny * ly + nz * lz, 0.0, 1.0)


def _round_shade(pen: Pen, across: Array) -> Array:
    """Brightness of an upright cylinder at `across` (-1 left edge to 1 right edge)."""
    nx = np.clip(across, -1.0, 1.0)
    return _lambert(pen, nx, np.float32(0.25), np.sqrt(1.0 - nx * nx))


def ball(x: Array, y: Array, pen: Pen) -> Sprite:
    """A beach ball with coloured sectors, or with a band."""
    nx, ny = x * 2.0, (y - 0.5) * 2.0
    square = np.minimum(nx * nx + ny * ny, 1.0)
    nz = np.sqrt(1.0 - square)
    colour = _fill(square.shape, pen.body)
    tilt = pen.rng.uniform(0, 2 * np.pi)
    a, b = nx * np.cos(tilt) + ny * np.sin(tilt), ny * np.cos(tilt) - nx * np.sin(tilt)
    width = 3.0 * pen.pixel
    if pen.rng.random() < 0.7:
        b, c = b * 0.85 - nz * 0.53, nz * 0.85 + b * 0.53
        wave = np.sin(np.arctan2(a, c) * 3.0) * np.hypot(a, c)
        _mix(colour, pen.detail, np.clip(0.5 + wave / (3.0 * width), 0, 1))
        _mix(colour, pen.body, np.clip((np.abs(b) - 0.93) / width, 0, 1))
    else:
        _mix(colour, pen.detail, np.clip((0.3 - np.abs(b)) / width + 0.5, 0, 1))
    colour *= _lambert(pen, nx, ny, nz)
    shine = np.exp(-((nx - 0.4 * pen.light) ** 2 + (ny - 0.42) ** 2) * 14.0)
    colour += np.float32(0.35) * shine
    return Sprite(pen.cover(np.hypot(x, y - 0.5) - 0.5), colour, 0.5 * nz)


def box(x: Array, y: Array, pen: Pen) -> Sprite:
    """A crate seen from a little above, with braces on its front."""
    side = 1.0 if pen.rng.random() < 0.5 else -1.0
    x = x * np.float32(side)
    shift, rise = float(pen.rng.uniform(0.14, 0.3)), float(pen.rng.uniform(0.14, 0.24))
    width, height = float(pen.rng.uniform(0.66, 0.9)), 1.0 - rise
    left = -(width + shift) / 2
    right = left + width
    outline = [
        (left, 0.0), (right, 0.0), (right + shift, rise), (right + shift, 1.0),
        (left + shift, 1.0), (left, height),
    ]  # fmt: skip
    alpha = pen.cover(_convex(x, y, outline))
    colour = _fill(alpha.shape, pen.body)
    front = pen.cover(_rect(x, y, left + width / 2, height / 2, width / 2, height / 2))
    fx, fy = (x - left) / width, y / height
    frame = np.minimum(np.minimum(fx, 1 - fx), np.minimum(fy, 1 - fy)) - 0.13
    brace = np.abs(fx - fy) - 0.09
    if pen.rng.random() < 0.5:
        brace = np.minimum(brace, np.abs(fx + fy - 1) - 0.09)
    wood = np.minimum(frame, brace) * np.float32(height)
    _mix(colour, pen.body * 0.72, front)
    _mix(colour, pen.body, front * pen.cover(wood))
    _mix(colour, pen.body * 0.45, front * pen.cover(np.abs(wood) - 0.008))
    top = pen.cover(height + np.maximum(0, x - right) / shift * rise - y) * (1 - front)
    inside = (y - height) / rise
    on_top = top * (x - left - inside * shift > 0) * (x - right - inside * shift < 0)
    lit = 1.0 + 0.22 * side * pen.light
    colour *= np.float32(0.92)
    _mix(colour, np.minimum(pen.body * 1.25, 1.0), on_top)
    _mix(colour, pen.body * np.float32(0.55 * lit), (1 - on_top) * (1 - front))
    return Sprite(alpha, colour, np.float32(0.3) * front)


def cone(x: Array, y: Array, pen: Pen) -> Sprite:
    """A traffic cone: a slim cone with bands on a flat foot."""
    half = 0.05 + (1.0 - y) * np.float32(pen.rng.uniform(0.24, 0.3))
    body = np.maximum(np.abs(x) - half, np.maximum(y - 1.0, 0.06 - y)) * np.float32(0.95)
    foot = _rect(x, y, 0.0, 0.05, 0.42, 0.02) - 0.03
    alpha = pen.cover(np.minimum(body, foot))
    colour = _fill(alpha.shape, pen.body)
    across = x / np.maximum(half, 0.05)
    arc = y + 0.05 * np.sqrt(np.clip(1 - across * across, 0, 1))
    for low, high in ((0.34, 0.5), (0.64, 0.78)):
        _mix(colour, pen.detail, pen.cover(np.maximum(low - arc, arc - high)))
    colour *= _round_shade(pen, across)
    only_foot = pen.cover(foot) * (1 - pen.cover(body))
    _mix(colour, pen.body * 0.6, only_foot)
    return Sprite(alpha, colour, 0.3 * np.clip(1 - np.abs(x) / 0.4, 0, 1))


def barrel(x: Array, y: Array, pen: Pen) -> Sprite:
    """A barrel with staves, hoops and an open top."""
    waist, lid = float(pen.rng.uniform(0.33, 0.42)), 0.09
    half = waist - 0.28 * (y - 0.5) ** 2
    across = x / half
    arc = lid * np.sqrt(np.clip(1 - across * across, 0, 1))
    top_half = waist - 0.28 * 0.41**2
    top = _ellipse(x, y, 0.0, 1 - lid, top_half, lid)
    wall = np.maximum(np.abs(x) - half, np.maximum(y - (1 - lid), lid - arc - y))
    alpha = pen.cover(np.minimum(wall, top))
    colour = _fill(alpha.shape, pen.body)
    turn = np.arcsin(np.clip(across, -1, 1)) * np.float32(9 / np.pi) + pen.rng.random()
    stave = np.abs(turn - np.round(turn))
    colour *= 1.0 - 0.35 * np.clip((0.09 - stave) * 14, 0, 1)
    for centre in (0.3, 0.72):
        _mix(colour, pen.detail, pen.cover(np.abs(y + arc - lid / 2 - centre) - 0.045))
    colour *= _round_shade(pen, across)
    _mix(colour, pen.body * 0.85, pen.cover(top))
    _mix(colour, pen.dark * 0.6, pen.cover(top + 0.025))
    return Sprite(alpha, colour, waist * np.sqrt(np.clip(1 - across * across, 0, 1)))


def ring(x: Array, y: Array, pen: Pen) -> Sprite:
    """A swimming ring that stands on its edge; what is behind shows through the hole."""
    squash = float(pen.rng.uniform(0.68, 1.0))
    tube = float(pen.rng.uniform(0.105, 0.15))
    px, py = x / squash, y - 0.5
    radius = np.maximum(np.hypot(px, py), 1e-4)
    middle = 0.5 - tube
    across = (radius - middle) / tube
    alpha = pen.cover((np.abs(across) - 1) * np.float32(tube * squash))
    angle = np.arctan2(py, px) + pen.rng.uniform(0, 2 * np.pi)
    colour = _fill(alpha.shape, pen.body)
    edge = np.sin(angle * int(pen.rng.integers(2, 4)) * 2) * radius
    _mix(colour, pen.detail, np.clip(0.5 + (edge - 0.15) / (6 * pen.pixel), 0, 1))
    flat = np.clip(across, -1, 1)
    nz = np.sqrt(1 - flat * flat)
    colour *= _lambert(pen, flat * px / radius, flat * py / radius, nz)
    return Sprite(alpha, colour, tube * nz)


def mushroom(x: Array, y: Array, pen: Pen) -> Sprite:
    """A mushroom with a spotted cap."""
    base, half = float(pen.rng.uniform(0.42, 0.55)), float(pen.rng.uniform(0.42, 0.56))
    stalk = float(pen.rng.uniform(0.11, 0.17))
    trunk = np.abs(x) - stalk - 0.12 * (1 - np.clip(y / base, 0, 1)) ** 2
    stem = np.maximum(trunk, np.maximum(0.015 - y, y - base - 0.1))
    dome = _ellipse(x, y, 0.0, base, half, 1.0 - base)
    cap = np.maximum(dome, base - 0.06 * np.sqrt(np.clip(1 - (x / half) ** 2, 0, 1)) - y)
    cap_cover = pen.cover(cap)
    alpha = np.maximum(pen.cover(stem), cap_cover)
    colour = _fill(alpha.shape, pen.detail * 0.95)
    colour *= _round_shade(pen, x / 0.25)
    below = np.clip((y - base + 0.16) * 8, 0, 1) * np.float32(0.4)
    colour *= 1 - below * (1 - cap_cover)
    top = _fill(alpha.shape, pen.body)
    for _ in range(int(pen.rng.integers(4, 8))):
        cx, cy = pen.rng.uniform(-0.85, 0.85) * half, base + pen.rng.uniform(0.1, 0.85) * (1 - base)
        size = float(pen.rng.uniform(0.045, 0.09))
        _mix(top, pen.detail, pen.cover(_ellipse(x, y, cx, cy, size * 1.2, size)))
    nx, ny = np.clip(x / half, -1, 1), np.clip((y - base) / (1 - base), 0, 1)
    nz = np.sqrt(np.clip(1 - nx * nx - ny * ny, 0, 1))
    top *= _lambert(pen, nx, ny, nz)
    colour += (top - colour) * cap_cover
    return Sprite(alpha, colour, 0.4 * nz * cap_cover)


def tree(x: Array, y: Array, pen: Pen) -> Sprite:
    """A fir with stacked tiers, or a tree with a lobed crown; the trunk shows."""
    trunk_cover = pen.cover(_rect(x, y, 0.0, 0.15, 0.055, 0.15))
    wide = float(pen.rng.uniform(0.3, 0.42))
    shade = _round_shade(pen, x / wide)
    if pen.rng.random() < 0.6:
        colour = _fill(trunk_cover.shape, pen.dark)
        alpha = trunk_cover
        for low, high, share in ((0.14, 0.6, 1.0), (0.36, 0.8, 0.8), (0.58, 1.0, 0.58)):
            half = wide * share
            hem = low + 0.025 * np.cos(x * np.float32(26.0))
            slope = np.float32((high - low) / np.hypot(half, high - low))
            tier = np.maximum((np.abs(x) - half * (high - y) / (high - low)) * slope, hem - y)
            cover = pen.cover(tier)
            tone = shade * (0.62 + 0.5 * np.clip((y - low) / (high - low), 0, 1))
            _mix_rgb(colour, pen.body, tone, cover)
            alpha = np.maximum(alpha, cover)
    else:
        colour = _fill(trunk_cover.shape, pen.dark)
        alpha = trunk_cover
        start = pen.rng.uniform(0, 2 * np.pi)
        for i in range(6):
            turn = start + i * 2 * np.pi / 6
            cx, cy = (0.2 * math.cos(turn), 0.64 + 0.18 * math.sin(turn)) if i < 5 else (0.0, 0.66)
            lobe = np.hypot(x - cx, y - cy) - (0.17 if i < 5 else 0.19)
            cover = pen.cover(lobe)
            tone = 0.72 + 0.45 * np.clip((y - cy + pen.light * (x - cx)) / 0.3 + 0.4, 0, 1)
            _mix_rgb(colour, pen.body, tone, cover)
            alpha = np.maximum(alpha, cover)
    return Sprite(alpha, colour, 0.2 * np.clip(1 - np.abs(x) / wide, 0, 1))


def _mix_rgb(below: Array, colour: Array, tone: Array, alpha: Array) -> None:
    below += (colour * tone - below) * alpha


def house(x: Array, y: Array, pen: Pen) -> Sprite:
    """A house with a gable roof, a door and a window."""
    eave, half = float(pen.rng.uniform(0.48, 0.6)), float(pen.rng.uniform(0.36, 0.46))
    walls = _rect(x, y, 0.0, eave / 2, half, eave / 2)
    gable = _convex(x, y, [(-half, eave - 0.02), (half, eave - 0.02), (0.0, 0.97)])
    slope = (1.0 - eave) / half
    line = (np.abs(x) * slope + y - 1.0) / np.float32(np.hypot(slope, 1.0))
    roof = np.maximum(np.maximum(line, -line - 0.1), eave - 0.09 - y)
    chimney = _rect(x, y, half * 0.55, eave + 0.3, 0.055, 0.12)
    roof_cover, wall_cover = pen.cover(roof), pen.cover(np.minimum(walls, gable))
    alpha = np.maximum(np.maximum(roof_cover, wall_cover), pen.cover(chimney))
    colour = _fill(alpha.shape, pen.dark)
    _mix(colour, pen.detail * np.float32(0.93 + 0.07 * pen.light), wall_cover)
    door = float(pen.rng.choice([-0.18, 0.18])) * half / 0.4
    _mix(colour, pen.body * 0.6, pen.cover(_rect(x, y, door, 0.15, 0.085, 0.15)))
    window = _rect(x, y, -door, 0.27, 0.095, 0.095)
    _mix(colour, pen.dark, pen.cover(window - 0.02))
    _mix(colour, np.array([0.75, 0.88, 0.95], np.float32)[:, None, None], pen.cover(window))
    bars = np.minimum(np.abs(x + door), np.abs(y - 0.27)) - 0.012
    _mix(colour, pen.dark, pen.cover(np.maximum(bars, window)))
    _mix(colour, pen.body * 0.6, pen.cover(np.hypot(x, y - eave - 0.14) - 0.055))
    shade = np.where(x * pen.light > 0, np.float32(1.1), np.float32(0.8))
    _mix_rgb(colour, pen.body, shade, roof_cover)
    return Sprite(alpha, colour, np.zeros_like(alpha))


def cactus(x: Array, y: Array, pen: Pen) -> Sprite:
    """A cactus with one or two bent arms."""
    thick = float(pen.rng.uniform(0.1, 0.14))
    distance = _segment(x, y, 0.0, 0.0, 0.0, 1.0 - thick) - thick
    axis = np.abs(x)
    colour_axis = x / thick
    arms = [1.0, -1.0] if pen.rng.random() < 0.75 else [float(pen.rng.choice([-1.0, 1.0]))]
    for arm in arms:
        low = float(pen.rng.uniform(0.28, 0.5))
        high = low + float(pen.rng.uniform(0.15, 0.28))
        reach, thin = 0.3, thick * 0.72
        bend = _segment(x, y, 0.0, low, arm * reach, low) - thin
        up = _segment(x, y, arm * reach, low, arm * reach, high) - thin
        aside = x - arm * reach
        colour_axis = np.where(up < np.minimum(distance, bend), aside / thin, colour_axis)
        colour_axis = np.where(bend < np.minimum(distance, up), (low - y) / thin, colour_axis)
        distance = np.minimum(distance, np.minimum(bend, up))
        axis = np.minimum(axis, np.abs(aside))
    alpha = pen.cover(np.maximum(distance, -y))
    across = np.clip(colour_axis, -1, 1)
    rib = np.cos(np.arcsin(across) * 5.0)
    colour = _fill(alpha.shape, pen.body)
    colour *= _round_shade(pen, across) * (0.9 + 0.16 * rib)
    if pen.rng.random() < 0.6:
        _mix(colour, pen.detail, pen.cover(np.hypot(x, y - 1.0 + thick * 0.5) - thick * 0.6))
    return Sprite(alpha, colour, thick * np.sqrt(1 - across * across))


def balloon(x: Array, y: Array, pen: Pen) -> Sprite:
    """A balloon on a string; the string is drawn, but too thin to be part of the mask."""
    top, low = 1.0, 0.3
    centre, radius = 0.68, 0.32
    py = np.where(y > centre, (y - centre) / (top - centre), (y - centre) / (centre - low))
    px = x / (0.29 * (1 + 0.1 * py))
    body = (np.hypot(px, py) - 1) * np.float32(0.28)
    knot = _convex(x, y, [(-0.05, low - 0.055), (0.05, low - 0.055), (0.0, low + 0.03)])
    string = np.abs(x - 0.03 * np.sin(y * 22.0)) - max(0.008, 0.55 * pen.pixel)
    string = np.maximum(string, np.maximum(y - low, -y))
    alpha = pen.cover(np.minimum(body, knot))
    square = np.minimum(px * px + py * py, 1.0)
    nz = np.sqrt(1 - square)
    colour = _fill(alpha.shape, pen.body)
    if pen.rng.random() < 0.35:
        stripe = np.sin(y * np.float32(26.0))
        _mix(colour, pen.detail, np.clip(0.5 + stripe / (40 * pen.pixel), 0, 1))
    colour *= _lambert(pen, px, py, nz)
    glow = np.exp(-((px - 0.4 * pen.light) ** 2 * 22.0 + (py - 0.35) ** 2 * 8.0))
    colour += np.float32(0.4) * glow
    trim = pen.cover(string) * (1 - alpha)
    colour += (np.float32(0.25) - colour) * trim
    return Sprite(alpha, colour, radius * nz, trim)


Drawing = Callable[[Array, Array, Pen], Sprite]


@dataclass(frozen=True)
class Thing:
    """How a class is drawn and placed.

    Attributes:
        draw: Drawing function.
        aspect: Width over height.
        heights: Height in the world over the camera's height (least, most).
        weight: How often it is tried; evens out that large things fit less often.
        floats: Whether it may be on water.
    """

    draw: Drawing
    aspect: float
    heights: tuple[float, float]
    weight: float
    floats: bool = False


THINGS: dict[str, Thing] = {
    "ball": Thing(ball, 1.0, (0.3, 0.9), 1.0, floats=True),
    "box": Thing(box, 1.2, (0.35, 1.1), 1.0, floats=True),
    "cone": Thing(cone, 0.92, (0.35, 0.95), 1.3),
    "barrel": Thing(barrel, 0.86, (0.45, 1.1), 0.9, floats=True),
    "ring": Thing(ring, 1.0, (0.4, 1.1), 1.0, floats=True),
    "mushroom": Thing(mushroom, 1.14, (0.35, 1.2), 1.6),
    "tree": Thing(tree, 0.88, (0.9, 2.6), 2.4),
    "house": Thing(house, 1.0, (0.9, 2.4), 2.4),
    "cactus": Thing(cactus, 0.84, (0.6, 1.7), 1.8),
    "balloon": Thing(balloon, 0.66, (0.6, 1.3), 0.6, floats=True),
}
