"""What a client is told: where the servers are, how to reach them, who calls, how much may be under way."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import grpc

from .images import Codec

DEFAULT_PORT = 50051
DEFAULT_TIMEOUT = 120.0
_SCHEMES = ("dns:", "unix:", "unix-abstract:", "ipv4:", "ipv6:", "vsock:")

Metadata = tuple[tuple[str, str | bytes], ...]

Priority = Literal["training", "evaluation"]
"""Evaluation takes what training leaves of a server, and a small share of its own."""

Token = str | Callable[[], str]
"""A bearer token, or what gives the one of the moment."""


@dataclass(frozen=True)
class TLS:
    """How a TLS connection is made. Certificates and keys are PEM: a path, or the bytes."""

    ca: str | os.PathLike[str] | bytes | None = None
    """Who signed the server's certificate; None for the authorities that gRPC brings."""
    cert: str | os.PathLike[str] | bytes | None = None
    """The client's own certificate, where the server asks for one."""
    key: str | os.PathLike[str] | bytes | None = None
    """Its private key."""
    server_name: str | None = None
    """The name in the server's certificate, where it is not the one that is called."""

    def credentials(self) -> grpc.ChannelCredentials:
        """The same for gRPC. Raises OSError where a file cannot be read."""
        return grpc.ssl_channel_credentials(pem(self.ca), pem(self.key), pem(self.cert))


def pem(source: str | os.PathLike[str] | bytes | None) -> bytes | None:
    """The bytes of a PEM file, where they are not given themselves."""
    return source if source is None or isinstance(source, bytes) else Path(source).read_bytes()


@dataclass(frozen=True)
class Settings:
    """A client's settings, checked."""

    addresses: tuple[str, ...]
    token: Token | None
    tls: TLS | None
    timeout: float
    codec: Codec
    max_in_flight: int
    stream_window: int
    use_proxy: bool
    priority: Priority

    @classmethod
    def of(
        cls,
        target: str | Sequence[str],
        *,
        token: Token | None,
        tls: TLS | bool | None,
        timeout: float,
        codec: Codec,
        max_in_flight: int,
        stream_window: int,
        use_proxy: bool,
        priority: Priority,
    ) -> Settings:
        """Checked settings. Raises ValueError with what is wrong."""
        targets = [target] if isinstance(target, str) else list(target)
        parsed = [address(each) for each in targets]
        if not parsed:
            raise ValueError("target is empty; give host:port, or several")
        secure = {scheme for _, scheme in parsed if scheme is not None}
        if len(secure) > 1 or (tls is not None and secure and bool(tls) not in secure):
            raise ValueError("http and https, or the settings of tls, contradict each other")
        if tls is None:
            tls = True in secure
        if codec not in ("raw", "png", "jpeg"):
            raise ValueError(f"codec is {codec!r}; raw, png and jpeg are known")
        if priority not in get_args(Priority):
            raise ValueError(f"priority is {priority!r}; training and evaluation are known")
        if not 0 < timeout < math.inf or max_in_flight < 1 or stream_window < 1:
            raise ValueError("timeout, max_in_flight and stream_window must be positive")
        addresses = tuple(each for each, _ in parsed)
        settings = TLS() if tls is True else tls or None
        if token and not settings and not all(map(_local, addresses)):
            warnings.warn("the token goes over the network in plain text; set tls", stacklevel=4)
        return cls(addresses, token, settings, timeout, codec, max_in_flight, stream_window, use_proxy, priority)

    def options(self) -> list[tuple[str, Any]]:
        """The channel's options."""
        options: list[tuple[str, Any]] = [
            # A pool of its own per channel: another library's settings for the same address are not shared.
            ("grpc.use_local_subchannel_pool", 1),
            # All addresses of a name take turns, and those that are dead are left out.
            ("grpc.service_config", '{"loadBalancingConfig":[{"round_robin":{}}]}'),
            # Retries are ours, inside the call's one deadline.
            ("grpc.enable_retries", 0),
            ("grpc.enable_http_proxy", int(self.use_proxy)),
            # A peer that is gone without a word is noticed after this long, while calls are under way.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            # How long one attempt to connect may take, and how long gRPC waits between two of them at most.
            ("grpc.min_reconnect_backoff_ms", 5_000),
            ("grpc.max_reconnect_backoff_ms", 5_000),
            # What is sent is held to the server's published limit; what comes back is a few bytes per item.
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", 16 << 20),
        ]
        if self.tls and self.tls.server_name:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return options

    def metadata(self, traceparent: str | None) -> Metadata:
        """What goes with every call: who calls, and in which trace."""
        metadata: Metadata = tuple(_trace(traceparent).items())
        if self.token is None:
            return metadata
        token = self.token() if callable(self.token) else self.token
        return ("authorization", f"Bearer {token}"), *metadata


def from_environment(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """A client's arguments from SPATIALSCORE_TARGET (several separated by commas), SPATIALSCORE_TOKEN or
    SPATIALSCORE_TOKEN_FILE, SPATIALSCORE_CA (a PEM file; turns TLS on) and SPATIALSCORE_TIMEOUT (seconds).

    Raises ValueError where there is no target.
    """
    target = environment.get("SPATIALSCORE_TARGET", "")
    if not target:
        raise ValueError("SPATIALSCORE_TARGET is not set; it names the server, as in scorer:50051")
    arguments: dict[str, Any] = {"target": [each.strip() for each in target.split(",") if each.strip()]}
    if token := environment.get("SPATIALSCORE_TOKEN"):
        arguments["token"] = token
    elif file := environment.get("SPATIALSCORE_TOKEN_FILE"):
        # Read for every call: tokens that an orchestrator mounts are replaced now and then.
        arguments["token"] = TokenFile(file)
    if authority := environment.get("SPATIALSCORE_CA"):
        arguments["tls"] = TLS(ca=authority)
    if timeout := environment.get("SPATIALSCORE_TIMEOUT"):
        arguments["timeout"] = float(timeout)
    return arguments


@dataclass(frozen=True)
class TokenFile:
    """A token that is read from a file for every call."""

    path: str

    def __call__(self) -> str:
        return Path(self.path).read_text().strip()


def address(target: str) -> tuple[str, bool | None]:
    """A target as gRPC names it, and whether its scheme asks for TLS; None where it says nothing.

    Raises ValueError where it is not a target.
    """
    text = target.strip()
    for scheme, secure in (("http://", False), ("https://", True)):
        if text.startswith(scheme):
            return address(text.removeprefix(scheme).rstrip("/"))[0], secure
    if text.startswith(_SCHEMES):
        return text, None
    host, port = host_and_port(text)
    return f"dns:///{f'[{host}]' if ':' in host else host}:{port}", None


def host_and_port(text: str) -> tuple[str, int]:
    """The host and the port of `host:port`, `[::1]:port` or `host`. Raises ValueError."""
    bracketed = text.startswith("[")
    host, closing, rest = text[1:].partition("]") if bracketed else (text, "", "")
    if bracketed:
        port = rest.removeprefix(":")
    elif text.count(":") <= 1:
        host, _, port = text.partition(":")
    else:
        host, port = text, ""
    if not host or (bracketed and not closing) or "/" in host or (port and not port.isdigit()):
        raise ValueError(f"{text!r} is not a target; give host:port")
    number = int(port or DEFAULT_PORT)
    if not 0 < number < 65536:
        raise ValueError(f"{text!r} has port {number}; ports go from 1 to 65535")
    return host, number


def _local(address: str) -> bool:
    text = address.removeprefix("dns:///")
    return text.startswith(("unix", "localhost", "127.", "[::1]"))


def _trace(traceparent: str | None) -> dict[str, str]:
    if traceparent is not None:
        return {"traceparent": traceparent}
    # Whoever traces has loaded OpenTelemetry; it is not imported on behalf of those who do not.
    propagate = sys.modules.get("opentelemetry.propagate")
    carrier: dict[str, str] = {}
    if propagate is not None:
        propagate.inject(carrier)
    return {key: value for key, value in carrier.items() if key in ("traceparent", "tracestate")}
