"""Named drawings, from which the scenes are composed.

They are fetched from npm, never kept in the repository:

    spatialreward-data fetch                      google (Noto Emoji, Apache-2.0) and twitter (Twemoji, CC-BY 4.0)
    spatialreward-data fetch --styles fluent …    others, drawn from their SVG (extra `drawings`)

`kinds.tsv` names the kinds that we use, one a line: a plain word, the name in `emoji.json`, and other words for it with
commas between. Its order is the order in which a growing world takes them. Any folder `STYLE/WORD.png` of transparent
pictures serves as well. A set that has no drawing of a kind lends one from the first set that has.

A style may name a look behind a `~`: `google~grey` is the same drawings without colour.
"""

import json
import subprocess
import tarfile
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from .files import Refusal, digest

STYLES = ("google", "twitter")
"""The sets that a world takes where it names none."""
DEFAULT_FOLDER = Path(".cache/drawings")
VERSION = "16.0.0"
SIDE = 128
"""Pixels along the side of what is drawn from SVG."""


class Set(NamedTuple):
    """A set of drawings as Iconify packs it for npm: one JSON of SVGs."""

    package: str
    version: str
    licence: str


SETS = {
    "fluent": Set("fluent-emoji-flat", "1.2.6", "MIT"),
    "fluent3d": Set("fluent-emoji", "1.2.7", "MIT"),
    "emojione": Set("emojione", "1.2.3", "CC-BY 4.0"),
    "noto1": Set("noto-v1", "1.2.5", "Apache-2.0"),
    "fx": Set("fxemoji", "1.2.2", "Apache-2.0"),
    "openmoji": Set("openmoji", "1.2.29", "CC-BY-SA 4.0"),
}
"""OpenMoji is to measure by, and not to train on: whether weights that learned from drawings under CC-BY-SA are under it
themselves is unsettled, and ours are Apache-2.0."""
EVERY_STYLE = (*STYLES, *SETS)
LICENCES = {"google": "Apache-2.0", "twitter": "CC-BY 4.0"} | {style: packed.licence for style, packed in SETS.items()}


class Kind(NamedTuple):
    """A line of `kinds.tsv`."""

    emoji: str
    synonyms: tuple[str, ...]


@cache
def kinds() -> dict[str, Kind]:
    """Each kind by its plain word."""
    lines = (line.split("\t") for line in (files(__package__) / "kinds.tsv").read_text().splitlines())
    return {word: Kind(emoji, tuple("".join(others).split(",")) if others else ()) for word, emoji, *others in lines}


def _pack(package: str, version: str, folder: Path) -> Path:
    """The archive of a package, by npm."""
    subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / f"{package.replace('@', '').replace('/', '-')}-{version}.tgz"


def _members(archive: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The files of a package whose names are wanted, in one pass: to look for one in a .tgz is to unpack all before it."""
    with tarfile.open(archive) as members:
        named = ((member, member.name.removeprefix("package/")) for member in members)
        return {name: members.extractfile(member).read() for member, name in named if wanted(name)}


def fetch(folder: Path = DEFAULT_FOLDER, styles: tuple[str, ...] = STYLES) -> None:
    """Fills `folder/STYLE/WORD.png` by npm. Does nothing for a style that was fetched with these kinds."""
    for style in styles:
        target = folder / style
        stamp = target / "fetched"
        if stamp.exists() and stamp.read_text() == _table():
            continue
        target.mkdir(parents=True, exist_ok=True)
        for word, png in (_from_datasource if style in STYLES else _from_svg)(style, folder):
            (target / f"{word}.png").write_bytes(png)
        stamp.write_text(_table())


def _table() -> str:
    return (files(__package__) / "kinds.tsv").read_text()


def _from_datasource(style: str, folder: Path) -> list[tuple[str, bytes]]:
    archive = _pack(f"emoji-datasource-{style}", VERSION, folder)
    members = _members(archive, lambda name: name == "emoji.json" or name.startswith(f"img/{style}/64/"))
    archive.unlink()
    images = {emoji["name"].lower(): emoji["image"] for emoji in json.loads(members["emoji.json"])}
    return [(word, members[f"img/{style}/64/{images[kind.emoji]}"]) for word, kind in kinds().items()]


def _from_svg(style: str, folder: Path) -> list[tuple[str, bytes]]:
    """What the set has of our kinds. Sets name their icons by Unicode's short names, some without the hyphens."""
    import resvg_py

    # The set that has short names by code point; and code points by the names that `kinds.tsv` has.
    packages = (("@iconify-json/fluent-emoji-flat", SETS["fluent"].version), ("emoji-datasource", VERSION), (f"@iconify-json/{SETS[style].package}", SETS[style].version))
    archives = [_pack(*package, folder) for package in packages]
    named, coded, drawn = (_members(archive, lambda name: name in ("chars.json", "emoji.json", "icons.json")) for archive in archives)
    for archive in set(archives):
        archive.unlink()
    short, icons = json.loads(named["chars.json"]), json.loads(drawn["icons.json"])
    codes = {emoji["name"].lower(): [emoji["unified"].lower(), (emoji["non_qualified"] or "").lower()] for emoji in json.loads(coded["emoji.json"])}
    found = []
    for word, kind in kinds().items():
        names = [short[code] for code in codes[kind.emoji] if code in short] + [kind.emoji.replace(" ", "-"), word]
        names = [icons.get("aliases", {}).get(name, {}).get("parent", name) for each in names for name in (each, each.replace("-", ""))]
        icon = next((icons["icons"][name] for name in names if name in icons["icons"]), None)
        if icon:
            width, height = (icon.get(edge, icons.get(edge, 16)) for edge in ("width", "height"))
            box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">{icon["body"]}</svg>'
            found.append((word, bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))))
    return found


# Looks: other colours of the same drawings

def _to_hls(rgb: np.ndarray) -> np.ndarray:
    """`colorsys.rgb_to_hls` of many colours, [n, 3]: its numbers to the bit."""
    # numpy takes ten times as long for the greatest of three along an axis.
    most, least = (extreme(extreme(rgb[:, 0], rgb[:, 1]), rgb[:, 2]) for extreme in (np.maximum, np.minimum))
    total, span = most + least, most - least
    coloured = span > 0
    light = total / 2
    saturation = np.divide(span, np.where(light <= 0.5, total, 2.0 - most - least), where=coloured, out=np.zeros_like(span))
    red, green, blue = np.divide(most[:, None] - rgb, span[:, None], where=coloured[:, None], out=np.zeros_like(rgb)).T
    hue = np.where(rgb[:, 0] == most, blue - green, np.where(rgb[:, 1] == most, 2.0 + red - blue, 4.0 + green - red))
    return np.stack([hue / 6.0 % 1.0, light, saturation], 1)


def _to_rgb(hls: np.ndarray) -> np.ndarray:
    """`colorsys.hls_to_rgb` of many colours, [n, 3]: its numbers to the bit."""
    hue, light, saturation = hls.T
    high = np.where(light <= 0.5, light * (1.0 + saturation), light + saturation - light * saturation)
    low = 2.0 * light - high

    def channel(hue: np.ndarray) -> np.ndarray:
        hue = hue % 1.0
        rising, falling = low + (high - low) * hue * 6.0, low + (high - low) * (2 / 3 - hue) * 6.0
        return np.where(hue < 1 / 6, rising, np.where(hue < 0.5, high, np.where(hue < 2 / 3, falling, low)))

    return np.stack([channel(hue + 1 / 3), channel(hue), channel(hue - 1 / 3)], 1)


def _in_hls(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Image.Image], Image.Image]:
    """A change of the colours, [n, 3] of hue, lightness and saturation from 0 to 1."""

    def look(image: Image.Image) -> Image.Image:
        pixels = np.asarray(image).copy()
        hls = change(_to_hls(pixels[..., :3].reshape(-1, 3) / 255))
        pixels[..., :3] = np.round(255 * _to_rgb(hls)).reshape(pixels[..., :3].shape)
        return Image.fromarray(pixels)

    return look


def _line(image: Image.Image) -> Image.Image:
    """Edges in black on white paper of the drawing's shape."""
    grey = image.convert("L")
    edges = grey.filter(ImageFilter.FIND_EDGES).point(lambda value: max(0, 255 - 3 * value))
    return Image.merge("RGBA", (edges, edges, edges, image.getchannel("A")))


def _outlined(image: Image.Image) -> Image.Image:
    """Flat pale colours, a thick dark line round each and round the whole."""
    width = max(1, max(image.size) // 32)
    colours = image.convert("RGB").quantize(6).convert("RGB")
    alpha = Image.new("L", (image.width + 2 * width, image.height + 2 * width))
    alpha.paste(image.getchannel("A"), (width, width))
    inside = alpha.filter(ImageFilter.MinFilter(2 * width + 1)).crop((width, width, width + image.width, width + image.height))
    within = colours.convert("L").filter(ImageFilter.FIND_EDGES).point(lambda value: 255 if value > 40 else 0)
    dark = ImageChops.lighter(ImageChops.invert(inside), within.filter(ImageFilter.MaxFilter(2 * (width // 2) + 1)))
    drawn = Image.composite(Image.new("RGB", image.size, (20, 20, 20)), Image.blend(colours, Image.new("RGB", image.size, "white"), 0.25), dark)
    drawn.putalpha(image.getchannel("A"))
    return drawn


LOOKS = {
    "grey": _in_hls(lambda hls: hls * (1, 1, 0)),
    **{f"hue{turn}": _in_hls(lambda hls, turn=turn: (hls + (turn / 360, 0, 0)) % (1, 1.0001, 1.0001)) for turn in range(45, 360, 45)},
    "pale": _in_hls(lambda hls: hls * (1, 0.6, 0.7) + (0, 0.38, 0)),
    "dark": _in_hls(lambda hls: hls * (1, 0.55, 1)),
    "line": _line,
    "outlined": _outlined,
}


def drawings_digest(folder: Path, words: tuple[str, ...], styles: tuple[str, ...]) -> str:
    """Of the files of these drawings: with others the same arguments give other pictures."""
    return digest(_file(folder, style, word).read_bytes() for style in styles for word in words)


def _file(folder: Path, style: str, word: str) -> Path:
    """The drawing in this style or, where its set has none, the first one that there is."""
    paths = [Path(folder) / each / f"{word}.png" for each in (style, *EVERY_STYLE)]
    # A set that was not fetched at all is no set without this one drawing.
    if paths[0].parent.is_dir() and (found := next((path for path in paths if path.exists()), None)):
        return found
    raise Refusal(f"{paths[0]}: no such drawing; `spatialreward-data fetch` gets them")


class Drawings:
    """The drawings of some kinds, cut to what is not transparent, scaled once for each size."""

    def __init__(self, folder: Path, words: tuple[str, ...], styles: tuple[str, ...] = STYLES):
        self.words, self.styles = words, styles
        self._plain = {}
        for style in styles:
            for word in words:
                image = Image.open(_file(folder, style, word)).convert("RGBA")
                self._plain[word, style] = image.crop(image.getchannel("A").getbbox())
        self._opaque = {name: np.asarray(image.getchannel("A")) > 127 for name, image in self._plain.items()}
        # A change of colours costs more than all else of a picture: every kind of every set in every look is
        # some 600 MB (calculated).
        self._full = lru_cache(maxsize=len(self._plain) * (1 + len(LOOKS)))(self._look)
        self.scaled = lru_cache(maxsize=4096)(self._scale)
        self.shadow = lru_cache(maxsize=4096)(self._cast)

    def shape(self, word: str, style: str) -> tuple[float, float]:
        """Width and height, the longer of the two being 1."""
        width, height = self._plain[word, style.split("~")[0]].size
        return width / max(width, height), height / max(width, height)

    def mask(self, word: str, style: str, width: int, height: int) -> np.ndarray:
        """[height, width]: where a drawing of this size is opaque, by its nearest pixels."""
        opaque = self._opaque[word, style.split("~")[0]]
        rows = (np.arange(height) + 0.5) * (len(opaque) / height)
        columns = (np.arange(width) + 0.5) * (opaque.shape[1] / width)
        return opaque[rows.astype(int)[:, None], columns.astype(int)]

    def _look(self, word: str, style: str) -> Image.Image:
        style, _, look = style.partition("~")
        image = self._plain[word, style]
        return LOOKS[look](image) if look else image

    def _scale(self, word: str, style: str, width: int, height: int) -> Image.Image:
        return self._full(word, style).resize((width, height), Image.Resampling.BILINEAR)

    def _cast(self, word: str, style: str, width: int, height: int, reach: int) -> Image.Image:
        """How dark it is round a drawing of this size, `reach` pixels further on every side."""
        shape = Image.new("L", (width + 2 * reach, height + 2 * reach))
        shape.paste(self.scaled(word, style, width, height).getchannel("A"), (reach, reach))
        return shape.filter(ImageFilter.GaussianBlur(reach / 2))
