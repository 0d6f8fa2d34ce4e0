#!/usr/bin/env python3
"""Make a Python virtual environment with pip, with nothing but what Debian's python3 brings.

    python_env.py DIR [REQUIREMENTS]

Debian's python3 comes without ensurepip. Where it is missing, pip's wheel comes from Debian's package of it, which
is unpacked beside the environment and needs no root. A second call does nothing until the requirements change.
"""

import importlib.util
import subprocess
import sys
import venv
from pathlib import Path


def fetch_pip(directory: Path) -> Path:
    """The wheel of pip, from Debian's python3-pip-whl."""
    subprocess.run(["apt-get", "download", "-q", "python3-pip-whl"], cwd=directory, check=True)
    package = next(directory.glob("python3-pip-whl_*.deb"))
    subprocess.run(["dpkg", "-x", package.name, "debian"], cwd=directory, check=True)
    return next(directory.glob("debian/usr/share/python-wheels/pip-*.whl"))


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
            try:
                wheel = fetch_pip(directory)
            except (OSError, subprocess.CalledProcessError, StopIteration):
                sys.exit("this Python has neither ensurepip nor Debian's pip to take: install python3-venv")
            subprocess.run([python, wheel / "pip", "install", "-q", "--no-index", wheel], check=True)
    if requirements:
        install = ["-m", "pip", "install", "--disable-pip-version-check", "-q", "-r", requirements]
        subprocess.run([python, *install], check=True)
    stamp.write_bytes(wanted)


if __name__ == "__main__":
    main()
