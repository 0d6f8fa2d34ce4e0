"""Models come and go on a running server: the client of its admin address, which has tokens of its own."""

from __future__ import annotations

from typing import Any

import grpc

from . import answers
from ._proto import admin as pb
from .errors import call_error
from .scores import ModelInfo
from .settings import TLS, Settings, Token

SERVICE = "/spatialscore.v1.AdminService"
# A large checkpoint takes its time.
_TIMEOUT = 1800.0


class AdminClient:
    """Loads, replaces, unloads, puts to sleep and wakes the models of one server. Each call returns when it is done.

    What fails raises a CallError, and leaves what was there.
    """

    def __init__(
        self, target: str, *, token: Token | None = None, tls: TLS | bool | None = None, timeout: float = _TIMEOUT
    ) -> None:
        """Connects nowhere yet. `target` is `host:port` of `serve --admin`; the rest is as of SpatialScoreClient."""
        self._settings = Settings.of(
            target=target, token=token, tls=tls, timeout=timeout, codec="raw", max_in_flight=1, stream_window=1,
            use_proxy=False, priority="training",
        )  # fmt: skip
        (self._address,) = self._settings.addresses
        credentials = self._settings.tls.credentials() if self._settings.tls else None
        options = self._settings.options()
        self._channel = (
            grpc.secure_channel(self._address, credentials, options)
            if credentials
            else grpc.insecure_channel(self._address, options)
        )

    def load(
        self, name: str, checkpoint: str, *, revision: str = "", profile: str = "", device: str = "", dtype: str = ""
    ) -> ModelInfo:
        """Loads a model under a new name. Paths are the server's."""
        model = pb.ModelSource(
            name=name, checkpoint=checkpoint, revision=revision, profile=profile, device=device, dtype=dtype
        )
        return answers.model(self._ask("LoadModel", pb.LoadModelRequest(model=model), pb.LoadModelResponse).model)

    def replace(
        self, name: str, checkpoint: str, *, revision: str = "", profile: str = "", device: str = "", dtype: str = ""
    ) -> ModelInfo:
        """Puts a model in the place of that of its name: it is up before the old one lets go."""
        model = pb.ModelSource(
            name=name, checkpoint=checkpoint, revision=revision, profile=profile, device=device, dtype=dtype
        )
        request = pb.ReplaceModelRequest(model=model)
        return answers.model(self._ask("ReplaceModel", request, pb.ReplaceModelResponse).model)

    def unload(self, name: str) -> None:
        """Takes a model away, once the calls that have it are answered."""
        self._ask("UnloadModel", pb.UnloadModelRequest(name=name), pb.UnloadModelResponse)

    def sleep(self, name: str) -> None:
        """Gives a model's memory back, once the calls that have it are answered."""
        self._ask("SleepModel", pb.SleepModelRequest(name=name), pb.SleepModelResponse)

    def wake(self, name: str) -> None:
        """Loads a sleeping model again, as what it was."""
        self._ask("WakeModel", pb.WakeModelRequest(name=name), pb.WakeModelResponse)

    def models(self) -> list[ModelInfo]:
        """All models, the default one first."""
        response = self._ask("DescribeModels", pb.DescribeModelsRequest(), pb.DescribeModelsResponse)
        return [answers.model(model) for model in response.models]

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, method: str, request: Any, response: Any) -> Any:
        ask = self._channel.unary_unary(f"{SERVICE}/{method}", type(request).SerializeToString, response.FromString)
        try:
            return ask(request, timeout=self._settings.timeout, metadata=self._settings.metadata(None))
        except grpc.RpcError as error:
            raise call_error(error.code().name, error.details() or "", self._address, 1) from error
