"""Prompts that need no file and no network, for the base to answer: `prompts:everyday`, `prompts:reasoning-gym`.

    everyday         400 instructions in ten categories, written for this project: `everyday.jsonl`
    reasoning-gym    as many as asked for, made by the package of that name (Apache-2.0)

Not here: who answers them (`regenerate.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.errors import ResourceError, UsageError
from retrofit.recipes.problems import did_you_mean
from retrofit.recipes.text.formats import Asked
from retrofit.recipes.text.sources import Indexed, Source, first_by_hash

if TYPE_CHECKING:
    from retrofit.recipes.schema import Data

Rows = tuple[list[str], Callable[[int], Asked]]
"""Ids, and what reads the prompt of one by its number."""
PREFIX = "prompts:"
EVERYDAY = Path(__file__).with_name("everyday.jsonl")
TASKS = (
    *("advanced_geometry", "aiw", "base_conversion", "basic_arithmetic", "bitwise_arithmetic", "caesar_cipher"),
    *("calendar_arithmetic", "chain_sum", "coin_flip", "count_bits", "course_schedule", "cryptarithm"),
    *("decimal_arithmetic", "family_relationships", "fraction_simplification", "gcd", "group_anagrams", "jugs"),
    *("knights_knaves", "largest_island", "lcm", "leg_counting", "letter_counting", "letter_jumble", "maze"),
    *("mini_sudoku", "number_filtering", "number_format", "number_sequence", "number_sorting", "palindrome_generation"),
    *("prime_factorization", "products", "propositional_logic"),
    *("rotate_matrix", "self_reference", "sentence_reordering", "shortest_path", "simple_equations"),
    *("simple_geometry", "simple_integration", "spell_backward", "spiral_matrix", "string_manipulation", "syllogism"),
    *("time_intervals", "tower_of_hanoi", "word_ladder", "word_sequence_reversal", "word_sorting"),
)
"""Tasks of reasoning-gym unless a recipe names some: texts to be read, quickly made and always the same for a seed.
None is built from the questions of a benchmark."""


def prompts(name: str, data: Data, held_out: int) -> Source:
    """The prompts of a source whose name begins with PREFIX.

    Raises UsageError for others, and where nothing answers them; ResourceError without the package that makes them.
    """
    makers: dict[str, Callable[[Data], Rows]] = {"everyday": _everyday, "reasoning-gym": _reasoning_gym}
    kind = name.removeprefix(PREFIX)
    if kind not in makers:
        known = [f"{PREFIX}{known}" for known in makers]
        raise UsageError(
            f"data.source {name}: no such prompts{did_you_mean(name, known)}", f"name {' or '.join(known)}"
        )
    if data.responses != "regenerate":
        raise UsageError(
            f"data.source {name}: holds prompts without responses",
            "set data.responses=regenerate to let the base answer",
        )
    ids, read = makers[kind](data)
    return Indexed(ids, first_by_hash(ids, name, held_out), read, ids.__getitem__)


@cache
def everyday() -> tuple[Mapping[str, str], ...]:
    """The instructions, each with its `category` and `prompt`."""
    return tuple(json.loads(line) for line in EVERYDAY.read_text(encoding="utf-8").splitlines())


def _everyday(data: Data) -> Rows:
    rows = everyday()
    ids = [f"everyday:{number}" for number in range(1, len(rows) + 1)]
    return ids, lambda number: Asked(rows[number]["prompt"])


def _reasoning_gym(data: Data) -> Rows:
    """Prompts of the tasks in turn, each task's own by its number."""
    names = tuple(dict.fromkeys(data.tasks or TASKS))[: data.prompts]
    questions = _questions(names, data.prompts, data.seed)
    ids = [f"reasoning-gym:{names[n % len(names)]}:{n // len(names)}" for n in range(data.prompts)]
    return ids, lambda number: Asked(questions[number])


@cache
def _questions(names: tuple[str, ...], count: int, seed: int) -> Sequence[str]:
    """Made once: every epoch reads them again."""
    made = _tasks(names, -(-count // len(names)), seed)
    return [str(made[n % len(made)][n // len(made)]["question"]) for n in range(count)]


def _tasks(names: Sequence[str], size: int, seed: int) -> list[Any]:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ResourceError(
            f"data.source {PREFIX}reasoning-gym is made by the package `reasoning-gym`, which does not load: {error}",
            "pip install 'retrofit-lm[reasoning-gym]', or name another source",
        ) from None
    wrong = next((name for name in names if name not in DATASETS or name == "composite"), None)
    if wrong is not None:
        known = sorted(set(DATASETS) - {"composite"})
        raise UsageError(
            f"data.tasks: reasoning-gym has no task `{wrong}`{did_you_mean(wrong, known)}", f"it has {', '.join(known)}"
        )
    return [reasoning_gym.create_dataset(name, size=size, seed=seed) for name in names]
