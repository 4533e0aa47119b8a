"""Documents of token ids, from every kind of text source a recipe can name.

    stdlib          the running interpreter's standard library, so that training works offline on any machine
    a local file    .txt, .py, .md: text; .jsonl: one record per line
    a local folder  of such files, its subfolders too, without hidden files and blank ones
    anything else   a `datasets` id, its configuration after a colon if it has several: `owner/name:config`

Held out are, of `stdlib`, the files the embedded base never saw; of any other source, the `data.held_out`
documents first by a hash of their id, though never more than half of them.  Training never sees those.

Files are read as documents are asked for; only ids and file offsets are kept.  Not here: what a record may
hold and how it becomes tokens (`encode.py`), batches, packing, tensors.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from retrofit.errors import DataError, ResourceError, UsageError
from retrofit.recipes.encode import Content, Text, content, encode, one_line, parse, token_ids

if TYPE_CHECKING:
    from retrofit.recipes.schema import Data

Part = Literal["train", "held_out"]

HELD_OUT_LIST = Path(__file__).parent / "tiny" / "heldout.txt"
TEXT_SUFFIXES = (".txt", ".py", ".md")
FILE_SUFFIXES = (*TEXT_SUFFIXES, ".jsonl")
STDLIB_SKIPPED = ("site-packages", "dist-packages", "encodings", "lib2to3/tests/data", "__pycache__")
STDLIB_LONGEST = 400_000  # characters; longer files are tables
STDLIB_NON_ASCII = 0.01  # share of the characters
PIECE = 8192  # bytes: a text file that is the whole source is cut into documents of this size, at line ends
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Document:
    """Token ids; `response` is as long, True where a token is part of a response (plain text: everywhere)."""

    id: str
    tokens: tuple[int, ...]
    response: tuple[bool, ...]


class _Source(NamedTuple):
    """Documents not yet read.  `read(i)` is None for one the source leaves out; `where(i)` is its place."""

    ids: Sequence[str]
    held_out: Sequence[int]
    read: Callable[[int], Content | None]
    where: Callable[[int], str]


class _Place(NamedTuple):
    """Where a document lies: `length` bytes of a file (None: all of it) from `offset`, line `line` first."""

    path: Path
    offset: int = 0
    length: int | None = None
    line: int = 1
    complete: bool = True


def documents(data: Data, tokenizer: Any, *, part: Part, seed: int = 0) -> Iterator[Document]:
    """The documents of one part of the source, each once.

    `train` comes in an order drawn from `seed`, `held_out` always in the same.  Raises UsageError for a
    path that does not exist, ResourceError for a Hub source out of reach, DataError for malformed local
    files and records, all from the call itself; DataError later for conversations that cannot be rendered
    and for malformed records of the Hub.
    """
    source = _open(data)
    order = _order(source, part)
    if part == "train":
        random.Random(seed).shuffle(order)
        if not order:
            raise DataError(f"data.source {data.source}: nothing left to train on", "set data.held_out lower")
    return _encoded(source, order, tokenizer)


def stdlib_texts(part: Part) -> Iterator[str]:
    """The files of one part of `stdlib` as text, for a tokenizer.  Raises ResourceError like `documents`."""
    source = _stdlib()
    for index in _order(source, part):
        found = source.read(index)
        if isinstance(found, Text):
            yield found.text


def _order(source: _Source, part: Part) -> list[int]:
    if part == "held_out":
        return list(source.held_out)
    held = set(source.held_out)
    return [index for index in range(len(source.ids)) if index not in held]


def _encoded(source: _Source, order: Sequence[int], tokenizer: Any) -> Iterator[Document]:
    for index in order:
        found = source.read(index)
        if found is not None:
            tokens, response = encode(found, tokenizer, source.where(index))
            yield Document(source.ids[index], tuple(tokens), tuple(response))


def windows(documents: Iterable[Document], max_length: int) -> Iterator[Document]:
    """Each document in consecutive windows of at most `max_length` tokens, ids `<id>#0`, `<id>#1`, ...

    Windows without a response token teach nothing and are left out.
    """
    for document in documents:
        for number, start in enumerate(range(0, len(document.tokens), max_length)):
            span = slice(start, start + max_length)
            if any(document.response[span]):
                yield Document(f"{document.id}#{number}", document.tokens[span], document.response[span])


def held_out_prompts(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """`count` prompts of exactly `length` tokens from held-out standard-library files, always the same ones.

    Each begins at the start of a line.  Every file long enough gives one before any gives another, from
    another line. Raises DataError when the files hold fewer such prompts.
    """
    root = _stdlib_root()
    names = sorted((name for name in _held_out_names() if (root / name).is_file()), key=_hash)
    texts = [text for name in names if (text := _stdlib_text(root / name)) is not None]
    prompts: list[list[int]] = []
    used: list[set[int]] = [set() for _ in texts]
    turn = 0
    while len(prompts) < count:
        before = len(prompts)
        for number, text in enumerate(texts):
            if len(prompts) == count:
                break
            found = _prompt(tokenizer, text, _hash(f"{names[number]} {turn}") / 2**64, length, used[number])
            if found is not None:
                prompts.append(found)
        if len(prompts) == before:
            raise DataError(
                f"the held-out files of {root} yield {before} prompts of {length} tokens, not {count}",
                "ask for fewer or shorter ones",
            )
        turn += 1
    return prompts


def _prompt(tokenizer: Any, text: str, fraction: float, length: int, used: set[int]) -> list[int] | None:
    """Prompt from the line at `fraction` of the text, or nearer its beginning where too little follows."""
    lines = text.split("\n")
    line = int(fraction * len(lines))
    tokens = token_ids(tokenizer, "\n".join(lines[line:]))
    if len(tokens) < length and len(token_ids(tokenizer, text)) < length:
        return None
    while len(tokens) < length:
        line //= 2
        tokens = token_ids(tokenizer, "\n".join(lines[line:]))
    if line in used:
        return None
    used.add(line)
    return tokens[:length]


def _hash(text: str) -> int:
    """64 bits that are the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _open(data: Data) -> _Source:
    if data.source == "stdlib":
        return _stdlib()
    path = Path(data.source).expanduser()
    if path.exists():
        return _local(path, data)
    if path.suffix in FILE_SUFFIXES or not HUB_ID.fullmatch(data.source):
        raise UsageError(
            f"data.source {data.source}: no such file or folder",
            "name `stdlib`, a .txt, .py, .md or .jsonl file, a folder of such files, or a `datasets` id",
        )
    return _hub(data)


def _stdlib() -> _Source:
    root = _stdlib_root()
    names = _stdlib_names(root)
    index = {name: number for number, name in enumerate(names)}
    held = [index[name] for name in _held_out_names() if name in index]
    if not held or len(held) == len(names):
        raise ResourceError(
            f"the standard library at {root} lacks the .py files that training and measuring read",
            "run a Python that has its sources, or set data.source to text of your own",
        )

    def read(number: int) -> Content | None:
        text = _stdlib_text(root / names[number])
        return None if text is None else Text(text)

    return _Source(names, held, read, lambda number: str(root / names[number]))


def _stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@cache
def _stdlib_names(root: Path) -> tuple[str, ...]:
    """Paths of the .py files relative to `root`, sorted, without the skipped folders."""
    names = []
    for folder, subfolders, files in os.walk(root):
        at = Path(folder).relative_to(root)
        # pruned in place: third-party packages can hold many times more files than the library
        subfolders[:] = [s for s in subfolders if s not in STDLIB_SKIPPED and (at / s).as_posix() not in STDLIB_SKIPPED]
        names += [(at / file).as_posix() for file in files if file.endswith(".py")]
    return tuple(sorted(names))


def _held_out_names() -> list[str]:
    return HELD_OUT_LIST.read_text(encoding="utf-8").split()


def _stdlib_text(path: Path) -> str | None:
    """Text of a file, None where it is blank, huge, not UTF-8 or hardly ASCII, as for the embedded base."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        raise ResourceError(f"{path} cannot be read: {error.strerror}") from None
    if not text.strip() or len(text) > STDLIB_LONGEST:
        return None
    non_ascii = 0 if text.isascii() else sum(character > "\x7f" for character in text)
    return None if non_ascii > STDLIB_NON_ASCII * len(text) else text


def _local(path: Path, data: Data) -> _Source:
    if path.is_dir():
        files = [f for f in sorted(path.rglob("*")) if f.suffix in FILE_SUFFIXES and f.is_file()]
        files = [f for f in files if not any(p.startswith(".") for p in f.relative_to(path).parts)]
        root = path
    elif path.suffix in FILE_SUFFIXES:
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
                places += _lines(file, data.field)
            else:
                places += _pieces(file) if path.is_file() else _whole(file)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    if not places:
        what = "holds no text" if files else f"holds no {', '.join(FILE_SUFFIXES)} file"
        raise DataError(f"{path}: {what}", "name a file or folder with text in it")
    ids = [_place_id(place, root) for place in places]

    def read(number: int) -> Content:
        place = places[number]
        try:
            with place.path.open("rb") as file:
                file.seek(place.offset)
                raw = file.read(-1 if place.length is None else place.length)
        except OSError as error:
            raise DataError(f"{place.path}: cannot be read: {error.strerror}") from None
        text = _decoded(raw, place.path, place.line)
        if place.path.suffix == ".jsonl":
            return parse(text, f"{place.path}:{place.line}", data.field)
        return Text(text, place.complete)

    where = [f"{place.path}:{place.line}" for place in places]
    return _Source(ids, _first_by_hash(ids, data), read, where.__getitem__)


def _place_id(place: _Place, root: Path) -> str:
    name = place.path.relative_to(root).as_posix()
    return name if place.length is None else f"{name}:{place.line}"


def _lines(path: Path, field: str | None) -> Iterator[_Place]:
    """One place per record; all are checked, so that a bad one stops the run before it starts."""
    offset = count = 0
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            if raw.strip():
                parse(_decoded(raw, path, line), f"{path}:{line}", field)
                yield _Place(path, offset, len(raw), line)
                count += 1
            offset += len(raw)
    if count == 0:
        raise DataError(f"{path}: the file is empty", "put one JSON object on each line")


def _pieces(path: Path) -> Iterator[_Place]:
    """A text file that is the whole source: documents of PIECE bytes or a little more, cut at line ends."""
    start = end = 0
    first, line, blank = 1, 0, True
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            blank = blank and not _decoded(raw, path, line).strip()
            # a piece is closed by the line after it, so that the last one is known to be the last
            if end - start >= PIECE and not blank and raw.strip():
                yield _Place(path, start, end - start, first, complete=False)
                start, first = end, line
            end += len(raw)
    if blank:
        raise DataError(f"{path}: the file is empty", "name a file with text in it")
    yield _Place(path, start, end - start, first)


def _whole(path: Path) -> Iterator[_Place]:
    """A text file of a folder: one document, none when it is blank, like many an `__init__.py`."""
    if _decoded(path.read_bytes(), path, 1).strip():
        yield _Place(path)


def _decoded(raw: bytes, path: Path, line: int) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        problem = f"{path}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x})"
        raise DataError(problem, "convert the file to UTF-8") from None


def _hub(data: Data) -> _Source:
    try:
        import datasets
    except ImportError:
        raise ResourceError(
            f"data.source {data.source} is read through the package `datasets`, which is not installed",
            "pip install datasets, or name a local file or `stdlib`",
        ) from None
    name, _, configuration = data.source.partition(":")
    try:
        records = datasets.load_dataset(name, configuration or None, split=data.split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ResourceError(
            f"data.source {data.source}: {one_line(error)}",
            "check the id; log in with `hf auth login` if it is gated; or name a local file or `stdlib`",
        ) from None
    except OSError as error:  # network errors among them
        raise ResourceError(
            f"data.source {data.source}: {one_line(error)}",
            "check the id, the network and the disk, or name a local file or `stdlib`",
        ) from None
    except ValueError as error:  # an unknown split or configuration; the message lists those there are
        raise UsageError(
            f"data.source {data.source}, data.split {data.split}: {one_line(error)}",
            "a configuration goes after a colon, `owner/name:configuration`",
        ) from None
    if len(records) == 0:
        raise DataError(f"data.source {data.source}, data.split {data.split}: no records")
    ids = [f"{data.source}:{number}" for number in range(len(records))]

    def where(number: int) -> str:
        return f"{data.source} ({data.split}) record {number}"

    def read(number: int) -> Content:
        return content(records[number], where(number), data.field)

    return _Source(ids, _first_by_hash(ids, data), read, where)


def _first_by_hash(ids: Sequence[str], data: Data) -> list[int]:
    if data.held_out and len(ids) == 1:
        raise DataError(
            f"data.source {data.source}: one document cannot be both trained on and held out",
            "give more documents, or set data.held_out=0",
        )
    count = min(data.held_out, len(ids) // 2)
    return heapq.nsmallest(count, range(len(ids)), key=lambda index: _hash(ids[index]))
