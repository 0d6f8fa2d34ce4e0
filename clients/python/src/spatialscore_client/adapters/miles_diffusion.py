"""miles_diffusion: `--custom-rm-path`, as in radixark/miles_diffusion at 2929e491, miles/rollout/rm_hub/__init__.py.

    --custom-rm-path spatialscore_client.adapters.miles_diffusion.spatialscore

The server is SPATIALSCORE_TARGET. For one model of several, or their sum, name a function of your own module, made by
`reward(weights={"hpsv3": 1.0, "layout": 0.5})`. Without `--group-rm` a call is a microgroup, with it a whole group.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from .judge import Judge

RewardFn = Callable[..., Awaitable[list[float]]]


async def spatialscore(args: Any, samples: Sequence[Any], **kwargs: Any) -> list[float]:
    """The rewards of samples, in order.

    `generated_output` is a tensor (3, 1, H, W), uint8, or float in [0, 1], or bytes as floats. What cannot be scored
    raises.
    """
    rewards: list[float] = await _default()(args, samples, **kwargs)
    return rewards


def reward(
    models: Sequence[str] | None = None, weights: Mapping[str, float] | None = None, **options: Any
) -> RewardFn:
    """Such a function for one model by name, or a sum of several with weights. `options` are those of
    SpatialScoreClient; the environment says what is not given."""
    judge = Judge.of(models=models, weights=weights, asynchronous=True, **options)

    async def fn(args: Any, samples: Sequence[Any], **kwargs: Any) -> list[float]:
        pictures = _bytes([_picture(place, sample) for place, sample in enumerate(samples)])
        made = await judge.rewards_async([sample.prompt for sample in samples], pictures)
        return made.rewards

    return fn


@functools.cache
def _default() -> RewardFn:
    return reward()


def _picture(place: int, sample: Any) -> Any:
    output = sample.generated_output
    if output is None or output.ndim != 4 or output.shape[1] != 1:
        shape = None if output is None else tuple(output.shape)
        raise ValueError(f"sample {place} has a generated_output of shape {shape}; a still picture is (3, 1, H, W)")
    return output[:, 0]


def _bytes(pictures: list[Any]) -> list[Any]:
    """The pictures, as bytes where they are bytes that are kept as floats, as some samplers leave them.

    Raises ValueError where nobody can tell: floats that are 0 or 1 alone. What is on neither scale is left to the
    client, which refuses it.
    """
    floats = [picture for picture in pictures if picture.dtype.is_floating_point]
    most = max((picture.max().item() for picture in floats), default=0)
    whole = all(picture.equal(picture.round().clamp(0, 255)) for picture in floats)
    if most == 1 and whole:
        raise ValueError("all values are 0 or 1: are these pictures in [0, 1], or black ones in [0, 255]?")
    return [picture.byte() for picture in pictures] if most > 1 and whole else pictures
