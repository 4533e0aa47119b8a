"""Scores of what a model wrote: a number found, rules of format kept, code that parses.  Pure functions of text.

Not here: running code (`execution.py`), likelihoods (`answering.py`), means and intervals (`pairing.py`).
"""

from __future__ import annotations

import ast
import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def numbers(text: str) -> list[Decimal]:
    """Every number in a text, thousands commas taken off: `1,250 and -3.5` has two."""
    return [Decimal(found.replace(",", "")) for found in NUMBER.findall(text)]


def right_number(text: str, answer: str, take: str) -> bool:
    """Whether the number at `take`, the first or the last of the text, is the answer's.

    After `####`, which some models write before their result, only what follows counts.
    """
    found = numbers(text.rpartition("####")[2])
    return bool(found) and found[0 if take == "first" else -1] == Decimal(answer.replace(",", ""))


def likeliest(totals: Sequence[float]) -> int:
    """The number of the option with the highest log-probability, the first of equal ones."""
    return max(range(len(totals)), key=totals.__getitem__)


def kept(text: str, rule: str, value: Any) -> bool:
    """Whether a text keeps a rule of RULES, white space around it aside."""
    return RULES[rule](text.strip(), value)


def follows(text: str, rules: Mapping[str, Any]) -> bool:
    """Whether it keeps all of them: name of the rule -> its value."""
    return all(kept(text, rule, value) for rule, value in rules.items())


def _json(text: str, value: Any) -> bool:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return type(found) is type(value) and found == value


def _json_keys(text: str, value: Sequence[str]) -> bool:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and sorted(found) == sorted(value)


RULES: dict[str, Callable[[str, Any], bool]] = {
    "equals": lambda text, value: text == value,
    "matches": lambda text, value: re.fullmatch(value, text) is not None,
    "json": _json,
    "json_keys": _json_keys,
    "lines": lambda text, value: len([line for line in text.splitlines() if line.strip()]) == value,
    "each_line": lambda text, value: all(re.fullmatch(value, line.strip()) for line in text.splitlines() if line),
    "words": lambda text, value: value[0] <= len(text.split()) <= value[1],
    "contains": lambda text, value: all(part in text for part in value),
    "lacks": lambda text, value: bool(text) and not any(part in text for part in value),
    "upper": lambda text, value: text.isupper() is value,
    "lower": lambda text, value: text.islower() is value,
    "ends": lambda text, value: text.endswith(value),
}
"""Rule -> whether a text keeps it, given the rule's value."""


def body_of(text: str) -> str:
    """What continues a function: up to the first line that is not indented, so without what a model adds after it."""
    lines = text.splitlines(keepends=True)
    end = next((n for n, line in enumerate(lines) if line.strip() and not line[0].isspace()), len(lines))
    return "".join(lines[:end]).rstrip() + "\n"


def program_of(prompt: str, text: str) -> str:
    """The program that a model wrote: the prompt, which ends within a function, and the function's body."""
    return prompt + body_of(text)


def parses(program: str) -> bool:
    """Whether it is Python, and the last function has more than a docstring."""
    try:
        tree = ast.parse(textwrap.dedent(program))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    last = tree.body[-1] if tree.body else None
    return isinstance(last, ast.FunctionDef) and (len(last.body) > 1 or ast.get_docstring(last) is None)
