"""Does the map of an explanation show what the prompt names? Explains pictures of the generator, whose things have boxes.

    spatialreward-data make pairs --pairs 200 --seed 20261126 --things 2 4 --clauses 1 3 --words 8 60
    spatialscore serve --http 127.0.0.1:8080
    python benches/explanation_map.py pairs --http http://127.0.0.1:8080 --cells 49 25 16 9

Needs the Python client alone. A cell is a named thing's where such a thing covers half of it or it covers half of the thing, and
ground where nothing touches it; what is covered with a cell covers a named thing where it covers half of it. All numbers are of the pictures that keep their prompts; intervals are of 95 %, over pictures.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import fmean

from spatialscore_client import Explanation, SpatialScoreClient

Box = tuple[float, float, float, float]


def scenes(folder: Path) -> Iterator[tuple[str, Path, list[Box], list[Box]]]:
    """Prompts and pictures, with the boxes of the things that are named and of the others."""
    for manifest in sorted(folder.glob("*/manifest.jsonl")):
        for line in manifest.read_text().splitlines():
            row = json.loads(line)
            named = {kind for relation in row["relations"] for kind in relation["about"]}
            boxes: tuple[list[Box], list[Box]] = ([], [])
            for thing in row["things"]["kept"]:
                boxes[thing["kind"] not in named].append(tuple(thing["box"]))
            yield row["prompt"], manifest.parent / row["kept"], *boxes


def shared(one: Box, other: Box) -> float:
    """The area that two boxes have in common, as a share of the smaller one."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return max(width, 0) * max(height, 0) / min(areas)


class Found:
    """What the map of one picture says."""

    def __init__(self, why: Explanation, named: list[Box], others: list[Box]) -> None:
        costs: dict[str, list[float]] = {"named": [], "ground": []}
        ranked: list[tuple[float, bool]] = []
        rows, columns = len(why.map), len(why.map[0])
        # What is covered with a cell, as src/explain/cells.rs has it.
        reach = min(rows, columns) // 6
        for row, line in enumerate(why.map):
            for column, cost in enumerate(line):
                cell = (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
                if cost is None:
                    continue
                covered = (
                    max(column - reach, 0) / columns,
                    max(row - reach, 0) / rows,
                    min(column + reach + 1, columns) / columns,
                    min(row + reach + 1, rows) / rows,
                )
                ranked.append((cost, any(shared(covered, box) >= 0.5 for box in named)))
                if any(shared(cell, box) >= 0.5 for box in named):
                    costs["named"].append(cost)
                elif not any(shared(cell, box) for box in named + others):
                    costs["ground"].append(cost)
        self.named, self.ground = costs["named"], costs["ground"]
        self.strongest = float(max(ranked, key=lambda cell: abs(cell[0]))[1])
        self.chance = sum(covers for _, covers in ranked) / len(ranked)
        self.costly = float(max(ranked)[0] > 1)
        self.high = why.whole.mean > 0
        self.cells = f"{rows} x {columns}"

    @property
    def whole(self) -> bool:
        """Whether it has cells of both sorts."""
        return bool(self.named and self.ground)


def interval(found: list[Found], value: Callable[[Found], float]) -> str:
    """The mean over pictures, with the interval of 2,000 resamples."""
    values = [value(one) for one in found]
    draw = random.Random(0)
    means = sorted(fmean(draw.choices(values, k=len(values))) for _ in range(2000))
    return f"{fmean(values):.3f} [{means[50]:.3f}, {means[1949]:.3f}]"


def report(found: list[Found]) -> None:
    """Prints what the maps of all pictures say."""
    both = [one for one in found if one.whole]
    print(f"{found[0].cells} cells, {len(both)} of {len(found)} pictures with both sorts of cells")

    def size(costs: list[float]) -> float:
        return fmean(map(abs, costs))

    for words, value in (
        ("cost of a named thing's cell", lambda one: fmean(one.named)),
        ("cost of a cell of ground", lambda one: fmean(one.ground)),
        ("the difference", lambda one: fmean(one.named) - fmean(one.ground)),
        ("named costs more, share", lambda one: float(fmean(one.named) > fmean(one.ground))),
        ("named moves the score by", lambda one: size(one.named)),
        ("ground moves the score by", lambda one: size(one.ground)),
        ("named moves it more, share", lambda one: float(size(one.named) > size(one.ground))),
        ("the strongest covers a named thing", lambda one: one.strongest),
        ("by chance", lambda one: one.chance),
    ):
        print(f"  {words:35}{interval(both, value)}")
    high = [one for one in found if one.high]
    print(f"  of {len(high)} that score above 0, a cell costs more than 1: {interval(high, lambda one: one.costly)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, help="a folder that spatialreward-data made")
    parser.add_argument("--http", required=True, help="the URL of a server's HTTP port")
    parser.add_argument("--cells", type=int, nargs="+", default=[49], help="of the maps (default: 49)")
    parser.add_argument("--pictures", type=int, default=200, help="how many (default: 200)")
    options = parser.parse_args()
    # No gRPC address is asked.
    client = SpatialScoreClient("127.0.0.1:1", timeout=600)
    chosen = list(islice(scenes(options.pairs), options.pictures))
    for cells in options.cells:
        found = []
        for prompt, picture, named, others in chosen:
            why = client.explain(prompt, picture, http=options.http, cells=cells)
            found.append(Found(why, named, others))
        report(found)


if __name__ == "__main__":
    main()
