"""What a client is told: where the servers are, how to reach them, who calls, how much may be under way."""

from __future__ import annotations

import ipaddress
import math
import os
import re
import ssl
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import grpc

from .errors import ConfigurationError
from .images import Codec

DEFAULT_PORT = 50051
DEFAULT_TIMEOUT = 120.0
_SCHEMES = ("dns:", "unix:", "unix-abstract:", "ipv4:", "ipv6:", "vsock:")

# Those behind which a list of addresses stands.
_LISTS = ("ipv4:", "ipv6:")

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
        """The same for gRPC. Raises ConfigurationError where a file cannot be used."""
        if (self.cert is None) != (self.key is None):
            raise ConfigurationError("tls: a certificate of one's own needs its key, and a key its certificate")
        ca, cert = (pem(each, "CERTIFICATE") for each in (self.ca, self.cert))
        return grpc.ssl_channel_credentials(ca, pem(self.key, "PRIVATE KEY"), cert)


def pem(source: str | os.PathLike[str] | bytes | None, kind: str) -> bytes | None:
    """The bytes of a PEM file, where they are not given themselves. Raises ConfigurationError."""
    if source is None:
        return None
    name = "the PEM given as bytes" if isinstance(source, bytes) else os.fspath(source)
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"tls: {name} cannot be used: {error.strerror or error}") from None
    if f"{kind}-----".encode() not in data:
        raise ConfigurationError(f"tls: {name} holds no {kind.lower()} in PEM form")
    return data


def context(tls: TLS, protocol: str) -> ssl.SSLContext:
    """The same for Python's own TLS. Raises ConfigurationError where a file cannot be used."""
    authority = pem(tls.ca, "CERTIFICATE")
    made = ssl.create_default_context(cadata=authority.decode() if authority else None)
    made.set_alpn_protocols([protocol])
    if tls.cert is not None and not isinstance(tls.cert, bytes) and not isinstance(tls.key, bytes):
        made.load_cert_chain(tls.cert, tls.key)
    return made


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
        """Checked settings. Raises ConfigurationError with what is wrong."""
        if target is None or not isinstance(target, (str, Sequence)):
            raise ConfigurationError(f"target is {target!r}; give host:port, or several")
        targets = [target] if isinstance(target, str) else list(target)
        parsed = [part for each in targets for part in _parts(each)]
        if not parsed:
            raise ConfigurationError("target is empty; give host:port, or several")
        secure = {scheme for _, scheme in parsed if scheme is not None}
        if len(secure) > 1 or (tls is not None and secure and bool(tls) not in secure):
            raise ConfigurationError("http and https, or the settings of tls, contradict each other")
        if tls is None:
            tls = True in secure
        if not isinstance(tls, (bool, TLS)):
            raise ConfigurationError(f"tls is {tls!r}; give True, False or a TLS(ca=…)")
        if codec not in get_args(Codec):
            raise ConfigurationError(f"codec is {codec!r}; raw, png and jpeg are known")
        if priority not in get_args(Priority):
            raise ConfigurationError(f"priority is {priority!r}; training and evaluation are known")
        check_timeout(timeout)
        for name, number in (("max_in_flight", max_in_flight), ("stream_window", stream_window)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ConfigurationError(f"{name} is {number!r}; it must be a whole number from 1")
        addresses = tuple(dict.fromkeys(each for each, _ in parsed))
        settings = TLS() if tls is True else tls or None
        if settings:
            settings.credentials()
        if isinstance(token, str):
            check_token(token)
        elif isinstance(token, TokenFile):
            token()
        elif token is not None and not callable(token):
            raise ConfigurationError(f"token is a {type(token).__name__}; give a str, or what gives one")
        if token and not settings and not all(map(is_local, addresses)):
            warnings.warn("the token goes over the network in plain text; set tls", stacklevel=4)
        return cls(addresses, token, settings, timeout, codec, max_in_flight, stream_window, use_proxy, priority)

    def options(self, authority: str | None = None) -> list[tuple[str, Any]]:
        """The channel's options. `authority` is the name and port behind which its address was found."""
        options: list[tuple[str, Any]] = [
            # A pool of its own per channel: another library's settings for the same address are not shared.
            ("grpc.use_local_subchannel_pool", 1),
            # All addresses of a name take turns, and those that are dead are left out.
            ("grpc.service_config", '{"loadBalancingConfig":[{"round_robin":{}}]}'),
            # Retries are ours, inside the call's one deadline.
            ("grpc.enable_retries", 0),
            ("grpc.enable_http_proxy", int(self.use_proxy)),
            # A peer that is gone without a word is noticed sooner, by `Watch`; this ends its connection. Of the two
            # timeouts the later one counts, and the second is a minute where nobody sets it.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.http2.ping_timeout_ms", 5_000),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            # How long one attempt to connect may take, and how long gRPC waits between two of them at most.
            ("grpc.min_reconnect_backoff_ms", 5_000),
            ("grpc.max_reconnect_backoff_ms", 5_000),
            # What is sent is held to the server's published limit; what comes back is a few bytes per item.
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", 16 << 20),
        ]
        if authority:
            options.append(("grpc.default_authority", authority))
        name = self.tls and (self.tls.server_name or (authority and host_and_port(authority)[0]))
        if name:
            options.append(("grpc.ssl_target_name_override", name))
        return options

    def metadata(self, traceparent: str | None) -> Metadata:
        """What goes with every call: who calls, and in which trace."""
        metadata: Metadata = tuple(_trace(traceparent).items())
        if self.token is None:
            return metadata
        token = self.token() if callable(self.token) else self.token
        check_token(token)
        return ("authorization", f"Bearer {token}"), *metadata


def from_environment(environment: Mapping[str, str] = os.environ, *, complete: bool = True) -> dict[str, Any]:
    """A client's arguments from SPATIALSCORE_TARGET (several separated by commas), SPATIALSCORE_TOKEN or
    SPATIALSCORE_TOKEN_FILE (either has one line: the token, or subject:token), SPATIALSCORE_CA (a PEM file; turns TLS
    on), SPATIALSCORE_TIMEOUT (seconds) and SPATIALSCORE_PRIORITY. What is not set is not there.

    Raises ConfigurationError where one of them makes no sense, or there is no target and they must be `complete`.
    """
    arguments: dict[str, Any] = {}
    if target := environment.get("SPATIALSCORE_TARGET", "").strip():
        arguments["target"] = targets(target)
    elif complete:
        raise ConfigurationError("SPATIALSCORE_TARGET is not set; it names the server, as in scorer:50051")
    if token := environment.get("SPATIALSCORE_TOKEN"):
        arguments["token"] = one_token(token, "SPATIALSCORE_TOKEN")
    elif file := environment.get("SPATIALSCORE_TOKEN_FILE"):
        # Read for every call: tokens that an orchestrator mounts are replaced now and then.
        arguments["token"] = TokenFile(file)
    if authority := environment.get("SPATIALSCORE_CA"):
        arguments["tls"] = TLS(ca=authority)
    if timeout := environment.get("SPATIALSCORE_TIMEOUT"):
        try:
            arguments["timeout"] = float(timeout)
            check_timeout(arguments["timeout"])
        except ValueError:
            raise ConfigurationError(f"SPATIALSCORE_TIMEOUT is {timeout!r}; it must be a number of seconds") from None
    if priority := environment.get("SPATIALSCORE_PRIORITY"):
        if priority not in get_args(Priority):
            raise ConfigurationError(f"SPATIALSCORE_PRIORITY is {priority!r}; training and evaluation are known")
        arguments["priority"] = priority
    return arguments


def targets(text: str) -> list[str]:
    """Several targets that are separated by commas; gRPC's lists of addresses keep theirs."""
    if text.startswith(_LISTS):
        return [text]
    return [each.strip() for each in text.split(",") if each.strip()]


def check_timeout(timeout: object) -> None:
    """Raises ConfigurationError where a timeout is none."""
    number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if not number or not 0 < timeout < math.inf:  # type: ignore[operator]
        raise ConfigurationError(f"timeout is {timeout!r}; it must be a positive number of seconds")


def check_token(token: object) -> None:
    """Raises ConfigurationError where a token is none that a header can carry. Nothing of it is quoted."""
    if not isinstance(token, str):
        raise ConfigurationError(f"the token is a {type(token).__name__}, not a str")
    if not token:
        raise ConfigurationError("the token is empty")
    if token != token.strip():
        raise ConfigurationError("the token begins or ends in a blank or a newline; strip() it")
    if not all("!" <= letter <= "~" for letter in token):
        raise ConfigurationError("the token must be visible ASCII without blanks")


def one_token(text: str, where: str) -> str:
    """The token of a text of one line, `token` or `subject:token`, as the server's own command reads it.

    Raises ConfigurationError where it holds none, or several.
    """
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if len(lines) != 1:
        what = "no token" if not lines else f"{len(lines)} tokens"
        raise ConfigurationError(f"{where} holds {what}; it must hold one line: the token, or subject:token")
    token = lines[0].partition(":")[2] if ":" in lines[0] else lines[0]
    try:
        check_token(token)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from None
    return token


@dataclass(frozen=True)
class TokenFile:
    """A token that is read from a file for every call."""

    path: str

    def __call__(self) -> str:
        """Raises ConfigurationError where the file cannot be read or holds no token."""
        try:
            text = Path(self.path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            what = getattr(error, "strerror", None) or error
            raise ConfigurationError(f"token: cannot be read: {self.path}: {what}") from None
        return one_token(text, f"token: {self.path}")


def _parts(target: object) -> list[tuple[str, bool | None]]:
    """The servers of one target: gRPC's lists of addresses have several, each of which is called by its own name."""
    if not isinstance(target, str):
        raise ConfigurationError(f"target is {target!r}; give host:port")
    scheme = next((each for each in _LISTS if target.strip().startswith(each)), None)
    if scheme is None:
        return [address(target)]
    return [address(f"{scheme}{each.strip()}") for each in target.strip().removeprefix(scheme).split(",")]


def is_ip(host: str) -> bool:
    """Whether a host is an address and no name."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def address(target: str) -> tuple[str, bool | None]:
    """A target as gRPC names it, and whether its scheme asks for TLS; None where it says nothing.

    Raises ConfigurationError where it is not a target.
    """
    text = target.strip()
    for scheme, secure in (("http://", False), ("https://", True)):
        if text.startswith(scheme):
            return address(text.removeprefix(scheme).rstrip("/"))[0], secure
    if text.startswith(_LISTS):
        scheme = next(each for each in _LISTS if text.startswith(each))
        host, port = host_and_port(text.removeprefix(scheme))
        if not is_ip(host):
            raise ConfigurationError(f"{text!r} is not a target: {host!r} is no address; leave {scheme} away")
        return f"{scheme}{f'[{host}]' if ':' in host else host}:{port}", None
    if text.startswith("dns:///"):
        return address(text.removeprefix("dns:///"))
    if text.startswith(_SCHEMES):
        return text, None
    host, port = host_and_port(text)
    return f"dns:///{f'[{host}]' if ':' in host else host}:{port}", None


def host_and_port(text: str) -> tuple[str, int]:
    """The host and the port of `host:port`, `[::1]:port` or `host`. Raises ConfigurationError."""
    bracketed = text.startswith("[")
    host, closing, rest = text[1:].partition("]") if bracketed else (text, "", "")
    if bracketed:
        port = rest.removeprefix(":")
    elif text.count(":") <= 1:
        host, _, port = text.partition(":")
    else:
        host, port = text, ""
    broken = (bracketed and not closing) or re.search(r"[/,@\s]", host)
    if not host or broken or (port and not port.isdigit()):
        raise ConfigurationError(f"{text!r} is not a target; give host:port")
    number = int(port or DEFAULT_PORT)
    if not 0 < number < 65536:
        raise ConfigurationError(f"{text!r} has port {number}; ports go from 1 to 65535")
    return host, number


def is_local(address: str) -> bool:
    """Whether a target is of this machine."""
    text = re.sub("^(dns:///|ipv[46]:)", "", address)
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
