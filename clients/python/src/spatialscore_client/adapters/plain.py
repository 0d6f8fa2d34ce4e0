"""For a training loop of one's own: `reward(prompts, images) -> list[float]`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from ..client import SpatialScoreClient
from ..errors import ConfigurationError
from ..images import Pictures
from ..settings import TLS, TokenFile

Reward = Callable[["str | Sequence[str]", Pictures], list[float]]


def reward(target: str | Sequence[str] | None = None, **options: Any) -> Reward:
    """A function of prompts and images that gives their SpatialScores.

    `target` and `options` are those of SpatialScoreClient; the environment says what is not given.
    """
    client = client_of(target, **options)
    return lambda prompts, images: client.score(prompts, images).means


def client_of(target: str | Sequence[str] | None = None, **options: Any) -> SpatialScoreClient:
    """A client of what the environment says, with what is given here on top.

    `options` are the arguments of SpatialScoreClient, and for recipes that can write no more than text: `token_file`,
    and `ca`, a PEM file, which turns TLS on. Raises ConfigurationError with what is not known.
    """
    if target is not None:
        options["target"] = target
    known = {*inspect.signature(SpatialScoreClient).parameters, "token_file", "ca"}
    if unknown := sorted(set(options) - known):
        what = ", ".join(map(repr, unknown))
        raise ConfigurationError(f"{what}: not known to SpatialScore's client; there are {', '.join(sorted(known))}")
    if (file := options.pop("token_file", None)) is not None:
        options["token"] = TokenFile(str(file))
    if (authority := options.pop("ca", None)) is not None:
        options["tls"] = TLS(ca=str(authority))
    client: SpatialScoreClient = SpatialScoreClient.from_environment(**options)
    return client
