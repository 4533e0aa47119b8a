"""Sections on the card and on what an engine is on it: its two ceilings, self-tests, launches, memory."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median

import torch

from benchmarks.gpu.bench import Bench, Found, spread
from benchmarks.gpu.steps import AR, Steps
from retrofit.runtime.backends.fused.backend import FusedGQA
from retrofit.runtime.kernels.rows import PAGE


def machine(bench: Bench, found: Found) -> None:
    """Copy bandwidth, read bandwidth, and the rate of a large bf16 product."""
    sizes, dtype = bench.sizes, str(bench.dtype).removeprefix("torch.")
    source = torch.randn(sizes.copy_bytes // 4, device=bench.device)
    reads = bench.seconds(source.sum)
    a, b = (torch.randn(sizes.square, sizes.square, device=bench.device).to(bench.dtype) for _ in range(2))
    products = bench.seconds(lambda: a @ b)
    copy_rate, read_rate = bench.copy_rate(), source.nbytes / median(reads)
    rate = 2 * sizes.square**3 / median(products)
    found.figures |= {
        "copy_bytes_per_second": copy_rate, "read_bytes_per_second": read_rate, "flops_per_second": rate,
        "copy": spread(bench.copies), "read": spread(reads), "product": spread(products),
        "copied_bytes": sizes.copy_bytes, "square": sizes.square, "dtype": dtype,
    }  # fmt: skip
    found.state("copy, bytes read and written", f"{copy_rate / 1e12:.2f} TB/s")
    found.state("sum of a large tensor, bytes read", f"{read_rate / 1e12:.2f} TB/s")
    found.state(f"{sizes.square}^3 product, {dtype}", f"{rate / 1e12:.0f} TFLOP/s")


def selftest(bench: Bench, found: Found) -> None:
    """The self-test as it runs when an engine is loaded; of the 8B shape for the bars."""
    for shape, level in (
        ("llama-3.1-8b", "bucket"),
        ("llama-3.1-8b", "invariant"),
        ("qwen3-0.6b", "bucket"),
        ("qwen3-8b", "invariant"),
    ):
        has_bar = shape == "llama-3.1-8b"
        if not has_bar and bench.left() < 30:
            found.figures["stopped"] = f"out of time before {shape}, {level}"
            break
        bench.engine(shape, level)
        checks = bench.checks[shape, level, bench.bucket]
        equal = sum(check.equal for check in checks)
        found.figures[f"{shape}, {level}"] = [asdict(check) for check in checks]
        figure, met = f"{equal}/{len(checks)}", equal == len(checks) > 0
        if has_bar:
            found.judge(f"selftest_{level}", figure, met)
        else:
            found.state(f"self-test, {shape} shape: {level}", figure)
    bench.release(keep=lambda key: key[0] != "qwen3-8b")


@torch.no_grad()
def launches(bench: Bench, found: Found) -> None:
    """Kernels of one AR step, launched one by one: those that run once per layer are counted per layer."""
    from torch.profiler import ProfilerActivity, profile

    for exact in ("off", "invariant"):
        engine = bench.engine(exact=exact)
        assert isinstance(engine.backend, FusedGQA)
        layers = len(engine.backend.weights.layers)
        timer = Steps(bench, engine, 1)
        timer.time(AR)
        timer.loop.start(timer.requests[0])
        step = timer.loop.steps[AR, 1]
        cuda = bench.device.type == "cuda"
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
            timer.loop._body(step)
            bench.synchronize()
        kernels = {event.key: event.count for event in profiler.key_averages() if "CUDA" in str(event.device_type)}
        per_layer = sum(count // layers for count in kernels.values())
        found.figures[exact] = {"per_layer": per_layer, "per_step": sum(kernels.values()), "kernels": kernels}
        found.state(f"launches per layer (aim 10) and per step, {exact}", f"{per_layer}, {sum(kernels.values())}")


def memory(bench: Bench, found: Found) -> None:
    """GiB of weights, of a cache, and the most that `generate` held at once."""
    engine = bench.engine(exact="bucket")
    assert isinstance(engine.backend, FusedGQA)
    cuda = bench.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(bench.device)
    before = bench.allocated()
    batch, tokens = bench.sizes.lossless_batch, bench.sizes.slow_tokens
    prompts = bench.prompts(batch, bench.sizes.context, engine.backend.head.vocab)
    engine.generate(prompts, strategy="fused", max_new_tokens=tokens, batch_size=batch, ignore_eos=True)
    cache = engine.backend.cache
    assert cache is not None
    peak = torch.cuda.max_memory_allocated(bench.device) - before if cuda else 0
    found.figures |= {
        "built": bench.built, "weights_gib": engine.backend.weights.nbytes / 2**30, "cache_gib": cache.nbytes / 2**30,
        "cache_positions": cache.pages * PAGE, "peak_beyond_weights_gib": peak / 2**30, "batch": batch,
        "context": bench.sizes.context,
    }  # fmt: skip
    found.state(
        f"GiB: weights a step reads; cache of {cache.pages * PAGE} positions; most beyond the engine, batch {batch}",
        f"{engine.backend.weights.nbytes / 2**30:.2f}; {cache.nbytes / 2**30:.2f}; {peak / 2**30:.2f}",
    )
