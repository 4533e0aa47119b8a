"""Times decoding of the embedded base by whatever checkout of retrofit is on the path: `against.py` runs it as a file.

It takes an artifact, reads ways from stdin, a line each, and answers each with seconds a token.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from retrofit.runtime.engine import Engine

WAYS: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "self_spec": {"mode": "self_spec", "strategy": "fused", "tree": 0},
}
PROMPT = [(7 * i + 3) % 500 for i in range(64)]
TOKENS = 100
SAME: dict[str, Any] = {"max_new_tokens": TOKENS, "ignore_eos": True, "original_settings": False}

if __name__ == "__main__":
    torch.set_num_threads(1)
    engine = Engine.load(sys.argv[1], "cpu", "float32", offline=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        engine.generate([PROMPT], **WAYS[line.strip()], **SAME)
        print((time.perf_counter() - begin) / TOKENS, flush=True)
