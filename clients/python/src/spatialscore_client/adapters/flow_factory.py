"""Flow-Factory: reward models by dotted path, as in X-GenGroup/Flow-Factory at a0b2bc5a, flow_factory/rewards/abc.py.

    rewards:
      - name: spatialscore
        reward_model: spatialscore_client.adapters.flow_factory.SpatialScoreReward
        target: scorer:50051

Keys of `rewards` that Flow-Factory does not know come here, and are those of SpatialScoreClient: `target`, `timeout`,
`priority`, `token_file`, `ca` and so on, beside `models` and `weights`; one that is not known there either is an
error. The environment says what is not given.
"""

from __future__ import annotations

from typing import Any

from flow_factory.rewards import GroupwiseRewardModel, PointwiseRewardModel, RewardModelOutput

from ..errors import ConfigurationError
from ..rewards import win_probability
from .judge import Judge, client_of


class SpatialScoreReward(PointwiseRewardModel):  # type: ignore[misc]
    """The SpatialScore of each picture: of the model that `models` names, or of several a sum with `weights`.

    Rewards that Flow-Factory is to normalise one by one (`advantage_aggregation: gdpo`) are entries of its own, each
    with one of `models`.
    """

    required_fields = ("prompt", "image")
    # Tensors come as the sampler made them, with no detour over Pillow.
    use_tensor_inputs = True

    def __init__(self, config: Any, accelerator: Any) -> None:
        super().__init__(config, accelerator)
        self.judge = Judge.of(**config.extra_kwargs)
        self.client = self.judge.client

    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> Any:
        """Rewards of shape (batch,), float32; `extra_info` has every column."""
        import torch

        made = self.judge.rewards(prompt, image)
        return RewardModelOutput(rewards=torch.tensor(made.rewards, dtype=torch.float32), extra_info=made.columns)


class SpatialScoreGroupReward(GroupwiseRewardModel):  # type: ignore[misc]
    """How often a picture beats the others of its group: the mean of its win probabilities, from 0 to 1.

    It uses the standard deviations, and has one scale for every prompt, which the scores themselves have not. It
    needs a checkpoint with a Gaussian reward. `models` may name one model; of several there is no such probability.
    """

    required_fields = ("prompt", "image")
    use_tensor_inputs = True

    def __init__(self, config: Any, accelerator: Any) -> None:
        super().__init__(config, accelerator)
        keys = dict(config.extra_kwargs)
        self.models = keys.pop("models", None)
        if "weights" in keys or len(self.models or ()) > 1:
            raise ConfigurationError("a sum of several models has no win probability; give an entry for each model")
        judge = Judge(client_of(**keys), self.models)
        self.client, self.models = judge.client, judge.models

    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> Any:
        """Rewards of shape (group,)."""
        scored = self.client.score(prompt, image, models=self.models)
        scores = scored if self.models is None else scored[self.models[0]]
        if len(scores) < 2:
            raise ValueError("a group of one has nobody to be compared with; use SpatialScoreReward")
        wins = [
            sum(win_probability(one, other) for place, other in enumerate(scores) if place != index)
            for index, one in enumerate(scores)
        ]
        rewards = [won / (len(scores) - 1) for won in wins]
        return RewardModelOutput(rewards=rewards, extra_info={"mean": scores.means, "stddev": scores.stddevs})
