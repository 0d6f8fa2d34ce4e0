"""Named drawings, from which the scenes are composed.

The drawings are those of `emoji-datasource-google` (Noto Emoji, Apache-2.0) and `emoji-datasource-twitter` (Twemoji,
CC-BY 4.0), packed under MIT for npm. They are fetched, never kept in the repository:

    spatialreward-data fetch

`kinds.tsv` names the kinds that we use, one a line: a plain word, then the name in `emoji.json`. Its order is the order
in which a growing world takes them. Any folder `STYLE/WORD.png` of transparent pictures serves as well.
"""

import json
import subprocess
import tarfile
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from .files import Refusal, digest

STYLES = ("google", "twitter")
DEFAULT_FOLDER = Path(".cache/drawings")
VERSION = "16.0.0"


def kinds() -> dict[str, str]:
    """The plain word of each kind, with its name in `emoji.json`."""
    lines = (files(__package__) / "kinds.tsv").read_text().splitlines()
    return dict(line.split("\t") for line in lines)


def fetch(folder: Path = DEFAULT_FOLDER) -> None:
    """Fills `folder/STYLE/WORD.png` by npm. Does nothing for a style that is there."""
    for style in STYLES:
        target = folder / style
        if all((target / f"{word}.png").exists() for word in kinds()):
            continue
        target.mkdir(parents=True, exist_ok=True)
        package = f"emoji-datasource-{style}"
        subprocess.run(["npm", "pack", "--silent", f"{package}@{VERSION}"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        archive = folder / f"{package}-{VERSION}.tgz"
        with tarfile.open(archive) as members:
            read = lambda name: members.extractfile(f"package/{name}").read()
            images = {emoji["name"].lower(): emoji["image"] for emoji in json.loads(read("emoji.json"))}
            for word, name in kinds().items():
                (target / f"{word}.png").write_bytes(read(f"img/{style}/64/{images[name]}"))
        archive.unlink()


def drawings_digest(folder: Path, words: tuple[str, ...], styles: tuple[str, ...]) -> str:
    """Of the files of these drawings: with others the same arguments give other pictures."""
    return digest(_file(folder, style, word).read_bytes() for style in styles for word in words)


def _file(folder: Path, style: str, word: str) -> Path:
    path = Path(folder) / style / f"{word}.png"
    if not path.exists():
        raise Refusal(f"{path}: no such drawing; `spatialreward-data fetch` gets them")
    return path


class Drawings:
    """The drawings of some kinds, cut to what is not transparent, scaled once for each size."""

    def __init__(self, folder: Path, words: tuple[str, ...], styles: tuple[str, ...] = STYLES):
        self.words, self.styles = words, styles
        self._full = {}
        for style in styles:
            for word in words:
                image = Image.open(_file(folder, style, word)).convert("RGBA")
                self._full[word, style] = image.crop(image.getchannel("A").getbbox())
        self._opaque = {name: np.asarray(image.getchannel("A")) > 127 for name, image in self._full.items()}
        self.scaled = lru_cache(maxsize=4096)(self._scale)
        self.shadow = lru_cache(maxsize=4096)(self._cast)

    def shape(self, word: str, style: str) -> tuple[float, float]:
        """Width and height, the longer of the two being 1."""
        width, height = self._full[word, style].size
        return width / max(width, height), height / max(width, height)

    def mask(self, word: str, style: str, width: int, height: int) -> np.ndarray:
        """[height, width]: where a drawing of this size is opaque, by its nearest pixels."""
        opaque = self._opaque[word, style]
        rows = (np.arange(height) + 0.5) * (len(opaque) / height)
        columns = (np.arange(width) + 0.5) * (opaque.shape[1] / width)
        return opaque[rows.astype(int)[:, None], columns.astype(int)]

    def _scale(self, word: str, style: str, width: int, height: int) -> Image.Image:
        return self._full[word, style].resize((width, height), Image.Resampling.BILINEAR)

    def _cast(self, word: str, style: str, width: int, height: int, reach: int) -> Image.Image:
        """How dark it is round a drawing of this size, `reach` pixels further on every side."""
        shape = Image.new("L", (width + 2 * reach, height + 2 * reach))
        shape.paste(self.scaled(word, style, width, height).getchannel("A"), (reach, reach))
        return shape.filter(ImageFilter.GaussianBlur(reach / 2))
