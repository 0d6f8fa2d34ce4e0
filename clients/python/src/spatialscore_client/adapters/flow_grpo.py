"""flow_grpo: a reward for `multi_score`, as in yifan123/flow_grpo at ac4c86e8, flow_grpo/rewards.py.

Add `"spatialscore": spatialscore` to the dictionary `score_functions` there, and `{"spatialscore": 1.0}` to the
configuration's `reward_fn`. The server is SPATIALSCORE_TARGET; an evaluation's process has
SPATIALSCORE_PRIORITY=evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..images import Pictures
from .plain import client_of

RewardFn = Callable[[Pictures, Sequence[str], Any], tuple[list[float], dict[str, Any]]]


def spatialscore(device: Any) -> RewardFn:
    """A reward function `fn(images, prompts, metadata) -> (scores, details)`.

    `images` is a float tensor (B, 3, H, W) in [0, 1] on any device, or uint8 (B, H, W, 3). `device` is there because
    multi_score gives it to the factories that have a parameter of this name; the model runs elsewhere. The function
    is safe to call from the trainer's eight threads at once; what cannot be scored raises there.
    """
    client = client_of(None)

    def fn(images: Pictures, prompts: Sequence[str], metadata: Any) -> tuple[list[float], dict[str, Any]]:
        scores = client.score(list(prompts), images)
        return scores.means, {"stddev": scores.stddevs}

    return fn
