"""Rows of Parquet and of Arrow files, as Hugging Face's `datasets` writes both. Pictures stay in the file: in their place a
row has a `Cell`, which is read when the picture is.

Parquet is read by row groups, so a picture costs as much as all of its group (a hundred, as `datasets` writes them). An Arrow
file is mapped, and a picture costs what it is.
"""

import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from .files import Refusal

try:
    import pyarrow as pa
    from pyarrow import ArrowException, compute, ipc, parquet
except ImportError:
    pa = None


class Cell(NamedTuple):
    """A picture in a table. Another process can read it too."""

    file: str
    group: int
    """Row group or record batch."""
    column: str
    row: int
    """In its group."""

    def read(self) -> bytes:
        with _reading:
            cells = _cells(self.file, self.group, self.column)
        return cells[self.row].as_py()


class _Parquet:
    """Groups of rows, read a column at a time."""

    def __init__(self, file: str):
        self.file = parquet.ParquetFile(file)
        self.schema = self.file.schema_arrow
        self.counts = [self.file.metadata.row_group(group).num_rows for group in range(self.file.num_row_groups)]

    def column(self, group: int, path: str):
        return self.file.read_row_group(group, [path], use_threads=False).column(0)

    def has_nulls(self, group: int, path: str) -> bool:
        """Whether there may be any, by what the file says of itself."""
        said = self.file.metadata.row_group(group)
        counted = next((column.statistics for column in map(said.column, range(said.num_columns)) if column.path_in_schema == path), None)
        return not (counted and counted.has_null_count and counted.null_count == 0)


class _Arrow:
    """Batches of rows, which lie in the file and not in memory."""

    def __init__(self, file: str):
        stream = ipc.open_stream(pa.memory_map(file))
        self.schema, self.batches = stream.schema, list(stream)
        self.counts = [batch.num_rows for batch in self.batches]

    def column(self, group: int, path: str):
        return self.batches[group].column(path.partition(".")[0])

    def has_nulls(self, group: int, path: str) -> bool:
        return True


_reading = threading.Lock()


@lru_cache(maxsize=64)
def _table(file: str) -> _Parquet | _Arrow:
    return (_Parquet if file.endswith(".parquet") else _Arrow)(file)


def _column(file: str, group: int, path: str):
    """A column of a group; with a dot, a field of a column."""
    column, field = _table(file).column(group, path), path.partition(".")[2]
    return compute.struct_field(column, field) if field else column


# Both pictures of a pair, in the group that is read now and in the one before.
_cells = lru_cache(maxsize=4)(_column)


def _pictures(file: str, group: int, column: str) -> list[Cell | str | None] | None:
    """The pictures in a column, each as a place or as a file's name; None where the column holds no bytes."""
    table = _table(file)
    kind = table.schema.field(column).type
    fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    # Hugging Face's `Image` is {bytes, path}.
    path, kind = (f"{column}.bytes", fields["bytes"]) if "bytes" in fields else (column, kind)
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        return None
    rows = range(table.counts[group])
    there = _column(file, group, path).is_valid().to_pylist() if table.has_nulls(group, path) else [True for _ in rows]
    names = _column(file, group, f"{column}.path").to_pylist() if "path" in fields else [None for _ in rows]
    return [Cell(file, group, path, row) if there[row] else names[row] for row in rows]


def rows(file: Path, pictures: set[str]) -> Iterator[dict]:
    """The rows of a file, with a `Cell` where one of the columns `pictures` holds bytes."""
    if pa is None:
        raise Refusal(f"{file}: reading Parquet and Arrow takes the extra `parquet`: pip install spatialscore-training[parquet]")
    # Whoever reads it from the beginning wants it as it is now.
    _table.cache_clear()
    _cells.cache_clear()
    try:
        table = _table(str(file))
        for group in range(len(table.counts)):
            columns = {}
            for name in table.schema.names:
                held = _pictures(str(file), group, name) if name in pictures else None
                columns[name] = _column(str(file), group, name).to_pylist() if held is None else held
            yield from (dict(zip(columns, row)) for row in zip(*columns.values()))
    except (ArrowException, OSError) as error:
        raise Refusal(f"{file}: {error}") from error
