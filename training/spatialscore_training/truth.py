"""What the generator knows of each visual token of a picture."""

from typing import NamedTuple

import numpy as np

from .relations import Things, overlap

EXTRAS = 5
"""Numbers for each visual token on an object: the way from its middle to the object's (2), the object's width and
height, all as fractions of the picture's side times 4, and whether here, where two boxes meet, the object lies over the
other (1) or under it (-1); elsewhere 0."""


class Cells(NamedTuple):
    """Row by row: the index of the kind that a visual token sees (-1: none), and what it should know of it."""

    kind: np.ndarray
    extras: np.ndarray


def depth(things: Things, i: int) -> float:
    """1 if this thing lies over another, -1 if under one, 0 if it touches none."""
    over = any(overlap(things[i], other) for other in things[:i])
    under = any(overlap(things[i], other) for other in things[i + 1 :])
    return float(over) - float(under)


def _covered(box: tuple[float, float, float, float], grid: int) -> np.ndarray:
    """[grid, grid]: how much of each cell lies in a box."""
    left, top, right, bottom = box
    edges = np.arange(grid + 1) / grid
    across = np.clip(np.minimum(edges[1:], right) - np.maximum(edges[:-1], left), 0, None) * grid
    down = np.clip(np.minimum(edges[1:], bottom) - np.maximum(edges[:-1], top), 0, None) * grid
    return np.outer(down, across)


def cells(things: Things, grid: int, index: dict[str, int]) -> Cells:
    """The truth for `grid` × `grid` visual tokens. The front thing of those that cover a third of a cell counts."""
    kind = np.full((grid, grid), -1, np.int64)
    extras = np.zeros((grid, grid, EXTRAS), np.float32)
    middles = (np.arange(grid) + 0.5) / grid
    for i, thing in enumerate(things):
        on = _covered(thing.box, grid) > 0.33
        on[min(int(thing.y * grid), grid - 1), min(int(thing.x * grid), grid - 1)] = True
        rows, columns = np.nonzero(on)
        kind[rows, columns] = index[thing.kind]
        extras[rows, columns, 0] = 4 * (thing.x - middles[columns])
        extras[rows, columns, 1] = 4 * (thing.y - middles[rows])
        extras[rows, columns, 2:] = 4 * thing.width, 4 * thing.height, 0
    for i, thing in enumerate(things):
        for j, other in enumerate(things[:i]):
            if overlap(thing, other):
                (left, top, right, bottom), (left2, top2, right2, bottom2) = thing.box, other.box
                both = _covered((max(left, left2), max(top, top2), min(right, right2), min(bottom, bottom2)), grid) > 0
                for meeting, sign in ((thing, 1), (other, -1)):
                    extras[both & (kind == index[meeting.kind]), -1] = sign
    return Cells(kind.ravel(), extras.reshape(-1, EXTRAS))
