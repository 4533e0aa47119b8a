"""A safetensors file piece by piece, so that gigabytes are written without a second copy of them in memory.

Format: 8 bytes N, little-endian; N bytes of JSON, {name: {dtype, shape, data_offsets}}; the tensors, without holes.
Not here: reading, which the safetensors library does, and the file itself (`retrofit.artifact.files`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
ALIGNED = 8
"""Bytes that the header's length is a multiple of."""


def pieces(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of the file, one piece a tensor; each is moved to the CPU when its turn comes."""
    # widest types first, as the library does: then every tensor begins at a multiple of its own type's size
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        flat: Any = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield memoryview(flat)
