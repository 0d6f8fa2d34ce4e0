"""Puts the binary into the wheel, and tells by what it is linked with where that wheel installs."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parents[2]
BINARY = Path(os.environ.get("SPATIALSCORE_BINARY", ROOT / "target/release/spatialscore"))
# Whatever lies beside it in site-packages; the launcher names the folder in any case.
LIBRARIES = "$ORIGIN/../../torch/lib"


def oldest_glibc(binary: Path) -> tuple[int, int]:
    """The newest version of glibc that a symbol asks for."""
    symbols = subprocess.check_output(["readelf", "--version-info", "--wide", binary], text=True)
    return max((int(major), int(minor)) for major, minor in re.findall(r"GLIBC_(\d+)\.(\d+)", symbols))


class Hook(BuildHookInterface):
    """The build hook that pyproject.toml names."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        binary = Path(self.directory) / "spatialscore"
        binary.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(BINARY, binary)
        binary.chmod(0o755)
        subprocess.run(["strip", binary], check=True)
        # The folder of this machine that it was linked in.
        subprocess.run(["patchelf", "--set-rpath", LIBRARIES, binary], check=True)
        major, minor = oldest_glibc(binary)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-manylinux_{major}_{minor}_{platform.machine()}"
        build_data["force_include"][str(binary)] = "spatialscore/bin/spatialscore"
        build_data["force_include"][str(ROOT / "LICENSE")] = "spatialscore/LICENSE"
        notices = binary.with_name("THIRD-PARTY.txt")
        subprocess.run([sys.executable, ROOT / "scripts/notices.py", notices], check=True)
        build_data["force_include"][str(notices)] = "spatialscore/THIRD-PARTY.txt"
        self.made = [binary, notices]

    def finalize(self, version: str, build_data: dict[str, Any], artifact: str) -> None:
        if version != "editable":
            for file in self.made:
                file.unlink()
