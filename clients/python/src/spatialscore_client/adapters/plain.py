"""For a training loop of one's own: `reward(prompts, images) -> list[float]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..images import Pictures
from .judge import Judge

Reward = Callable[["str | Sequence[str]", Pictures], list[float]]


def reward(
    target: str | Sequence[str] | None = None,
    *,
    models: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
    **options: Any,
) -> Reward:
    """A function of prompts and images that gives their SpatialScores.

    `target` and `options` are those of SpatialScoreClient; the environment says what is not given. `models` names the
    model that scores; of several the reward is a sum with `weights`. `SpatialScoreClient.score` gives them apart.
    """
    judge = Judge.of(target, models=models, weights=weights, **options)
    return lambda prompts, images: judge.rewards(prompts, images).rewards
