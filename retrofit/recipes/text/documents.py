"""Documents of token ids, from every kind of text source a recipe can name.

    stdlib          the running interpreter's standard library, so that training works offline on any machine
    prompts:...     prompts alone, which the base answers: `prompts.py`
    a local file    .txt, .py, .md: text; .jsonl, .json, .csv (all three also as .gz), .parquet: records, one per row
    a local folder  of text, .jsonl and .parquet files, its subfolders too, without hidden files and blank ones
    anything else   a `datasets` id, its configuration after a colon if it has several: `owner/name:config`;
                    records are streamed as they are needed, nothing is downloaded first
    a list          a mixture of those, by weight

Held out are, of `stdlib`, the files the embedded base never saw; of a Hub id the first `data.held_out` records; of
files, the `data.held_out` documents first by a hash of their id, though never more than half of them; of a mixture,
each source's share.  Training never sees those.

Where the base is to write the responses a conversation comes along with its tokens, for its later prompts hold answers
that are not written yet.

Not here: what a record may hold (`formats.py`), how it becomes tokens (`tokens.py`), windows of them (`windows.py`).
"""

from __future__ import annotations

import errno
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from retrofit.errors import DataError, ResourceError, UsageError
from retrofit.locating import expanded
from retrofit.recipes.text.conversations import Chat
from retrofit.recipes.text.faults import Skipped, read_or_skip
from retrofit.recipes.text.formats import Asked, Content, Form, content, one_line
from retrofit.recipes.text.library import stdlib
from retrofit.recipes.text.local import FILE_SUFFIXES, Table, local
from retrofit.recipes.text.prompts import PREFIX, prompts
from retrofit.recipes.text.sources import Part, Row, Source, Streamed, stable_hash
from retrofit.recipes.text.tokens import encode
from retrofit.runtime.chat_template import check_arguments, source

if TYPE_CHECKING:
    from retrofit.recipes.schema import Data

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Document:
    """Token ids; `response` is as long, True where a token is part of a response (plain text: everywhere).

    source: what data.source calls it; where: the place it was read from.  chat: the conversation, where the base is to
    answer it.
    """

    id: str
    tokens: tuple[int, ...]
    response: tuple[bool, ...]
    source: str = ""
    where: str = ""
    chat: Chat | None = field(default=None, compare=False, repr=False)

    @property
    def to_answer(self) -> bool:
        """Whether the base has to write in it before it is text to train on; it is then not to be cut."""
        return self.chat is not None or not any(self.response)


class _Wanted(NamedTuple):
    """One source of a recipe, with what it takes over from the section filled in."""

    source: str
    weight: float
    split: str
    field: str | None
    held_out: int


class _Opened(NamedTuple):
    name: str
    share: float
    source: Source


def documents(
    data: Data,
    tokenizer: Any,
    *,
    part: Part,
    seed: int = 0,
    skipped: Skipped | None = None,
    vocab: int | None = None,
    offline: bool = False,
) -> Iterator[Document]:
    """The documents of one part of the source, each once; of a mixture see `_mixed`.

    `train` comes in an order drawn from `seed`, `held_out` and `all` always in the same.  With `skipped`, bad rows
    are counted in it and left out.  vocab: how many token ids the model knows.  offline: of a Hub source read only
    what the cache of `datasets` holds.
    Raises UsageError for a path that does not exist, ResourceError for a Hub source out of reach, DataError for
    malformed local files and records, all from the call itself; DataError later for conversations that cannot be
    rendered, tokens the model does not know, and malformed records of the Hub.
    """
    check_arguments(data.template, "data.template")
    wanted = [one._replace(held_out=0) if part == "all" else one for one in _wanted(data)]
    total = sum(one.weight for one in wanted)
    opened = [_Opened(one.source, one.weight / total, _open(one, data, skipped, offline)) for one in wanted]
    if part == "train":
        for one in opened:
            if next(one.source.rows(part), None) is None:
                raise DataError(f"data.source {one.name}: nothing left to train on", "set data.held_out lower")

    def encoded(number: int, turn: int = 0) -> Iterator[Document]:
        one = opened[number]
        rng = random.Random(seed if number == turn == 0 else f"{seed} {number} {turn}") if part == "train" else None
        for row in one.source.rows(part, rng):
            made = read_or_skip(skipped, _document, row, tokenizer, vocab, one.name, data)
            if made is not None:
                mark = (f"{number}/" if len(opened) > 1 else "") + made.id + (f"~{turn}" if turn else "")
                yield replace(made, id=mark)

    if len(opened) == 1:
        return encoded(0)
    train = part == "train"
    return _mixed(encoded, [one.share for one in opened], random.Random(seed if train else 0), repeat=train)


def _mixed(
    encoded: Callable[[int, int], Iterator[Document]], shares: Sequence[float], rng: random.Random, repeat: bool
) -> Iterator[Document]:
    """Documents of several sources in turn: after any number of them, each source's is its share within one or two.

    repeat: an epoch ends when every source has been read to its end; those that end sooner begin again, in another
    order and with `~1`, `~2` after their ids.  Else each ends when it ends.
    """
    streams = [encoded(number, 0) for number in range(len(shares))]
    turns = [0] * len(shares)
    unread = set(range(len(shares)))
    running = dict.fromkeys(unread)
    credit = [share * rng.random() for share in shares]
    while unread:
        for number in running:
            credit[number] += shares[number]
        picked = max(running, key=lambda number: credit[number])
        credit[picked] -= sum(shares[number] for number in running)
        document = next(streams[picked], None)
        if document is not None:
            yield document
            continue
        # Every row of it was left out, or it has come to its end.
        unread.discard(picked)
        turns[picked] += 1
        again = encoded(picked, turns[picked])
        first = next(again, None) if repeat and unread else None
        if first is None:
            del running[picked]
        else:
            streams[picked] = again
            yield first


def _document(row: Row, tokenizer: Any, vocab: int | None, name: str, data: Data) -> Document | None:
    found = row.read()
    if found is None:
        return None
    if isinstance(found, Asked) and data.ask == "chat" and source(tokenizer):
        found = Chat([{"role": "user", "content": found.prompt}])
    if isinstance(found, Chat):
        found = found._replace(arguments=drawn(data.template, data.seed, row.id))
    to_answer = data.responses == "regenerate"
    tokens, response = encode(found, tokenizer, row.where, vocab, to_answer)
    chat = found if isinstance(found, Chat) and to_answer else None
    return Document(row.id, tuple(tokens), tuple(response), name, row.where, chat)


def drawn(template: Mapping[str, Any], seed: int, document: str) -> dict[str, Any]:
    """Template arguments of one document: of a list of values one, the same whenever it is read."""
    return {
        name: value[stable_hash(f"{seed} {name} {document}") % len(value)] if isinstance(value, list | tuple) else value
        for name, value in template.items()
    }


def _wanted(data: Data) -> list[_Wanted]:
    if data.source == "stdlib":  # which brings its own parts
        return [_Wanted("stdlib", 1.0, "", None, 0)]
    if isinstance(data.source, str):
        return [_Wanted(data.source, 1.0, data.split, data.field, data.held_out)]
    total = sum(one.weight for one in data.source)
    return [
        _Wanted(
            one.source,
            one.weight,
            one.split or data.split,
            one.field or data.field,
            max(1, round(data.held_out * one.weight / total)) if data.held_out else 0,
        )
        for one in data.source
    ]


def _open(wanted: _Wanted, data: Data, skipped: Skipped | None, offline: bool) -> Source:
    if wanted.source == "stdlib":
        return stdlib()
    if wanted.source.startswith(PREFIX):
        return prompts(wanted.source, data, wanted.held_out)
    form = Form(wanted.field, alone=data.responses == "regenerate")
    path = expanded(wanted.source)
    if path.exists():
        return local(path, form, wanted.held_out, _table, skipped)
    if path.name.endswith(FILE_SUFFIXES) or not HUB_ID.fullmatch(wanted.source):
        raise UsageError(
            f"data.source {wanted.source}: no such file or folder",
            f"name `stdlib`, prompts, a {', '.join(FILE_SUFFIXES)} file, a folder of such files, or a `datasets` id",
        )
    return _hub(wanted, form, offline)


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ResourceError(
            f"data.source {name} is read through the package `datasets`, which is not installed",
            "pip install datasets, or name a local text or JSONL file or `stdlib`",
        ) from None
    return datasets


def _table(path: Path) -> Table:
    """The rows of a Parquet file, converted once into the cache of `datasets` and read from there in any order."""
    datasets = _datasets(str(path))
    import pyarrow.parquet

    try:
        if pyarrow.parquet.read_metadata(path).num_rows == 0:
            return []
        with _silent(datasets):
            table: Table = datasets.Dataset.from_parquet(str(path))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # ValueError: what pyarrow raises
        _refuse_cache(error, path, datasets.config.HF_DATASETS_CACHE)
        problem = f"{path}:1: cannot be read as Parquet: {one_line(error)}"
        raise DataError(problem, "write the file anew, or give JSONL") from None
    return table


def _refuse_cache(error: BaseException, path: Path, cache: str | Path) -> None:
    """Raises ResourceError where it was not the file that could not be read, but its copy that could not be made."""
    causes: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in causes:
        causes.append(one)
        one = one.__cause__ or one.__context__
    for cause in causes:
        if not isinstance(cause, OSError):
            continue
        place = Path(os.fsdecode(cause.filename)) if isinstance(cause.filename, str | bytes) else None
        # pyarrow and datasets say some of them in words only
        full = cause.errno in NO_ROOM or "disk space" in str(cause) or "No space left" in str(cause)
        if full or (place is not None and place.resolve() != path.resolve()):
            size = path.stat().st_size
            raise ResourceError(
                f"{place or cache}: cannot write the rows of {path} ({size:,} bytes, more when unpacked) there: "
                f"{cause.strerror or one_line(cause)}",
                "make room, set HF_DATASETS_CACHE to a folder that can be written, or give JSONL",
            ) from None


@contextmanager
def _silent(datasets: Any) -> Iterator[None]:
    """No progress bars, and no errors logged that are raised anyway."""
    bars, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def _offline(datasets: Any, wanted: bool) -> Iterator[None]:
    """Offline mode as HF_HUB_OFFLINE=1 sets it, which the libraries read but once, when they are imported."""
    from huggingface_hub import constants

    modules: list[Any] = [datasets.config, constants]
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = module.HF_HUB_OFFLINE or wanted
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _hub(wanted: _Wanted, form: Form, offline: bool) -> Source:
    datasets = _datasets(wanted.source)
    name, _, configuration = wanted.source.partition(":")
    # Offline there is nothing to stream from; what the cache holds is read in the same order.
    offline = offline or datasets.config.HF_HUB_OFFLINE

    def load() -> Iterable[Any]:
        try:
            with _offline(datasets, offline):
                records: Iterable[Any] = datasets.load_dataset(
                    name, configuration or None, split=wanted.split, streaming=not offline
                )
        except datasets.exceptions.DatasetNotFoundError as error:
            raise ResourceError(
                f"data.source {wanted.source}: {one_line(error)}",
                "check the id; log in with `hf auth login` if it is gated; or name a local file or `stdlib`",
            ) from None
        except OSError as error:  # network errors among them
            refused = _not_cached(wanted.source, error, datasets) if offline else _out_of_reach(wanted.source, error)
            raise refused from None
        except ValueError as error:  # an unknown split or configuration; the message lists those there are
            if offline and "find cache" in str(error):
                raise _not_cached(wanted.source, error, datasets) from None
            raise UsageError(
                f"data.source {wanted.source}, data.split {wanted.split}: {one_line(error)}",
                "a configuration goes after a colon, `owner/name:configuration`",
            ) from None
        return records

    def rows() -> Iterator[Row]:
        number = -1
        try:
            for number, record in enumerate(load()):
                where = f"{wanted.source} ({wanted.split}) record {number}"
                yield Row(f"{wanted.source}:{number}", where, _reader(record, where, form))
        except OSError as error:
            raise _out_of_reach(wanted.source, error) from None
        except (datasets.exceptions.DatasetsError, ValueError) as error:  # ValueError: what pyarrow and codecs raise
            place = f"after record {number}" if number >= 0 else "before the first record"
            problem = f"{wanted.source} ({wanted.split}), {place}: {one_line(error)}"
            raise DataError(problem, "the files of the data set are damaged; name another revision or source") from None

    if next(rows(), None) is None:
        raise DataError(f"data.source {wanted.source}, data.split {wanted.split}: no records")
    return Streamed(rows, wanted.held_out)


def _not_cached(name: str, error: Exception, datasets: Any) -> ResourceError:
    return ResourceError(
        f"data.source {name}: offline, and not in the cache {datasets.config.HF_DATASETS_CACHE}: {one_line(error)}",
        "run datasets.load_dataset once with a network, leave out --offline, or name a local file or `stdlib`",
    )


def _out_of_reach(name: str, error: OSError) -> ResourceError:
    return ResourceError(
        f"data.source {name}: {one_line(error)}",
        "check the id, the network and the disk, or name a local file or `stdlib`",
    )


def _reader(record: Any, where: str, form: Form) -> Callable[[], Content]:
    return lambda: content(record, where, form)
