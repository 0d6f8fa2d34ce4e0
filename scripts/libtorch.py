#!/usr/bin/env python3
"""Lay out libtorch 2.11.0 for torch-sys, taken from the wheels that PyPI has.

    libtorch.py DIR [--cuda]

DIR/site   torch/ and nvidia/ unpacked side by side, as pip lays them: the run paths inside the libraries
           then find one another. Without --cuda only what the CPU half needs is there.
DIR/include, DIR/lib
           what torch-sys compiles and links against. `lib` shows only libtorch_cpu and libc10, so that the
           binary starts on a machine without CUDA; it opens libtorch_cuda at run time.
"""

import argparse
import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TORCH = "torch==2.11.0"
# libtorch_cpu of the CUDA build needs these two of the CUDA stack, and no driver.
CPU_WHEELS = [TORCH, "nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cupti==13.0.85"]
CPU_LIBRARIES = {"libtorch_cpu.so", "libc10.so", "libgomp.so.1", "libcudart.so.13", "libcupti.so.13"}


def wanted(name: str, cuda: bool) -> bool:
    """Whether a file of a wheel belongs into the layout."""
    if name.startswith("torch/include/"):
        return True
    library = name.startswith(("torch/lib/", "nvidia/")) and ".so" in Path(name).name
    return library and (Path(name).name in CPU_LIBRARIES or (cuda and "python" not in name))


def download(into: str, cuda: bool) -> None:
    # The same wheels whatever Python runs this: only the libraries in them are used.
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-q", "-d", into]
    command += ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
    tags = ["manylinux2014", *(f"manylinux_2_{minor}" for minor in range(17, 29))]
    command += [f"--platform={tag}_{platform.machine()}" for tag in tags]
    subprocess.run(command + ([TORCH] if cuda else ["--no-deps", *CPU_WHEELS]), check=True)


def link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--cuda", action="store_true", help="the CUDA half too (2.5 GB)")
    arguments = parser.parse_args()
    directory = arguments.directory

    # torch-sys reads this file too, and compares what stands before the plus sign with its own version.
    stamp, version = directory / "build-version", "2.11.0+cu130" if arguments.cuda else "2.11.0+cpu"
    if stamp.exists() and stamp.read_text().strip() in (version, "2.11.0+cu130"):
        return
    site, lib = directory / "site", directory / "lib"
    site.mkdir(parents=True, exist_ok=True)
    print(f"fetching libtorch {version} ({'2.5 GB' if arguments.cuda else '540 MB'}, once)", flush=True)
    with tempfile.TemporaryDirectory(dir=directory) as wheels:
        download(wheels, arguments.cuda)
        for wheel in Path(wheels).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site, [n for n in archive.namelist() if wanted(n, arguments.cuda)])

    lib.mkdir(exist_ok=True)
    for name in ("libtorch_cpu.so", "libc10.so"):
        link(lib / name, Path("../site/torch/lib") / name)
    link(directory / "include", Path("site/torch/include"))
    # The wheel's libtorch.so only ties the CPU and the CUDA half together. torch-sys names it at link time.
    subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-o", lib / "libtorch.so"], check=True)
    stamp.write_text(version + "\n")


if __name__ == "__main__":
    main()
