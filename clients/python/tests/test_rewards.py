"""The pure functions, held against their definitions."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from spatialscore_client import Score, Scores, rank, top_k_bottom_k, win_probability


def test_rank_is_best_first_and_stable() -> None:
    assert rank([0.5, 2.0, -1.0, 2.0]) == [1, 3, 0, 2]
    assert rank(Scores([Score(1, None), Score(3, 0.1)])) == [1, 0]
    assert rank([]) == []


def test_win_probability_is_what_drawing_gives() -> None:
    a, b = Score(1.0, 0.8), Score(0.4, 0.6)
    random = np.random.default_rng(1)
    drawn = (random.normal(a.mean, a.stddev, 400_000) > random.normal(b.mean, b.stddev, 400_000)).mean()
    assert win_probability(a, b) == pytest.approx(drawn, abs=0.003)
    assert win_probability(a, b) == pytest.approx(statistics.NormalDist().cdf(0.6), abs=1e-12)
    assert win_probability(a, b) + win_probability(b, a) == pytest.approx(1)
    # Far out it keeps its digits, where 1 - Φ would have none.
    assert win_probability(Score(0, 1), Score(20, 1)) == pytest.approx(1.0442e-45, rel=1e-3)


def test_win_probability_without_doubt_or_without_knowing() -> None:
    assert [win_probability(Score(x, 0.0), Score(1.0, 0.0)) for x in (0.0, 1.0, 2.0)] == [0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match="standard deviation"):
        win_probability(Score(1, None), Score(0, 1))


def test_top_k_bottom_k_keeps_the_extremes_and_normalises_among_them() -> None:
    rewards = [3.0, -5.0, 0.0, 8.0, 1.0, -2.0]
    kept = top_k_bottom_k(rewards, 2, eps=0)
    assert kept.indices == [0, 1, 3, 5]
    values = np.array([3.0, -5.0, 8.0, -2.0])
    assert kept.advantages == pytest.approx(((values - values.mean()) / values.std()).tolist())
    assert math.fsum(kept.advantages) == pytest.approx(0, abs=1e-12)


def test_top_k_bottom_k_of_small_and_of_equal_groups() -> None:
    assert top_k_bottom_k([1.0, 2.0, 3.0], 2).indices == [0, 1, 2]
    assert top_k_bottom_k([4.0] * 6, 1).advantages == [0.0, 0.0]
    for wrong, k in (([], 1), ([1.0], 0), ([1.0, math.nan], 1), ([math.inf, 1.0], 1)):
        with pytest.raises(ValueError):
            top_k_bottom_k(wrong, k)


def test_scores_are_a_sequence_and_become_arrays() -> None:
    scores = Scores([Score(1.5, 0.1), Score(-2.0, 0.2)])
    assert (len(scores), scores[1], scores[:1].means, list(scores)[0].mean) == (2, Score(-2.0, 0.2), [1.5], 1.5)
    means, stddevs = scores.numpy()
    assert means.dtype == np.float32 and means.tolist() == [1.5, -2.0] and stddevs.shape == (2,)
    assert Scores([Score(1.5, None)]).numpy()[1] is None


def test_scores_become_tensors() -> None:
    torch = pytest.importorskip("torch")
    scores = Scores([Score(1.5, 0.1), Score(-2.0, 0.2)])
    means, stddevs = scores.torch("cpu")
    assert means.dtype == torch.float32 and means.tolist() == [1.5, -2.0] and stddevs.shape == (2,)
