"""What a call gives: the scores of its items, and what gave them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload


@dataclass(frozen=True)
class Component:
    """A named part of a score."""

    name: str
    """The name of a pass of the model's profile, or the text of a question."""
    mean: float
    """As of a score."""
    stddev: float | None
    """As of a score."""


@dataclass(frozen=True)
class Score:
    """The reward of one picture."""

    mean: float
    """The SpatialScore: higher is better. Unbounded, on the checkpoint's own scale, often negative."""
    stddev: float | None
    """The standard deviation of the Gaussian reward; None where the checkpoint gives a scalar."""
    components: tuple[Component, ...] = ()
    """What the mean is made of, where the model reads an item several times: its passes, or the item's questions."""


class Scores(Sequence[Score]):
    """The scores of a call: as many as it had items, in their order."""

    def __init__(self, scores: Sequence[Score]) -> None:
        self._scores = tuple(scores)

    @property
    def means(self) -> list[float]:
        """The SpatialScores."""
        return [score.mean for score in self._scores]

    @property
    def stddevs(self) -> list[float] | None:
        """The standard deviations; None where the checkpoint gives a scalar."""
        found = [score.stddev for score in self._scores if score.stddev is not None]
        return found if len(found) == len(self._scores) else None

    @property
    def components(self) -> dict[str, list[float]]:
        """The means of each component by its name, where all items have the same; they are never averaged here."""
        names = {tuple(part.name for part in score.components) for score in self._scores}
        if len(names) != 1:
            return {}
        return {
            name: [score.components[place].mean for score in self._scores]
            for place, name in enumerate(next(iter(names)))
        }

    def table(self, name: str) -> dict[str, list[float]]:
        """Every column by a name: the means under `name`, `name_stddev` where the reward is Gaussian, and for each
        component `name/component`, again with `_stddev`."""
        columns = {name: self.means, f"{name}_stddev": self.stddevs}
        for place, component in enumerate(self.components):
            parts = Scores([Score(part.mean, part.stddev) for part in (score.components[place] for score in self)])
            columns |= parts.table(f"{name}/{component}")
        return {name: column for name, column in columns.items() if column is not None}

    def numpy(self) -> tuple[Any, Any]:
        """Means and standard deviations as float32 arrays of shape (n,); the second may be None. Needs numpy."""
        import numpy as np

        stddevs = self.stddevs
        return np.array(self.means, np.float32), None if stddevs is None else np.array(stddevs, np.float32)

    def torch(self, device: Any = None) -> tuple[Any, Any]:
        """Means and standard deviations as float32 tensors of shape (n,); the second may be None. Needs torch."""
        import torch

        def tensor(values: list[float]) -> Any:
            return torch.tensor(values, dtype=torch.float32, device=device)

        stddevs = self.stddevs
        return tensor(self.means), None if stddevs is None else tensor(stddevs)

    @overload
    def __getitem__(self, index: int) -> Score: ...
    @overload
    def __getitem__(self, index: slice) -> Scores: ...
    def __getitem__(self, index: int | slice) -> Score | Scores:
        return Scores(self._scores[index]) if isinstance(index, slice) else self._scores[index]

    def __len__(self) -> int:
        return len(self._scores)

    def __iter__(self) -> Iterator[Score]:
        return iter(self._scores)

    def __eq__(self, other: object) -> bool:
        return self._scores == other._scores if isinstance(other, Scores) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._scores)

    def __repr__(self) -> str:
        return f"Scores(means={self.means!r}, stddevs={self.stddevs!r})"


@dataclass(frozen=True)
class Receipt:
    """What judged a call, for the log of a training run."""

    model: str
    """The model's name."""
    revision: str
    """The hub's commit or the digest of its files."""
    profile_digest: str
    """The digest of what its reward is read by."""
    dtype: str
    """The number format of its weights and its forward."""
    server_version: str
    """The server's version."""


class Columns(Mapping[str, Scores]):
    """The scores of a call that named models: by each model's name, in the order of the names."""

    def __init__(
        self,
        columns: Mapping[str, Scores],
        receipts: Sequence[Receipt] = (),
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self._columns = dict(columns)
        self.receipts = tuple(receipts)
        """What judged the call: one for each model."""
        self.sums = None if weights is None else self.weighted(weights)
        """The weighted sum for each item, where the call gave weights."""

    def weighted(self, weights: Mapping[str, float]) -> list[float]:
        """For each item the sum of its models' means, each times its weight. No part is left out in silence.

        Raises ValueError where there are no weights, one is not finite, or one is of a model that was not asked.
        """
        weights = check_weights(weights, list(self))
        parts = [self[model].means for model in weights]
        return [weighted_sum(weights, means) for means in zip(*parts, strict=True)]

    def table(self) -> dict[str, list[float]]:
        """Every column by a name, of each model as `Scores.table` has them. Nothing here is a mean of others."""
        return {name: column for model, scores in self.items() for name, column in scores.table(model).items()}

    def __getitem__(self, model: str) -> Scores:
        return self._columns[model]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        return f"Columns({self._columns!r})"


def weighted_sum(weights: Mapping[str, float], means: Iterable[float]) -> float:
    """The sum of an item's means, each times its weight."""
    return math.fsum(weight * mean for weight, mean in zip(weights.values(), means, strict=True))


def check_weights(weights: Mapping[str, float], models: Sequence[str]) -> dict[str, float]:
    """Weights that make a sum of what these models give. Raises ValueError."""
    if not weights:
        raise ValueError("there are no weights")
    for model, weight in weights.items():
        if model not in models:
            raise ValueError(f"a weight is of {model!r}, and the call is of {', '.join(map(repr, models))}")
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {model!r} is {weight}")
    return dict(weights)


@dataclass(frozen=True)
class StreamedScore:
    """One result of a stream, which come as they are done."""

    index: int
    """The item's place in the iterable, from 0."""
    score: Score
    """Its score."""


@dataclass(frozen=True)
class StreamedScores:
    """One result of a stream that names models."""

    index: int
    """The item's place in the iterable, from 0."""
    scores: Mapping[str, Score]
    """Its score by each model's name, in the order of the names."""
    receipts: tuple[Receipt, ...]
    """What judged it: one for each model."""
    sum: float | None = None
    """The weighted sum of the models' means, where the stream has weights."""


@dataclass(frozen=True)
class Limits:
    """What a server takes; see `Limits` in the contract."""

    max_items_per_request: int
    max_message_bytes: int
    max_prompt_bytes: int
    max_image_pixels: int
    max_item_tokens: int


@dataclass(frozen=True)
class ModelInfo:
    """What a server serves; see `GetModelResponse` in the contract."""

    name: str
    architecture: str
    revision: str
    dtype: str
    devices: tuple[str, ...]
    gaussian: bool
    """Whether scores have a standard deviation."""
    notice: str
    server_version: str
    limits: Limits
    profile: str = ""
    """What the reward is read by."""
    pictures: int = 1
    """How many pictures an item has, the judged one among them."""
    components: tuple[str, ...] = ()
    """The names of a score's components."""
    takes_questions: bool = False
    """Whether an item may have questions."""
    checkpoint: str = ""
    """Its directory or its hub id."""
    profile_digest: str = ""
    """The digest of what the reward is read by."""
    state: str = ""
    """`serving`, `asleep`, `waking` or `failed`; empty where the server does not say."""
