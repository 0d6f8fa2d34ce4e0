"""Flow-Factory: reward models by dotted path, as in X-GenGroup/Flow-Factory at a0b2bc5a, flow_factory/rewards/abc.py.

    rewards:
      - name: spatialscore
        reward_model: spatialscore_client.adapters.flow_factory.SpatialScoreReward
        target: scorer:50051

Keys of `rewards` that Flow-Factory does not know come here, and are those of SpatialScoreClient: `target`, `timeout`,
`priority`, `token_file`, `ca` and so on; one that is not known there either is an error. The environment says what is
not given.
"""

from __future__ import annotations

from typing import Any

from flow_factory.rewards import GroupwiseRewardModel, PointwiseRewardModel, RewardModelOutput

from ..client import SpatialScoreClient
from ..rewards import win_probability
from .plain import client_of


def _client(config: Any) -> SpatialScoreClient:
    return client_of(**config.extra_kwargs)


class SpatialScoreReward(PointwiseRewardModel):  # type: ignore[misc]
    """The SpatialScore of each picture."""

    required_fields = ("prompt", "image")
    # Tensors come as the sampler made them, with no detour over Pillow.
    use_tensor_inputs = True

    def __init__(self, config: Any, accelerator: Any) -> None:
        super().__init__(config, accelerator)
        self.client = _client(config)

    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> Any:
        """Rewards of shape (batch,), float32."""
        scores = self.client.score(prompt, image)
        return RewardModelOutput(rewards=scores.torch()[0], extra_info={"stddev": scores.stddevs})


class SpatialScoreGroupReward(GroupwiseRewardModel):  # type: ignore[misc]
    """How often a picture beats the others of its group: the mean of its win probabilities, from 0 to 1.

    It uses the standard deviations, and has one scale for every prompt, which the scores themselves have not. It
    needs a checkpoint with a Gaussian reward.
    """

    required_fields = ("prompt", "image")
    use_tensor_inputs = True

    def __init__(self, config: Any, accelerator: Any) -> None:
        super().__init__(config, accelerator)
        self.client = _client(config)

    def __call__(
        self,
        prompt: list[str],
        image: Any = None,
        video: Any = None,
        condition_images: Any = None,
        condition_videos: Any = None,
    ) -> Any:
        """Rewards of shape (group,)."""
        scores = self.client.score(prompt, image)
        if len(scores) < 2:
            raise ValueError("a group of one has nobody to be compared with; use SpatialScoreReward")
        wins = [
            sum(win_probability(one, other) for place, other in enumerate(scores) if place != index)
            for index, one in enumerate(scores)
        ]
        rewards = [won / (len(scores) - 1) for won in wins]
        return RewardModelOutput(rewards=rewards, extra_info={"mean": scores.means, "stddev": scores.stddevs})
