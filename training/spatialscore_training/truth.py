"""What the generator knows of each visual token of a picture."""

from typing import NamedTuple

import numpy as np

from .drawings import Drawings
from .relations import Things, overlap
from .scenes import Scene, layers, shade

EXTRAS = 5
"""Numbers for each visual token on an object: the way from its middle to the object's (2), the object's width and
height, all as fractions of the picture's side times 4, and whether, at most a cell away from where two objects meet,
this is the one over the other (1) or under it (-1); elsewhere 0."""

FINENESS = 7
"""Points along the side of a patch at which we look who is seen there."""


class Cells(NamedTuple):
    """Row by row: the index of the kind that a visual token sees (-1: none), and what it should know of it; for each of
    its four patches, the kind that is seen there (-1: none) with the box that it has, as in the extras, the kind that is
    hidden behind it, whether, next to where two things meet, it is the one over the other (1) or under it (-1), and how
    much of the light a shadow takes from what the patch shows most of."""

    kind: np.ndarray
    extras: np.ndarray
    front: np.ndarray
    boxes: np.ndarray
    behind: np.ndarray
    order: np.ndarray
    shade: np.ndarray


def depth(things: Things, i: int) -> float:
    """1 if this thing lies over another, -1 if under one, 0 if it touches none."""
    over = any(overlap(things[i], other) for other in things[:i])
    under = any(overlap(things[i], other) for other in things[i + 1 :])
    return float(over) - float(under)


def _shares(points: np.ndarray, parts: int) -> np.ndarray:
    """[..., parts, parts]: the share of the points in each part of a picture [..., side, side] that are true."""
    width = points.shape[-1] // parts
    return points.reshape(*points.shape[:-2], parts, width, parts, width).mean(axis=(-3, -1))


def _near(cells: np.ndarray) -> np.ndarray:
    """These cells and the eight round each."""
    padded = np.pad(cells, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def _boxes(things: Things, who: np.ndarray) -> np.ndarray:
    """[n, n, 4]: the way from the middle of each part to the middle of the thing that it sees, and that thing's size."""
    middles = (np.arange(len(who)) + 0.5) / len(who)
    each = np.array([(thing.x, thing.y, thing.width, thing.height) for thing in things] + [(0, 0, 0, 0)], np.float32)
    boxes = each[who]
    boxes[..., 0] -= middles
    boxes[..., 1] -= middles[:, None]
    return np.where((who >= 0)[..., None], 4 * boxes, 0).astype(np.float32)


def _by_cell(patches: np.ndarray) -> np.ndarray:
    """[2n, 2n, ...] as [n * n, 4, ...]."""
    grid, rest = len(patches) // 2, patches.shape[2:]
    return patches.reshape(grid, 2, grid, 2, *rest).swapaxes(1, 2).reshape(grid * grid, 4, *rest)


def cells(scene: Scene, grid: int, index: dict[str, int], drawings: Drawings) -> Cells:
    """The truth for `grid` × `grid` visual tokens. A token sees what takes the most of it, if that is a fifth of it."""
    things = scene.things
    side = 2 * grid * FINENESS
    front, behind = layers(things, side, drawings)
    kinds = np.array([index[thing.kind] for thing in things] + [-1])
    each = np.arange(len(things))[:, None, None]
    seen = _shares(front == each, grid)
    who = np.where(seen.max(0) >= 0.2, seen.argmax(0), -1)
    for i, share in enumerate(seen):
        if not (who == i).any():
            who[np.unravel_index(share.argmax(), share.shape)] = i
    extras = np.zeros((grid, grid, EXTRAS), np.float32)
    extras[..., :4] = _boxes(things, who)
    order = np.zeros((2 * grid, 2 * grid), np.float32)
    shares = [_shares(layer == each, 2 * grid) for layer in (front, behind)]
    nearest, hidden = (np.where(share.max(0) >= 0.3, share.argmax(0), -1) for share in shares)
    # Of a patch, only the points on what it shows most of.
    shown = front == nearest.repeat(FINENESS, 0).repeat(FINENESS, 1)
    shades = _shares(shade(scene, side, drawings) * shown, 2 * grid) / np.maximum(_shares(shown, 2 * grid), 1e-6)
    for i in range(len(things)):
        for j in range(i):
            if overlap(things[i], things[j]):
                under = (front == i) & (behind == j)
                for parts, seen, marks in ((grid, who, extras[..., -1]), (2 * grid, nearest, order)):
                    meeting = _near(_shares(under, parts) > 0.02)
                    marks[meeting & (seen == i)] = 1
                    marks[meeting & (seen == j)] = -1
    return Cells(
        kinds[who].ravel(),
        extras.reshape(-1, EXTRAS),
        _by_cell(kinds[nearest]),
        _by_cell(_boxes(things, nearest)),
        _by_cell(kinds[hidden]),
        _by_cell(order),
        _by_cell(shades.astype(np.float32)),
    )
