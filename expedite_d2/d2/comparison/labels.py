"""Places for the labels of points, where they cover neither a point nor another label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

__all__ = ["Box", "box", "place_labels"]

# Left, first, right and last coordinate; the second axis may point either way.
Box = tuple[float, float, float, float]


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    radius: float,
    bounds: Box,
    obstacles: Iterable[Box] = (),
) -> Iterator[Box]:
    """Choose a place beside each point.

    Args:
        points: Centres of the points, each of which is covered by a marker.
        sizes: Width and height of their labels.
        radius: Of the markers.
        bounds: Where labels are allowed to be.
        obstacles: What else they should not cover.

    Yields:
        The label's box: of eight places close by and eight farther off the first that is free, or
        the one that covers least.
    """
    taken = [*(box(x, y, 2 * radius, 2 * radius) for x, y in points), *obstacles]
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        places = []
        for distance in (radius + 3, radius + 3 + height):
            side, above = distance + width / 2, distance + height / 2
            places += [
                box(x + dx, y + dy, width, height)
                for dx, dy in (
                    (side, 0), (-side, 0), (0, -above), (0, above),
                    (side, -above), (side, above), (-side, -above), (-side, above),
                )
            ]  # fmt: skip
        place = min(places, key=lambda one: _covered(one, taken) + _outside(one, bounds))
        taken.append(place)
        yield place


def box(x: float, y: float, width: float, height: float) -> Box:
    """The box around a centre."""
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _covered(one: Box, others: Iterable[Box]) -> float:
    """Area that a box shares with others."""
    return sum(
        max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
        * max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
        for other in others
    )


def _outside(one: Box, bounds: Box) -> float:
    """Area of a box beyond the bounds."""
    return (one[2] - one[0]) * (one[3] - one[1]) - _covered(one, [bounds])
