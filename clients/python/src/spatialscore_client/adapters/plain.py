"""For a training loop of one's own: `reward(prompts, images) -> list[float]`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..client import SpatialScoreClient
from ..images import Pictures

Reward = Callable[["str | Sequence[str]", Pictures], list[float]]


def reward(target: str | Sequence[str] | None = None, **options: Any) -> Reward:
    """A function of prompts and images that gives their SpatialScores.

    `target` and `options` are those of SpatialScoreClient; without a target the environment names it.
    """
    client = client_of(target, **options)
    return lambda prompts, images: client.score(prompts, images).means


def client_of(target: str | Sequence[str] | None, **options: Any) -> SpatialScoreClient:
    """A client of `target`, or of the environment's."""
    if target is not None:
        return SpatialScoreClient(target, **options)
    client: SpatialScoreClient = SpatialScoreClient.from_environment(**options)
    return client
