"""Training text from files on this machine: text, JSONL, JSON, CSV, Parquet, and folders of such files.

All rows are checked when a source is opened, so that a bad one stops the run before it starts; then they are read
as they are asked for, and only their places are kept.
Not here: what a row may hold (`formats.py`), how a Parquet file is read (`documents.py`, the one place for
`datasets`) and others that cannot be read where they lie (`unpacked.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from retrofit.errors import DataError, UsageError
from retrofit.recipes.text.faults import RowError, Skipped, read_or_skip
from retrofit.recipes.text.formats import Content, Form, Text, content, parse
from retrofit.recipes.text.lines import Line, decoded, raw_lines
from retrofit.recipes.text.sources import Indexed, Source, first_by_hash
from retrofit.recipes.text.unpacked import PACKED_SUFFIXES, unpacked

TEXT_SUFFIXES = (".txt", ".py", ".md")
FOLDER_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".jsonl.gz", ".parquet")
"""Of the files in a folder; .json and .csv beside text are most likely settings and tables of something else."""
FILE_SUFFIXES = tuple(dict.fromkeys((*TEXT_SUFFIXES, ".jsonl", ".parquet", *PACKED_SUFFIXES)))
PIECE = 8192  # bytes: a text file that is the whole source is cut into documents of this size, at line ends

Table = Sequence[Mapping[str, Any]] | Sequence[bytes]
"""Rows, read or as JSON."""


class _Place(NamedTuple):
    """Where a document lies: `length` bytes of a file (None: all of it) from `offset`, line `line` first.

    Of a table: row `line` of it, counted from 1.
    """

    path: Path
    offset: int = 0
    length: int | None = None
    line: int = 1
    complete: bool = True
    table: Table | None = None


def local(
    path: Path, form: Form, held_out: int, open_table: Callable[[Path], Table], skipped: Skipped | None
) -> Source:
    """The documents of a file or folder.  Raises UsageError for files of other kinds, DataError for bad ones."""
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if f.name.endswith(FOLDER_SUFFIXES) and f.is_file()]
        files = [f for f in files if not any(p.startswith(".") for p in f.relative_to(path).parts)]
        root = path
    elif path.name.endswith(FILE_SUFFIXES):
        files, root = [path], path.parent
    else:
        raise UsageError(
            f"data.source {path}: cannot read {path.suffix or 'such'} files",
            f"readable are {', '.join(FILE_SUFFIXES)}",
        )
    places: list[_Place] = []
    for file in files:
        try:
            if file.suffix == ".jsonl":
                places += _lines(file, form, skipped)
            elif file.suffix == ".parquet":
                places += _table_rows(file, form, open_table(file), skipped)
            elif file.name.endswith(PACKED_SUFFIXES):
                places += _table_rows(file, form, unpacked(file), skipped)
            else:
                places += _pieces(file, skipped) if path.is_file() else _whole(file, skipped)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    if not places:
        what = "holds no text" if files else f"holds no {', '.join(FOLDER_SUFFIXES)} file"
        bad = f": {skipped.line()}" if skipped is not None and skipped.rows else ""
        raise DataError(f"{path}: {what}{bad}", "name a file or folder with text in it")
    ids = [_place_id(place, root) for place in places]
    where = [f"{place.path}:{place.line}" for place in places]
    held = first_by_hash(ids, str(path), held_out)
    return Indexed(ids, held, lambda number: _read(places[number], form), where.__getitem__)


def _read(place: _Place, form: Form) -> Content:
    where = f"{place.path}:{place.line}"
    if place.table is not None:
        return _row(place.table[place.line - 1], place.path, place.line, form)
    try:
        with place.path.open("rb") as file:
            file.seek(place.offset)
            raw = file.read(-1 if place.length is None else place.length)
    except OSError as error:
        raise DataError(f"{place.path}: cannot be read: {error.strerror}") from None
    text = decoded(raw, place.path, place.line)
    return parse(text, where, form) if place.path.suffix == ".jsonl" else Text(text, place.complete)


def _place_id(place: _Place, root: Path) -> str:
    name = place.path.relative_to(root).as_posix()
    return name if place.length is None and place.table is None else f"{name}:{place.line}"


def _lines(path: Path, form: Form, skipped: Skipped | None) -> Iterator[_Place]:
    """One place per record of a JSONL file."""
    blank = True
    with path.open("rb") as file:
        for line in raw_lines(file):
            if not line.raw.strip():
                continue
            blank = False
            if read_or_skip(skipped, line.record, path, form):
                yield _Place(path, line.offset, line.length, line.number)
    if blank:
        read_or_skip(skipped, _refuse_empty, path, "put one JSON object on each line")


def _table_rows(path: Path, form: Form, table: Table, skipped: Skipped | None) -> Iterator[_Place]:
    blank = True
    for number, record in enumerate(table, 1):
        if isinstance(record, bytes) and not record.strip():
            continue
        blank = False
        if read_or_skip(skipped, _row, record, path, number, form):
            yield _Place(path, line=number, table=table)
    if blank:
        read_or_skip(skipped, _refuse_empty, path, "name a file with rows in it")


def _row(record: Mapping[str, Any] | bytes, path: Path, number: int, form: Form) -> Content:
    if isinstance(record, bytes):
        return Line(number, 0, len(record), record).record(path, form)
    return content(record, f"{path}:{number}", form)


def _pieces(path: Path, skipped: Skipped | None) -> Iterator[_Place]:
    """A text file that is the whole source: documents of PIECE bytes or a little more, cut at line ends.

    Where bad lines are left out, a piece ends before one.
    """
    start = end = 0
    first, blank, nothing = 1, True, True
    with path.open("rb") as file:
        for line in raw_lines(file):
            text = read_or_skip(skipped, line.text, path)
            # a piece is closed by the line after it, so that the last one is known to be the last
            full = end - start >= PIECE and line.raw.strip()
            if not blank and (text is None or full):
                yield _Place(path, start, end - start, first, complete=False)
                blank = True
                start, first = end, line.number
            end = line.offset + line.length
            if text is None:
                start, first, nothing, blank = end, line.number + 1, False, True
            elif text.strip():
                blank = nothing = False
    if nothing:
        read_or_skip(skipped, _refuse_empty, path, "name a file with text in it")
    if not blank:
        yield _Place(path, start, end - start, first)


def _whole(path: Path, skipped: Skipped | None) -> Iterator[_Place]:
    """A text file of a folder: one document, none when it is blank, like many an `__init__.py`, or bad."""
    if read_or_skip(skipped, _has_text, path):
        yield _Place(path)


def _has_text(path: Path) -> bool:
    with path.open("rb") as file:
        # no `any`: all lines are looked at, so that a bad one is found wherever it is
        return sum(bool(line.text(path).strip()) for line in raw_lines(file)) > 0


def _refuse_empty(path: Path, hint: str) -> None:
    raise RowError("empty", f"{path}:1", "the file is empty", hint)
