#!/usr/bin/env python3
"""Loads a server with many client processes, and holds every answer against a table of known scores.

    load.py --target 127.0.0.1:50051 --processes 32 --seconds 600

The table is made first, one picture at a time. Then each process asks for random groups, in turn by `score`, by
`score_stream` and by the asyncio client, and compares each score with the table's entry for its prompt and picture.
Whatever is wrong, swapped or missing is counted, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import spatialscore_client as sc

PROMPTS = [
    "a red box to the left of a blue box",
    "a blue box above a green box, and a red box at the bottom",
    "a green box is centered, with a red box behind it and a blue box to its right",
]
# A score is the same alone and among others to 1e-5, on scores of about ten.
TOLERANCE = 1e-4


def picture(number: int) -> Any:
    """A picture that no other number gives: three boxes on a ground, uint8 (224, 224, 3)."""
    draw = np.random.default_rng(number)
    canvas = np.full((224, 224, 3), draw.integers(0, 256, 3), np.uint8)
    for channel in range(3):
        top, left, height, width = draw.integers(20, 100, 4)
        canvas[top : top + height, left : left + width] = np.eye(3)[channel] * 255
    return canvas


def known_scores(target: str, pictures: int, timeout: float) -> dict[tuple[int, int], sc.Score]:
    """The score of each prompt with each picture, each asked for alone."""
    with sc.SpatialScoreClient(target, timeout=timeout) as client:
        return {
            (which, number): client.score(prompt, [picture(number)])[0]
            for which, prompt in enumerate(PROMPTS)
            for number in range(pictures)
        }


@dataclass
class Tally:
    """What one process saw."""

    calls: int = 0
    items: int = 0
    wrong: int = 0
    missing: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


class Worker:
    """One client process."""

    def __init__(
        self, target: str, table: dict[tuple[int, int], sc.Score], largest: int, timeout: float, seed: int
    ) -> None:
        self._table = table
        self._largest = largest
        self._random = random.Random(seed)
        self._pictures = {number: picture(number) for _, number in table}
        self._client = sc.SpatialScoreClient(target, timeout=timeout)
        self._asynchronous = sc.AsyncSpatialScoreClient(target, timeout=timeout)
        self._loop = asyncio.new_event_loop()
        self.tally = Tally()

    def run(self, seconds: float) -> Tally:
        """Asks for group after group for so long."""
        end = time.monotonic() + seconds
        ways = [self._score, self._stream, self._score_asynchronously]
        while time.monotonic() < end:
            asked = self._random.choices(list(self._table), k=self._random.randint(1, self._largest))
            start = time.monotonic()
            try:
                got = ways[self.tally.calls % len(ways)](asked)
            except sc.SpatialScoreError as error:
                kind = f"{type(error).__name__}: {error}"
                self.tally.errors[kind] = self.tally.errors.get(kind, 0) + 1
            else:
                self._compare(asked, got)
            self.tally.calls += 1
            self.tally.seconds.append(time.monotonic() - start)
        self._client.close()
        self._loop.run_until_complete(self._asynchronous.close())
        return self.tally

    def _compare(self, asked: list[tuple[int, int]], got: list[sc.Score | None]) -> None:
        self.tally.items += len(asked)
        self.tally.missing += abs(len(asked) - len(got)) + sum(score is None for score in got)
        for key, score in zip(asked, got, strict=False):
            self.tally.wrong += score is not None and not same(score, self._table[key])

    def _arguments(self, asked: list[tuple[int, int]]) -> tuple[list[str], list[Any]]:
        return [PROMPTS[which] for which, _ in asked], [self._pictures[number] for _, number in asked]

    def _score(self, asked: list[tuple[int, int]]) -> list[sc.Score | None]:
        return list(self._client.score(*self._arguments(asked)))

    def _score_asynchronously(self, asked: list[tuple[int, int]]) -> list[sc.Score | None]:
        return list(self._loop.run_until_complete(self._asynchronous.score(*self._arguments(asked))))

    def _stream(self, asked: list[tuple[int, int]]) -> list[sc.Score | None]:
        got: list[sc.Score | None] = [None] * len(asked)
        for result in self._client.score_stream(zip(*self._arguments(asked), strict=True)):
            got[result.index] = result.score
        return got


def same(one: sc.Score, other: sc.Score) -> bool:
    """Whether two scores are one, but for the order in which a forward pass adds up."""
    both = abs(one.mean - other.mean) <= TOLERANCE
    if one.stddev is None or other.stddev is None:
        return both and one.stddev is other.stddev
    return both and abs(one.stddev - other.stddev) <= TOLERANCE


def work(arguments: tuple[Any, ...]) -> Tally:
    """A process's main function."""
    *worker, seconds = arguments
    return Worker(*worker).run(seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--processes", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--pictures", type=int, default=24, help="in the table, with each of three prompts (24)")
    parser.add_argument("--largest", type=int, default=24, help="pictures of the largest group (24)")
    parser.add_argument("--timeout", type=float, default=300.0, help="of each call")
    given = parser.parse_args()
    table = known_scores(given.target, given.pictures, given.timeout)
    means = sorted(score.mean for score in table.values())
    gap = min(later - earlier for earlier, later in zip(means, means[1:], strict=False))
    # What lies closer together than the tolerance could be swapped without being seen.
    close = sum(later - earlier <= 2 * TOLERANCE for earlier, later in zip(means, means[1:], strict=False))

    context = multiprocessing.get_context("spawn")
    tasks = [
        (given.target, table, given.largest, given.timeout, seed, given.seconds) for seed in range(given.processes)
    ]
    start = time.monotonic()
    with context.Pool(given.processes) as pool:
        tallies = pool.map(work, tasks, chunksize=1)
    took = time.monotonic() - start
    waits = sorted(wait for tally in tallies for wait in tally.seconds)
    report = {
        "processes": given.processes,
        "seconds": round(took, 1),
        "calls": sum(tally.calls for tally in tallies),
        "items": sum(tally.items for tally in tallies),
        "items_per_second": round(sum(tally.items for tally in tallies) / took, 1),
        "wrong": sum(tally.wrong for tally in tallies),
        "missing": sum(tally.missing for tally in tallies),
        "errors": {kind: count for tally in tallies for kind, count in tally.errors.items()},
        "call_seconds_median": round(statistics.median(waits), 3),
        "call_seconds_p99": round(waits[int(len(waits) * 0.99)], 3),
        "known_scores": len(table),
        "smallest_gap": gap,
        "indistinguishable": close,
    }
    print(json.dumps(report, indent=1))
    return int(bool(report["wrong"] or report["missing"] or report["errors"] or not report["items"]))


if __name__ == "__main__":
    sys.exit(main())
