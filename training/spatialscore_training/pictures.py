"""A picture of a pair: a file's name, its bytes, or a place in a file that holds many. It is read when it is needed, and
wherever it is needed: the places can be pickled."""

import io
from pathlib import Path

from PIL import Image, ImageOps

from .tables import Cell
from .tars import Member

Picture = str | bytes | Cell | Member


def picture_bytes(picture: Picture) -> bytes:
    """A picture's file."""
    if isinstance(picture, str):
        return Path(picture).read_bytes()
    return picture if isinstance(picture, bytes) else picture.read()


def open_picture(picture: Picture) -> Image.Image:
    """A picture as the server reads it: turned as its EXIF says, in RGB."""
    with Image.open(picture if isinstance(picture, str) else io.BytesIO(picture_bytes(picture))) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def picture_named(said: str | list) -> Picture:
    """A picture as JSON has it: a name, or the parts of a place."""
    return said if isinstance(said, str) else {4: Cell, 3: Member}[len(said)](*said)
