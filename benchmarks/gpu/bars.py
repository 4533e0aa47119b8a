"""The bars that only a GPU can judge, and their titles: what `benchmarks.gpu` measures and docs/numbers.md lists.

Imports nothing, so that it is drawn without torch.
"""

from __future__ import annotations

BARS: dict[str, tuple[str, str]] = {
    "ar": ("AR, batch 1, 8B shape, bf16: weight bytes / copy bandwidth over step time", ">= 80 %, aim 90 %"),
    "rows": ("64-row step / 1-row step, 8B shape", "<= 1.15"),
    "selftest_bucket": ("self-test, 8B shape: bucket", "all equal"),
    "selftest_invariant": ("self-test, 8B shape: invariant", "all equal"),
    "lossless_bucket": (
        "self_spec = ar, greedy and T = 0.8, 64 prompts at batch 8, as many as stated at batch 1, 8B shape: bucket",
        "all identical",
    ),
    "lossless_invariant": (
        "self_spec = ar, greedy and T = 0.8, 64 prompts at batch 8, as many as stated at batch 1, 8B shape: invariant",
        "all identical",
    ),
    "small_bucket": (
        "self_spec = ar, greedy and T = 0.8, 64 prompts at batch 1 and 8, 0.6B shape: bucket",
        "all identical",
    ),
    "small_invariant": (
        "self_spec = ar, greedy and T = 0.8, 64 prompts at batch 1 and 8, 0.6B shape: invariant",
        "all identical",
    ),
    "auto": ("auto / ar seconds per token, untrained drafter, batch 1 and 8, 8B shape", "<= 1.02"),
    "auto_small": ("auto / ar seconds per token, untrained drafter, batch 1 and 8, 0.6B shape", "<= 1.02"),
    "eager": ("tokens/s to transformers generate, oracle acceptance 0.8, K = 8, batch 1: eager", ">= 6x"),
    "compiled": (
        "tokens/s to transformers generate, oracle acceptance 0.8, K = 8, batch 1: static cache, compiled",
        ">= 3x",
    ),
    "adapter": ("a rank-32 adapter's share of a step, fused and ar", "<= 5 %"),
    "tests": ("tests of the kernels and of the fused backend, and tests marked gpu, on the GPU", "all pass"),
}
"""Name -> (what, bar).  A section may state further figures, which have no bar."""

TITLES: dict[str, str] = {
    "machine": "GPU: what the card does",
    "ar": "GPU: AR steps",
    "rows": "GPU: step time by rows",
    "selftest": "GPU: exactness self-test",
    "speed": "GPU: tokens per second, drafts by an oracle of stated acceptance (synthetic)",
    "lossless": "GPU: lossless, 8B shape",
    "steps": "GPU: speculative steps",
    "adapter": "GPU: the adapter's price",
    "exact": "GPU: the price of exactness for AR",
    "compiled": "GPU: against compiled transformers",
    "small": "GPU: 0.6B shape, lossless and `auto`",
    "tests": "GPU: tests",
    "attention": "GPU: attention",
    "launches": "GPU: launches",
    "memory": "GPU: memory",
    "shapes": "GPU: other shapes",
    "gemm": "GPU: matrix products, ours and the library's",
}
