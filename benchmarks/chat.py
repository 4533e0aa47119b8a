"""What kept prefixes are worth in a conversation.  `python -m benchmarks.chat --model FOLDER`

Ten turns through the model's chat template, 3,000 tokens in all.  Each turn is answered with prefixes kept and without
them, one after the other, first the one and then the other in turn; what is timed is the first token.  Exits 3 if a bar
is missed, 4 where prefixes are not kept on this machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.common import ROOT, Bar, say, section, write
from retrofit.hub import load_base
from retrofit.machine import cpu_name
from retrofit.runtime.engine import Engine
from retrofit.runtime.prefixes.reuse import why_not

TURNS, TOTAL, ANSWER = 10, 3000, 128
"""Turns, tokens of the whole conversation, and of an answer."""
BAR = 0.2
RESULTS = ROOT / "results" / "chat-cpu.json"
TEXT = ("docs/how-it-works.md", "docs/troubleshooting.md", "docs/tutorial.md")
"""What the user says, cut into turns."""


def said(tokenizer: PreTrainedTokenizerBase, seed: int) -> list[str]:
    """What the user says in each turn, so long that the conversation has TOTAL tokens."""
    text = "\n\n".join((ROOT / name).read_text(encoding="utf-8") for name in TEXT)
    tokens = tokenizer(text)["input_ids"]
    template = len(tokenizer.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True))
    count = TOTAL // TURNS - ANSWER - template
    first = seed * count * TURNS // 3
    return [tokenizer.decode(tokens[first + n * count : first + (n + 1) * count]) for n in range(TURNS)]


@contextmanager
def without_prefixes(engine: Engine) -> Iterator[None]:
    kept, engine.prefixes = engine.prefixes, None
    try:
        yield
    finally:
        engine.prefixes = kept


def answered(engine: Engine, messages: Sequence[Any], mode: str) -> tuple[float, Any]:
    """(seconds to the first token, the result)."""
    begin = time.perf_counter()
    first = 0.0
    for event in engine.stream([messages], mode, max_new_tokens=ANSWER, ignore_eos=True, with_text=False):
        first = first or time.perf_counter() - begin
        result = event.result
    return first, result


def converse(engine: Engine, mode: str, seed: int) -> dict[str, Any]:
    """One conversation: seconds to the first token of each turn, kept and not, and whether the tokens are the same."""
    assert engine.tokenizer is not None and engine.prefixes is not None
    engine.prefixes.clear()
    messages: list[dict[str, str]] = []
    turns: dict[str, list[Any]] = {"prompt": [], "reused": [], "kept": [], "without": []}
    same = True
    for number, text in enumerate(said(engine.tokenizer, seed)):
        messages.append({"role": "user", "content": text})

        def plain() -> tuple[float, Any]:
            with without_prefixes(engine):
                return answered(engine, messages, mode)

        if number % 2:
            (without, other), (kept, result) = plain(), answered(engine, messages, mode)
        else:
            (kept, result), (without, other) = answered(engine, messages, mode), plain()
        same = same and result.tokens == other.tokens
        messages.append({"role": "assistant", "content": result.text})
        found = {"prompt": len(result.prompt), "reused": result.stats.reused, "kept": kept, "without": without}
        for name, value in found.items():
            turns[name].append(value)
        say(f"turn {number + 1}: " + ", ".join(f"{name} {value:.6g}" for name, value in found.items()))
    return {**turns, "same": same}


@click.command(help=__doc__)
@click.option("--model", type=click.Path(exists=True, path_type=Path), required=True, help="A model's folder.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--mode", type=click.Choice(["ar", "self_spec"]), default="ar", show_default=True)
@click.option("--conversations", type=click.IntRange(1), default=3, show_default=True)
@click.option("--write/--no-write", "keep", default=True, help=f"Put the figures into results/{RESULTS.name}.")
def main(model: Path, dtype: str, mode: str, conversations: int, keep: bool) -> None:
    base = load_base(str(model), dtype=dtype)
    begin = time.perf_counter()
    with closing(Engine.from_model(base.model, base.tokenizer, packed=True)) as engine:
        settled = time.perf_counter() - begin
        if engine.prefixes is None:
            say(f"prefixes are not kept here: {why_not(engine.backend)}")
            sys.exit(4)
        say(f"{model.name} in {dtype} at {engine.backend.exact} on {cpu_name()}, {torch.get_num_threads()} threads")
        found = [converse(engine, mode, seed) for seed in range(conversations)]
        ratio = median(one["kept"][-1] / one["without"][-1] for one in found)
        same = sum(one["same"] for one in found)
        seconds, level = (
            [median(one[name][-1] for one in found) for name in ("kept", "without")],
            engine.backend.exact,
        )
    name = f"{model.name}, {dtype}"
    bars = [
        Bar(
            f"{name}: first token of turn {TURNS}, of that without prefixes kept",
            f"<= {BAR}",
            f"{ratio:.3f} ({seconds[0]:.2f} of {seconds[1]:.2f} s)",
            ratio <= BAR,
        ),
        Bar(f"{name}: conversations with the same tokens", "all", f"{same}/{len(found)}", same == len(found)),
    ]
    for bar in bars:
        say(f"{bar.what}: {bar.figure} (bar {bar.bar})")
    if keep:
        given = [model.name if one == str(model) else one for one in sys.argv[1:]]
        command = " ".join(["python -m benchmarks.chat", *given])
        figures = {"level": level, "settle_seconds": round(settled, 2), "conversations": found}
        write(RESULTS, {f"chat, {name}": section(command, time.perf_counter() - begin, bars, figures)})
    sys.exit(0 if all(bar.met for bar in bars) else 3)


if __name__ == "__main__":
    main()
