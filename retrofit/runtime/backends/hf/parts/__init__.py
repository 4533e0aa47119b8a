"""Attention by torch's kernel for CPUs, in parts: over pieces of the keys, whose results are joined."""

from retrofit.runtime.backends.hf.parts.base_rows import base_attention
from retrofit.runtime.backends.hf.parts.call import fits
from retrofit.runtime.backends.hf.parts.draft_rows import draft_attention
from retrofit.runtime.backends.hf.parts.tree_rows import tree_attention

__all__ = ["base_attention", "draft_attention", "fits", "tree_attention"]
