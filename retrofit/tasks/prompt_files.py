"""Prompts from a JSONL file: in the fields of SPEED-Bench or Spec-Bench, or a user's own prompts and chats.

    SPEED-Bench   question_id, category, sub_category, turns
    Spec-Bench    question_id, category, turns
    own           prompt, or messages; category if there is one

Turns are what the user says, one text a turn.  Nothing of those benchmarks is shipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrofit.errors import DataError, UsageError

UNRESOLVED = "specdec_bench"
"""Public rows of SPEED-Bench hold, in place of a text, a line that names the tool which fetches it."""
HOW = "each line is a JSON object with `turns` (a list of texts), `prompt` (a text) or `messages` (role and content)"


@dataclass(frozen=True)
class BenchPrompt:
    """One row.  turns: what the user says, at least one text; messages: the whole chat, where the row has one."""

    id: str
    category: str
    sub_category: str | None
    turns: tuple[str, ...]
    messages: tuple[Mapping[str, str], ...] | None = None

    def raw(self) -> str:
        """The first turn, as a text to be continued."""
        return self.turns[0]

    def chat(self) -> list[Mapping[str, str]]:
        """The messages up to the first answer that is to be written, for the chat template."""
        return list(self.messages) if self.messages is not None else [{"role": "user", "content": self.turns[0]}]


def read(path: str | Path) -> list[BenchPrompt]:
    """The prompts of a file, in its order; empty lines are left out.

    Raises UsageError for a file that cannot be read, DataError (file:line) for a row that is no prompt or has an id
    that another has, and for a file without any.
    """
    found: dict[str, BenchPrompt] = {}
    for number, row in numbered_rows(path, HOW):
        prompt = _prompt(row, f"{path}:{number}", number)
        if prompt.id in found:
            raise DataError(f"{path}:{number}: another row has the id {prompt.id}", "give each row an id of its own")
        found[prompt.id] = prompt
    return list(found.values())


def numbered_rows(path: str | Path, how: str) -> Iterator[tuple[int, Any]]:
    """(line, what it holds) of a JSONL file of prompts; empty lines are left out.

    how: the hint that says what a line should hold.  Raises UsageError for a file that cannot be read, DataError, with
    file:line, for what is not JSON, and for a file without any.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}", "name a JSONL file of prompts") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})", "convert the file to UTF-8") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: holds no prompts", how)
    for number, line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not valid JSON: {getattr(error, 'msg', error)}", how) from None
        yield number, row


def _prompt(row: Any, where: str, number: int) -> BenchPrompt:
    """The prompt in a row.  number: its id where it names none.  Raises DataError."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: not a JSON object", HOW)
    category, sub_category = (_text_or_none(row.get(name), name, where) for name in ("category", "sub_category"))
    messages = _messages(row["messages"], where) if "messages" in row else None
    turns = _turns(row, where) if messages is None else tuple(m["content"] for m in messages if m["role"] == "user")
    if any(UNRESOLVED in turn for turn in turns):
        raise DataError(
            f"{where}: a row of SPEED-Bench whose text was not fetched", f"run prepare_data.py of {UNRESOLVED} first"
        )
    id = str(row.get("question_id", number))
    return BenchPrompt(id, category or "uncategorised", sub_category, turns, messages)


def _turns(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    turns = row.get("turns", row.get("prompt"))
    turns = [turns] if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
        raise DataError(f"{where}: no turns: a list of texts, none empty, is needed", HOW)
    return tuple(turns)


def _messages(given: Any, where: str) -> tuple[Mapping[str, str], ...]:
    """Raises DataError for what is no chat, and for one that does not end with the user."""
    if not isinstance(given, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in given
    ):
        raise DataError(f"{where}: messages are not a list of objects with role and content, both texts", HOW)
    if not given or given[-1]["role"] != "user":
        raise DataError(
            f"{where}: the messages do not end with the user's", "leave out the answer that is to be written"
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in given)


def _text_or_none(value: Any, name: str, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: {name} is not a text", HOW)
    return value


def limited(prompts: Sequence[BenchPrompt], limit: int) -> list[BenchPrompt]:
    """At most so many prompts, in the file's order, the categories taking turns."""
    by_category: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_category.setdefault(prompt.category, []).append(number)
    rank = {number: place for numbers in by_category.values() for place, number in enumerate(numbers)}
    chosen = sorted(range(len(prompts)), key=lambda number: (rank[number], number))[:limit]
    return [prompts[number] for number in sorted(chosen)]
