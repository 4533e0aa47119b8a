"""What a step of each kind costs against one of `ar`, and where its time goes.

Steps are taken as decoding takes them, drafts, token choice and all, at one place of one text: its drafts are the text
itself, so that every one is accepted and the block behind the last one is drafted from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import AttentionInterface

from benchmarks.common import Bar, say
from benchmarks.cpu.figures import Clock, bandwidth, floor_ms, interleaved, medians, seconds
from benchmarks.cpu.subjects import DTYPES, Task, random_tokens
from retrofit.adapters.gated_lora import GatedLoraLinear
from retrofit.eval.speed import ratio_of
from retrofit.runtime.backends.hf import attention
from retrofit.runtime.backends.hf.recorded.steps import AFTER, PROOFS
from retrofit.runtime.backends.threads import thread_limit
from retrofit.runtime.engine import Engine
from retrofit.runtime.host import modes
from retrofit.runtime.plan import StepPlan
from retrofit.runtime.request import Request
from retrofit.runtime.rules.sampling import Processing
from retrofit.runtime.rules.tree import UNKNOWN_CHANCE, DraftTree, grow
from retrofit.runtime.run import Run

CONTEXT = 200
TREE_NODES, TREE_BLOCKS = 23, 3
"""With the seed and blocks of 8 rows: a tree forward of 48 rows."""
BARS = {"bfloat16": {"fused, 9 + 8": 1.3, "tree, 48": 2.2}, "float32": {"fused, 9 + 8": 1.4, "tree, 48": 2.2}}
PARTS = ("products", "attention", "norms and elementwise", "drafting", "token choice", "Python and the rest")
DRAFTING, REST = PARTS[3], PARTS[5]
TURNS = 15
AR = "ar"


@dataclass(frozen=True)
class Step:
    """plan: of one request; drafts: what it verifies, on a tree or in a chain."""

    plan: StepPlan
    drafts: list[int]
    tree: DraftTree | None = None


class Stage:
    """A text of an engine, in its cache, whose next step can be taken again and again."""

    def __init__(self, engine: Engine, prompt: list[int]):
        self.engine, self.prompt, self.backend = engine, prompt, engine.backend
        room = len(prompt) + 2 * engine.layout.block + TREE_NODES
        cache = self.backend.new_cache(1, room)
        cache.open(0, room)
        self.run = Run(self.backend, cache, Processing(), engine.layout, engine.limits, "fused")
        with torch.inference_mode():
            modes.prefill_step(self.run, [self._request()])

    def _request(self) -> Request:
        request = Request(0, list(self.prompt), 0, 64, frozenset(), slot=0)
        self.run.watch([request])
        return request

    @torch.inference_mode()
    def take(self, step: Step) -> float:
        """Milliseconds of the step.  Raises AssertionError where drafts are not accepted that are the text."""
        request = self._request()
        request.committed = len(self.prompt) - 1
        request.drafts, request.tree = list(step.drafts), step.tree
        blocks = step.plan.blocks * self.run.layout.block
        work = (1 + step.plan.verify + blocks) * self.backend.work_per_row
        with thread_limit(self.backend.device, work):
            took = seconds(lambda: modes.speculative_step(self.run, [request], [step.plan]))
        assert not step.plan.hang or request.drafts, "no block came true"
        return 1000 * took


def steps(engine: Engine, prompt: list[int]) -> dict[str, Step]:
    """Each kind, by the name of its rows."""
    drafts = engine.layout.drafts
    options: dict[str, Any] = {"ignore_eos": True, "original_settings": False, "max_new_tokens": drafts + 1}
    text = engine.generate([prompt], "ar", **options)[0].tokens
    tree = grow(UNKNOWN_CHANCE * drafts, TREE_NODES)
    hang = ends(tree, TREE_BLOCKS)
    return {
        AR: Step(StepPlan(), []),
        f"verify, {1 + drafts}": Step(StepPlan(drafts), text[:drafts]),
        f"draft, 1 + {engine.layout.block}": Step(StepPlan(0, (0,), drafts), []),
        f"fused, {1 + drafts} + {engine.layout.block}": Step(StepPlan(drafts, (drafts,), drafts), text[:drafts]),
        "tree, 48": Step(StepPlan(tree.nodes, hang, tree.nodes, tree), on_tree(tree, text, engine), tree),
    }


def best_path(tree: DraftTree) -> list[int]:
    """Nodes that hold the best candidate all the way from the seed."""
    path = [0]
    for node, (parent, rank) in enumerate(zip(tree.parents, tree.ranks, strict=True)):
        if parent == path[-1] and rank == 0 and node:
            path.append(node)
    return path


def ends(tree: DraftTree, count: int) -> tuple[int, ...]:
    """Where blocks hang: behind the best path, and where else it most likely ends."""
    last, likeliest = best_path(tree)[-1], tree.likeliest_ends(count)
    return likeliest if last in likeliest else tuple(sorted([last, *tree.likeliest_ends(count - 1)]))


def on_tree(tree: DraftTree, text: list[int], engine: Engine) -> list[int]:
    """The nodes' tokens: the text along the best path, something else beside it."""
    vocab, best = engine.backend.head.vocab, set(best_path(tree))
    places = list(zip(tree.depths, tree.ranks, strict=True))
    return [
        text[depth - 1] if node in best else (text[depth - 1] + 1 + rank) % vocab
        for node, (depth, rank) in enumerate(places)
        if node
    ]


def costs(task: Task) -> tuple[list[Bar], dict[str, Any]]:
    bars, figures = [], {}
    for dtype in task.dtypes:
        say(f"{dtype}: steps")
        engine = task.engine(dtype, prefix_cache=0)
        prompt = random_tokens(CONTEXT, task.vocab)
        stage = Stage(engine, prompt)
        ways = {name: partial(stage.take, step) for name, step in steps(engine, prompt).items()}
        interleaved(ways, AFTER + PROOFS)
        found = interleaved(ways, 5 if task.quick else TURNS)
        ratios = {name: round(ratio_of(found, name, AR), 3) for name in ways}
        for name, ratio in ratios.items():
            if name != AR:
                bar = BARS[dtype].get(name)
                what, met = f"a step of {name} rows / ar, {dtype}", None if bar is None else ratio <= bar
                ms = f"{ratio:.2f} ({medians(found)[name]:.1f} ms, ar {medians(found)[AR]:.1f})"
                bars.append(Bar(what, "" if bar is None else f"<= {bar:g}", ms, met))
        figures[dtype] = {"context": CONTEXT, "median_ms": medians(found), "ratio": ratios, "ms": found}
    return bars, figures


def split(task: Task) -> tuple[list[Bar], dict[str, Any]]:
    """Milliseconds of each part of a step, beside the step without clocks and what reading memory takes at least."""
    bars, figures = [], {}
    speed = bandwidth()
    for dtype in task.dtypes:
        say(f"{dtype}: where a step's time goes")
        engine = task.engine(dtype, prefix_cache=0)
        prompt = random_tokens(CONTEXT, task.vocab)
        stage = Stage(engine, prompt)
        least = floor_ms(*read_bytes(engine, CONTEXT), speed)
        kinds = steps(engine, prompt)
        turns = 5 if task.quick else TURNS
        interleaved({name: partial(stage.take, step) for name, step in kinds.items()}, AFTER + PROOFS)
        plain = interleaved({name: partial(stage.take, step) for name, step in kinds.items()}, turns)
        table: dict[str, Mapping[str, float]] = {}
        for name, step in kinds.items():
            table[name] = parts_of(stage, step, turns)
        figures[dtype] = {"context": CONTEXT, "floor_ms": least, "whole_ms": medians(plain), "parts_ms": table}
        for name in kinds:
            whole, counted = medians(plain)[name], sum(table[name].values())
            text = f"{whole:.1f} ms, {whole / least:.1f} x floor; {counted:.1f} ms with clocks"
            bars.append(Bar(f"a step of {name} rows, {dtype}", f"floor {least:.1f} ms", text, None))
    return bars, {"read_bytes_per_second": speed, **figures}


def parts_table(figures: dict[str, Any]) -> list[list[str]]:
    """Rows of cells: each step's parts in ms, of each type."""
    rows = [["ms", *PARTS]]
    for dtype in (name for name in DTYPES if name in figures):
        for name, parts in figures[dtype]["parts_ms"].items():
            rows.append([f"{name} rows, {dtype}", *(f"{parts[part]:.1f}" for part in PARTS)])
    return rows


def parts_of(stage: Stage, step: Step, turns: int) -> dict[str, float]:
    """The median of each part, in ms, over some steps."""
    found: dict[str, list[float]] = {part: [] for part in PARTS}
    for _ in range(turns):
        clock = Clock(whole=(DRAFTING,))
        with clocked(stage.backend, clock), clock.section(REST):
            stage.take(step)
        for part in PARTS:
            found[part].append(1000 * clock.spent[part])
    return {part: median(times) for part, times in found.items()}


@contextmanager
def clocked(backend: Any, clock: Clock) -> Iterator[None]:
    """Count the time of a backend's parts.

    Products are modules that multiply by a weight (a wrapped one with its adapter), and experts.  What is left of the
    decoder are norms, elementwise operations and its Python; what is left of the step are plans, requests and tensors
    of indices.
    """
    handles = [handle for module in multiplying(backend) for handle in hooked(module, clock, "products")]
    handles += hooked(backend.trunk, clock, "norms and elementwise")
    AttentionInterface.register(attention.ATTENTION, clock.timed("attention", attention.row_attention))
    try:
        with (
            patch.object(modes, "draft_tokens", clock.timed(DRAFTING, modes.draft_tokens)),
            patch.object(modes, "_chosen", clock.timed("token choice", modes._chosen)),
        ):
            yield
    finally:
        AttentionInterface.register(attention.ATTENTION, attention.row_attention)
        for handle in handles:
            handle.remove()


def hooked(module: nn.Module, clock: Clock, name: str) -> list[Any]:
    return [
        module.register_forward_pre_hook(lambda *_: clock.enter(name)),
        module.register_forward_hook(lambda *_: clock.leave(), always_call=True),
    ]


def multiplying(backend: Any) -> list[nn.Module]:
    """The outermost modules that multiply by a weight."""
    found: list[nn.Module] = []
    waiting: list[tuple[str, nn.Module]] = [("", backend.trunk)]
    while waiting:
        name, module = waiting.pop()
        if isinstance(module, (GatedLoraLinear, nn.Linear)) or name == "experts":
            found.append(module)
        else:
            waiting += module.named_children()
    return [*found, backend.head.linear]


def read_bytes(engine: Engine, context: int) -> tuple[int, int]:
    """Bytes of the weights and of the K/V that a step of `ar` reads; of experts all, an embedding only where tied."""
    model, config = engine.attached.model, engine.attached.model.config.get_text_config()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    size = engine.backend.dtype.itemsize
    weights = size * sum(p.numel() for p in engine.attached.base_parameters())
    if not tied:
        weights -= size * model.get_input_embeddings().weight.numel()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return weights, 2 * size * config.num_hidden_layers * config.num_key_value_heads * width * context
