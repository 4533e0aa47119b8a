"""Does `self_spec` in half precision say what `ar` says, token for token?  `python -m benchmarks.exact`

Random models of several families, wide enough for the products of real ones to show, in bfloat16, at the level that
`exact=auto` finds to hold on this machine, and at `off` beside it.  Drafts are the truth with planted mistakes, so that
accepted prefixes of all lengths occur.  With --model a real model takes their place, with --artifact one that was
converted, drafting for itself.  Exits 3 if a text differs at the level that auto picks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.common import ROOT, Bar, say, section, write
from benchmarks.sections import from_tests
from retrofit.adapters.layout import DraftLayout
from retrofit.gguf_files import pretrained
from retrofit.hub import load_base
from retrofit.runtime.engine import Engine
from retrofit.runtime.host import modes

FAMILIES = ("llama", "qwen3", "gemma3", "phi3", "qwen3_moe", "deepseek_v3")
WIDE = {
    "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 1536, "moe_intermediate_size": 1536,
    "max_position_embeddings": 2048,
}  # fmt: skip
"""Rows of products with more than 1,024 inputs depend on each other the most."""
STD = 0.06
"""Three times transformers' initialisation: texts of random models are lively then."""
WAYS: dict[str, dict[str, Any]] = {
    "two_forward": {"strategy": "two_forward"},
    "fused chain": {"strategy": "fused", "tree": 0},
    "fused tree": {"strategy": "fused", "tree": 18},
    "auto": {"strategy": "auto"},
    "prompt_lookup": {"strategy": "prompt_lookup"},
}
BATCHES = (1, 3, 8)
TEMPERATURES = (0.0, 0.8)
LENGTHS = (3, 40, 12, 90, 5, 61, 25, 130)
"""Prompt tokens, in turn."""
FOLDER = click.Path(exists=True, path_type=Path)
RESULTS = ROOT / "results" / "exact-cpu.json"


@dataclass
class Subject:
    """A model to decode with; engine: at a level of exactness."""

    name: str
    dtype: torch.dtype
    load: Any
    vocab: int
    oracle: bool
    tokenizer: Any = None

    def engine(self, exact: str) -> Engine:
        engine: Engine = self.load(exact)
        return engine


def random_family(name: str, dtype: torch.dtype) -> Subject:
    config = from_tests("tiny_models").CONFIGS[name]()
    config.update(WIDE)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=STD)
    return Subject(name, dtype, partial(untrained, model.to(dtype)), WIDE["vocab_size"], oracle=True)


def untrained(model: PreTrainedModel, exact: str) -> Engine:
    engine = Engine.from_model(model, layout=DraftLayout(block=4), exact=exact)
    return from_tests("decoding").randomise(engine)


def prompts_for(subject: Subject, count: int) -> list[Any]:
    lengths = [LENGTHS[i % len(LENGTHS)] for i in range(count)]
    return from_tests("decoding").random_prompts(lengths, vocab=subject.vocab)


def compare(
    subject: Subject, engine: Engine, prompts: Sequence[Any], tokens: int, ways: Sequence[str], batches: Sequence[int]
) -> Iterator[tuple[str, int, int]]:
    """(what, equal texts, texts) of every way, batch and temperature against own `ar`, one request at a time."""
    for temperature in TEMPERATURES:
        options = {"max_new_tokens": tokens, "temperature": temperature, "seed": 7, "ignore_eos": True}
        truth = [r.tokens for r in engine.generate(prompts, "ar", batch_size=1, **options)]
        yield f"ar, batch 8, T = {temperature:g}", *counted(engine, prompts, truth, mode="ar", batch_size=8, **options)
        known = {0: truth[0], **{7 + i: text for i, text in enumerate(truth)}}  # 0: what `auto` times its plans with
        oracle = from_tests("decoding").Oracle(known, vocab=subject.vocab)
        planted = patch.object(modes, "draft_tokens", oracle) if subject.oracle else nullcontext()
        with planted:
            for way in ways:
                for batch in batches:
                    found = counted(engine, prompts, truth, **WAYS[way], batch_size=batch, **options)
                    yield f"{way}, batch {batch}, T = {temperature:g}", *found


def counted(engine: Engine, prompts: Sequence[Any], truth: Sequence[list[int]], **options: Any) -> tuple[int, int]:
    got = [r.tokens for r in engine.generate(prompts, **options)]
    return sum(a == b for a, b in zip(got, truth, strict=True)), len(truth)


def measure(subject: Subject, prompts: Sequence[Any], tokens: int, ways: Sequence[str]) -> tuple[Bar, dict[str, Any]]:
    figures: dict[str, Any] = {}
    for exact in ("auto", "off"):
        with closing(subject.engine(exact)) as engine:
            level = engine.backend.exact
            say(f"{subject.name}: exact={exact} keeps {level}")
            found = {}
            batches = BATCHES if exact == "auto" else BATCHES[-1:]  # what is known to differ need not be known so well
            for what, equal, total in compare(subject, engine, prompts, tokens, ways, batches):
                say(f"  {what}: {equal}/{total}")
                found[what] = [equal, total]
            figures[exact] = {"level": level, "why": engine.settled.why if engine.settled else None, "texts": found}
    kept, free = (figures[exact]["texts"].values() for exact in ("auto", "off"))
    equal, total = sum(e for e, _ in kept), sum(t for _, t in kept)
    worst = min(e for e, _ in free)
    name = str(subject.dtype).removeprefix("torch.")
    level = figures["auto"]["level"]
    text = f"{equal}/{total} at {level}; off: worst {worst}/{len(prompts)}"
    bar = Bar(f"{subject.name}, {name}: self_spec = own ar", "all identical", text, equal == total and level != "off")
    return bar, figures


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(FAMILIES), help="A family; may be given several times.")
@click.option(
    "--model", type=click.Path(exists=True, path_type=Path), help="A model's folder, with an untrained adapter."
)
@click.option(
    "--artifact", type=click.Path(exists=True, path_type=Path), help="A converted model, drafting for itself."
)
@click.option("--way", multiple=True, type=click.Choice(list(WAYS)), help="A strategy; may be given several times.")
@click.option("--prompts", type=click.IntRange(1), default=32, show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--dtype", type=click.Choice(["bfloat16", "float16"]), default="bfloat16", show_default=True)
@click.option("--write/--no-write", "keep", default=True, help=f"Put the figures into results/{RESULTS.name}.")
def main(
    only: tuple[str, ...],
    model: Path | None,
    artifact: Path | None,
    way: tuple[str, ...],
    prompts: int,
    tokens: int,
    dtype: str,
    keep: bool,
) -> None:
    kind = getattr(torch, dtype)
    if artifact is not None:
        config = AutoConfig.from_pretrained(
            **pretrained(load_artifact(artifact, dtype, "off").base.place)
        ).get_text_config()
        subjects = [Subject(artifact.name, kind, partial(load_artifact, artifact, dtype), config.vocab_size, False)]
    elif model is not None:
        base = load_base(str(model), dtype=dtype).model
        vocab = base.config.get_text_config().vocab_size
        subjects = [Subject(model.name, kind, partial(untrained, base), vocab, True)]
    else:
        subjects = [random_family(name, kind) for name in only or FAMILIES]
    met = True
    for subject in subjects:
        begin = time.perf_counter()
        bar, figures = measure(subject, prompts_for(subject, prompts), tokens, way or list(WAYS))
        say(f"{bar.what}: {bar.figure}")
        met = met and bar.met is True
        if keep:
            command = " ".join(["python -m benchmarks.exact", *sys.argv[1:]])
            write(RESULTS, {f"exact, {subject.name}": section(command, time.perf_counter() - begin, [bar], figures)})
    sys.exit(0 if met else 3)


def load_artifact(folder: Path, dtype: str, exact: str) -> Engine:
    return Engine.load(folder, dtype=dtype, exact=exact, offline=True)


if __name__ == "__main__":
    main()
