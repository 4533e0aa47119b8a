"""Make Triton's interpreter compute what a GPU computes, so that kernels can be tested without one.

Stock, it multiplies bf16 as the integers that hold its bits, truncates fp32 to bf16, and hands `tl.dot` to a BLAS
whose rows depend on the rows beside them.  Here bf16 is widened, rounding is to nearest even, and a dot product adds
in an order that knows nothing of other rows.  It also replaces `tl` by its own functions anew at every call of a
function, which is most of its time; here it does so once.  Uses private parts of Triton 3.6 and 3.7.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import numpy as np


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; decided by TRITON_INTERPRET when they are first imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def patch() -> None:
    """Correct the interpreter, once."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if getattr(InterpreterBuilder, "corrected", False):
        return
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if target == tl.bfloat16 and source == tl.float32:
            return TensorHandle(_to_bfloat16(src.data), target)
        if source == tl.bfloat16 and target == tl.float32:
            return TensorHandle(_widened(src.data, source), target)
        if tl.bfloat16 in (source, target) and source != target:
            raise NotImplementedError("the interpreter casts bf16 to and from fp32 only; go through tl.float32")
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        left, right = _widened(a.data, a.dtype.scalar), _widened(b.data, b.dtype.scalar)
        product = np.einsum("...ik,...kj->...ij", left, right, optimize=False)
        return TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)

    replace, done = interpreter._patch_lang, set()

    def replace_once(function: Any) -> Any:
        """Which functions are replaced depends on whether `function` sees `tl`, `tl.core` or both."""
        seen = frozenset(id(m) for m in (tl, tl.core) if m in function.__globals__.values())
        if seen not in done:
            replace(function)
            # Triton 3.6 hands Python's `range` an array of one element, which numpy 2.4 takes for no number.
            tl.tensor.__index__ = lambda self: int(self.handle.data.squeeze())
            done.add(seen)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = replace_once
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_trunc = cast_impl
    InterpreterBuilder.create_fp_ext = cast_impl
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.corrected = True


def _widened(data: np.ndarray, dtype: Any) -> np.ndarray:
    import triton.language as tl

    if dtype == tl.bfloat16:
        return (data.astype(np.uint32) << 16).view(np.float32)
    return data.astype(np.float32)


def _to_bfloat16(data: np.ndarray) -> np.ndarray:
    """fp32 to the uint16 bits of bf16, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), np.uint32(0x7FC0), rounded).astype(np.uint16)
