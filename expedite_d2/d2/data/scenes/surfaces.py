"""The six stuff classes of the scenes: textures whose structure, not colour, tells the class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: float32 throughout; numpy's stubs lose that in mixed arithmetic.
Array = NDArray[Any]

#: Side of the noise table, a power of two so that indices wrap with a mask.
TABLE = 1024
#: Samples in one feature of the noise.
FEATURE = 64


@lru_cache(maxsize=1)
def _noise_table() -> Array:
    """Smooth noise (TABLE, TABLE) that tiles; values have mean 0 and deviation 1.

    Its features are about 64 samples wide, so that a feature may be enlarged to a hundred
    pixels before single samples show.
    """
    rng = np.random.default_rng(20221003)
    white = np.fft.rfft2(rng.standard_normal((TABLE, TABLE)))
    fy = np.fft.fftfreq(TABLE)[:, None] * FEATURE
    fx = np.fft.rfftfreq(TABLE)[None, :] * FEATURE
    radius2 = fx * fx + fy * fy
    table = np.fft.irfft2(white * np.exp(-2.0 * radius2) * (radius2 > 0), s=(TABLE, TABLE))
    return (table / table.std()).astype(np.float32)


@lru_cache(maxsize=1)
def _hash_table() -> Array:
    return np.random.default_rng(20221004).random(TABLE).astype(np.float32)


def noise(u: Array, v: Array, shift: int) -> Array:
    """Smooth noise at (u, v); one unit is about one feature."""
    columns = (u * np.float32(FEATURE)).astype(np.int32) + shift
    rows = (v * np.float32(FEATURE)).astype(np.int32) + shift * 7
    return _noise_table().ravel()[((rows & (TABLE - 1)) * TABLE) + (columns & (TABLE - 1))]


def _hash(i: NDArray[np.int32], j: NDArray[np.int32], shift: int) -> Array:
    """A number in [0, 1) for each pair of integers."""
    return _hash_table()[(i * 73 + j * 397 + shift) & (TABLE - 1)]


def ramp(low: float, high: float, value: Array) -> Array:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((value - np.float32(low)) / np.float32(high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _cell(value: Array) -> tuple[NDArray[np.int32], Array]:
    """The integer part (rounded down) and the rest, in float32."""
    whole = np.floor(value)
    return whole.astype(np.int32), value - whole


@dataclass(frozen=True)
class Frame:
    """Where a surface is drawn.

    Attributes:
        x, y: Pixel coordinates relative to the vanishing point, (1, w) and (h, 1).
        u, v: Coordinates on the ground, (h, w): features shrink towards the horizon.
        scale: Pixels in one unit of u and v, (h, 1).
        size: Side of the image in pixels.
        slant: Change of a wall's scale over one pixel in x (0: the wall faces the camera).
    """

    x: Array
    y: Array
    u: Array
    v: Array
    scale: Array
    size: int
    slant: float


@dataclass(frozen=True)
class Paint:
    """The random choices of one surface: colours (3, 1, 1), generator and noise offset."""

    rng: np.random.Generator
    base: Array
    light: Array
    dark: Array
    shift: int


def _blend(a: Array, b: Array, t: Array) -> Array:
    return a + (b - a) * t


def sky(frame: Frame, paint: Paint) -> Array:
    """A vertical gradient with soft clouds."""
    height = np.clip(-frame.y / np.float32(0.5 * frame.size), 0.0, 1.0) + 0 * frame.x
    colour = _blend(paint.light, paint.base, height)
    wide = np.float32(frame.size * paint.rng.uniform(0.16, 0.3))
    lift = frame.y / (wide * 0.5)
    cloud = noise(frame.x / wide, lift, paint.shift)
    cloud = cloud + 0.45 * noise(frame.x * 2.6 / wide, lift * 2.6, paint.shift + 311)
    veil = ramp(0.25, 0.75, cloud) * np.float32(0.85)
    under = np.clip(0.75 + 0.25 * cloud, 0.7, 1.0)
    puff = np.minimum(paint.light * 0.35 + 0.68, 1.0)
    return colour + (puff * under - colour) * veil


def water(frame: Frame, paint: Paint) -> Array:
    """Long horizontal crests and troughs with glints."""
    drift = noise(frame.u * 1.2, frame.v * 3.0, paint.shift)
    long = noise(frame.u * 2.0, frame.v * 13.0 + 0.5 * drift, paint.shift + 57)
    colour = _blend(paint.base, paint.dark, ramp(0.1, 0.9, -long))
    colour = _blend(colour, paint.light, ramp(0.55, 0.95, long))
    glint = noise(frame.u * 5.0, frame.v * 26.0, paint.shift + 501)
    return _blend(colour, np.minimum(paint.light + 0.25, 1.0), ramp(1.35, 1.7, glint + 0.3 * long))


def grass(frame: Frame, paint: Paint) -> Array:
    """Rows of leaning blades, dark at the foot and light at the tips, each over the row behind."""
    t = frame.v * np.float32(7.0) + 0.35 * noise(frame.u * 1.5, frame.v * 1.5, paint.shift)
    row, near = _cell(t)
    # 1 where a row begins (far), 0 at its near end, where the next row's feet are.
    high = 1.0 - near
    colour = _blend(paint.dark, paint.base, np.clip(0.9 - high, 0.0, 1.0))
    for layer, width in enumerate((15.0, 11.0)):
        blade = frame.u * np.float32(width) + _hash(row, row, paint.shift + layer) * 7.0
        number, inside = _cell(blade)
        lean = (_hash(number, row, paint.shift + 5 + layer) - 0.5) * 0.7
        across = np.abs(inside - 0.5 - lean * high * high) * 2.0
        tall = 0.45 + 0.5 * _hash(number, row, paint.shift + layer)
        reach = tall * (1.0 - across * across) - high
        tone = _blend(paint.base * (0.72 + 0.2 * layer), paint.light, np.clip(1.25 * high, 0, 1))
        colour = _blend(colour, tone, np.clip(0.5 + reach * 7.0, 0.0, 1.0))
    return colour * (1.0 + 0.09 * noise(frame.u * 0.8, frame.v * 1.2, paint.shift + 91))


def sand(frame: Frame, paint: Paint) -> Array:
    """Crooked ripples strewn with pebbles."""
    bend = noise(frame.u * 1.3, frame.v * 1.8, paint.shift)
    tilt = np.float32(paint.rng.uniform(1.5, 3.5) * paint.rng.choice([-1.0, 1.0]))
    wave = np.sin(frame.v * 17.0 + frame.u * tilt * 2.0 + 1.6 * bend)
    colour = _blend(paint.base, paint.light, ramp(-0.2, 1.0, wave) * np.float32(0.75))
    colour = _blend(colour, paint.dark, ramp(0.35, 1.0, -wave) * np.float32(0.55))
    cells = np.float32(7.5)
    (i, fa), (j, fb) = _cell(frame.u * cells), _cell(frame.v * cells * 1.3)
    dx = fa - 0.3 - 0.4 * _hash(i, j, paint.shift)
    dy = fb - 0.3 - 0.4 * _hash(j, i, paint.shift + 17)
    there = _hash(i + 5, j, paint.shift) > 0.45
    size = np.float32(0.26) * there * (0.5 + _hash(i, j + 9, paint.shift))
    reach = np.hypot(dx, dy * 1.3) - size
    soft = np.maximum(cells / frame.scale, 0.04)
    return _blend(colour, paint.dark * 0.8, np.clip(0.4 - reach / soft, 0, 1) * there)


def brick(frame: Frame, paint: Paint) -> Array:
    """Courses of bricks with mortar between; a slanted wall is seen in perspective."""
    scale = np.maximum(1.0 + np.float32(frame.slant) * frame.x, 0.2)
    high = np.float32(frame.size * paint.rng.uniform(0.036, 0.062))
    b = frame.y / (scale * high)
    a = frame.x / (scale * high * 2.2) + 0 * b
    j, fb = _cell(b)
    i, fa = _cell(a + np.float32(0.5) * (j & 1).astype(np.float32))
    edge = np.minimum(np.minimum(fa, 1 - fa) * 2.2, np.minimum(fb, 1 - fb)) * high * scale
    tone = 0.78 + 0.44 * _hash(i, j + 0 * i, paint.shift)
    colour = paint.base * tone
    colour *= 1.07 - 0.2 * fb
    colour *= 1.0 + 0.05 * noise(frame.x / 9.0, frame.y / 9.0, paint.shift)
    joint = np.clip(0.5 + (0.075 * high * scale - edge), 0.0, 1.0)
    return _blend(colour, paint.light, joint)


def wood(frame: Frame, paint: Paint) -> Array:
    """Planks that run towards the horizon or across, with grain, gaps and staggered ends."""
    if paint.rng.random() < 0.65:
        a, b = frame.u * np.float32(paint.rng.uniform(2.6, 4.2)), frame.v * 1.1
    else:
        a, b = frame.v * np.float32(paint.rng.uniform(4.0, 6.0)), frame.u * 0.55
    i, fa = _cell(a)
    b = b + _hash(i, i, paint.shift + 33) * 3.0
    j, fb = _cell(b)
    tone = 0.74 + 0.44 * _hash(i, j, paint.shift)
    grain = noise(a * 4.5, b * 0.9, paint.shift) + 0.5 * noise(a * 9.0, b * 1.7, paint.shift + 71)
    colour = paint.base * (tone + 0.075 * grain)
    colour = _blend(colour, paint.dark, ramp(1.1, 1.9, grain) * np.float32(0.4))
    gap = np.minimum(np.minimum(fa, 1 - fa), np.minimum(fb, 1 - fb) * 2.5)
    return _blend(colour, paint.dark * 0.6, 1.0 - ramp(0.012, 0.05, gap))


Texture = Callable[[Frame, Paint], Array]

#: Name of a class -> its texture and its usual hues (0 to 1), which overlap between classes.
STUFF: dict[str, tuple[Texture, tuple[float, ...]]] = {
    "sky": (sky, (0.56, 0.6, 0.53, 0.08, 0.93, 0.72)),
    "water": (water, (0.54, 0.5, 0.6, 0.42, 0.1, 0.8)),
    "grass": (grass, (0.28, 0.23, 0.35, 0.14, 0.47, 0.07)),
    "sand": (sand, (0.11, 0.09, 0.14, 0.04, 0.55, 0.28)),
    "brick wall": (brick, (0.02, 0.05, 0.1, 0.58, 0.3, 0.9)),
    "wood floor": (wood, (0.07, 0.09, 0.04, 0.12, 0.6, 0.35)),
}
