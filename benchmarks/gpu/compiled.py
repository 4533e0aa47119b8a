"""transformers' `generate` with a static cache and torch.compile, timed: SHAPE PROMPT_TOKENS NEW_TOKENS.

Run by `benchmarks.gpu` as a process of its own, because compiling may take longer than there is time for.  Prints one
line of JSON.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from transformers import CompileConfig, GenerationConfig

from benchmarks.gpu.models import transformers_model

TIMED = 3


def main(shape: str, prompt_tokens: int, new_tokens: int, dry: bool) -> None:
    device, dtype = (torch.device("cpu"), torch.float32) if dry else (torch.device("cuda"), torch.bfloat16)
    model = transformers_model(shape, device, dtype, dry)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt_tokens), generator=generator).to(device)
    model.generation_config = GenerationConfig()
    config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0, cache_implementation="static",
        compile_config=None if dry else CompileConfig(mode="reduce-overhead"),
    )  # fmt: skip

    def run() -> float:
        begin = time.perf_counter()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        if not dry:
            torch.cuda.synchronize()
        assert out.shape[1] == prompt_tokens + new_tokens
        return time.perf_counter() - begin

    # The first run compiles, the second records graphs.
    warm = [run() for _ in range(2)]
    seconds = [run() for _ in range(TIMED)]
    print(json.dumps({"warm_seconds": warm, "seconds": seconds, "tokens": new_tokens}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "--dry-run" in sys.argv)
