"""UniRL: a reward backend by `_target_`, for Tencent-Hunyuan/UniRL at 1a7b501e and `unirl` 0.2.0 of PyPI.

reward:
  _target_: unirl.reward.service.RewardService
  backend:
    _target_: spatialscore_client.adapters.unirl.SpatialScoreBackend
    target: scorer:50051
"""

from __future__ import annotations

import time
from typing import Any

from unirl.reward.base import RewardBackend
from unirl.types.reward import RewardRequest, RewardResponse

from ..errors import SpatialScoreError
from .judge import NAME, Judge


class SpatialScoreBackend(RewardBackend):  # type: ignore[misc]
    """Rewards are the SpatialScores, of several `models` their sum with `weights`; `component_rewards` has a column
    for each model, its standard deviations and its components, as they were given.

    A request whose pictures cannot all be scored raises: a response would need a number in the place of each failure.
    """

    input_kind = "image"

    def __init__(self, target: str | list[str] | None = None, **options: Any) -> None:
        # What the base class knows of is its own; the rest is SpatialScoreClient's.
        own = {name: options.pop(name) for name in ("batch_size", "prompt_source") if name in options}
        targets = target if target is None or isinstance(target, str) else list(target)
        judge = Judge.of(targets, **options)
        super().__init__(model_name=NAME, timeout=judge.client.timeout, **own)
        self.judge, self.client = judge, judge.client

    def compute_rewards(self, request: RewardRequest) -> RewardResponse:
        """The rewards of a request's pictures, in order."""
        start = time.monotonic()
        pictures = request.generated.get("image")
        if pictures is None:
            raise ValueError(f"the request has {sorted(request.generated)}, and no image to score")
        # UniRL's own view of its pixels: what lies a little outside [0, 1] is clamped.
        images = [picture.pixels.detach().float().clamp(0, 1) for picture in pictures.to_list()]
        made = self.judge.rewards(self._prompts(request), images)
        return RewardResponse(
            rewards=made.rewards,
            component_rewards=made.columns,
            successes=[True] * len(made.rewards),
            errors=[None] * len(made.rewards),
            compute_time=time.monotonic() - start,
        )

    def is_available(self) -> bool:
        """Whether the server answers within five seconds."""
        try:
            self.client.model(timeout=5.0)
        except SpatialScoreError:
            return False
        return True

    def dispose(self) -> None:
        """Closes the connections."""
        self.client.close()

    def _prompts(self, request: RewardRequest) -> list[str]:
        # Since 0.2 the backend says which of a request's prompts it wants; before, there was one.
        choose = getattr(super(), "prompts", None)
        return list(choose(request) if choose else request.prompts)
