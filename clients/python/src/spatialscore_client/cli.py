"""The command `spatialscore-client`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .check import check
from .settings import TLS, Settings, Token, TokenFile

_DESCRIPTION = "Talks to a SpatialScore server."
_CHECK = """Says in plain words what is wrong with a connection: name, port, TLS, token, model, limits, and a round
trip with its timings. Ends with 0 where all is well, 1 where a step failed, 2 where the arguments make no sense."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; its exit status."""
    parser = argparse.ArgumentParser(prog="spatialscore-client", description=_DESCRIPTION)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("check", help="what is wrong with a connection", description=_CHECK)
    command.add_argument("target", metavar="TARGET", help="host:port; https:// in front turns TLS on")
    command.add_argument(
        "--token-file", metavar="FILE", help="a file with the bearer token (else SPATIALSCORE_TOKEN)"
    )
    command.add_argument("--tls", action="store_true", help="use TLS, with the authorities that gRPC brings")
    command.add_argument("--ca", metavar="FILE", help="use TLS; who signed the server's certificate (PEM)")
    command.add_argument("--cert", metavar="FILE", help="the client's own certificate (PEM)")
    command.add_argument("--key", metavar="FILE", help="its private key (PEM)")
    command.add_argument("--server-name", metavar="NAME", help="the name in the server's certificate")
    command.add_argument("--timeout", metavar="SECONDS", type=float, default=30.0, help="for each step (30)")
    command.add_argument("--use-proxy", action="store_true", help="heed the environment's proxy variables")
    given = parser.parse_args(arguments)
    try:
        settings = _settings(given)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0 if check(settings, given.target, print) else 1


def _settings(given: argparse.Namespace) -> Settings:
    files = (given.ca, given.cert, given.key, given.server_name)
    tls = TLS(*files) if any(files) else (True if given.tls else None)
    token: Token | None = TokenFile(given.token_file) if given.token_file else os.environ.get("SPATIALSCORE_TOKEN")
    return Settings.of(
        given.target,
        token=token,
        tls=tls,
        timeout=given.timeout,
        codec="raw",
        max_in_flight=1,
        stream_window=1,
        use_proxy=given.use_proxy,
        priority="training",
    )


if __name__ == "__main__":
    sys.exit(main())
