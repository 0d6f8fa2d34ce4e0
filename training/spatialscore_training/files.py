"""What every command does alike with files: refuse what would harm, and write whole or not at all."""

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path


class Refusal(Exception):
    """Why something is not done, in words for the person who asked for it."""


def command(main: Callable[[], None]) -> Callable[[], None]:
    """A command's entry: what is refused ends it with 1 and one line, not with a traceback."""

    def run() -> None:
        try:
            main()
        except (Refusal, OSError) as refusal:
            sys.exit(f"error: {refusal}")

    run.__doc__ = main.__doc__
    return run


def keep_apart(out: Path, **inputs: Path | None) -> None:
    """Refuses an output that is, holds or lies in an input: nothing that is read may be written over."""
    target = out.resolve()
    for name, path in inputs.items():
        if path is None:
            continue
        source = path.resolve()
        if target == source or target in source.parents or source in target.parents:
            how = "is" if target == source else "holds" if target in source.parents else "lies in"
            raise Refusal(f"the output {out} {how} the input {path} ({name}); give it a place of its own")


def part_of(path: Path) -> Path:
    """Where `path` is written before it is whole."""
    return path.with_name(f"{path.name}.part")


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder to; it takes the place of `path` once it is whole."""
    part = part_of(path)
    remove(part)
    path.parent.mkdir(parents=True, exist_ok=True)
    yield part
    files = [file for file in part.rglob("*") if file.is_file()] if part.is_dir() else [part]
    mask = os.umask(0)
    os.umask(mask)
    for file in files:
        # safetensors (0.8) writes for its owner alone; who serves a checkpoint is often another user.
        if not file.is_symlink() and not file.stat().st_mode & 0o077:
            file.chmod(0o666 & ~mask)
        with file.open("rb") as written:
            os.fsync(written.fileno())
    if part.is_dir() and path.exists():
        # A folder cannot be replaced in one step where there is something in it.
        old = path.with_name(f"{path.name}.old")
        remove(old)
        path.rename(old)
        part.rename(path)
        remove(old)
    else:
        part.replace(path)


def write_text(path: Path, text: str) -> None:
    with beside(path) as part:
        part.write_text(text)


def remove(path: Path) -> None:
    """Removes a file, a link or a folder, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 over parts, none of which can be taken for a piece of its neighbour."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return f"sha256:{whole.hexdigest()}"


def tries(wanted: str, count: int = 3000) -> Iterator[None]:
    """So many turns of a loop that a random find ends; then it is refused, with what was looked for."""
    yield from repeat(None, count)
    raise Refusal(f"{wanted}: not found in {count:,} tries; what is asked for can hardly be, or cannot")
