"""Sections on whole answers: tokens per second of `generate` against transformers, and losslessness."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.gpu_bars import BARS
from benchmarks.gpu_bench import Bench, Found
from benchmarks.gpu_models import transformers_model
from benchmarks.gpu_oracle import let_oracle_draft
from benchmarks.gpu_processes import ROOT, Process
from benchmarks.gpu_steps import tree_of
from retrofit.eval.acceptance import compare, reference_tokens, summary
from retrofit.runtime.engine import Engine, Result
from retrofit.runtime.sampling import SamplingParams

JUDGED = 0.8
"""The oracle's acceptance at which the bars are judged, and at which losslessness is tested."""
SHAPE = "llama-3.1-8b"
COMPILE_SECONDS = 170.0
GREEDY = SamplingParams()
TEMPERATURE = 0.8


def speed(bench: Bench, found: Found) -> None:
    """Batch 1, greedy: ours with an oracle, beside our `ar`, transformers' eager `generate`, and the hf backend.

    At the levels where speculation equals AR: at `off` rows differ in their last bits by how many they are, the output
    leaves what the oracle knows, and its drafts would be wrong from there on.
    """
    sizes = bench.sizes
    vocab = bench.engine(exact="bucket").backend.head.vocab
    prompts = bench.prompts(sizes.speed_prompts, sizes.prompt_tokens, vocab)
    for level in ("bucket", "invariant"):
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
    ours = bench.ours = found.figures["bucket"][f"fused, oracle {JUDGED:g}"]["tokens_per_second"]

    model = transformers_model(SHAPE, bench.device, bench.dtype, bench.dry)
    some = prompts[:1]
    reference_tokens(model, some, max_new_tokens=4)
    seconds, eager = bench.wall(lambda: reference_tokens(model, some, max_new_tokens=sizes.slow_tokens))
    rate = len(eager[0]) / seconds
    same = next((i for i, pair in enumerate(zip(eager[0], truth[0], strict=False)) if pair[0] != pair[1]), None)
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
    command = [sys.executable, "-m", "benchmarks.gpu_compiled", *arguments]
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
    """The 8B shape; one prompt at a time for fewer of them."""
    compare_tokens(bench, found, SHAPE, "lossless", bench.sizes.prompts_alone)


def small(bench: Bench, found: Found) -> None:
    """The 0.6B shape, all prompts at both batch sizes."""
    compare_tokens(bench, found, "qwen3-0.6b", "small", bench.sizes.prompts)
    bench.release(keep=lambda key: key[0] != "qwen3-0.6b")


def compare_tokens(bench: Bench, found: Found, shape: str, bar: str, alone: int) -> None:
    """`self_spec` against `ar` (run in a batch) at equal seeds, with drafts of an oracle so that many are accepted.

    alone: of how many prompts the batch of 1 is tried.
    """
    sizes = bench.sizes
    batch, few = sizes.lossless_batch, max(1, alone // 4)
    for level in ("bucket", "invariant"):
        engine = bench.engine(shape, level)
        prompts = bench.prompts(sizes.prompts, sizes.prompt_tokens, engine.backend.head.vocab)
        chain, tree = {"strategy": "fused", "tree": 0}, {"strategy": "fused", "tree": sizes.tree}
        ways: dict[str, tuple[int, int, dict[str, Any]]] = {
            f"fused, batch {batch}": (len(prompts), batch, chain),
            f"two_forward, batch {batch}": (len(prompts), batch, {"strategy": "two_forward"}),
            "fused, batch 1": (alone, 1, chain),
            "ar, batch 1": (few, 1, {"mode": "ar"}),
        }
        if level == "invariant":  # a bucket has no room for so many rows
            ways["tree, batch 1"] = (few, 1, tree)
        shown: list[str] = []
        for temperature in (0.0, TEMPERATURE):
            options: dict[str, Any] = {
                "max_new_tokens": sizes.new_tokens, "temperature": temperature, "ignore_eos": True
            }  # fmt: skip
            engine._loops.clear()
            seconds, results = bench.wall(partial(engine.generate, prompts, "ar", batch_size=batch, **options))
            truth = [result.tokens for result in results]
            figures = found.figures[f"{level}, T = {temperature:g}"] = {"ar": {"seconds": round(seconds, 2)}}
            for name, (count, size, way) in ways.items():
                if bench.left() < 8:
                    found.state(f"{BARS[f'{bar}_{level}'][0]}, as far as time went", " ".join(shown) or "nothing")
                    return
                let_oracle_draft(
                    engine, truth, JUDGED, batch=min(size, count), longest=sizes.prompt_tokens + sizes.new_tokens,
                    params=SamplingParams(temperature), shape=tree_of(bench) if way is tree else None,
                )  # fmt: skip
                run = partial(engine.generate, prompts[:count], batch_size=size, **way, **options)
                seconds, results = bench.wall(run)
                same, total = compare([r.tokens for r in results], truth[:count]), summary(results)
                figures[name] = {
                    "equal": same.equal, "total": same.total, "seconds": round(seconds, 2), "tau": total["tau"],
                    "forwards": total["forwards_by_kind"],
                    "differences": [difference._asdict() for difference in same.differences],
                }  # fmt: skip
                shown.append(f"{same.equal}/{same.total}")
        met = all(equal == total for equal, total in (counts.split("/") for counts in shown))
        found.judge(f"{bar}_{level}", " ".join(shown), met)
