"""The package as it is shipped: current, typed, installable where nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

CLIENT = Path(__file__).resolve().parent.parent


def run(*command: object, cwd: Path = CLIENT) -> str:
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_messages_are_those_of_the_contract() -> None:
    run(sys.executable, "scripts/generate_stubs.py", "--check")


def test_types_are_strict() -> None:
    run(sys.executable, "-m", "mypy")


def test_style() -> None:
    run(sys.executable, "-m", "ruff", "check", ".")
    run(sys.executable, "-m", "ruff", "format", "--check", ".")


def test_wheel_and_sdist_install_into_a_clean_environment(tmp_path: Path) -> None:
    run(sys.executable, "-m", "hatchling", "build", "-d", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    (sdist,) = tmp_path.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"spatialscore_client/py.typed", "spatialscore_client/_proto/spatialscore.pyi"} <= set(names)
    assert all(name.startswith(("spatialscore_client/", "spatialscore_client-")) for name in names)
    # The sdist is whole: a wheel comes out of it again.
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "again", cwd=unpacked(sdist))
    (again,) = (tmp_path / "again").glob("*.whl")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(names)

    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    # This environment's pip installs into the other: Debian's Python cannot give it one.
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", wheel)
    script = (
        "import importlib.metadata as m, spatialscore_client as sc; sc.SpatialScoreClient('scorer:1');"
        "print(sorted(d.name for d in m.distributions()))"
    )
    installed = run(python, "-c", script, cwd=tmp_path)
    assert installed.strip() == "['grpcio', 'protobuf', 'spatialscore-client', 'typing_extensions']"
    if "SPATIALSCORE_ADDRESS" in os.environ:
        checked = run(environment / "bin" / "spatialscore-client", "check", os.environ["SPATIALSCORE_ADDRESS"])
        assert "round trip" in checked


def unpacked(sdist: Path) -> Path:
    return sdist.parent / sdist.name.removesuffix(".tar.gz")
