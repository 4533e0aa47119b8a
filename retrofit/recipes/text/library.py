"""The running interpreter's standard library as training text: offline, on any machine, the same files everywhere.

Held out are the files the embedded base never saw, which `tiny/heldout.txt` lists.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from retrofit.errors import DataError, ResourceError
from retrofit.recipes.text.formats import Content, Text
from retrofit.recipes.text.sources import Indexed, Part, Source, stable_hash
from retrofit.recipes.text.tokens import token_ids

HELD_OUT_LIST = Path(__file__).parents[1] / "tiny" / "heldout.txt"
STDLIB_SKIPPED = ("site-packages", "dist-packages", "encodings", "lib2to3/tests/data", "__pycache__")
STDLIB_LONGEST = 400_000  # characters; longer files are tables
STDLIB_NON_ASCII = 0.01  # share of the characters


def stdlib() -> Source:
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

    return Indexed(names, held, read, lambda number: str(root / names[number]))


def stdlib_texts(part: Part) -> Iterator[str]:
    """The files of one part of `stdlib` as text, for a tokenizer.  Raises ResourceError like `documents`."""
    for row in stdlib().rows(part):
        found = row.read()
        if isinstance(found, Text):
            yield found.text


def held_out_prompts(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """`count` prompts of exactly `length` tokens from held-out standard-library files, always the same ones.

    Each begins at the start of a line.  Every file long enough gives one before any gives another, from
    another line. Raises DataError when the files hold fewer such prompts.
    """
    root = _stdlib_root()
    names = sorted((name for name in _held_out_names() if (root / name).is_file()), key=stable_hash)
    texts = [text for name in names if (text := _stdlib_text(root / name)) is not None]
    prompts: list[list[int]] = []
    used: list[set[int]] = [set() for _ in texts]
    turn = 0
    while len(prompts) < count:
        before = len(prompts)
        for number, text in enumerate(texts):
            if len(prompts) == count:
                break
            found = _prompt(tokenizer, text, stable_hash(f"{names[number]} {turn}") / 2**64, length, used[number])
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
