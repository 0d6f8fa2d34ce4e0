"""Servers to measure, and the load on them."""

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from common import BINARY, ROOT


UNCACHED = ("--set", "cache.max_items=0")
"""For a load that repeats itself, so that each item costs a forward."""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@functools.cache
def built(name):
    """The program of benches/NAME.rs, built: only where it is needed. SPATIALSCORE_LOAD, for one, names one that is."""
    if there := os.environ.get(f"SPATIALSCORE_{name.upper()}"):
        return there
    said = subprocess.run(
        ["cargo", "bench", "--no-run", "--bench", name, "--message-format", "json"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = (json.loads(line) for line in said.stdout.splitlines())
    return next(line["executable"] for line in lines if line.get("target", {}).get("name") == name)


def load(target, pictures, prompt, seconds, *flags):
    """What a load of so many seconds gave: see benches/load.rs."""
    command = [built("load"), *target, "--seconds", seconds, "--prompt", prompt, *flags, *pictures]
    out = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out)


def rate(said):
    """Scores a second."""
    return said["outcomes"].get("scored", {"count": 0})["count"] / said["seconds"]


class Server:
    """A process that serves, with its log in a file."""

    def __init__(self, command, log, ready, patience=120):
        self.log = open(log, "w")
        self.process = subprocess.Popen(list(map(str, command)), stdout=self.log, stderr=self.log)
        until = time.monotonic() + patience
        try:
            while not ready():
                if self.process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{command[0]} does not serve: {Path(log).read_text()[-2000:]}")
                time.sleep(0.1)
        except BaseException:
            self.process.terminate()
            raise

    def resident(self):
        """Memory in MiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024

    def stop(self):
        self.process.terminate()
        self.process.wait()
        self.log.close()


@contextlib.contextmanager
def ours(checkpoint, out, *flags):
    """`spatialscore serve`; gives the server, its gRPC address and its metrics' URL. No checkpoint: flags name the models."""
    port, metrics = free_port(), free_port()
    url = f"http://127.0.0.1:{metrics}/metrics"
    listen = ["--listen", f"127.0.0.1:{port}", "--metrics-listen", f"127.0.0.1:{metrics}"]
    served = ["--checkpoint", checkpoint] if checkpoint else []
    command = [BINARY, "serve", *served, "--device", "cpu", *listen, *flags]
    log = out / "spatialscore.log"
    server = Server(command, log, lambda: "serving" in log.read_text())
    try:
        yield server, f"127.0.0.1:{port}", url
    finally:
        server.stop()


@contextlib.contextmanager
def fastapi(checkpoint, out, *flags):
    """fastapi_server.py; gives the URL that scores."""
    port = free_port()
    script = Path(__file__).with_name("fastapi_server.py")

    def ready():
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status == 200

    command = [sys.executable, script, checkpoint, "--port", port, *flags]
    server = Server(command, out / f"fastapi-{port}.log", ready)
    try:
        yield f"http://127.0.0.1:{port}/score"
    finally:
        server.stop()


def metric(url, name):
    """The sum of a metric's lines."""
    page = urllib.request.urlopen(url).read().decode()
    lines = (line.rsplit(" ", 1) for line in page.splitlines() if line and line[0] != "#")
    return sum(float(value) for key, value in lines if key == name or key.startswith(name + "{"))
