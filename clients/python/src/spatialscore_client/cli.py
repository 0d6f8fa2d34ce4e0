"""The command `spatialscore-client`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .check import check, without_token
from .errors import ConfigurationError
from .settings import TLS, Settings, Token, TokenFile, from_environment

_DESCRIPTION = "Talks to a SpatialScore server."
_CHECK = """Says in plain words what is wrong with a connection: name, port, TLS, token, model, limits, and a round
trip with its timings. Ends with 0 where all is well, 1 where a step failed, 2 where the arguments make no sense."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; its exit status."""
    parser = argparse.ArgumentParser(prog="spatialscore-client", description=_DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("check", help="what is wrong with a connection", description=_CHECK)
    command.add_argument(
        "target",
        metavar="TARGET",
        nargs="?",
        help="host:port, https://host:port for TLS, or the URL of the HTTP port; else those of SPATIALSCORE_TARGET",
    )
    command.add_argument(
        "--token-file",
        metavar="FILE",
        help="a file with the token, or subject:token (else SPATIALSCORE_TOKEN, SPATIALSCORE_TOKEN_FILE)",
    )
    command.add_argument("--tls", action="store_true", help="use TLS, with the authorities that gRPC brings")
    command.add_argument("--ca", metavar="FILE", help="use TLS; who signed its certificate (else SPATIALSCORE_CA)")
    command.add_argument("--cert", metavar="FILE", help="the client's own certificate (PEM)")
    command.add_argument("--key", metavar="FILE", help="its private key (PEM)")
    command.add_argument("--server-name", metavar="NAME", help="the name in the server's certificate")
    command.add_argument(
        "--timeout", metavar="SECONDS", type=float, help="for each step (30, or SPATIALSCORE_TIMEOUT)"
    )
    command.add_argument("--use-proxy", action="store_true", help="heed the environment's proxy variables")
    given = parser.parse_args(arguments)
    try:
        found = from_environment(complete=given.target is None)
        targets = [given.target] if given.target is not None else found["target"]
        timeout = given.timeout if given.timeout is not None else found.get("timeout", 30.0)
        for target in targets:
            _settings(given, target, None, None, timeout)
    except ConfigurationError as error:
        parser.error(str(error))
    token = TokenFile(given.token_file) if given.token_file else found.get("token")
    files = (given.ca, given.cert, given.key, given.server_name)
    tls = TLS(*files) if any(files) else (True if given.tls else found.get("tls"))
    well = True
    for target in targets:
        if len(targets) > 1:
            print(f"{without_token(target)}:")
        try:
            settings = _settings(given, target, token, tls, timeout)
        except ConfigurationError as error:
            print(f"FAIL  {error}")
            well = False
        else:
            well = check(settings, target, print) and well
    return 0 if well else 1


def _settings(
    given: argparse.Namespace, target: str, token: Token | None, tls: TLS | bool | None, timeout: float
) -> Settings:
    return Settings.of(
        without_token(target),
        token=token,
        tls=tls,
        timeout=timeout,
        codec="raw",
        max_in_flight=1,
        stream_window=1,
        use_proxy=given.use_proxy,
        priority="training",
    )


if __name__ == "__main__":
    sys.exit(main())
