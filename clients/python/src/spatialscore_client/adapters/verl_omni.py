"""verl-omni: a reward function by path, as in verl-project/verl-omni at a1139baf, reward_loop/reward_manager/.

    reward:
      reward_functions:
        spatialscore:
          path: pkg://spatialscore_client.adapters.verl_omni
          name: compute_score
          required: true
          target: scorer:50051

Keys that verl-omni does not know come here, and are those of SpatialScoreClient, beside `models` and `weights`; one
that is not known there either is an error. The environment says what is not given. Without `required: true` verl-omni
takes whatever fails for 0. The data set's `ground_truth` must be the prompt, all of it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

from .judge import Judge

_judges: dict[str, Judge] = {}
_lock = threading.Lock()


async def compute_score(
    data_source: Any,
    solution_image: Any,
    ground_truth: Any,
    extra_info: Any = None,
    reward_router_address: Any = None,
    reward_model_tokenizer: Any = None,
    model_name: Any = None,
    **keys: Any,
) -> dict[str, float]:
    """The reward of a picture as `score`, and every column beside it, which verl-omni logs.

    `solution_image` is a uint8 tensor (3, H, W), or (1, 3, H, W). What cannot be scored raises. The arguments of
    verl-omni's own that a judge elsewhere has no use for are there so that they are not taken for keys.
    """
    if not isinstance(ground_truth, str) or not ground_truth:
        raise ValueError(f"ground_truth is {ground_truth!r}; the data set must have the whole prompt there")
    if solution_image.ndim == 4:
        if len(solution_image) != 1:
            raise ValueError(f"solution_image has {len(solution_image)} frames; only still pictures are scored")
        solution_image = solution_image[0]
    made = await _judge(keys).rewards_async(ground_truth, [solution_image])
    return {"score": made.rewards[0], **{name: values[0] for name, values in made.columns.items()}}


def _judge(keys: Mapping[str, Any]) -> Judge:
    """The judge of these keys: a process has one, for all its calls, which come one for each picture."""
    # Recipes bring lists and mappings of their own kinds, which say what they hold.
    name = json.dumps(keys, sort_keys=True, default=repr)
    with _lock:
        if name not in _judges:
            _judges[name] = Judge.of(**keys, asynchronous=True)
        return _judges[name]
