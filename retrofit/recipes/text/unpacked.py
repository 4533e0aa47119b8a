"""Files that have to be read from their beginning: compressed ones, JSON arrays, tables in CSV.

Each is read once, into a temporary file without a name of one JSON record to a line, out of which rows are read in any
order; only their places are held in memory.
Not here: what a record holds (`formats.py`), files that are read where they lie (`local.py`).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

from retrofit.errors import DataError, ResourceError
from retrofit.recipes.text.lines import LONGEST_LINE, raw_lines

PACKED_SUFFIXES = (".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")


class Unpacked(Sequence[bytes]):
    """The rows of such a file as JSON, one by one; blank where a line of it is."""

    def __init__(self, rows: Iterable[bytes]) -> None:
        """Raises ResourceError where the disk is full, and what reading the rows raises."""
        self._ends = array("Q", [0])
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it goes with this object
        for row in rows:
            self._write(row)
            self._ends.append(self._ends[-1] + len(row))
        self._write(b"", flush=True)

    def _write(self, row: bytes, flush: bool = False) -> None:
        try:
            self._file.write(row)
            if flush:
                self._file.flush()
        except OSError as error:
            hint = "make room, set TMPDIR to a folder that has some, or give JSONL, which is read where it lies"
            raise ResourceError(f"{tempfile.gettempdir()}: cannot unpack a file: {error.strerror}", hint) from None

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, number: int) -> bytes: ...
    @overload
    def __getitem__(self, number: slice) -> list[bytes]: ...
    def __getitem__(self, number: int | slice) -> bytes | list[bytes]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        self._file.seek(self._ends[number])
        return self._file.read(self._ends[number + 1] - self._ends[number])


def unpacked(path: Path) -> Unpacked:
    """The rows of a file whose name ends with one of PACKED_SUFFIXES.

    Raises DataError for one that is damaged, ResourceError where there is no room to unpack it, OSError.
    """
    packed = path.suffix == ".gz"
    read = {".json": _json, ".csv": _csv, ".jsonl": _jsonl}[Path(path.stem).suffix if packed else path.suffix]
    with gzip.open(path) if packed else path.open("rb") as file:
        try:
            return Unpacked(read(file, path))  # type: ignore[arg-type]
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            problem = f"{path}: cannot be unpacked: {str(error).strip() or 'it is damaged'}"
            raise DataError(problem, "compress it anew, or give it as it is") from None


def _jsonl(file: BinaryIO, path: Path) -> Iterator[bytes]:
    for line in raw_lines(file):
        yield line.raw


def _json(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The elements of an array; a file that begins with an object is one of JSON lines."""
    text = file.read()
    if text.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"[":
        yield from _jsonl(io.BytesIO(text), path)
        return
    try:
        records = json.loads(text.removeprefix(b"\xef\xbb\xbf"))
    except UnicodeDecodeError as error:
        line = 1 + text.count(b"\n", 0, error.start)
        raise DataError(f"{path}:{line}: not UTF-8 text", "convert the file to UTF-8") from None
    except json.JSONDecodeError as error:
        problem = f"{path}:{error.lineno}: not valid JSON: {error.msg} (column {error.colno})"
        raise DataError(problem, "write an array of objects, or one object on each line") from None
    except (ValueError, RecursionError) as error:  # thousands of digits, thousands of brackets
        raise DataError(f"{path}: not valid JSON: {' '.join(str(error).split())}", "write it anew") from None
    for record in records:
        yield _line(record)


def _line(record: Any) -> bytes:
    """A record as JSON, about as long as its text: how long a row may be does not go by the language it is in."""
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which whoever reads the row says
        return json.dumps(record).encode() + b"\n"


def _csv(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The rows below the header, with its names."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    before = csv.field_size_limit(LONGEST_LINE)
    try:
        reader = csv.reader(text, strict=True)
        header = next(reader, [])
        for row in reader:
            if len(row) > len(header):
                problem = f"{path}:{reader.line_num}: a row of {len(row)} columns under a header of {len(header)}"
                raise DataError(problem, "put text with commas between double quotes")
            if row:
                yield _line({key: value for key, value in zip(header, row, strict=False) if value})
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte 0x{error.object[error.start]:02x})", "convert it") from None
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not valid CSV: {error}", "quote texts with double quotes") from None
    finally:
        csv.field_size_limit(before)
        text.detach()
