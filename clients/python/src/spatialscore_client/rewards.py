"""Small pure functions on rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .scores import Score


def rank(scores: Sequence[Score | float]) -> list[int]:
    """The places of the items, the best first. Equals keep their order."""
    means = _means(scores)
    return sorted(range(len(means)), key=lambda index: -means[index])


def win_probability(a: Score, b: Score) -> float:
    """The probability that a draw from `a`'s Gaussian reward lies above one from `b`'s.

    That is Φ((mean_a − mean_b) / sqrt(stddev_a² + stddev_b²)).

    Raises ValueError where a score has no standard deviation: a scalar checkpoint says nothing of its doubt.
    """
    if a.stddev is None or b.stddev is None:
        raise ValueError("a score without a standard deviation has no win probability")
    difference, spread = a.mean - b.mean, math.hypot(a.stddev, b.stddev)
    if spread == 0:
        return 0.5 if difference == 0 else float(difference > 0)
    return 0.5 * math.erfc(-difference / (spread * math.sqrt(2)))


@dataclass(frozen=True)
class Selection:
    """The items of a group that train the policy."""

    indices: list[int]
    """Their places in the group, in order."""
    advantages: list[float]
    """Their normalised advantages, one per index."""


def top_k_bottom_k(scores: Sequence[Score | float], k: int, *, eps: float = 1e-4) -> Selection:
    """Keeps a group's k best and k worst, then normalises the advantages among those kept.

    An advantage is (reward − mean) / (stddev + eps) with the population's standard deviation, as GRPO has it. A
    group of 2k or fewer is kept whole; where all rewards are equal, all advantages are 0. The filter is that of
    arXiv 2602.24233.

    Raises ValueError where `k` is not positive, the group is empty or a reward is not finite.
    """
    means = _means(scores)
    if k < 1:
        raise ValueError(f"k is {k}; at least 1 is needed")
    if not means:
        raise ValueError("the group is empty")
    order = rank(means)
    kept = sorted(order if len(order) <= 2 * k else order[:k] + order[-k:])
    rewards = [means[index] for index in kept]
    mean = math.fsum(rewards) / len(rewards)
    stddev = math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / len(rewards))
    return Selection(kept, [(reward - mean) / (stddev + eps) for reward in rewards])


def _means(scores: Sequence[Score | float]) -> list[float]:
    means = [score.mean if isinstance(score, Score) else float(score) for score in scores]
    for index, mean in enumerate(means):
        if not math.isfinite(mean):
            raise ValueError(f"reward {index} is {mean}")
    return means
