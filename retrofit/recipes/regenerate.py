"""Let the base write the responses itself: drafts are judged against the base, so its own text trains them best.

The prompt of a document is what stands before its first response token; plain text keeps a random first part.  A
document gets one response, the same in every epoch, and responses are kept on disk: a run that was interrupted, or is
done again with other settings of training, finds them there.
Not here: what of it is trained on, which is as with any other text.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from retrofit.adapters.attach import Attached
from retrofit.errors import ResourceError
from retrofit.files import room
from retrofit.recipes.blocks import document_rng
from retrofit.recipes.data import Document
from retrofit.recipes.source import stable_hash
from retrofit.runtime.engine import Engine

BATCH = 64
"""Requests that run together; where one ends, the next takes its place."""
CHUNK = 256
"""Documents that are asked for at once."""
SHORTEST_PROMPT = 8
FORMAT = 1
SAMPLED = 64
"""Values of each tensor that identify the base."""


class _Job(NamedTuple):
    """One response to write: `limit` tokens at most, as many as the document had."""

    prompt: tuple[int, ...]
    limit: int
    seed: int

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()[:32]


def regenerate(
    documents: Iterable[Document],
    engine: Engine,
    temperature: float,
    seed: int,
    max_length: int,
    cache: ResponseCache | None = None,
    quiet: bool = True,
) -> Iterator[Document]:
    """Each document with its response written anew by `ar` at `temperature`, as long as it was, ids unchanged.

    Left out are documents whose prompt is empty, or as long as the window.  Raises ResourceError where the cache
    cannot be written.
    """
    source = iter(documents)
    while chunk := list(islice(source, CHUNK)):
        jobs: list[tuple[Document, _Job]] = []
        for document in chunk:
            prompt, length = prompt_length(document, seed), min(len(document.tokens), max_length)
            if 0 < prompt < length:
                draw = stable_hash(f"{seed} {document.id}") % (1 << 31)
                jobs.append((document, _Job(document.tokens[:prompt], length - prompt, draw)))
        written = _written([job for _, job in jobs], engine, temperature, cache, quiet)
        for (document, job), response in zip(jobs, written, strict=True):
            flags = (False,) * len(job.prompt) + (True,) * len(response)
            yield replace(document, tokens=(*job.prompt, *response), response=flags)


def _written(
    jobs: list[_Job], engine: Engine, temperature: float, cache: ResponseCache | None, quiet: bool
) -> list[list[int]]:
    """Responses in the order of the jobs, from the cache where it has them; new ones go there one by one."""
    done = {number: found for number, job in enumerate(jobs) if cache and (found := cache.get(job.key)) is not None}
    if len(done) == len(jobs):
        return [done[number] for number in range(len(jobs))]
    # The longest begin first, so that none is left running alone at the end.
    missing = sorted((n for n in range(len(jobs)) if n not in done), key=lambda n: -jobs[n].limit)
    events = engine.stream(
        [list(jobs[n].prompt) for n in missing],
        mode="ar",
        temperature=temperature,
        max_new_tokens=[jobs[n].limit for n in missing],
        seed=[jobs[n].seed for n in missing],
        batch_size=BATCH,
        with_text=False,
    )
    with tqdm(
        total=len(jobs), initial=len(done), desc="regenerating", unit="response", disable=quiet, leave=False,
        file=sys.stderr, dynamic_ncols=True,
    ) as bar:  # fmt: skip
        for event in events:
            if event.result is not None:
                number = missing[event.index]
                done[number] = event.result.tokens
                if cache is not None:
                    cache.put(jobs[number].key, event.result.tokens)
                bar.update()
    return [done[number] for number in range(len(jobs))]


def prompt_length(document: Document, seed: int) -> int:
    """Tokens before the first response token; of plain text a random part up to one half."""
    first = int(np.argmax(document.response)) if any(document.response) else 0
    half = len(document.tokens) // 2
    if first or half <= SHORTEST_PROMPT:
        return first or half
    return int(document_rng(seed, 0, document.id).integers(SHORTEST_PROMPT, half))


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
        line = (json.dumps({"key": key, "tokens": tokens}) + "\n").encode()
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


def cache_folder() -> Path:
    """`RETROFIT_CACHE`, else `retrofit` in the user's cache folder."""
    given = os.environ.get("RETROFIT_CACHE")
    if given:
        return Path(given).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "retrofit"
    except RuntimeError as error:  # this user has no home
        raise ResourceError("there is no home folder to keep responses in", "set RETROFIT_CACHE to a folder") from error


@torch.no_grad()
def weights_key(attached: Attached) -> str:
    """What tells one base from another, live ones too: shape, type and evenly spaced values of every tensor."""
    digest = hashlib.sha256()
    for name, parameter in attached.peft_model.named_parameters():
        if "lora_" not in name:
            values = parameter.detach().flatten()[:: max(1, parameter.numel() // SAMPLED)]
            digest.update(
                f"{tuple(parameter.shape)} {parameter.dtype}".encode() + values.float().cpu().numpy().tobytes()
            )
    return digest.hexdigest()
