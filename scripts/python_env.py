#!/usr/bin/env python3
"""Make a Python virtual environment with pip, with nothing but the standard library.

    python_env.py DIR [REQUIREMENTS]

Debian's python3 comes without pip and without ensurepip. Where they are missing, pip's own wheel is fetched
from the package index (PIP_INDEX_URL, else PyPI) and installs itself. A second call does nothing until the
requirements change.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path
from urllib.parse import urljoin

PIP = "25.3"


def fetch_pip(into: Path) -> Path:
    """The wheel of pip, from the index, checked against the digest that the index gives."""
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    page = urllib.request.Request(
        f"{index}/pip/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    with urllib.request.urlopen(page, timeout=60) as reply:
        base, files = reply.url, json.load(reply)["files"]
    name = f"pip-{PIP}-py3-none-any.whl"
    file = next(f for f in files if f["filename"] == name)
    with urllib.request.urlopen(urljoin(base, file["url"]), timeout=60) as reply:
        wheel = reply.read()
    if hashlib.sha256(wheel).hexdigest() != file["hashes"]["sha256"]:
        sys.exit(f"{name} does not have the digest that the index announces")
    into.mkdir(parents=True, exist_ok=True)
    path = into / name
    path.write_bytes(wheel)
    return path


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    directory = Path(sys.argv[1])
    requirements = Path(sys.argv[2]) if len(sys.argv) == 3 else None
    wanted = requirements.read_bytes() if requirements else b""
    stamp = directory / "installed"
    if stamp.exists() and stamp.read_bytes() == wanted:
        return
    python = directory / "bin" / "python"
    if not python.exists():
        print(f"making {directory}", flush=True)
        with_pip = importlib.util.find_spec("ensurepip") is not None
        venv.create(directory, with_pip=with_pip, symlinks=True)
        if not with_pip:
            wheel = fetch_pip(directory)
            subprocess.run([python, wheel / "pip", "install", "-q", "--no-index", wheel], check=True)
    if requirements:
        install = ["-m", "pip", "install", "--disable-pip-version-check", "-q", "-r", requirements]
        subprocess.run([python, *install], check=True)
    stamp.write_bytes(wanted)


if __name__ == "__main__":
    main()
