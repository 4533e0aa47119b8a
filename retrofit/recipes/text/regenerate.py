"""Let the base write the responses itself: drafts are judged against the base, so its own text trains them best.

In a conversation the base answers turn by turn, each time to the turns so far with its own answers in them; a prompt
alone it answers once (`rewriting.py`).

Responses are the same in every epoch, and kept on disk: a run that was interrupted, or is done again with other
settings of training, finds them there.
Not here: what of it is trained on, which is as with any other text.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from retrofit.adapters.attach import Attached
from retrofit.artifact.files import json_line, room
from retrofit.errors import ResourceError, TrainingError
from retrofit.machine import cache_folder
from retrofit.progress import progress
from retrofit.quantised.linear import stored_parts
from retrofit.recipes.processes import Processes
from retrofit.recipes.text.documents import Document
from retrofit.recipes.text.faults import Skipped, read_or_skip
from retrofit.recipes.text.rewriting import Answered, Limits, Rewritten
from retrofit.runtime.backends.hf.linear.packing import packed_meanwhile
from retrofit.runtime.engine import Engine

BATCH = 64
"""Requests that run together, at most; where one ends, the next takes its place."""
ROOM = 1 << 17
"""Tokens that there is room for in all requests that run together, each as long as the longest may get."""
CHUNK = 256
"""Documents that are asked for at once."""
FORMAT = 1
SAMPLED = 64
"""Values of each tensor that identify the base."""


class _Job(NamedTuple):
    """One response to write: `limit` tokens at most."""

    prompt: tuple[int, ...]
    limit: int
    seed: int

    @property
    def length(self) -> int:
        """Most tokens in all."""
        return len(self.prompt) + self.limit

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()[:32]


def regenerate(
    documents: Iterable[Document],
    engine: Engine,
    temperature: float,
    seed: int,
    max_length: int,
    max_new_tokens: int | None = None,
    cache: ResponseCache | None = None,
    quiet: bool = True,
    processes: Processes | None = None,
    skipped: Skipped | None = None,
) -> Iterator[Document]:
    """Each document with its responses written anew by `ar` at `temperature`, ids unchanged, no longer than it was.

    max_new_tokens: most tokens of each response, in place of how long the document was; it is never longer than
    max_length.  A conversation becomes several documents where the chat template changes what was said before.
    Left out are documents whose prompt is empty, or as long as the window.  Several processes divide the responses
    among them; the cache is the main one's.  Raises ResourceError where the cache cannot be written, TrainingError
    where the processes read different text, and, unless `skipped` counts them, RowError for messages that the
    template refuses.
    """
    source, limits = iter(documents), Limits(max_length, max_new_tokens)

    def opened(document: Document) -> Rewritten | Answered:
        if document.chat is None:
            return Rewritten(document, seed, limits)
        return Answered(document, seed, limits, engine.tokenizer, engine.backend.eos)

    while chunk := list(islice(source, CHUNK)):
        texts = [text for document in chunk if (text := read_or_skip(skipped, opened, document)) is not None]
        while waiting := [
            (text, _Job(tuple(text.prompt), limit, text.draw())) for text in texts if (limit := text.limit()) > 0
        ]:
            written = _written([job for _, job in waiting], engine, temperature, cache, quiet, processes)
            for (text, _), response in zip(waiting, written, strict=True):
                text.take(response)
        for text in texts:
            yield from text.written()


def _written(
    jobs: list[_Job],
    engine: Engine,
    temperature: float,
    cache: ResponseCache | None,
    quiet: bool,
    processes: Processes | None,
) -> list[list[int]]:
    """Responses in the order of the jobs, from the cache where it has them; new ones go there one by one."""
    done = {number: found for number, job in enumerate(jobs) if cache and (found := cache.get(job.key)) is not None}
    if processes is not None:
        told = processes.exchange("responses", ([job.key for job in jobs], done))
        if any(keys != told[0][0] for keys, _ in told):
            hint = "let data.source be the same files for all of them"
            raise TrainingError("the processes read different text", hint)
        done = told[0][1]
    # The longest begin first, so that none is left running alone at the end.
    missing = sorted((n for n in range(len(jobs)) if n not in done), key=lambda n: -jobs[n].limit)
    if not missing:
        return [done[number] for number in range(len(jobs))]
    mine = missing if processes is None else missing[processes.rank :: processes.size]
    for number, tokens in _generated(mine, jobs, engine, temperature, quiet, len(done)):
        done[number] = tokens
        if cache is not None:
            cache.put(jobs[number].key, tokens)
    if processes is not None:
        for rank, theirs in enumerate(processes.exchange("generated", {n: done[n] for n in mine})):
            done |= theirs
            if cache is not None and rank != processes.rank:
                for number, tokens in theirs.items():
                    cache.put(jobs[number].key, tokens)
    return [done[number] for number in range(len(jobs))]


def _generated(
    numbers: list[int], jobs: list[_Job], engine: Engine, temperature: float, quiet: bool, known: int
) -> Iterator[tuple[int, list[int]]]:
    """Responses as they are finished."""
    if not numbers:
        return
    alike: dict[int, list[int]] = {}
    for number in numbers:
        alike.setdefault(together(jobs[number].length), []).append(number)
    bar = progress("regenerating", "response", known + len(numbers), done=known, quiet=quiet)
    with packed_meanwhile(engine.backend), bar as shown:
        for requests, group in sorted(alike.items()):  # those first that get longest
            events = engine.stream(
                [list(jobs[n].prompt) for n in group],
                mode="ar",
                temperature=temperature,
                max_new_tokens=[jobs[n].limit for n in group],
                seed=[jobs[n].seed for n in group],
                batch_size=requests,
                original_settings=False,  # the drafter learns the model's own distribution
                with_text=False,
            )
            for event in events:
                if event.result is not None:
                    yield group[event.index], event.result.tokens
                    shown.advance()


def together(length: int) -> int:
    """How many requests run together that may get so long, in tokens."""
    return max(1, min(BATCH, ROOM >> (length - 1).bit_length()))


def most_kept(longest: int) -> tuple[int, int]:
    """(requests, tokens of each) for which most room is made, where none gets longer."""
    found = [(together(n), n) for n in {longest, min(longest, ROOM // BATCH)}]
    return max(found, key=lambda kept: (kept[0] * kept[1], kept[0]))


class ResponseCache:
    """Responses on disk, one JSON line each, in a file of the base and the sampling settings.

    Only places are held in memory.  A line cut short by an interruption is passed over.  Several processes may add to
    one file.
    """

    def __init__(self, base: str, temperature: float, eos: Iterable[int] = (), folder: Path | None = None):
        """base: what tells the base's weights from others', as `weights_key`.  Raises ResourceError."""
        settings = json.dumps([FORMAT, base, temperature, sorted(eos)])
        name = hashlib.sha256(settings.encode()).hexdigest()[:32]
        self.path = (folder or cache_folder()) / "responses" / f"{name}.jsonl"
        self._places: dict[str, int] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b", buffering=0)
            end = self._index()
            if end:  # an interrupted write: what is added must not go on in its line
                self._append(b"\n")
        except OSError as error:
            raise _refusal(self.path, error) from None

    def _index(self) -> bytes:
        """Find the places; returns what follows the last line end."""
        offset = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    return line
                if (found := _entry(line)) is not None:
                    self._places[found[0]] = offset
                offset += len(line)
        return b""

    def get(self, key: str) -> list[int] | None:
        """The response, None where there is none."""
        if key not in self._places:
            return None
        with self.path.open("rb") as file:
            file.seek(self._places[key])
            found = _entry(file.readline())
        return found[1] if found is not None and found[0] == key else None

    def put(self, key: str, tokens: list[int]) -> None:
        """Add a response.  Raises ResourceError: disk full, folder not writable."""
        line = json_line({"key": key, "tokens": tokens}).encode()
        try:
            self._places[key] = self._append(line)
        except OSError as error:
            raise _refusal(self.path, error, len(line)) from None

    def _append(self, line: bytes) -> int:
        written = self._file.write(line)
        if written != len(line):
            raise OSError(0, f"only {written} of {len(line)} bytes could be written")
        return self._file.tell() - len(line)


def _refusal(path: Path, error: OSError, size: int = 0) -> ResourceError:
    wanted = f"cannot write {size:,} bytes{room(path)}: " if size else ""
    return ResourceError(
        f"{path}: regenerated responses cannot be kept there: {wanted}{error.strerror}",
        "make room, or set RETROFIT_CACHE to a folder that can be written",
    )


def check_cache() -> None:
    """Raises ResourceError where responses could not be kept: to find out before a base is loaded, not after."""
    folder = cache_folder() / "responses"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\n")
    except OSError as error:
        raise _refusal(folder, error) from None


def _entry(line: bytes) -> tuple[str, list[int]] | None:
    """(key, tokens) of a line; None for one that is damaged."""
    try:
        entry = json.loads(line)
        return str(entry["key"]), [int(token) for token in entry["tokens"]]
    except (ValueError, TypeError, KeyError):
        return None


@torch.no_grad()
def weights_key(attached: Attached) -> str:
    """What tells one base from another, live ones too: shape, type and evenly spaced values of every tensor."""
    digest = hashlib.sha256()
    for parameter in [*attached.base_parameters(), *stored_parts(attached.model)]:
        values = parameter.detach().flatten()[:: max(1, parameter.numel() // SAMPLED)]
        digest.update(f"{tuple(parameter.shape)} {parameter.dtype}".encode() + values.float().cpu().numpy().tobytes())
    return digest.hexdigest()
