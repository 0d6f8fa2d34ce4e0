"""The pictures that a caller may give, and their form on the wire.

numpy, Pillow and torch are looked up among what the caller has loaded already, and never imported on their behalf: a
caller who holds an array of a package has loaded that package. The one exception is a codec that the caller asks for.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Union

from ._proto import spatialscore as pb

if TYPE_CHECKING:
    import numpy
    import PIL.Image
    import torch

Codec = Literal["raw", "png", "jpeg"]
"""How pixels are sent: `raw` and `png` change nothing, `jpeg` (quality 95) is smaller and changes scores."""

Picture = Union[
    str, "os.PathLike[str]", bytes, "dict[str, Any]", "PIL.Image.Image", "numpy.ndarray[Any, Any]", "torch.Tensor"
]
"""A path, an encoded file, a PIL image, a uint8 array (H, W, 3), a tensor (3, H, W): uint8, or float in [0, 1]; or a
dict of `bytes` and `path`, as `datasets.Image(decode=False)` gives them."""

Pictures = Union[Iterable[Picture], "numpy.ndarray[Any, Any]", "torch.Tensor"]
"""Pictures one by one, or a batch: a uint8 array (B, H, W, 3), or a tensor (B, 3, H, W)."""

# EXIF's tag.
_ORIENTATION = 0x0112

# How far a float may lie outside [0, 1] for rounding alone; what lies further is on another scale.
_SLACK = 1e-3


class PictureError(ValueError):
    """A picture that cannot be sent."""


@dataclass(frozen=True)
class Encoded:
    """A picture's bytes: pixels where there is a size, else a file."""

    data: bytes
    size: tuple[int, int] | None

    def write(self, image: pb.Image) -> None:
        """Puts them where they are sent from: once, for a large picture is slow to copy."""
        if self.size is None:
            image.encoded = self.data
        else:
            image.raw.width, image.raw.height = self.size
            image.raw.rgb8 = self.data


@dataclass(frozen=True)
class Source:
    """A picture that is known to be of a form we send."""

    size: tuple[int, int] | None
    """Width and height, where they are known without decoding; the sides may be swapped, where EXIF turns it."""
    load: Callable[[], Encoded]
    """Its file, or its pixels: rows from the top, RGB. May raise PictureError."""

    def encode(self, codec: Codec) -> Encoded:
        """The picture as it is sent. Raises PictureError."""
        found = self.load()
        if found.size is None or codec == "raw":
            return found
        return Encoded(_compress(found.data, found.size, codec), None)


def sources(images: Pictures) -> list[Source | PictureError]:
    """What a caller gave, one entry per picture, in order. Pixels of tensors are copied from their device here, in
    the caller's own thread and on its current stream."""
    return [_try(picture) for picture in split(images)]


def split(images: Pictures) -> list[Any]:
    """The pictures of a batch. Raises TypeError for what is one picture and not several."""
    single = (str, bytes, bytearray, memoryview, os.PathLike, dict)
    if isinstance(images, single) or _is(images, "PIL.Image", "Image"):
        raise TypeError("images is a single picture; put it in a list")
    dimensions = getattr(images, "ndim", None)
    if dimensions is not None and dimensions != 4:
        raise TypeError(f"images has {dimensions} dimensions; a batch has 4, and a single picture goes in a list")
    if _is(images, "torch", "Tensor"):
        # One that is sparse cannot be taken apart by iterating.
        batch: Any = images
        return [batch[index] for index in range(len(batch))]
    return list(images)


def source(picture: Any) -> Source:
    """One picture. Raises PictureError."""
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return Source(None, lambda: Encoded(bytes(picture), None))
    if isinstance(picture, (str, os.PathLike)):
        return _file(picture)
    if isinstance(picture, dict):
        return _undecoded(picture)
    if _is(picture, "PIL.Image", "Image"):
        return Source(picture.size, lambda: _pillow(picture))
    if _is(picture, "torch", "Tensor"):
        return _tensor(picture)
    if _is(picture, "numpy", "ndarray"):
        return _array(picture)
    raise PictureError(
        f"is a {type(picture).__name__}; give a path, encoded bytes, a PIL image, a uint8 array or a tensor"
    )


def _try(picture: Any) -> Source | PictureError:
    try:
        return source(picture)
    except PictureError as error:
        return error


def _is(value: Any, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)


def _file(path: str | os.PathLike[str]) -> Source:
    def read() -> Encoded:
        try:
            with open(path, "rb") as file:
                return Encoded(file.read(), None)
        except OSError as error:
            raise PictureError(f"cannot be read: {error}") from error

    if not os.path.isfile(path):
        raise PictureError(f"there is no file {os.fspath(path)!r}")
    return Source(None, read)


def _undecoded(picture: dict[str, Any]) -> Source:
    """What the `datasets` package holds of a picture that it does not decode: its bytes, or else where they lie."""
    data, path = picture.get("bytes"), picture.get("path")
    if not picture.keys() <= {"bytes", "path"} or (data is None and path is None):
        raise PictureError(f"is a dict of {sorted(map(str, picture))}; give one with its bytes or its path")
    return source(path if data is None else data)


def _pillow(picture: Any) -> Encoded:
    """The pixels that the server would find in the picture's file: turned as EXIF says, without alpha; and where one
    colour is declared transparent, white. That is what transformers' `load_image` and `convert_to_rgb` do."""
    from PIL import Image, ImageOps

    try:
        picture.load()
        turned = picture.getexif().get(_ORIENTATION, 1) != 1
        upright = ImageOps.exif_transpose(picture) if turned else picture
        rgb = upright if upright.mode == "RGB" else upright.convert("RGB")
        if rgb.info.get("transparency") is not None:
            rgba = rgb.convert("RGBA")
            rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return Encoded(rgb.tobytes(), rgb.size)
    except Exception as error:
        # Of many kinds, for what is wrong may be the file, its metadata or its palette.
        raise PictureError(f"cannot be decoded by Pillow: {error}") from error


def _array(array: Any) -> Source:
    if str(array.dtype) != "uint8" or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise PictureError(f"is an array {array.shape} of {array.dtype}; give uint8 (height, width, 3)")
    size = (array.shape[1], array.shape[0])
    return Source(size, lambda: Encoded(array.tobytes(), size))


def _tensor(tensor: Any) -> Source:
    shape, floating = tuple(tensor.shape), tensor.dtype.is_floating_point
    kind = str(tensor.dtype).removeprefix("torch.")
    if len(shape) != 3 or shape[0] != 3 or 0 in shape or not (floating or kind == "uint8"):
        raise PictureError(f"is a tensor {shape} of {kind}; give (3, height, width), uint8 or float in [0, 1]")
    layout = str(tensor.layout).removeprefix("torch.")
    if tensor.is_meta or layout != "strided":
        held = "on the meta device, which holds no values" if tensor.is_meta else f"of the layout {layout}"
        raise PictureError(f"is a tensor {held}; give a dense one that has its values")
    tensor = tensor.detach()
    if floating:
        # In float32: bfloat16 has no room for 255 steps.
        tensor = tensor.float()
        low, high = (bound.item() for bound in tensor.aminmax())
        if not (low >= -_SLACK and high <= 1 + _SLACK):
            raise PictureError(f"has values from {low:g} to {high:g}; give floats in [0, 1]")
        tensor = tensor.mul(255).round_().clamp_(0, 255).byte()
    pixels = tensor.permute(1, 2, 0).contiguous().cpu().numpy()
    size = (shape[2], shape[1])
    return Source(size, lambda: Encoded(pixels.tobytes(), size))


def png(rgb: bytes, size: tuple[int, int]) -> bytes:
    """A PNG file of pixels, where there need be no Pillow."""
    width, height = size

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = b"".join(b"\0" + rgb[3 * width * row : 3 * width * (row + 1)] for row in range(height))
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _compress(rgb: bytes, size: tuple[int, int], codec: Codec) -> bytes:
    try:
        from PIL import Image
    except ImportError:
        raise PictureError(f"codec {codec!r} needs Pillow") from None
    file = io.BytesIO()
    picture = Image.frombytes("RGB", size, rgb)
    if codec == "png":
        # Level 1 is several times faster than the default and about a tenth larger.
        picture.save(file, "PNG", compress_level=1)
    else:
        picture.save(file, "JPEG", quality=95)
    return file.getvalue()
