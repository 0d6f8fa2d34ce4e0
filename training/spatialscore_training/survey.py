"""What the pictures of a data set are like as a whole: slips that no pair shows alone. None of it is wrong by itself, so all of
it is told and nothing is refused."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

MANY = 10
"""From so many pairs on, what all or most of them have in common is no chance."""
PATCH = 28
"""Pixels of what a Qwen-VL takes for one."""
BETTER, WORSE = (re.compile(rf"(?<![a-z])({words})(?![a-z])", re.IGNORECASE) for words in ("chosen|kept|winner|win|better|good", "rejected|broken|loser|lose|worse|bad"))


class Seen(NamedTuple):
    """What is kept of a picture that was looked at."""

    pixels: str
    """Their digest: a copy that was saved anew has other bytes and the same pixels."""
    size: tuple[int, int]
    plain: bool
    """Of one colour."""


def seen(image: Image.Image) -> Seen:
    """What is kept of a picture in RGB."""
    pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    return Seen(pixels, image.size, all(least == most for least, most in image.getextrema()))


class Survey:
    """Counts over the pairs of a set."""

    def __init__(self):
        self.pairs, self.every = 0, Counter()
        self.sides = {"kept": Counter(), "broken": Counter()}
        self.sizes = {"kept": set(), "broken": set()}
        self.found: dict[str, list] = {}

    def _note(self, what: str, where: str) -> None:
        self.found.setdefault(what, [0, where])[0] += 1

    def add(self, record: dict, pictures: dict[str, Seen]) -> None:
        self.pairs += 1
        where = record["where"]
        for name, picture in pictures.items():
            if picture.plain:
                self._note("pictures of one colour", f"{where}: `{name}`")
            if min(picture.size) < PATCH:
                self._note(f"pictures with a side of less than {PATCH} pixels", f"{where}: `{name}`")
        for name, counter in self.sides.items():
            counter[pictures[name].pixels] += 1
            self.sizes[name].add(pictures[name].size)
        pair = (record["prompt"], *(picture.pixels for picture in pictures.values()))
        self.every[pair] += 1
        if self.every[pair] > 1:
            self._note("pairs that stand there already, with the same prompt and pictures", where)
        kept, broken = record["kept"], record["broken"]
        if isinstance(kept, str) and isinstance(broken, str):
            says = lambda name, one, other: one.search(name) and not other.search(name)
            if says(kept, WORSE, BETTER) and says(broken, BETTER, WORSE):
                self._note("pairs that may be swapped, since the better picture's file is called the worse one and the worse one's the better", where)

    def warnings(self) -> Iterator[str]:
        """A line for each slip that this may be, with how often and where first."""
        yield from (f"{what}: {count:,}, the first in {where}" for what, (count, where) in self.found.items())
        if self.pairs < MANY:
            return
        for name, counter in self.sides.items():
            _, count = counter.most_common(1)[0]
            if count > self.pairs / 2:
                yield f"{count:,} of {self.pairs:,} pairs have one and the same picture as `{name}`"
        if not self.sizes["kept"] & self.sizes["broken"]:
            yield "no picture that is `kept` has the size of one that is `broken`: a model may learn sizes, and nothing else"
