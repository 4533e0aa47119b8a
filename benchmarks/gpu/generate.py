"""Sections on whole answers: tokens per second of `generate` against transformers, and losslessness."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

from benchmarks.gpu.bars import BARS
from benchmarks.gpu.bench import Bench, Found, drop_cache
from benchmarks.gpu.models import transformers_model
from benchmarks.gpu.oracle import let_oracle_draft
from benchmarks.gpu.processes import ROOT, Process
from benchmarks.gpu.steps import tree_of
from retrofit.eval.acceptance import Comparison, compare, reference_tokens, summary
from retrofit.eval.speed import ratio_of
from retrofit.runtime.auto.policy import AutoPolicy
from retrofit.runtime.engine import Engine, Result
from retrofit.runtime.rules.sampling import Processing
from retrofit.runtime.rules.tree import DraftTree

JUDGED = 0.8
"""The oracle's acceptance at which the bars are judged, and at which losslessness is tested."""
SHAPE, SMALL = "llama-3.1-8b", "qwen3-0.6b"
LEVELS = ("bucket", "invariant")
"""Those at which speculation emits what AR does."""
COMPILE_SECONDS = 170.0
GREEDY = Processing()
TEMPERATURE = 0.8
AUTO_AT_MOST = 1.02
LEAST_SECONDS = 8.0
"""Without so many left, nothing more is begun."""
CHAINS: dict[str, dict[str, Any]] = {
    "fused": {"strategy": "fused", "tree": 0},
    "two_forward": {"strategy": "two_forward"},
}


def speed(bench: Bench, found: Found) -> None:
    """Batch 1, greedy: ours with an oracle, beside our `ar`, transformers' eager `generate`, and the hf backend; then
    `auto`.

    At the levels where speculation equals AR: at `off` rows differ in their last bits by how many they are, the output
    leaves what the oracle knows, and its drafts would be wrong from there on.
    """
    sizes = bench.sizes
    vocab = bench.engine(exact="bucket").backend.head.vocab
    prompts = bench.prompts(sizes.speed_prompts, sizes.prompt_tokens, vocab)
    for level in LEVELS:
        engine = bench.engine(exact=level)
        seconds, plain = timed(bench, engine, prompts, "ar")
        truth = [result.tokens for result in plain]
        figures = found.figures[level] = {"ar": rate_of(seconds, plain)}
        for acceptance in sizes.acceptances:
            for strategy in ("fused", "two_forward") if acceptance == JUDGED else ("fused",):
                longest = sizes.prompt_tokens + sizes.speed_tokens
                let_oracle_draft(engine, truth, acceptance, batch=1, longest=longest, params=GREEDY)
                seconds, results = timed(bench, engine, prompts, "self_spec", strategy=strategy, tree=0)
                figures[f"{strategy}, oracle {acceptance:g}"] = {
                    **rate_of(seconds, results),
                    "equal_to_ar": compare([r.tokens for r in results], truth).equal,
                }
        shown = "; ".join(f"{name} {f['tokens_per_second']:.0f} (tau {f['tau']:.2f})" for name, f in figures.items())
        found.state(f"tokens/s, batch 1, K = {bench.layout.drafts}, {level}", shown)
    bench.ours = found.figures["bucket"][f"fused, oracle {JUDGED:g}"]["tokens_per_second"]
    beside_transformers(bench, found, prompts[:1], truth[0], bench.ours)
    auto_beside_ar(bench, found, SHAPE, "auto")


def beside_transformers(bench: Bench, found: Found, some: list[list[int]], truth: list[int], ours: float) -> None:
    """Eager `generate` of one prompt, and the hf backend on the same model.  ours: tokens per second."""
    sizes = bench.sizes
    model = transformers_model(SHAPE, bench.device, bench.dtype, bench.dry)
    reference_tokens(model, some, max_new_tokens=4)
    seconds, eager = bench.wall(lambda: reference_tokens(model, some, max_new_tokens=sizes.slow_tokens))
    rate = len(eager[0]) / seconds
    same = next((i for i, pair in enumerate(zip(eager[0], truth, strict=False)) if pair[0] != pair[1]), None)
    found.figures["transformers eager"] = {"tokens_per_second": rate, "first_token_unlike_invariant": same}
    found.judge("eager", f"{ours / rate:.2f}x ({ours:.0f} to {rate:.0f})", ours / rate >= 6)

    hf = Engine.from_model(model, layout=bench.layout)
    options: dict[str, Any] = {"batch_size": 1, "ignore_eos": True}
    hf.generate(some, "ar", max_new_tokens=4, **options)
    seconds, results = bench.wall(lambda: hf.generate(some, "ar", max_new_tokens=sizes.slow_tokens, **options))
    found.figures["hf backend"] = {"ar": rate_of(seconds, results)}
    found.state("tokens/s, batch 1, ar of the hf backend", f"{sizes.slow_tokens / seconds:.0f}")
    hf.generate(some, strategy="fused", max_new_tokens=4, **options)
    seconds, results = bench.wall(
        lambda: hf.generate(some, strategy="fused", max_new_tokens=sizes.slow_tokens, **options)
    )
    forwards = results[0].stats.decode_forwards
    found.figures["hf backend"]["fused"] = {**rate_of(seconds, results), "ms_per_forward": 1e3 * seconds / forwards}
    found.state("ms of a fused forward, hf backend, untrained drafts", f"{1e3 * seconds / forwards:.1f}")
    hf.close()


def auto_beside_ar(bench: Bench, found: Found, shape: str, bar: str) -> None:
    """Seconds per token of `auto` to those of `ar`, in turn, with an untrained drafter; then `auto` with an oracle.

    `auto` begins with what conversion would have measured: no draft is ever right, and the oracle's acceptance.
    """
    sizes, shown, slowest = bench.sizes, [], 0.0
    cases = [(level, batch) for level in LEVELS for batch in sizes.auto_batches]
    for level, batch in cases:
        if bench.left() < LEAST_SECONDS:
            break
        engine = bench.engine(shape, level)
        prompts = bench.prompts(batch, sizes.prompt_tokens, engine.backend.head.vocab)
        run = partial(
            engine.generate, prompts, batch_size=batch, max_new_tokens=sizes.auto_tokens, ignore_eos=True
        )  # fmt: skip
        ways = {"ar": partial(run, "ar"), "auto": partial(run, strategy="auto")}

        drop_cache(engine)
        engine.device_policy = AutoPolicy(engine.layout, {})
        results = {name: way() for name, way in ways.items()}  # records the steps, times the plans
        turns: list[dict[str, float]] = []
        for turn in range(sizes.auto_turns):
            order = list(ways) if turn % 2 else list(ways)[::-1]
            turns.append({name: bench.wall(ways[name])[0] for name in order})
        ratio = ratio_of(turns, "auto", "ar")
        fastest = {name: min(turn[name] for turn in turns) for name in ways}

        sure = [JUDGED] * engine.layout.drafts
        engine.device_policy = AutoPolicy(engine.layout, {"conditional": {"greedy": sure}})
        truth, longest = [result.tokens for result in results["ar"]], sizes.prompt_tokens + sizes.auto_tokens
        let_oracle_draft(engine, truth, JUDGED, batch=batch, longest=longest, params=GREEDY)
        ways["auto"]()
        seconds, guided = min((bench.wall(ways["auto"]) for _ in range(sizes.auto_turns)), key=lambda timed: timed[0])

        figures = {
            "ar": rate_of(fastest["ar"], results["ar"]),
            "auto, untrained": rate_of(fastest["auto"], results["auto"]),
            f"auto, oracle {JUDGED:g}": rate_of(seconds, guided),
        }
        found.figures[f"auto: {level}, batch {batch}"] = {**figures, "turns": turns, "untrained_to_ar": ratio}
        rates = "; ".join(f"{name} {entry['tokens_per_second']:.0f}" for name, entry in figures.items())
        found.state(f"tokens/s, batch {batch}, {shape} shape, {level}", rates)
        shown.append(f"{level}, batch {batch}: {ratio:.3f}")
        slowest = max(slowest, ratio)
    judge(found, bar, "; ".join(shown), slowest <= AUTO_AT_MOST, len(shown) == len(cases))


def judge(found: Found, bar: str, figure: str, met: bool, complete: bool) -> None:
    """A bar is met only by all that belongs to it, and missed by any part of it."""
    if complete or not met:
        found.judge(bar, figure, met)
    else:
        found.state(f"{BARS[bar][0]}, as far as time went", figure or "nothing")


def timed(
    bench: Bench, engine: Engine, prompts: Sequence[Sequence[int]], mode: str, **options: Any
) -> tuple[float, list[Result]]:
    """Seconds and results of `generate`, one prompt at a time, after a run that records the steps."""

    def run() -> list[Result]:
        return engine.generate(
            prompts, mode, max_new_tokens=bench.sizes.speed_tokens, batch_size=1, ignore_eos=True, **options
        )

    run()
    return bench.wall(run)


def rate_of(seconds: float, results: Sequence[Result]) -> dict[str, Any]:
    total = summary(results)
    tokens = sum(len(result.tokens) for result in results)
    kept = ("tpf", "tau", "rows_per_token", "most_rows", "forwards_by_kind", "accept_cond")
    return {
        "tokens_per_second": tokens / seconds, "tokens": tokens, "seconds": seconds, **{k: total[k] for k in kept}
    }  # fmt: skip


def compiled(bench: Bench, found: Found) -> None:
    """transformers' `generate` with a static cache and torch.compile, in a process that is ended when it takes long."""
    sizes = bench.sizes
    limit = min(COMPILE_SECONDS, bench.left() - 5)
    arguments = [SHAPE, str(sizes.prompt_tokens), str(sizes.speed_tokens), "--dry-run" if bench.dry else "--gpu"]
    command = [sys.executable, "-m", "benchmarks.gpu.compiled", *arguments]
    code, output = Process.start(command, ROOT, dict(os.environ)).finish(limit)
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if code != 0 or not lines:
        reason = f"not done in {limit:.0f} s" if code is None else f"failed with exit code {code}"
        found.figures |= {"reason": reason, "output": output[-4000:]}
        found.state("tokens/s, batch 1, transformers compiled", reason)
        return
    found.figures |= json.loads(lines[-1])
    rate = sizes.speed_tokens / min(found.figures["seconds"])
    found.figures["tokens_per_second"] = rate
    ours = bench.ours
    if ours is None:
        found.state("tokens/s, batch 1, transformers compiled", f"{rate:.0f}")
    else:
        found.judge("compiled", f"{ours / rate:.2f}x ({ours:.0f} to {rate:.0f})", ours / rate >= 3)


def lossless(bench: Bench, found: Found) -> None:
    """The 8B shape; one at a time, as many prompts as leave time to the sections after it."""
    compare_tokens(bench, found, SHAPE, "lossless", all_alone=False)


def small(bench: Bench, found: Found) -> None:
    """The 0.6B shape, all prompts at both batch sizes; then `auto`."""
    compare_tokens(bench, found, SMALL, "small", all_alone=True)
    auto_beside_ar(bench, found, SMALL, "auto_small")
    bench.release(keep=lambda key: key[0] != SMALL)


def compare_tokens(bench: Bench, found: Found, shape: str, bar: str, all_alone: bool) -> None:
    """`self_spec` against `ar` (run in a batch) at equal seeds, with drafts of an oracle so that many are accepted.

    all_alone: whether all prompts have to run at batch 1 as well.
    """
    for done, level in enumerate(LEVELS):
        begin, levels = time.perf_counter(), len(LEVELS) - done
        engine = bench.engine(shape, level)
        trials = [Trial(bench, engine, temperature) for temperature in (0.0, TEMPERATURE)]
        for trial in trials:
            trial.batched()
            found.figures[f"{level}, T = {trial.temperature:g}"] = trial.figures
        # The levels that follow take as long for their batches.
        spare = bench.left() - bench.reserved - (levels - 1) * (time.perf_counter() - begin)
        for trial in trials:
            share = max(bench.sizes.alone_seconds, spare / levels / len(trials))
            trial.alone(float("inf") if all_alone else share)
        met = all(trial.equal for trial in trials)
        complete = all(trial.ran_all if all_alone else trial.ran_some for trial in trials)
        judge(found, f"{bar}_{level}", "; ".join(trial.shown() for trial in trials if trial.held), met, complete)


@dataclass
class Trial:
    """One level and temperature: what `ar` emits in a batch, and how the ways of speculating compare with it."""

    bench: Bench
    engine: Engine
    temperature: float
    figures: dict[str, Any] = field(default_factory=dict)
    held: list[tuple[int, str, Comparison]] = field(default_factory=list)
    """(batch size, way, comparison)."""

    def __post_init__(self) -> None:
        sizes = self.bench.sizes
        self.prompts = self.bench.prompts(sizes.prompts, sizes.prompt_tokens, self.engine.backend.head.vocab)
        self.truth: list[list[int]] = []

    @property
    def equal(self) -> bool:
        return all(found.equal == found.total for _, _, found in self.held)

    @property
    def ran_some(self) -> bool:
        """Whether every way ran, at batch 1 for some prompts."""
        chains = {(batch, name) for batch, name, _ in self.held if name in CHAINS}
        return len(chains) == 2 * len(CHAINS)

    @property
    def ran_all(self) -> bool:
        return self.ran_some and all(c.total == len(self.prompts) for _, name, c in self.held if name in CHAINS)

    def shown(self) -> str:
        """`T = 0: 64 prompts at batch 8: fused 64/64, ...; 16 prompts at batch 1: ...`."""
        parts = []
        for (total, batch), group in groupby(self.held, key=lambda held: (held[2].total, held[0])):
            counts = ", ".join(f"{name} {found.equal}/{found.total}" for _, name, found in group)
            parts.append(f"{total} prompts at batch {batch}: {counts}")
        return f"T = {self.temperature:g}, " + ", ".join(parts)

    def batched(self) -> None:
        """All prompts in batches: `ar`, which is the truth from then on, and the chains."""
        batch, every = self.bench.sizes.lossless_batch, range(len(self.prompts))
        if self.bench.left() < LEAST_SECONDS:
            return
        drop_cache(self.engine)
        seconds, results = self.run(every, batch, {"mode": "ar"})
        self.truth = [result.tokens for result in results]
        self.figures["ar"] = {"seconds": round(seconds, 2)}
        self.draft(batch)
        for name, way in CHAINS.items():
            if self.bench.left() < LEAST_SECONDS:
                return
            self.hold(batch, name, *self.run(every, batch, way))

    def alone(self, limit: float) -> None:
        """One prompt at a time: a few by `ar` and by a tree, by chains as many as `limit` seconds allow."""
        sizes, tree = self.bench.sizes, tree_of(self.bench)
        few, chunk, until = range(min(sizes.few, len(self.prompts))), sizes.chunk, time.perf_counter() + limit
        if not self.truth or self.bench.left() < LEAST_SECONDS:
            return
        self.hold(1, "ar", *self.run(few, 1, {"mode": "ar"}))
        self.draft(1, tree)
        self.hold(1, "tree", *self.run(few, 1, {"strategy": "fused", "tree": sizes.tree}))
        self.draft(1)
        seconds = dict.fromkeys(CHAINS, 0.0)
        results: dict[str, list[Result]] = {name: [] for name in CHAINS}
        for start in range(0, len(self.prompts), chunk):
            if self.bench.left() < LEAST_SECONDS or (start and time.perf_counter() > until):
                break
            for name, way in CHAINS.items():
                took, some = self.run(range(start, min(start + chunk, len(self.prompts))), 1, way)
                seconds[name] += took
                results[name] += some
        for name, some in results.items():
            if some:
                self.hold(1, name, seconds[name], some)

    def run(self, which: range, batch: int, way: dict[str, Any]) -> tuple[float, list[Result]]:
        """Seconds and results of some prompts; the seed of each is its number."""
        generate = partial(
            self.engine.generate, [self.prompts[i] for i in which], seed=list(which), batch_size=batch,
            max_new_tokens=self.bench.sizes.new_tokens, temperature=self.temperature, ignore_eos=True, **way,
        )  # fmt: skip
        return self.bench.wall(generate)

    def draft(self, batch: int, tree: DraftTree | None = None) -> None:
        """From now on an oracle drafts."""
        sizes = self.bench.sizes
        let_oracle_draft(
            self.engine, self.truth, JUDGED, batch=batch, longest=sizes.prompt_tokens + sizes.new_tokens,
            params=Processing(self.temperature), tree=tree,
        )  # fmt: skip

    def hold(self, batch: int, name: str, seconds: float, results: list[Result]) -> None:
        """Hold the first prompts' results against the truth."""
        same = compare([result.tokens for result in results], self.truth[: len(results)])
        total = summary(results)
        self.held.append((batch, name, same))
        self.figures[f"{name}, batch {batch}"] = {
            "equal": same.equal, "total": same.total, "seconds": round(seconds, 2), "tau": total["tau"],
            "forwards": total["forwards_by_kind"],
            "differences": [difference._asdict() for difference in same.differences],
        }  # fmt: skip
