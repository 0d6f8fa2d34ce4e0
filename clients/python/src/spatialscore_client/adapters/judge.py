"""What the adapters have in common: a client from a recipe's keys, and one reward from what several models give."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .. import plan
from ..aio import AsyncSpatialScoreClient
from ..client import SpatialScoreClient
from ..errors import ConfigurationError
from ..images import Pictures
from ..scores import Columns, Scores
from ..settings import TLS, TokenFile

T = TypeVar("T")
# What the only column is called where no model is named.
NAME = "spatialscore"


def client_of(target: str | Sequence[str] | None = None, **options: Any) -> SpatialScoreClient:
    """A client of what the environment says, with what is given here on top.

    `options` are the arguments of SpatialScoreClient, and for recipes that can write no more than text: `token_file`,
    and `ca`, a PEM file, which turns TLS on. Raises ConfigurationError with what is not known.
    """
    client: SpatialScoreClient = _client_of(SpatialScoreClient, target, options)
    return client


def _client_of(kind: Any, target: str | Sequence[str] | None, options: dict[str, Any], *others: str) -> Any:
    options = dict(options)
    if target is not None:
        options["target"] = target
    known = {*inspect.signature(SpatialScoreClient).parameters, "token_file", "ca"}
    if unknown := sorted(set(options) - known):
        what, there = ", ".join(map(repr, unknown)), ", ".join(sorted(known | set(others)))
        raise ConfigurationError(f"{what}: not known to SpatialScore's client; there are {there}")
    if (file := options.pop("token_file", None)) is not None:
        options["token"] = TokenFile(str(file))
    if (authority := options.pop("ca", None)) is not None:
        options["tls"] = TLS(ca=str(authority))
    return kind.from_environment(**options)


@dataclass(frozen=True)
class Rewards:
    """What a trainer gets for a batch."""

    rewards: list[float]
    """What trains: the weighted sum, or the means of the only model."""
    columns: dict[str, list[float]]
    """Every number that the models gave, by `Columns.table`'s names. Nothing in it is a mean of others."""


class Judge:
    """The models of a recipe, and how their scores make a reward. A part that is missing raises."""

    def __init__(
        self, client: Any, models: Sequence[str] | None = None, weights: Mapping[str, float] | None = None
    ) -> None:
        """Raises ConfigurationError where several models have no weights: no sum is made that nobody asked for."""
        self.client = client
        # Recipes bring lists and mappings of their own kinds.
        try:
            self._weights = None if weights is None else {str(name): float(part) for name, part in weights.items()}
            self._models = plan.names(models, self._weights)
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigurationError(f"models and weights: {error}") from None
        if self._weights is None and len(self._models or ()) > 1:
            names = ", ".join(self._models or ())
            raise ConfigurationError(
                f"models are {names}, and there is one reward: weights must say what their sum is"
            )

    @classmethod
    def of(
        cls,
        target: str | Sequence[str] | None = None,
        *,
        models: Sequence[str] | None = None,
        weights: Mapping[str, float] | None = None,
        asynchronous: bool = False,
        **options: Any,
    ) -> Judge:
        """From the keys of a recipe: `models`, `weights`, and those of `client_of`."""
        kind = AsyncSpatialScoreClient if asynchronous else SpatialScoreClient
        return cls(_client_of(kind, target, options, "models", "weights"), models, weights)

    @property
    def models(self) -> list[str] | None:
        """The models that are named."""
        return self._models

    def rewards(self, prompts: str | Sequence[str], images: Pictures) -> Rewards:
        """A reward for each picture. Raises what SpatialScoreClient.score raises."""
        return self._rewards(self.client.score(prompts, images, models=self._models, weights=self._weights))

    async def rewards_async(self, prompts: str | Sequence[str], images: Pictures) -> Rewards:
        """The same, of an AsyncSpatialScoreClient."""
        return self._rewards(await self.client.score(prompts, images, models=self._models, weights=self._weights))

    def _rewards(self, scored: Scores | Columns) -> Rewards:
        if isinstance(scored, Scores):
            return Rewards(scored.means, scored.table(NAME))
        if scored.sums is not None:
            return Rewards(scored.sums, scored.table())
        (only,) = scored.values()
        return Rewards(only.means, scored.table())


def column_names(models: Sequence[str], names: Sequence[str] | None) -> list[str]:
    """The columns that are meant: those that are named, or one for each model. Raises TypeError or ValueError."""
    found = plan.names(models, None) or []
    return found if names is None else plan.names(names, None) or []


def column(table: Mapping[str, list[float]], name: str) -> list[float]:
    """A column by its name. Raises ConfigurationError with the names of those that are."""
    if name not in table:
        raise ConfigurationError(f"there is no column {name!r}; there are {', '.join(map(repr, table))}")
    return table[name]


class Shared(Generic[T]):
    """One call for several reward functions, which a trainer asks one after the other about the same batch.

    A batch is known by the very objects that a trainer hands over, in the thread that does. Each function takes a
    result once: who comes again has come with another batch, even if it lies in the same objects.
    """

    def __init__(self, count: int) -> None:
        """For so many functions."""
        self._count = count
        self._here = threading.local()

    def take(self, function: int, batch: Sequence[object], begin: Callable[[], T]) -> T:
        """What `begin` gives for the batch, to the function of that place."""
        known = getattr(self._here, "round", None)
        if known is None or function in known.taken or not known.is_of(batch):
            known = self._here.round = _Round([_reference(each) for each in batch], begin(), set())
        known.taken.add(function)
        if len(known.taken) == self._count:
            self._here.round = None
        result: T = known.result
        return result


@dataclass(frozen=True)
class _Round:
    """A batch that some functions have taken their part of."""

    batch: list[Callable[[], object]]
    result: Any
    taken: set[int]

    def is_of(self, batch: Sequence[object]) -> bool:
        return len(batch) == len(self.batch) and all(
            mine() is theirs for mine, theirs in zip(self.batch, batch, strict=True)
        )


def _reference(value: object) -> Callable[[], object]:
    """Gives the object while it lives. Pictures are not kept for it. What can have no weak reference is: its place in
    memory must not become another's."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value
