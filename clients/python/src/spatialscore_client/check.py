"""Finds out, step by step, what is wrong with a connection, and says it in plain words."""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

import grpc

from . import answers
from ._proto import spatialscore as pb
from .base import SERVICE
from .client import failure_of
from .door import Door
from .errors import ConfigurationError, Finding, ItemFailure, SpatialScoreError
from .scores import ModelInfo
from .settings import Settings, address, context, host_and_port

T = TypeVar("T")
# The picture of the round trip: grey, the smallest that every checkpoint of this family takes as it is.
_SIDE = 112
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY")


def check(settings: Settings, target: str, report: Callable[[str], None]) -> bool:
    """Checks a target, one line a step. False where a step failed; what depends on it is not tried."""
    try:
        for line in _steps(settings, target):
            report(f"ok    {line}")
    except Finding as finding:
        report(f"FAIL  {finding}")
        return False
    return True


def _steps(settings: Settings, target: str) -> Iterator[str]:
    timeout = min(settings.timeout, 10.0)
    url = urlsplit(target)
    name, _ = address(without_token(target))
    if name.startswith("dns:///"):
        host, port = host_and_port(name.removeprefix("dns:///"))
        where = yield from _network(settings, host, port, timeout)
        if url.scheme in ("http", "https"):
            door = Door(url, _token(settings), context(settings.tls, "http/1.1") if settings.tls else None, timeout)
            if door.is_there():
                yield from door.steps()
                return
        yield _transport(settings, host, where, timeout)
    else:
        yield f"target: {name}, left to gRPC to resolve"
    options, tls = settings.options(), settings.tls
    channel = grpc.secure_channel(name, tls.credentials(), options) if tls else grpc.insecure_channel(name, options)
    with channel:
        caller = _Caller(channel, settings)
        model = caller.model()
        kind = "mean and standard deviation" if model.gaussian else "a scalar"
        yield f"gRPC: a SpatialScore server {model.server_version} answers" + _who(settings)
        where = ", ".join(model.devices)
        yield f"model: {model.name} ({model.architecture}, {model.dtype} on {where}), rewards are {kind}"
        yield f"revision: {model.revision}"
        if model.notice:
            yield f"its makers say: {model.notice}"
        limits = model.limits
        yield (
            f"limits: {limits.max_items_per_request} items and {limits.max_message_bytes >> 10} KiB a request, "
            f"{limits.max_prompt_bytes} bytes a prompt, {limits.max_image_pixels} pixels a picture"
        )
        yield caller.round_trip()


def without_token(target: str) -> str:
    """A target without the subject and the token that a URL of the HTTP port may have."""
    scheme, marker, rest = target.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if marker else target


def _token(settings: Settings) -> str | None:
    return settings.token() if callable(settings.token) else settings.token


def _who(settings: Settings) -> str:
    return ", and takes the token" if settings.token is not None else ", without a token"


def _network(settings: Settings, host: str, port: int, timeout: float) -> Generator[str, None, Any]:
    set_proxies = [name for name in _PROXIES if os.environ.get(name)]
    if set_proxies and not settings.use_proxy:
        yield f"proxy: {', '.join(set_proxies)} set, and ignored"
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        raise Finding(
            f"name: {host!r} does not resolve ({error}): is it spelled right, and known to this machine's DNS?"
        ) from None
    addresses = list(dict.fromkeys(entry[4][0] for entry in found))
    yield f"name: {host} is {', '.join(map(str, addresses))}"
    reached = []
    trouble = ""
    for family, kind, protocol, _, where in found:
        try:
            with socket.socket(family, kind, protocol) as connection:
                connection.settimeout(timeout)
                start = time.perf_counter()
                connection.connect(where)
                reached.append((where, time.perf_counter() - start))
        except TimeoutError:
            trouble = (
                f"{where[0]} port {port} did not answer within {timeout:g} s: a firewall, or a machine that is off?"
            )
        except ConnectionRefusedError:
            trouble = (
                f"{where[0]} refuses port {port}: nothing listens there; is the server running, and on that port?"
            )
        except OSError as error:
            trouble = f"{where[0]} port {port}: {error}"
    if not reached:
        raise Finding(f"port: {trouble}")
    yield f"port: {port} answers on {len(reached)} of {len(addresses)} addresses in {reached[0][1] * 1e3:.1f} ms"
    if trouble:
        yield f"      but {trouble}"
    return reached[0][0]


def _transport(settings: Settings, host: str, where: Any, timeout: float) -> str:
    if settings.tls is None:
        if _speaks_tls(where, timeout):
            raise Finding("TLS: the server asks for TLS, and the client does not use it; pass --tls, or --ca FILE")
        return "TLS: not used"
    name = settings.tls.server_name or host
    try:
        secure = context(settings.tls, "h2")
    except (ConfigurationError, OSError, ssl.SSLError) as error:
        raise Finding(f"TLS: the certificate or key given here cannot be used: {error}") from None
    try:
        with (
            socket.create_connection(where[:2], timeout) as plain,
            secure.wrap_socket(plain, server_hostname=name) as connection,
        ):
            until = connection.getpeercert() or {}
            protocol = connection.selected_alpn_protocol()
            version = connection.version()
    except ssl.SSLCertVerificationError as error:
        text = error.verify_message.rstrip(".")
        raise Finding(
            f"TLS: the server's certificate is not trusted for {name!r}: {text}; see --ca and --server-name"
        ) from None
    except ssl.SSLError as error:
        if not _speaks_tls(where, timeout):
            raise Finding("TLS: the server does not speak TLS; leave --tls and --ca away") from None
        raise Finding(f"TLS: the handshake failed: {error.reason or error}") from None
    except OSError as error:
        raise Finding(f"TLS: the connection broke in the handshake: {error}") from None
    if protocol != "h2":
        raise Finding("TLS: the other side does not offer HTTP/2 (ALPN h2), which gRPC needs; is it a web server?")
    return f"TLS: {version}, certificate for {name} until {until.get('notAfter', 'unknown')}"


def _speaks_tls(where: Any, timeout: float) -> bool:
    """Whether a TLS handshake gets anywhere, whoever the server says it is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection(where[:2], min(timeout, 3.0)) as plain, context.wrap_socket(plain):
            return True
    except ssl.SSLError as error:
        # A server that wants the client's certificate says so in TLS; one that does not speak it answers otherwise.
        return error.reason is not None and "ALERT" in error.reason
    except OSError:
        return False


class _Caller:
    """Single attempts, so that the first failure is told as it is."""

    def __init__(self, channel: grpc.Channel, settings: Settings) -> None:
        self._channel = channel
        self._timeout = settings.timeout
        try:
            self._metadata = settings.metadata(None)
        except ConfigurationError as error:
            raise Finding(str(error)) from None

    def model(self) -> ModelInfo:
        response = self._call("GetModel", pb.GetModelRequest(), pb.GetModelResponse)
        return answers.model(response)

    def round_trip(self) -> str:
        grey = bytes([128]) * (_SIDE * _SIDE * 3)
        image = pb.Image(raw=pb.RawImage(width=_SIDE, height=_SIDE, rgb8=grey))
        request = pb.ScoreRequest(prompt="a grey wall", items=[pb.ScoreItem(image=image)])
        start = time.perf_counter()
        response = self._call("Score", request, pb.ScoreResponse)
        took = time.perf_counter() - start
        try:
            (score,) = answers.results(response, 0, 1, "the server")
        except SpatialScoreError as error:
            raise Finding(f"round trip: {error}") from None
        if isinstance(score, ItemFailure):
            raise Finding(f"round trip: a grey picture was not scored: {score.code}: {score.message}")
        parts = {
            name: (part.seconds + part.nanos / 1e9) * 1e3
            for name in ("preprocess", "queue", "inference")
            if (part := getattr(response.timings, name)) is not None
        }
        rest = took * 1e3 - sum(parts.values())
        told = ", ".join(f"{name} {part:.1f}" for name, part in parts.items())
        return f"round trip: a grey picture scored in {took * 1e3:.1f} ms ({told}, network and the rest {rest:.1f})"

    def _call(self, method: str, request: Any, response: Any) -> Any:
        call = self._channel.unary_unary(f"{SERVICE}/{method}", type(request).SerializeToString, response.FromString)
        try:
            return call(request, timeout=self._timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            failure = failure_of(error)
            raise Finding(f"{_MEANINGS.get(failure.code, method)}: {failure.code}: {failure.message}") from None


_MEANINGS = {
    "UNAUTHENTICATED": "token: the server wants one, and does not know this one; pass --token-file FILE",
    "PERMISSION_DENIED": "token: the server knows it, and does not let it in",
    "UNIMPLEMENTED": "gRPC: something else than SpatialScore listens there",
    "UNAVAILABLE": "gRPC: the server is loading its model, stopping, or does not speak gRPC",
    "DEADLINE_EXCEEDED": "gRPC: no answer in time; the server, or what stands before it, is overloaded or stuck",
    "RESOURCE_EXHAUSTED": "gRPC: the server is there, and its queue is full",
}
