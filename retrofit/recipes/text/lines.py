"""Lines of a file as they are read one by one: where each begins, and what is wrong with it.

Not here: what a record in a line holds (`formats.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from retrofit.recipes.text.faults import RowError
from retrofit.recipes.text.formats import Content, Form, parse

LONGEST_LINE = 1_000_000  # bytes; a longer one is most likely a file without line ends, or data that is no text


class Line(NamedTuple):
    """A line of a file; of one that is too long only the beginning is kept."""

    number: int
    offset: int
    length: int
    raw: bytes

    def text(self, path: Path) -> str:
        """Raises RowError for a line that is too long or not UTF-8."""
        if self.length > LONGEST_LINE:
            raise RowError(
                "long",
                f"{path}:{self.number}",
                f"a line of {self.length:,} bytes, more than {LONGEST_LINE:,}",
                "give each document or record a line of its own, and cut longer ones",
            )
        return decoded(self.raw, path, self.number)

    def record(self, path: Path, form: Form) -> Content:
        """Raises RowError for a line that is no usable record."""
        return parse(self.text(path), f"{path}:{self.number}", form)


def raw_lines(file: BinaryIO) -> Iterator[Line]:
    """The lines of a file, counted from 1."""
    offset = number = 0
    while raw := file.readline(LONGEST_LINE + 1):
        number, length, end = number + 1, len(raw), raw[-1:]
        while length > LONGEST_LINE and end != b"\n" and (rest := file.readline(LONGEST_LINE)):
            length, end = length + len(rest), rest[-1:]
        yield Line(number, offset, length, raw)
        offset += length


def decoded(raw: bytes, path: Path, line: int) -> str:
    """UTF-8 text that begins in a line of a file, without a byte order mark.  Raises RowError."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        problem = f"not UTF-8 text (byte 0x{raw[error.start]:02x})"
        raise RowError("encoding", f"{path}:{line}", problem, "convert the file to UTF-8") from None
