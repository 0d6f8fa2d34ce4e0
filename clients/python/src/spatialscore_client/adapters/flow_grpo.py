"""flow_grpo: rewards for `multi_score`, as in yifan123/flow_grpo at ac4c86e8, flow_grpo/rewards.py.

Add `"spatialscore": spatialscore` to the dictionary `score_functions` there, and `{"spatialscore": 1.0}` to the
configuration's `reward_fn`; or, of a server of several models, `**columns(["hpsv3", "layout"])` and
`{"hpsv3": 1.0, "layout": 0.5}`. The server is SPATIALSCORE_TARGET; an evaluation's process has
SPATIALSCORE_PRIORITY=evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..images import Pictures
from .judge import Judge, Shared, client_of, column, column_names

RewardFn = Callable[[Pictures, Sequence[str], Any], tuple[list[float], dict[str, Any]]]
Factory = Callable[[Any], RewardFn]


def spatialscore(device: Any) -> RewardFn:
    """A reward function `fn(images, prompts, metadata) -> (scores, details)`.

    `images` is a float tensor (B, 3, H, W) in [0, 1] on any device, or uint8 (B, H, W, 3). `device` is there because
    multi_score gives it to the factories that have a parameter of this name; the model runs elsewhere. The function
    is safe to call from the trainer's eight threads at once; what cannot be scored raises there.
    """
    return reward()(device)


def reward(
    models: Sequence[str] | None = None, weights: Mapping[str, float] | None = None, **options: Any
) -> Factory:
    """What stands where `spatialscore` does, for one model by name, or a sum of several with weights.

    `options` are those of SpatialScoreClient; the environment says what is not given. The details have every column.
    """

    def factory(device: Any) -> RewardFn:
        judge = Judge.of(models=models, weights=weights, **options)

        def fn(images: Pictures, prompts: Sequence[str], metadata: Any) -> tuple[list[float], dict[str, Any]]:
            made = judge.rewards(list(prompts), images)
            return made.rewards, dict(made.columns)

        return fn

    return factory


def columns(models: Sequence[str], names: Sequence[str] | None = None, **options: Any) -> dict[str, Factory]:
    """Entries of `score_functions`, one for each model: a column each in the detail dictionary, and a weight of its
    own in `reward_fn`. A batch is scored once for all of them, its pictures sent and decoded once.

    `names` are the columns where not one for each model is meant: `MODEL`, `MODEL_stddev`, `MODEL/COMPONENT`. What is
    not to train, but to be seen, has the weight 0 there.
    """
    wanted = column_names(models, names)
    shared: Shared[dict[str, list[float]]] = Shared(len(wanted))

    def entry(place: int, name: str) -> Factory:
        def factory(device: Any) -> RewardFn:
            client = client_of(**options)

            def fn(images: Pictures, prompts: Sequence[str], metadata: Any) -> tuple[list[float], dict[str, Any]]:
                def score() -> dict[str, list[float]]:
                    return client.score(list(prompts), images, models=models).table()

                table = shared.take(place, (images, prompts), score)
                return column(table, name), {}

            return fn

        return factory

    return {name: entry(place, name) for place, name in enumerate(wanted)}
