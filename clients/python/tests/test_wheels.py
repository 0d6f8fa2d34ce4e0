"""The wheels that `make wheel` leaves: installed into clean environments, and a score through them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

TORCH = "2.11.0"
SAMPLE = json.loads((ROOT / "samples/manifest.jsonl").read_text().splitlines()[0])


def wheel(package: str) -> Path:
    if "SPATIALSCORE_WHEELS" not in os.environ:
        pytest.skip("SPATIALSCORE_WHEELS names no folder; `make client-test` does")
    (found,) = Path(os.environ["SPATIALSCORE_WHEELS"]).glob(f"{package}-*.whl")
    return found


class Environment:
    """A virtual environment of its own, whose torch is the libraries that the binary was linked with, under pip's
    eyes the package that brings them: torch itself has half a gigabyte."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.bin = folder / "bin"
        (self.site,) = folder.glob("lib/python*/site-packages")

    def add_torch(self, version: str = TORCH) -> None:
        libtorch = Path(os.environ.get("LIBTORCH", ROOT / ".libtorch")).resolve() / "site"
        if not libtorch.is_dir():
            pytest.skip(f"{libtorch} is not laid out as `make libtorch` does")
        (self.site / "torch").mkdir()
        (self.site / "torch/__init__.py").write_text("raise ImportError('torch takes seconds to import')\n")
        (self.site / "torch/lib").symlink_to(libtorch / "torch/lib")
        (self.site / "nvidia").symlink_to(libtorch / "nvidia")
        info = self.site / f"torch-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")

    def pip(self, *words: object) -> subprocess.CompletedProcess[str]:
        """This environment's pip installs into the other: Debian's Python cannot give it one."""
        command = [sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "-q", *words]
        return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """With nothing in the path but what was installed."""
        command = [str(self.bin / str(words[0])), *(str(word) for word in words[1:])]
        environment = {"PATH": str(self.bin), "HOME": str(self.site), "PYTHONPATH": ""}
        return subprocess.run(command, cwd=self.site, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("wheel") / "environment")
    environment.add_torch()
    server = environment.pip("--no-index", wheel("spatialscore"))
    assert server.returncode == 0, server.stderr
    client = environment.pip(wheel("spatialscore_client"), "pillow")
    assert client.returncode == 0, client.stderr
    return environment


@pytest.fixture
def served(installed: Environment) -> Iterator[str]:
    """The address of a server that the wheel's command started, and that ends as the server does."""
    command = [installed.bin / "spatialscore", "serve", "--listen", "127.0.0.1:0", "--metrics-listen", ""]
    process = subprocess.Popen(
        [*command, "--log-format", "json", "--threads", "1"],
        env={"PATH": str(installed.bin)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r'"address":"([^"]+)"', line):
            break
    else:
        pytest.fail("".join(lines))
    yield found[1]
    process.send_signal(signal.SIGTERM)
    process.stderr.read()
    assert process.wait(30) == 0


def test_a_score_through_what_was_installed(installed: Environment, served: str) -> None:
    picture = ROOT / "samples" / SAMPLE["image"]
    scored = installed.run("spatialscore", "score", "--server", served, "--wait", 60, "--format", "json",
                           "--prompt", SAMPLE["prompt"], picture)  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    script = (
        "import sys; from spatialscore_client import SpatialScoreClient;"
        "print(SpatialScoreClient(sys.argv[1]).score(sys.argv[2], [sys.argv[3]]).means[0])"
    )
    client = installed.run("python", "-c", script, served, SAMPLE["prompt"], picture)
    assert client.returncode == 0, client.stderr
    assert float(client.stdout) == pytest.approx(json.loads(scored.stdout)["mean"], abs=1e-4)
    assert installed.run("spatialscore-client", "check", served).returncode == 0


def test_crate_wheels_and_client_have_one_version(installed: Environment) -> None:
    (version,) = re.findall(r'^version = "(.*)"$', (ROOT / "Cargo.toml").read_text(), flags=re.M)
    assert {wheel(name).name.split("-")[1] for name in ("spatialscore", "spatialscore_client")} == {version}
    assert installed.run("spatialscore", "--version").stdout.split() == ["spatialscore", version]


def test_its_tag_tells_the_oldest_glibc(installed: Environment) -> None:
    """And its run path names nothing of the machine that built it."""
    if shutil.which("readelf") is None:
        pytest.skip("there is no readelf")
    binary = installed.site / "spatialscore/bin/spatialscore"
    facts = subprocess.check_output(["readelf", "-dVW", binary], text=True)
    newest = max(tuple(map(int, found)) for found in re.findall(r"GLIBC_(\d+)\.(\d+)", facts))
    assert f"manylinux_{newest[0]}_{newest[1]}_" in wheel("spatialscore").name
    # What Debian 12, Ubuntu 22.04 and RHEL 9 have, and their libstdc++.
    assert newest <= (2, 34)
    assert max(int(found) for found in re.findall(r"GLIBCXX_3\.4\.(\d+)", facts)) <= 29
    assert re.findall(r"R(?:UN)?PATH.*\[(.*)\]", facts) == ["$ORIGIN/../../torch/lib"]


def test_the_licences_of_what_is_in_it_go_along(installed: Environment) -> None:
    text = (installed.site / "spatialscore/THIRD-PARTY.txt").read_text()
    for crate in ("mozjpeg-sys", "ring", "tch", "tokenizers", "tonic"):
        assert re.search(rf"^{crate} \d\S*, .*(LICEN|COPY)", text, flags=re.M | re.I), crate
    # What only tests are made of is not in it.
    assert not re.search(r"^rcgen ", text, flags=re.M)


@pytest.mark.parametrize("version", [None, "2.10.0"])
def test_a_torch_that_is_not_its_own_is_refused(version: str | None, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    if version:
        environment.add_torch(version)
    refused = environment.pip("--no-index", wheel("spatialscore"))
    assert refused.returncode != 0 and f"torch=={TORCH}" in refused.stdout + refused.stderr

    assert environment.pip("--no-index", "--no-deps", wheel("spatialscore")).returncode == 0
    ended = environment.run("spatialscore", "--version")
    assert (ended.returncode, ended.stdout) == (69, "")
    says = (
        f"is {version}: pip install torch=={TORCH}" if version else f"there is no torch; looked in {environment.bin}"
    )
    assert says in ended.stderr and "libtorch_cpu.so and libc10.so" in ended.stderr


def test_libraries_that_are_missing_are_named(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "environment")
    environment.add_torch()
    (environment.site / "torch/lib").unlink()
    assert environment.pip("--no-index", wheel("spatialscore")).returncode == 0
    ended = environment.run("spatialscore", "serve")
    assert ended.returncode == 69
    assert f"{environment.site / 'torch/lib'} has no libtorch_cpu.so and no libc10.so" in ended.stderr
