"""TRL: reward functions for `GRPOTrainer(reward_funcs=…)`, sync and async, as in trl 1.16.

TRL's policies write text. What turns a completion into a picture is the caller's: a renderer, a diffusion pipeline,
or a column of the data set.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..aio import AsyncSpatialScoreClient
from ..client import SpatialScoreClient
from .judge import Judge, Shared, column, column_names

Draw = Callable[[str, str, dict[str, Any]], Any]
"""Makes the picture of (prompt, completion, the row's other columns)."""


@dataclass(frozen=True)
class Binding:
    """What a reward function is made of. It stands in front of TRL's arguments, since every column of a data set may
    come as a keyword."""

    judge: Judge
    image: str | Draw
    prompt: str | None

    def captions(self, rows: list[dict[str, Any]]) -> list[str]:
        """What the pictures are held against."""
        return [_texts(row)[0] if self.prompt is None else row[self.prompt] for row in rows]

    def picture(self, row: dict[str, Any]) -> Any:
        """The picture of a row, or what can be awaited for it."""
        return row[self.image] if isinstance(self.image, str) else self.image(*_texts(row), row)


def reward(
    client: SpatialScoreClient,
    *,
    image: str | Draw = "image",
    prompt: str | None = None,
    models: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
) -> Any:
    """A reward function.

    image: the data set's column with the pictures, or what draws one.
    prompt: the column with the text that pictures are held against; without it, the prompt itself, of which the last
        user turn counts where it is a conversation.
    models: the model that scores, of a server of several; of several the reward is a sum with `weights`. Apart they
        are `rewards`.

    It gives one finite number per completion, or raises what SpatialScoreClient.score raises.
    """
    return _named(functools.partial(spatialscore, Binding(Judge(client, models, weights), image, prompt)))


def async_reward(
    client: AsyncSpatialScoreClient,
    *,
    image: str | Draw = "image",
    prompt: str | None = None,
    models: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
) -> Any:
    """The same as an `async` function, which TRL runs beside its other asynchronous rewards. `image` may then be one
    too."""
    return _named(functools.partial(spatialscore_async, Binding(Judge(client, models, weights), image, prompt)))


def rewards(
    client: SpatialScoreClient,
    models: Sequence[str],
    *,
    columns: Sequence[str] | None = None,
    image: str | Draw = "image",
    prompt: str | None = None,
) -> list[Any]:
    """Reward functions for several models, one each, in the order of the names. TRL weighs them by `reward_weights`,
    and normalises each before it sums them where `multi_objective_aggregation="normalize_then_sum"` (GDPO).

    A batch is drawn, sent and scored once for all of them: give TRL all. `columns` are what trains where not one for
    each model is meant: `MODEL`, or `MODEL/COMPONENT` for a part of its score. What cannot be scored raises, for TRL
    would leave a missing part out of its sum.
    """
    binding = Binding(Judge(client), image, prompt)
    names = column_names(models, columns)
    shared: Shared[dict[str, list[float]]] = Shared(len(names))

    def function(place: int, name: str) -> Any:
        def fn(prompts: list[Any], completions: list[Any], **data: Any) -> list[float]:
            def score() -> dict[str, list[float]]:
                rows = _rows(prompts, completions, data)
                pictures = [binding.picture(row) for row in rows]
                return client.score(binding.captions(rows), pictures, models=models).table()

            return column(shared.take(place, (prompts, completions), score), name)

        # TRL logs a reward by the name of its function.
        fn.__name__ = name
        return fn

    return [function(place, name) for place, name in enumerate(names)]


def async_rewards(
    client: AsyncSpatialScoreClient,
    models: Sequence[str],
    *,
    columns: Sequence[str] | None = None,
    image: str | Draw = "image",
    prompt: str | None = None,
) -> list[Any]:
    """The same as `async` functions. `image` may then be one, too."""
    binding = Binding(Judge(client), image, prompt)
    names = column_names(models, columns)
    shared: Shared[asyncio.Future[dict[str, list[float]]]] = Shared(len(names))

    def function(place: int, name: str) -> Any:
        async def fn(prompts: list[Any], completions: list[Any], **data: Any) -> list[float]:
            async def score() -> dict[str, list[float]]:
                rows = _rows(prompts, completions, data)
                scored = await client.score(binding.captions(rows), await _drawn(binding, rows), models=models)
                return scored.table()

            begun = shared.take(place, (prompts, completions), lambda: asyncio.ensure_future(score()))
            return column(await begun, name)

        fn.__name__ = name
        return fn

    return [function(place, name) for place, name in enumerate(names)]


def spatialscore(binding: Binding, /, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """See `reward`."""
    rows = _rows(prompts, completions, columns)
    return binding.judge.rewards(binding.captions(rows), [binding.picture(row) for row in rows]).rewards


async def spatialscore_async(
    binding: Binding, /, prompts: list[Any], completions: list[Any], **columns: Any
) -> list[float]:
    """See `async_reward`."""
    rows = _rows(prompts, completions, columns)
    made = await binding.judge.rewards_async(binding.captions(rows), await _drawn(binding, rows))
    return made.rewards


# TRL logs a reward by the name of the function within: both are one reward.
spatialscore_async.__name__ = spatialscore.__name__


def _named(function: functools.partial[Any]) -> functools.partial[Any]:
    # Before 1.0, TRL took the name of its logs from here.
    function.__name__ = "spatialscore"  # type: ignore[attr-defined]
    return function


async def _drawn(binding: Binding, rows: list[dict[str, Any]]) -> list[Any]:
    pictures = [binding.picture(row) for row in rows]
    return [await picture if inspect.isawaitable(picture) else picture for picture in pictures]


def _rows(prompts: list[Any], completions: list[Any], columns: dict[str, Any]) -> list[dict[str, Any]]:
    """The columns as rows. What TRL adds that is no column (its state, its loggers) stays out."""
    listed = {name: values for name, values in columns.items() if isinstance(values, list)}
    listed = {name: values for name, values in listed.items() if len(values) == len(prompts)}
    return [
        {"prompt": prompt, "completion": completion, **{name: values[place] for name, values in listed.items()}}
        for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]


def _texts(row: dict[str, Any]) -> tuple[str, str]:
    return _text(row["prompt"], "user"), _text(row["completion"], "assistant")


def _text(value: Any, role: str) -> str:
    """A text as it is; of a conversation, the text of that role's last turn."""
    if isinstance(value, str):
        return value
    turns = [turn["content"] for turn in value if turn["role"] == role]
    if not turns:
        raise ValueError(f"a conversation without a turn of the {role}")
    content = turns[-1]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")
