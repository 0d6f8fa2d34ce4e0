#!/usr/bin/env python3
"""Lay out libtorch 2.11.0 for torch-sys, taken from the wheels that PyPI has.

    libtorch.py DIR

DIR/site   torch/ and nvidia/ unpacked side by side, as pip lays them: the run paths inside the libraries
           then find one another. Only the CPU half runs from it; `--cuda` unpacks the CUDA half too.
DIR/include, DIR/lib
           what torch-sys compiles and links against. `lib` shows only libtorch_cpu and libc10, so that the
           binary starts on a machine without CUDA; `device.rs` opens libtorch_cuda at run time.
"""

import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TORCH = "2.11.0"
CPU_WHEELS = [f"torch=={TORCH}", "nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cupti==13.0.85"]
# What of the torch wheel is wanted for building and for running on the CPU.
CPU_LIBRARIES = {"libtorch_cpu.so", "libc10.so", "libgomp.so.1"}
CUDA_RUNTIME = {"libcudart.so.13", "libcupti.so.13"}


def wanted(name: str) -> bool:
    path = Path(name)
    if name.startswith("torch/include/"):
        return True
    if path.parent == Path("torch/lib"):
        return path.name in CPU_LIBRARIES
    return path.name in CUDA_RUNTIME


def download(into: str) -> None:
    machine = platform.machine()
    platforms = [f"manylinux_2_28_{machine}", f"manylinux_2_25_{machine}", f"manylinux2014_{machine}"]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-q", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp", "-d", into]
    command += [f"--platform={p}" for p in platforms]
    subprocess.run([*command, *CPU_WHEELS], check=True)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    directory = Path(sys.argv[1])
    stamp = directory / "build-version"
    if stamp.exists() and stamp.read_text().strip() == TORCH:
        return
    site, lib = directory / "site", directory / "lib"
    site.mkdir(parents=True, exist_ok=True)
    print(f"fetching libtorch {TORCH} (530 MB, once)", flush=True)
    with tempfile.TemporaryDirectory(dir=directory) as wheels:
        download(wheels)
        for wheel in Path(wheels).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site, [n for n in archive.namelist() if wanted(n)])

    lib.mkdir(exist_ok=True)
    for name in ("libtorch_cpu.so", "libc10.so"):
        link(lib / name, Path("../site/torch/lib") / name)
    link(directory / "include", Path("site/torch/include"))
    # The wheel's libtorch.so only ties the CPU and the CUDA half together. torch-sys names it at link time.
    subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-o", lib / "libtorch.so"], check=True)
    stamp.write_text(TORCH + "\n")


def link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


if __name__ == "__main__":
    main()
