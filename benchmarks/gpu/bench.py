"""What the sections of `benchmarks.gpu` share: sizes, the clock, engines that stay alive, and where figures go."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.bars import BARS
from benchmarks.gpu.models import config_of, random_adapter, random_checkpoint, random_heads
from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.backends.fused.backend import FusedGQA
from retrofit.runtime.backends.fused.self_test import Check, self_test
from retrofit.runtime.engine import Engine


@dataclass(frozen=True)
class Sizes:
    """How much is measured.  The defaults are for a GPU."""

    block: int = 8
    rank: int = 32
    markov_rank: int = 128
    context: int = 1024
    room: int = 512
    """Positions that timed steps may advance by."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    row_counts: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    lane_rows: int = 64
    """Base rows of one request, where there are more rows than that."""
    step_batches: tuple[int, ...] = (1, 4, 8)
    tree: int = 18
    buckets: tuple[int, ...] = (64, 128)
    repeats: int = 30
    warm: int = 3
    prompts: int = 64
    chunk: int = 4
    """Prompts that run one at a time between two looks at the clock."""
    few: int = 4
    """Prompts of ways that are only sampled at batch 1."""
    alone_seconds: float = 12.0
    """Of the 8B shape, what batch 1 may take at a level and temperature, whatever the sections after it need."""
    prompt_tokens: int = 64
    new_tokens: int = 256
    lossless_batch: int = 8
    speed_tokens: int = 256
    speed_prompts: int = 2
    slow_tokens: int = 96
    """Tokens of ways that take tens of milliseconds each."""
    acceptances: tuple[float, ...] = (0.6, 0.8, 0.9)
    auto_batches: tuple[int, ...] = (1, 8)
    auto_tokens: int = 128
    auto_turns: int = 5
    contexts: tuple[int, ...] = (1024, 8192, 32768)
    copy_bytes: int = 4 << 30
    square: int = 8192
    gemm_rows: tuple[int, ...] = (1, 64, 128, 16)
    gemm_block_n: tuple[int, ...] = (128, 64)
    gemm_warps: tuple[int, ...] = (4, 8)
    gemm_stages: tuple[int, ...] = (6, 4, 3)
    cold_bytes: int = 256 << 20
    """Weights that a timed product goes through before it meets the first again: several times an L2 cache."""


TINY = Sizes(
    block=2, rank=4, markov_rank=8, context=5, room=16, batches=(1, 2), row_counts=(1, 2), lane_rows=1,
    step_batches=(1,), tree=3, buckets=(16, 32), repeats=1, warm=0, prompts=2, chunk=1, few=1, prompt_tokens=3,
    new_tokens=4, lossless_batch=2, speed_tokens=4, speed_prompts=1, slow_tokens=3, acceptances=(0.8,),
    auto_batches=(2,), auto_tokens=4, auto_turns=1, contexts=(64,), copy_bytes=1 << 16, square=32, gemm_rows=(1, 16),
    gemm_block_n=(32,), gemm_warps=(4,), gemm_stages=(2,), cold_bytes=1 << 12,
)  # fmt: skip
"""For a dry run in Triton's interpreter: every line of code, no figure of worth."""


FEWEST_CALLS = 8
"""Calls that are timed together: starting a recorded graph takes microseconds of its own."""


@dataclass
class Found:
    """Bars and figures of one section, kept as they come, so that a section that breaks keeps what it has."""

    dry: bool = False
    bars: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def judge(self, name: str, figure: str, met: bool) -> None:
        """One of `BARS`."""
        self._add(*BARS[name], figure, met)

    def state(self, what: str, figure: str) -> None:
        """A figure that is not judged."""
        self._add(what, "stated", figure, None)

    def _add(self, what: str, bar: str, figure: str, met: bool | None) -> None:
        shown = f"{figure} (dry run)" if self.dry else figure
        self.bars.append({"what": what, "bar": bar, "figure": shown, "met": met})


@dataclass
class Bench:
    """The device, what is measured on it, and what is left of the time."""

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes
    dry: bool
    deadline: float
    """On the clock of time.perf_counter."""
    reserved: float = 0.0
    """Seconds that the sections after this one need."""
    copies: list[float] = field(default_factory=list)
    """Seconds of large copies, once `copy_rate` was asked for."""
    ours: float | None = None
    """Tokens per second that the bars against transformers are judged by."""
    engines: dict[tuple[Any, ...], Engine] = field(default_factory=dict)
    tests: dict[str, Any] = field(default_factory=dict)
    """Test runs under way, by name."""
    tests_begun: bool = False
    missed: int = 0
    """Bars missed so far."""
    checks: dict[tuple[str, str, int], list[Check]] = field(default_factory=dict)
    """What self-tests found when engines were built, by shape, level and rows of a bucket."""
    built: dict[str, dict[str, float]] = field(default_factory=dict)
    """Seconds and GiB that each engine took."""

    @property
    def layout(self) -> DraftLayout:
        return DraftLayout(block=self.sizes.block)

    @property
    def bucket(self) -> int:
        return self.sizes.buckets[-1]

    def copy_rate(self) -> float:
        """Bytes per second, read and written, of a large copy."""
        if not self.copies:
            source = torch.randn(self.sizes.copy_bytes // 4, device=self.device)
            target = torch.empty_like(source)
            self.copies = self.seconds(lambda: target.copy_(source))
        return 2 * self.sizes.copy_bytes / median(self.copies)

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.perf_counter()

    def engine(
        self, shape: str = "llama-3.1-8b", exact: str = "off", rows: int | None = None, adapter: bool = True
    ) -> Engine:
        """A fused engine over random weights; the same one whenever it is asked for."""
        rows = rows or self.bucket
        key = (shape, exact, rows if exact == "bucket" else None, adapter)
        if key not in self.engines:
            begin, before = time.perf_counter(), self.allocated()
            config = config_of(shape, self.dry)
            made: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
            backend = FusedGQA(
                config,
                random_checkpoint(shape, **made, tiny=self.dry),
                self.layout,
                random_heads(config, self.layout, self.sizes.markov_rank, **made),
                random_adapter(config, self.sizes.rank, **made) if adapter else {},
                1.0,
                **made,
                exact=exact,
                rows=rows,
            )
            if exact != "off":
                # As where an artifact is loaded: at `bucket` it may put our products in place of the library's.
                self.checks[shape, exact, rows] = self_test(backend, self.layout.drafts)
            self.engines[key] = Engine(backend, self.layout, None)
            self.synchronize()
            name = " ".join(str(part) for part in key)
            gib = (self.allocated() - before) / 2**30
            self.built[name] = {"seconds": round(time.perf_counter() - begin, 2), "gib": round(gib, 2)}
        return self.engines[key]

    def release(self, keep: Callable[[tuple[Any, ...]], bool] = lambda key: True) -> None:
        """Give memory back: caches and recorded steps of all engines, and engines not to be kept."""
        self.engines = {key: engine for key, engine in self.engines.items() if keep(key)}
        for engine in self.engines.values():
            drop_cache(engine)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def prompts(self, count: int, length: int, vocab: int) -> list[list[int]]:
        """Random token ids, the same at every call."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, vocab, (count, length), generator=generator).tolist()

    def seconds(
        self,
        run: Callable[[], Any],
        before: Callable[[], Any] = lambda: None,
        repeats: int | None = None,
        warm: int | None = None,
    ) -> list[float]:
        """Device seconds of each of `repeats` runs; `before` goes ahead of each and is not counted."""
        for _ in range(self.sizes.warm if warm is None else warm):
            before()
            run()
        times: list[float] = []
        events = []
        for _ in range(repeats or self.sizes.repeats):
            before()
            if self.device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                events.append((begin, end))
            else:
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
        self.synchronize()
        return times + [begin.elapsed_time(end) / 1e3 for begin, end in events]

    def wall(self, run: Callable[[], Any]) -> tuple[float, Any]:
        """(seconds by the host's clock until the device is done, what `run` returned)."""
        self.synchronize()
        begin = time.perf_counter()
        result = run()
        self.synchronize()
        return time.perf_counter() - begin, result

    def each(self, calls: Sequence[Callable[[], Any]]) -> float:
        """Seconds of one of these calls, run one after the other without gaps: the median over replays, by count."""
        if self.device.type != "cuda":
            return median(self.seconds(lambda: [call() for call in calls])) / len(calls)
        calls = list(calls) * -(-FEWEST_CALLS // len(calls))
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            calls[0]()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return median(self.seconds(graph.replay, repeats=7)) / len(calls)


def drop_cache(engine: Engine) -> None:
    """Give back the cache and the steps recorded over it."""
    backend = engine.backend
    assert isinstance(backend, FusedGQA)
    if backend.cache is not None:
        backend.cache.loops.clear()  # they hold the cache in turn
        backend.cache = None


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and minimum in milliseconds, and of how many."""
    return {
        "median_ms": round(median(seconds) * 1e3, 4),
        "min_ms": round(min(seconds) * 1e3, 4),
        "repeats": len(seconds),
    }
