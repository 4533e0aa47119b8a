"""Sections on single kernels: attention by context, and matrix products over a grid of tile sizes.

Calls go round over several weights or layers, so that none finds its data in a cache.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.bench import Bench, Found
from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.runtime.backends.fused.backend import FusedGQA
from retrofit.runtime.backends.fused.paged import PagedCache, pages_for
from retrofit.runtime.kernels.attention import row_attention
from retrofit.runtime.kernels.gemm import split_matmul, split_plan


@torch.no_grad()
def attention(bench: Bench, found: Found) -> None:
    """Both launches of row attention, one row and a fused step's rows, over the layers of the 8B shape in turn."""
    backend = bench.engine().backend
    assert isinstance(backend, FusedGQA)
    layers, heads, width = len(backend.weights.layers), backend.config.num_key_value_heads, backend.width
    made: dict[str, Any] = {"dtype": bench.dtype, "device": bench.device}
    block, k = bench.layout.block, bench.layout.drafts
    bench.release()
    for context in bench.sizes.contexts:
        cache = PagedCache((layers, heads, width), 1, context, pages_for(context), bench.dtype, bench.device)
        cache.keys.normal_()
        cache.values.normal_()
        cache.open(0, context)
        start = context - 1
        fused = SequenceRows(
            0, start - k, [1] * (k + 1), [Block(start - k + j + 1, [MASK] * block) for j in range(k + 1)]
        )
        for plan in (SequenceRows(0, start, [1]), fused):
            rows = backend.rows(backend.row_plan([plan]), cache)
            query = torch.randn(rows.padded, backend.config.num_attention_heads, width, **made)
            drafts = torch.randn(2, rows.num_draft, heads, width, **made)

            def call(layer: int, query: Tensor, drafts: Tensor, rows: Any, cache: PagedCache) -> Tensor:
                keys, values = cache.keys[layer], cache.values[layer]
                return row_attention(
                    query, keys, values, cache.block_table, drafts[0], drafts[1], rows, width**-0.5, None, None, False
                )

            calls = [partial(call, layer, query, drafts, rows, cache) for layer in range(layers)]
            seconds = bench.each(calls)
            nbytes = 2 * context * heads * width * cache.keys.element_size()
            found.figures[f"{rows.num_rows} rows, context {context}"] = {
                "us": seconds * 1e6, "bytes_per_second": nbytes / seconds
            }  # fmt: skip
        del cache
    shown = "; ".join(f"{name}: {entry['us']:.1f}" for name, entry in found.figures.items())
    found.state("us of one layer's attention", shown)


@torch.no_grad()
def gemm(bench: Bench, found: Found) -> None:
    """Our split product against the library's, for every weight shape of the 8B model; the grid as far as time goes."""
    backend = bench.engine().backend
    assert isinstance(backend, FusedGQA)
    layer, sizes = backend.weights.layers[0], bench.sizes
    weights = {
        name: linear.weight
        for name, linear in (
            ("gate_up", layer.gate_up), ("down", layer.down), ("qkv", layer.qkv), ("o", layer.o),
            ("head", backend.weights.head),
        )
    }  # fmt: skip
    grid = list(product(sizes.gemm_block_n, sizes.gemm_warps, sizes.gemm_stages))
    for count in sizes.gemm_rows:
        for name, weight in weights.items():
            copies = [weight, *(weight.clone() for _ in range(max(1, sizes.cold_bytes // weight.nbytes) - 1))]
            x = torch.randn(count, weight.shape[1], dtype=bench.dtype, device=bench.device)
            plan = split_plan(*weight.shape)
            entry: dict[str, Any] = {
                "shape": list(weight.shape), "plan": list(plan),
                "library_us": 1e6 * bench.each([partial(F.linear, x, w) for w in copies]),
                "default_us": 1e6 * bench.each([partial(split_matmul, x, w, *plan) for w in copies]),
                "grid": [],
            }  # fmt: skip
            found.figures[f"{name}, {count} rows"] = entry
            for block_n, warps, stages in grid:
                if bench.left() < 4:
                    found.figures["stopped"] = f"out of time at {name}, {count} rows"
                    break
                options = {"block_n": block_n, "num_warps": warps, "num_stages": stages}
                try:
                    calls = [partial(split_matmul, x, w, *plan, **options) for w in copies]
                    entry["grid"].append({**options, "us": 1e6 * bench.each(calls)})
                except Exception as error:  # such a tile does not fit on this GPU
                    entry["grid"].append({**options, "error": f"{type(error).__name__}: {error}"[:200]})
            ran = [point for point in entry["grid"] if "us" in point]
            entry["best"] = min(ran, key=lambda point: point["us"], default=None)
            del copies
            if "stopped" in found.figures:
                break
        if "stopped" in found.figures:
            break
    for count in sizes.gemm_rows:
        shown = []
        for name in weights:
            tried = found.figures.get(f"{name}, {count} rows")
            if tried is not None:
                best = "-" if tried["best"] is None else f"{tried['best']['us']:.1f}"
                shown.append(f"{name} {tried['library_us']:.1f} {tried['default_us']:.1f} {best}")
        if shown:
            found.state(f"us of products with {count} rows: library, ours, ours at its best", "; ".join(shown))
