"""Seeded pictures, and PNG files of the kinds that Pillow reads but cannot write (16-bit colour, interlaced, tRNS).

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

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, int(interlaced))
    chunks = [chunk(b"IHDR", header)]
    if gamma is not None:
        chunks.append(chunk(b"gAMA", struct.pack(">I", gamma)))
    if palette is not None:
        chunks.append(chunk(b"PLTE", bytes(palette)))
    if transparency is not None:
        chunks.append(chunk(b"tRNS", bytes(transparency)))
    chunks += [chunk(b"IDAT", zlib.compress(data, 9)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
