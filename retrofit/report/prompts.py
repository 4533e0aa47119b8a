"""What is asked while measuring: the user's own prompts, or some of our own in as many kinds of text.

A file is JSONL in the field layout of SPEED-Bench and Spec-Bench (`question_id, category, sub_category, turns`); a row
may hold `prompt`, `messages` or `tokens` in place of `turns`.  Of several turns the first is asked: the others answer
what a model has said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.errors import DataError
from retrofit.recipes.text.library import held_out_prompts
from retrofit.runtime.chat_template import source
from retrofit.runtime.prompts import encode
from retrofit.tasks.prompt_files import numbered_rows

if TYPE_CHECKING:
    from retrofit.runtime.engine import Engine

OWN = Path(__file__).with_name("prompts.jsonl")
CODE_TOKENS = 48
"""Of a prompt cut from held-out source code."""
HOW = 'one a line, such as {"turns": ["Why is the sky blue?"]}'
KINDS = ("turns", "prompt", "messages", "tokens")


@dataclass(frozen=True)
class Row:
    """A prompt as a file has it.  asked: text of a user's message or raw text, messages, or token ids."""

    id: str
    category: str
    asked: Any
    raw: bool = False
    """Text that goes through no chat template."""
    left_out: int = 0
    """Turns that are not asked."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the engine takes it."""

    id: str
    category: str
    tokens: tuple[int, ...]
    left_out: int = 0


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a file.  Raises DataError for a row that is no prompt, and what `numbered_rows` raises."""
    path = Path(path).expanduser()
    return [_row(held, f"{path}:{number}") for number, held in numbered_rows(path, HOW)]


def _row(held: Any, where: str) -> Row:
    kinds = [kind for kind in KINDS if isinstance(held, dict) and kind in held]
    if len(kinds) != 1:
        raise DataError(f"{where}: must hold one of {', '.join(KINDS)}", HOW)
    kind, asked = kinds[0], held[kinds[0]]
    wanted: Any = str if kind == "prompt" else list
    if not isinstance(asked, wanted) or not asked or (kind == "turns" and not all(isinstance(t, str) for t in asked)):
        raise DataError(f"{where}: `{kind}` must be {'text' if kind == 'prompt' else 'a list that is not empty'}")
    name = str(held.get("question_id", where.rpartition(":")[2]))
    category = str(held.get("category") or "uncategorised")
    if kind == "turns":
        return Row(name, category, asked[0], left_out=len(asked) - 1)
    return Row(name, category, asked, raw=kind == "prompt")


@cache
def own_rows() -> tuple[Row, ...]:
    """Prompts written for this project, categories in turn, so that any first few are of several."""
    return tuple(read_rows(OWN))


def tokenized(rows: Sequence[Row], engine: Engine) -> list[Prompt]:
    """Rows as token ids, through the chat template where the model has one.  Raises UsageError, naming the row."""
    templated = bool(source(engine.tokenizer))
    made = []
    for row in rows:
        chat = templated and isinstance(row.asked, str) and not row.raw
        asked = [{"role": "user", "content": row.asked}] if chat else row.asked
        tokens = encode(asked, f"prompt {row.id}", engine.tokenizer, engine.backend.input_vocab)
        made.append(Prompt(row.id, row.category, tuple(tokens), row.left_out))
    return made


def code_prompts(engine: Engine, count: int) -> list[Prompt]:
    """Beginnings cut from held-out source code, for a model that was trained on such.  Raises DataError: too few."""
    length = min(CODE_TOKENS, engine.limits.context // 2)
    cut = held_out_prompts(engine.tokenizer, count, length)
    return [Prompt(f"code-{number}", "code", tuple(tokens)) for number, tokens in enumerate(cut, 1)]


def digest(prompts: Sequence[Prompt]) -> str:
    """Of the tokens of all prompts, in order: equal for runs that asked the same."""
    return sha256(json.dumps([prompt.tokens for prompt in prompts]).encode()).hexdigest()


def categories(prompts: Sequence[Prompt]) -> Mapping[str, list[int]]:
    """Category -> numbers of its prompts."""
    found: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        found.setdefault(prompt.category, []).append(number)
    return found
