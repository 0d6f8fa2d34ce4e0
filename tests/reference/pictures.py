"""Seeded pictures, and files of the kinds that Pillow reads but cannot write: PNG of 16-bit colour, interlaced, with tRNS;
JPEG of other samplings and markers; EXIF of other forms.

A library for the other scripts; not run by itself.
"""

import random
import struct
import zlib

import numpy as np
from PIL import Image, ImageDraw


def drawing(width, height, seed):
    """A smooth ground, a few shapes with hard edges, and some noise: what resampling and decoding can get wrong."""
    rng = random.Random(seed)
    noise = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x * rng.uniform(0, 0.2) + y * rng.uniform(0, 0.2) + rng.uniform(0, 6)) for _ in range(3)]
    ground = 128 + 90 * np.stack(waves, axis=-1)
    image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(2, 5)):
        left, top = rng.randint(0, width - 1), rng.randint(0, height - 1)
        box = (
            left,
            top,
            left + rng.randint(width // 8 + 1, width // 2 + 1),
            top + rng.randint(height // 8 + 1, height // 2 + 1),
        )
        colour = tuple(rng.randrange(256) for _ in range(3))
        rng.choice((draw.rectangle, draw.ellipse))(box, fill=colour)
    patch = noise.integers(-40, 40, (height // 2 + 1, width // 2 + 1, 1))
    pixels = np.array(image).astype(int)
    pixels[: patch.shape[0], : patch.shape[1]] += patch
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


# Colour type of the PNG format by the number of channels.
COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}

# Where each of Adam7's passes starts and how far it steps: x, y, dx, dy.
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def _chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(pixels, depth=8, palette=None, transparency=None, interlaced=False, gamma=None):
    """A PNG file of `pixels` [H, W, channels], integers of `depth` bits; with a palette they are its indices.

    `transparency` is the content of tRNS as it stands in the file: alphas of the palette, or one colour in 16 bits.
    Rows are filtered in turn by each of the format's five filters.
    """
    height, width, channels = pixels.shape
    colour_type = 3 if palette is not None else COLOUR_TYPES[channels]

    def rows(part):
        """The filtered scanlines of a pass."""
        if depth == 16:
            packed = part.astype(">u2").reshape(part.shape[0], -1).view(np.uint8)
        elif depth == 8:
            packed = part.astype(np.uint8).reshape(part.shape[0], -1)
        else:
            bits = (part[:, :, 0, None] >> np.arange(depth - 1, -1, -1)) & 1
            packed = np.packbits(bits.reshape(part.shape[0], -1).astype(np.uint8), axis=1)
        step = max(1, channels * depth // 8)
        before = np.zeros(packed.shape[1], int)
        for index, row in enumerate(packed.astype(int)):
            left = np.concatenate([np.zeros(step, int), row])[: len(row)]
            corner = np.concatenate([np.zeros(step, int), before])[: len(row)]
            distance = [abs(before - corner), abs(left - corner), abs(left + before - 2 * corner)]
            paeth = np.where(
                (distance[0] <= distance[1]) & (distance[0] <= distance[2]),
                left,
                np.where(distance[1] <= distance[2], before, corner),
            )
            guess = (0 * row, left, before, (left + before) // 2, paeth)[index % 5]
            yield bytes([index % 5]) + ((row - guess) % 256).astype(np.uint8).tobytes()
            before = row

    passes = PASSES if interlaced else ((0, 0, 1, 1),)
    parts = [pixels[y::dy, x::dx] for x, y, dx, dy in passes]
    data = b"".join(row for part in parts if part.size for row in rows(part))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, int(interlaced))
    chunks = [_chunk(b"IHDR", header)]
    if gamma is not None:
        chunks.append(_chunk(b"gAMA", struct.pack(">I", gamma)))
    if palette is not None:
        chunks.append(_chunk(b"PLTE", bytes(palette)))
    if transparency is not None:
        chunks.append(_chunk(b"tRNS", bytes(transparency)))
    chunks += [_chunk(b"IDAT", zlib.compress(data, 9)), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png_chunk(data, name, content):
    """A PNG file with one more chunk in front of its pixels."""
    at = 8 + 25
    return data[:at] + _chunk(name, content) + data[at:]


def tiff(orientation, kind="short", order="<"):
    """EXIF that says how a picture is to be turned, as `kind`: a "short" as the standard has it, or a "long"."""
    code, form = {"short": (3, "Hxx"), "long": (4, "L")}[kind]
    head = struct.pack(order + "2sHL", b"II" if order == "<" else b"MM", 42, 8)
    return head + struct.pack(order + "HHHL" + form + "L", 1, 0x0112, code, 1, orientation, 0)


def raw_profile(data):
    """The text that ImageMagick made of EXIF before PNG had a chunk for it."""
    digits = data.hex()
    lines = [digits[at : at + 72] for at in range(0, len(digits), 72)]
    return "\n".join(["", "exif", f"{len(data):8}", *lines, ""]).encode()


# Segments of a JPEG file, as bytes behind its first two.
JFIF = b"\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0"


def adobe(transform):
    return b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0" + bytes([transform])


def app1(content):
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content


def jpeg(data, segments=b"", ids=None, factors=None, size=None):
    """A JPEG file of one scan with other segments than those that say how colours are written; with other component
    ids; and with the sampling factors and the size (width, height) of a file that has as many blocks in the same order.
    """
    data, kept, at = bytearray(data), bytearray(), 2
    while True:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big") + 2
        segment = data[at : at + length]
        if marker in (0xC0, 0xC2):
            if size:
                segment[5:9] = struct.pack(">HH", size[1], size[0])
            for index in range(segment[9]):
                segment[10 + 3 * index] = ids[index] if ids else segment[10 + 3 * index]
                if factors and index == 0:
                    segment[11] = factors[0] << 4 | factors[1]
        if marker == 0xDA:
            for index in range(segment[4]):
                segment[5 + 2 * index] = ids[index] if ids else segment[5 + 2 * index]
        if marker not in (0xE0, 0xEE):
            kept += segment
        at += length
        if marker == 0xDA:
            return bytes(data[:2] + segments + kept + data[at:])


def animation(still, size, canvas, at=(0, 0)):
    """An animated WebP whose one frame is a still file's and asks to be blended; it lies at `at`, which is even."""

    def chunk(name, content):
        return name + struct.pack("<L", len(content)) + content + b"\0" * (len(content) % 2)

    def three(*values):
        return b"".join(struct.pack("<L", value)[:3] for value in values)

    parts, place = b"", 12
    while place < len(still):
        name, length = still[place : place + 4], struct.unpack("<L", still[place + 4 : place + 8])[0]
        if name in (b"ALPH", b"VP8 ", b"VP8L"):
            parts += chunk(name, still[place + 8 : place + 8 + length])
        place += 8 + length + length % 2
    header = three(at[0] // 2, at[1] // 2, size[0] - 1, size[1] - 1, 100) + b"\0"
    extended = b"\x12\0\0\0" + three(canvas[0] - 1, canvas[1] - 1)
    content = b"WEBP" + chunk(b"VP8X", extended) + chunk(b"ANIM", bytes(6)) + chunk(b"ANMF", header + parts)
    return b"RIFF" + struct.pack("<L", len(content)) + content
