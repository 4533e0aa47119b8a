"""`python -m benchmarks.train`: what a training step costs, beside its clean forward alone and a straightforward step.

The straightforward step (`naive_training.py`) has the same documents, anchors, losses and gradients; that they are the
same is checked.  Ours, naive and the clean forward alone take turns.  Seconds are wall time; processor seconds stand
beside them, for machines that are not idle.  Offline, on the CPU in fp32.  Exits 3 if a bar is missed or a gradient
differs.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

from benchmarks.bars import VERDICTS
from benchmarks.common import ROOT, Bar, say, section, table, write
from benchmarks.cpu.figures import Clock
from benchmarks.naive_training import NaiveTrainer
from retrofit.adapters.attach import attach
from retrofit.adapters.layout import DraftLayout
from retrofit.errors import RetrofitError
from retrofit.hub import load_base
from retrofit.machine import forget_peak, peak_resident, resident
from retrofit.named_bases import EMBEDDED
from retrofit.recipes.schema import Recipe, load_recipe
from retrofit.recipes.text.documents import Document, documents
from retrofit.recipes.text.windows import windows
from retrofit.recipes.training import step
from retrofit.recipes.training.clean.forward import clean_forward
from retrofit.recipes.training.order import Batch
from retrofit.recipes.training.step import Trainer
from retrofit.runtime.backends.hf.backend import wrap

RESULTS = ROOT / "results" / "train-cpu.json"
BAR = 1.5
PROMPT = 64
"""Tokens of a random document that are no response."""
CLEAN, VOCABULARY = "clean rows", "vocabulary and losses"
LENGTHS = (1024, 2048, 4096, 8192)
SAME = 1e-4
"""Largest difference of a gradient from the naive one, relative to its tensor's largest: sums run in other orders."""


@dataclass(frozen=True)
class Job:
    """A step of ours and the naive one over the same weights and documents."""

    ours: Trainer
    naive: Trainer
    batch: Batch


def qwen3(vocab: int) -> PreTrainedConfig:
    """Shaped as Qwen3-0.6B, smaller: 113M parameters beside the vocabulary."""
    return Qwen3Config(
        vocab_size=vocab, hidden_size=768, intermediate_size=2304, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=6, head_dim=128, tie_word_embeddings=True, max_position_embeddings=32768,
    )  # fmt: skip


def deep(vocab: int) -> PreTrainedConfig:
    """Qwen3-0.6B at half its width, 20 of its 28 layers: 79M parameters beside the vocabulary."""
    return Qwen3Config(
        vocab_size=vocab, hidden_size=512, intermediate_size=1536, num_hidden_layers=20, num_attention_heads=8,
        num_key_value_heads=4, head_dim=128, tie_word_embeddings=True, max_position_embeddings=32768,
    )  # fmt: skip


def small(window: bool) -> PreTrainedConfig:
    """For memory: two layers of each kind, so that length is what counts."""
    return Gemma3TextConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=32768, sliding_window=256,
        layer_types=["sliding_attention", "full_attention"] * 2 if window else ["full_attention"] * 4,
    )  # fmt: skip


def job(model: PreTrainedModel, recipe: Recipe, found: list[Document]) -> Job:
    """Adapter weights are given values first: at the identity half of the gradients would be 0."""
    layout, a = DraftLayout(**recipe.draft.model_dump()), recipe.adapter
    sizes = {"rank": a.rank, "alpha": a.alpha, "markov_rank": a.markov_rank, "confidence": a.confidence}
    attached, backend = wrap(model, lambda: attach(model, layout, targets=a.targets, **sizes, seed=0))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in attached.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.02)
    batch = [(document, 0) for document in found]
    return Job(Trainer(attached, backend, recipe), NaiveTrainer(attached, backend, recipe), batch)


def embedded() -> Job:
    base, recipe = load_base(EMBEDDED, dtype="float32", offline=True), load_recipe(None)
    found = windows(documents(recipe.data, base.tokenizer, part="train", seed=0), recipe.data.max_length)
    return job(base.model, recipe, list(islice(found, recipe.train.batch_size)))


def of_random(config: PreTrainedConfig, sequences: int, length: int, **overrides: Any) -> Job:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    response = tuple(position >= PROMPT for position in range(length))
    texts = [torch.randint(0, config.vocab_size, (length,), generator=generator).tolist() for _ in range(sequences)]
    found = [Document(str(number), tuple(text), response) for number, text in enumerate(texts)]
    settings = {"train.precision": "float32", "data.max_length": length, "train.batch_size": sequences, **overrides}
    return job(model, load_recipe("default", settings), found)


def of_folder(folder: str) -> Job:
    base = load_base(folder, dtype="float32", offline=True)
    recipe = load_recipe("default", {"train.precision": "float32", "data.max_length": 1024})
    found = list(islice(windows(documents(recipe.data, base.tokenizer, part="train", seed=0), 1024), 2))
    return job(base.model, recipe, found)


DENSE = {"train.anchors": 256, "draft.block": 16}
"""As trainers of block drafters lay blocks out: each token stands in two blocks, and both in their teachers' way."""

SETTINGS: dict[str, tuple[str, Callable[[], Job]]] = {
    "tiny": ("embedded base, recipe tiny", embedded),
    "49k": ("random Qwen3, vocabulary 49,152, 1 x 1,024", lambda: of_random(qwen3(49_152), 1, 1024)),
    "dense": (
        "random Qwen3, vocabulary 49,152, 1 x 2,048, 256 blocks of 16",
        lambda: of_random(deep(49_152), 1, 2048, **DENSE),
    ),
    "49k-long": ("random Qwen3, vocabulary 49,152, 1 x 2,048", lambda: of_random(qwen3(49_152), 1, 2048)),
    "150k": ("random Qwen3, vocabulary 151,936, 1 x 1,024", lambda: of_random(qwen3(151_936), 1, 1024)),
    "150k-long": ("random Qwen3, vocabulary 151,936, 1 x 2,048", lambda: of_random(qwen3(151_936), 1, 2048)),
}


def gradients(trainer: Trainer, batch: Batch) -> tuple[Any, list[Tensor]]:
    result = trainer.gradients([batch])
    taken = [p.grad.clone() for p in trainer.trained if p.grad is not None]
    trainer.optimizer.zero_grad(set_to_none=True)
    return result, taken


def compare(made: Job, repeats: int) -> dict[str, Any]:
    """Times of the three, by turns, and how far gradients and losses are apart."""
    found = [document for document, _ in made.batch]
    work: dict[str, Callable[[], Any]] = {
        "clean": lambda: clean_forward(made.ours.backend, found),
        "ours": lambda: gradients(made.ours, made.batch),
        "naive": lambda: gradients(made.naive, made.batch),
    }
    wall: dict[str, list[float]] = {name: [] for name in work}
    processor: dict[str, list[float]] = {name: [] for name in work}
    last: dict[str, Any] = {}
    for _ in range(repeats):
        for name, run in work.items():
            last.pop("clean", None)
            begin, used = time.perf_counter(), time.process_time()
            last[name] = run()
            wall[name].append(time.perf_counter() - begin)
            processor[name].append(time.process_time() - used)
    (ours, one), (naive, two) = last["ours"], last["naive"]
    apart = {n: relative(a, b) for n, a, b in zip(made.ours.names, one, two, strict=True)}
    losses = {key: abs(ours.loss[key] - naive.loss[key]) / max(abs(naive.loss[key]), 1e-9) for key in naive.loss}
    least, cpu = ({n: min(t) for n, t in times.items()} for times in (wall, processor))
    return {
        "parameters": sum(p.numel() for p in made.ours.backend.model.parameters()),
        "sequences": [len(document.tokens) for document in found],
        "clean_rows": ours.clean_rows,
        "draft_rows": ours.draft_rows,
        "repeats": repeats,
        "seconds": {n: round(t, 3) for n, t in least.items()},
        "median_seconds": {n: round(statistics.median(t), 3) for n, t in wall.items()},
        "processor_seconds": {n: round(t, 3) for n, t in cpu.items()},
        "naive_over_ours": round(least["naive"] / least["ours"], 3),
        "naive_over_ours_processor": round(cpu["naive"] / cpu["ours"], 3),
        "draft_rows_per_second": round(ours.draft_rows / least["ours"], 1),
        "step_over_clean_forward": round(least["ours"] / least["clean"], 2),
        "largest_gradient_difference": max(apart.values()),
        "largest_gradient_difference_in": max(apart, key=lambda name: apart[name]),
        "largest_loss_difference": max(losses.values()),
        "parts_seconds": parts_of(made),
    }


def parts_of(made: Job) -> dict[str, float]:
    """Seconds of one step of ours, by part.

    Draft rows go through the trunk forwards and backwards; what is left are blocks, buffers of gradients, and Python.
    """
    clock = Clock(whole=(CLEAN, VOCABULARY))
    trunk = type(made.ours.backend)
    with (
        patch.object(step, "clean_forward", clock.timed(CLEAN, step.clean_forward)),
        patch.object(step, "backward_draft", clock.timed(VOCABULARY, step.backward_draft)),
        patch.object(step, "backward_diffusion", clock.timed(VOCABULARY, step.backward_diffusion)),
        patch.object(trunk, "run_trunk", clock.timed("draft rows, forward", trunk.run_trunk)),
        patch.object(Tensor, "backward", clock.timed("draft rows, backward", Tensor.backward)),
        clock.section("the rest"),
    ):
        made.ours.gradients([made.batch])
        with clock.section("optimizer"):
            made.ours.update()
    return {name: round(seconds, 3) for name, seconds in clock.spent.items()}


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest number."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


def peaks(window: bool) -> dict[str, Any]:
    """Most memory a process needs for one step, beyond the model, for documents of several lengths."""
    found = {}
    for length in LENGTHS:
        command = [sys.executable, "-m", "benchmarks.train", "--peak", f"{'window' if window else 'full'}:{length}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found[str(length)] = int(done.stdout.strip().splitlines()[-1])
        say(f"  {'window' if window else 'full'} {length}: {found[str(length)] / 1e6:.1f} MB")
    return found


def peak(which: str) -> int:
    """Bytes one step adds to the most this process has used: one document, 16 anchors."""
    kind, length = which.split(":")
    anchors = {"train.anchors": 16, "adapter.rank": 8, "adapter.markov_rank": 16}
    warm = of_random(small(kind == "window"), 1, 256, **anchors)
    warm.ours.gradients([warm.batch])
    made = of_random(small(kind == "window"), 1, int(length), **anchors)
    forget_peak()
    before = resident()
    made.ours.gradients([made.batch])
    return peak_resident() - before


@click.command(help=__doc__)
@click.option("--model", "names", multiple=True, help=f"{', '.join(SETTINGS)} or a folder; repeatable. [default: all]")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="[default: all]")
@click.option("--memory/--no-memory", "with_memory", default=True, help="Also measure memory against length.")
@click.option("--json", "out", type=click.Path(path_type=Path), help="[default: results/train-cpu.json]")
@click.option("--peak", "which", hidden=True)
def main(
    names: tuple[str, ...], repeats: int, threads: int | None, with_memory: bool, out: Path | None, which: str | None
) -> None:
    if threads:
        torch.set_num_threads(threads)
    if which:
        print(peak(which))
        return
    options = [*(f"--model {n}" for n in names), f"--repeats {repeats}", *([f"--threads {threads}"] if threads else [])]
    command = " ".join(["python -m benchmarks.train", *options])
    path = out or RESULTS
    failed = False
    try:
        for name in names or SETTINGS:
            title, make = SETTINGS.get(name, (name, lambda name=name: of_folder(name)))
            say(f"== {title}")
            begin = time.perf_counter()
            figures = compare(make(), repeats)
            failed |= not show(figures)
            write(path, {name: section(command, time.perf_counter() - begin, bars_of(title, figures), figures)})
        if with_memory:
            for window in (False, True):
                begin, kind = time.perf_counter(), "sliding window" if window else "full attention"
                title = f"memory of a step, {kind}"
                say(f"== {title}")
                found = peaks(window)
                sizes = ", ".join(f"{int(length):,}: {size / 1e6:.0f} MB" for length, size in found.items())
                bars = [Bar(f"{title}, by length", "stated", sizes, None)]
                write(path, {title: section(command, time.perf_counter() - begin, bars, {"bytes": found})})
    except RetrofitError as error:
        say(f"error: {error}" + (f"\n{error.hint}" if error.hint else ""))
        sys.exit(error.exit_code)
    say(f"wrote {path}")
    sys.exit(3 if failed else 0)


def show(figures: dict[str, Any]) -> bool:
    """Print one setting's figures; whether its bar is met and the gradients are the naive ones."""
    seconds, cpu, median = (figures[k] for k in ("seconds", "processor_seconds", "median_seconds"))
    rows = [["", "least s", "median s", "processor s"]]
    rows += [[n, f"{seconds[n]:.2f}", f"{median[n]:.2f}", f"{cpu[n]:.2f}"] for n in seconds]
    print(table(rows))
    print("  " + ", ".join(f"{name} {taken:.2f} s" for name, taken in figures["parts_seconds"].items()))
    same = figures["largest_gradient_difference"] <= SAME
    met = figures["naive_over_ours"] >= BAR
    print(
        f"  naive / ours {figures['naive_over_ours']:.2f} (bar {BAR}: {VERDICTS[met]}; by processor seconds "
        f"{figures['naive_over_ours_processor']:.2f}), {figures['draft_rows_per_second']:,.0f} draft rows/s, a step is "
        f"{figures['step_over_clean_forward']:.2f} clean forwards\n  gradients differ by at most "
        f"{figures['largest_gradient_difference']:.1e} of the largest ({figures['largest_gradient_difference_in']}), "
        f"losses by {figures['largest_loss_difference']:.1e}",
        flush=True,
    )
    return same and met


def bars_of(title: str, figures: dict[str, Any]) -> list[Bar]:
    """What the README says of a setting."""
    ratio, same = figures["naive_over_ours"], figures["largest_gradient_difference"]
    rates = f"{figures['step_over_clean_forward']:.1f}, {figures['draft_rows_per_second']:,.0f}"
    return [
        Bar(f"straightforward step / ours, {title}", f">= {BAR}", f"{ratio:.2f}", ratio >= BAR),
        Bar("  largest difference of a gradient", f"<= {SAME:.0e}", f"{same:.1e}", same <= SAME),
        Bar("  a step in clean forwards, draft rows/s", "stated", rates, None),
    ]


if __name__ == "__main__":
    main()
