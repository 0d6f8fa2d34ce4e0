"""WebDataset shards: tar files in which the members of a sample stand together and have one name before the first dot.

    0001.json            what a line of JSON lines would say
    0001.txt             the prompt, if 0001.json does not say it
    0001.chosen.png      its pictures, by the names that `pair_files` knows
    0001.rejected.jpg

Pictures stay in the file: in their place a sample has a `Member`, which is read when the picture is.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from .files import Refusal


class Member(NamedTuple):
    """A picture in a tar file. Another process can read it too."""

    file: str
    offset: int
    length: int

    def read(self) -> bytes:
        with open(self.file, "rb") as tar:
            tar.seek(self.offset)
            return tar.read(self.length)


# As `webdataset` reads a name: a sample, up to the first dot behind the last slash, and what of it this is. Others are no
# sample's.
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")


def _told(tar: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> object:
    """What a text says: an object where it is JSON."""
    text = tar.extractfile(member).read()
    try:
        return json.loads(text) if member.name.lower().endswith(".json") else text.decode().strip()
    except ValueError as error:
        raise Refusal(f"{where}: {member.name}: {error}") from error


def _sample(tar: tarfile.TarFile, members: list[tarfile.TarInfo], file: Path, where: str, pictures: set[str]) -> dict:
    found = {}
    for member in members:
        kind = _NAME.fullmatch(member.name)[2].lower()
        name = {"txt": "prompt", "prompt.txt": "prompt", "json": "json"}.get(kind, kind.partition(".")[0])
        if name not in ("prompt", "json", *pictures):
            continue
        if name in found:
            raise Refusal(f"{where}: two members are its `{name}`")
        found[name] = Member(str(file), member.offset_data, member.size) if name in pictures else _told(tar, member, where)
    said = found.pop("json", {})
    if not isinstance(said, dict):
        raise Refusal(f"{where}: its JSON is not an object")
    if twice := sorted(found.keys() & said.keys()):
        raise Refusal(f"{where}: `{twice[0]}` is in its JSON and is a member too")
    return said | found


def samples(file: Path, pictures: set[str]) -> Iterator[tuple[str, dict | Refusal]]:
    """The samples of a shard, each with its place, or in a sample's place what is wrong with it."""
    try:
        with tarfile.open(file, "r:") as tar:
            members = (member for member in tar if member.isfile() and _NAME.fullmatch(member.name))
            for key, its in groupby(members, lambda member: _NAME.fullmatch(member.name)[1]):
                where = f"{file}: {key}"
                try:
                    yield where, _sample(tar, list(its), file, where, pictures)
                except Refusal as refusal:
                    yield where, refusal
            # tarfile takes a file that ends between two members for a whole one.
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(512) != bytes(512):
                raise Refusal(f"{file}: the file ends in the middle; samples are missing")
    except tarfile.TarError as error:
        raise Refusal(f"{file}: {error}") from error
