"""Becomes the server's binary, once the libraries of torch that it is linked with are found."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

TORCH = "2.11.0"
LIBRARIES = ("libtorch_cpu.so", "libc10.so")
BINARY = Path(__file__).resolve().parent / "bin" / "spatialscore"
# What sysexits.h calls a missing service.
UNAVAILABLE = 69


def torch_libraries() -> Path:
    """The folder of torch's libraries. Raises RuntimeError with what is wanted and where it was looked for.

    torch itself is not imported: that takes seconds.
    """
    wanted = f"spatialscore runs on {' and '.join(LIBRARIES)} of torch {TORCH}"
    looked = f"looked in {', '.join(path or os.getcwd() for path in sys.path)}"
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"{wanted}, and there is no torch; {looked}")
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    try:
        found = metadata.version("torch")
    except metadata.PackageNotFoundError:
        found = "a version that it does not tell"
    # What stands behind the plus sign says for which devices it was built.
    if found.partition("+")[0] != TORCH:
        raise RuntimeError(f"{wanted}, and {folder.parent} is {found}: pip install torch=={TORCH}")
    missing = [name for name in LIBRARIES if not (folder / name).is_file()]
    if missing:
        raise RuntimeError(f"{wanted}, and {folder} has no {' and no '.join(missing)}")
    return folder


def main() -> NoReturn:
    """Replaces this process: signals and the exit code are the server's own."""
    try:
        folder = torch_libraries()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(UNAVAILABLE)
    # First in the path, so that another libtorch there is not taken in its place.
    libraries = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(libraries)
    os.execv(BINARY, ["spatialscore", *sys.argv[1:]])
