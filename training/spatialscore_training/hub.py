"""Pairs as a data set that the Hugging Face hub shows and `datasets.load_dataset` takes.

    OUT/data/train-00000-of-00003.parquet    pictures inside, as `datasets`' Image
    OUT/stats/train/stats.png                what `spatialreward-data stats` draws
    OUT/dataset.json                         what it was made with, how many pairs, and the digest of `data`
    OUT/README.md                            the data card
"""

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from .data_sets import home
from .drawings import EVERY_STYLE, LICENCES
from .figures import draw_figures
from .files import Refusal, beside, keep_apart
from .manifest import set_digest, validate
from .pair_files import NAMES, read_pairs
from .pictures import picture_bytes
from .survey import Survey

try:
    import pyarrow as pa
    from pyarrow import ArrowException, parquet
except ImportError:
    pa = None

ROWS = 100
"""Pairs in a row group: what is read at once for one picture. `datasets` takes as many where there are pictures."""
SHARD = 300 << 20
"""Bytes of pictures from which on a file is full."""
PICTURES = {"kept": "chosen", "broken": "rejected", "source": "source"}

CARD = """---
pretty_name: {name}
{head}tags:
- preference
- reward-model
- text-to-image
configs:
- config_name: default
  data_files:
{files}
dataset_info:
  splits:
{sizes}
---

# {title}

{pairs:,} pairs of pictures, each under one prompt: `chosen` is the better one by it, `rejected` the worse one.

    datasets.load_dataset("OWNER/{title}")                       or the path of this folder
    spatialscore-train-reward {title}/data/{first} out --recipe …   a reward model from a copy of it

| split | pairs | |
|---|---|---|
{splits}

{figures}

## Columns

{columns}

## What it was made with

{made}

## Licence

{licence}

## Limits

{limits}
"""

OURS = """- Pictures are composed of drawings of single things on plain, shaded or banded grounds. There is no photograph and no painting
  among them, and a model that learns from these pairs alone has seen none.
- `chosen` and `rejected` differ in where things are, or in which are there, and but for the paper's preset in their grounds.
  The pairs say nothing of taste, quality or style.
- Prompts are written by rules, in English. Whether a relation holds is decided by the boxes of things (`things`), and a layout
  that is too close to call makes no pair."""
COLUMNS = {
    "prompt": "what both pictures are judged by",
    "chosen": "the better picture",
    "rejected": "the worse picture",
    "source": "the picture that both were made from",
    "confidence": "how sure people were, 0 to 1",
    "tie": "people held neither for the better one",
    "id": "the pair's name",
    "perturbed_prompt": "true of `rejected`",
    "relations": "of `prompt`: relation, what it is about, whether it holds in `chosen` (`kept`) and in `rejected` (`broken`)",
    "things": "in `chosen` (`kept`) and `rejected` (`broken`): kind, style of drawing, box (left, top, right, bottom as fractions of the side)",
}


def _columns(pairs: list[dict]) -> dict:
    """What pairs say besides their pictures, by column."""
    names = sorted({name for pair in pairs for name in pair} - {*NAMES, "where"}, key=lambda name: ([*COLUMNS, name].index(name), name))
    found = {}
    for name in names:
        try:
            found[name] = pa.array([pair.get(name) for pair in pairs])
        except ArrowException as error:
            raise Refusal(f"`{name}` is not of one type in all pairs, as a column must be: {error}") from error
    return found


def _pictures(pairs: list[dict], name: str):
    """A column of `datasets`' Image."""
    embedded = lambda picture: {"bytes": picture_bytes(picture), "path": Path(picture).name if isinstance(picture, str) else None}
    return pa.array([embedded(pair[name]) if name in pair else None for pair in pairs], pa.struct({"bytes": pa.binary(), "path": pa.string()}))


def _tables(pairs: list[dict], columns: dict, held: list[str], bar: tqdm) -> Iterator:
    """A row group at a time. That a column is one of pictures stands in the schema, as `datasets` writes it."""
    told = json.dumps({"info": {"features": {PICTURES[name]: {"_type": "Image"} for name in held}}})
    for start in range(0, len(pairs), ROWS):
        some = pairs[start : start + ROWS]
        prompt, *rest = ((name, column.slice(start, ROWS)) for name, column in columns.items())
        yield pa.table(dict([prompt, *((PICTURES[name], _pictures(some, name)) for name in held), *rest]), metadata={"huggingface": told})
        bar.update(len(some))


def _write_split(folder: Path, split: str, tables: Iterator) -> int:
    """Writes a split's files; returns the bytes of what is in them."""
    files, size, whole, writer = [], 0, 0, None
    for table in tables:
        if writer is None:
            files.append(folder / f"{split}-{len(files):05}")
            # Pictures hardly shrink and never repeat.
            writer = parquet.ParquetWriter(files[-1], table.schema, use_dictionary=False)
        writer.write_table(table, row_group_size=ROWS)
        size += table.nbytes
        whole += table.nbytes
        if size >= SHARD:
            writer.close()
            size, writer = 0, None
    if writer:
        writer.close()
    for file in files:
        file.rename(f"{file}-of-{len(files):05}.parquet")
    return whole


def _made_with(path: Path) -> dict | None:
    said = home(path) / "dataset.json"
    return json.loads(said.read_text())["made_with"] if said.is_file() else None


def _styles(pairs: list[dict], made: list[dict]) -> list[str]:
    """The sets that drawings are of. A kind that a set lacks is lent by the first that has it."""
    styles = {style for one in made for style in one["world"]["styles"]}
    styles |= {thing["style"].split("~")[0] for pair in pairs for things in pair.get("things", {}).values() for thing in things}
    return [style for style in EVERY_STYLE if style in styles or (style == EVERY_STYLE[0] and styles)]


def _card(name: str, splits: dict[str, list[dict]], sizes: dict[str, int], summaries: dict[str, str], made: dict[str, dict | None], columns: list[str]) -> str:
    every = [pair for pairs in splits.values() for pair in pairs]
    ours = all(one and "world" in one for one in made.values())
    styles = _styles(every, list(made.values())) if ours else []
    licences = sorted({LICENCES[style].lower().replace(" ", "-") for style in styles})
    listed = lambda key, values: f"{key}:\n" + "".join(f"- {value}\n" for value in values)
    return CARD.format(
        name=json.dumps(name),
        title=name,
        first=next(iter(splits)),
        head=listed("license", licences) + listed("language", ["en"]) if ours else "",
        files="\n".join(f"  - split: {split}\n    path: data/{split}-*" for split in splits),
        sizes="\n".join(f"  - name: {split}\n    num_bytes: {sizes[split]}\n    num_examples: {len(pairs)}" for split, pairs in splits.items()),
        pairs=len(every),
        splits="\n".join(f"| `{split}` | {len(pairs):,} | {summaries[split]} |" for split, pairs in splits.items()),
        figures="\n".join(f"![Words, relations and kinds of {split}](stats/{split}/stats.png)" for split in splits),
        columns="| | |\n|---|---|\n" + "\n".join(f"| `{column}` | {COLUMNS.get(column, '')} |" for column in columns),
        made="\n\n".join(
            f"`{split}`: SpatialScore's `spatialreward-data`, which says of it\n\n```json\n{json.dumps(one, indent=1)}\n```" if one else f"`{split}`: this is to be told by who made it."
            for split, one in made.items()
        ),
        licence=("The drawings are of these sets: " + ", ".join(f"`{style}` ({LICENCES[style]})" for style in styles) + ".") if ours else "This is to be told by who has the rights in the pictures.",
        limits=OURS if ours else "These are to be told by who made it.",
    )


def export(sources: dict[str, Path], out: Path) -> None:
    """Writes these splits. Nothing is where there was something, or where a pair has a fault."""
    if pa is None:
        raise Refusal("writing Parquet takes the extra `parquet`: pip install spatialscore-training[parquet]")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refusal(f"{out} is not empty; name a new folder")
    for split, path in sources.items():
        if not re.fullmatch(r"\w+(\.\w+)*", split):
            raise Refusal(f"{split!r} is no name that `datasets` knows a split by: letters, digits, _ and .")
        keep_apart(out, pairs=path)
    splits = {split: list(read_pairs(path)) for split, path in sources.items()}
    for split, path in sources.items():
        survey = Survey()
        if faults := list(islice(validate(path, survey), 20)):
            raise Refusal(f"{path} has faults; `spatialreward-data validate` lists them all:\n" + "\n".join(faults))
        for warning in survey.warnings():
            tqdm.write(f"warning: {split}: {warning}")
    every = [pair for pairs in splits.values() for pair in pairs]
    held = [name for name in NAMES if any(name in pair for pair in every)]
    columns = _columns(every)
    made = {split: _made_with(path) for split, path in sources.items()}
    with beside(out) as part, tqdm(total=len(every), unit="pair") as bar:
        (part / "data").mkdir(parents=True)
        sizes, start = {}, 0
        for split, pairs in splits.items():
            own = {name: column.slice(start, len(pairs)) for name, column in columns.items()}
            sizes[split] = _write_split(part / "data", split, _tables(pairs, own, held, bar))
            start += len(pairs)
        summaries = {split: draw_figures(path, part / "stats" / split) for split, path in sources.items()}
        said = {"made_with": {"exported": made}, "pairs": len(every), "digest": set_digest(part)}
        (part / "dataset.json").write_text(json.dumps(said, indent=1) + "\n")
        named = ["prompt", *(PICTURES[name] for name in held), *(name for name in columns if name != "prompt")]
        (part / "README.md").write_text(_card(out.name, splits, sizes, summaries, made, named))
