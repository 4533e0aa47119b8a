"""Memory of an engine with packed products against one without, and of K/V behind sliding windows against all of them.

Each engine is loaded, decodes a little and says what its process holds, in a process of its own.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from benchmarks.common import ROOT, Bar, say
from benchmarks.cpu.subjects import Task, random_tokens
from retrofit.machine import peak_resident, resident
from retrofit.runtime.engine import Engine
from retrofit.runtime.host.modes import prefill_step
from retrofit.runtime.request import Request
from retrofit.runtime.rules.sampling import Processing
from retrofit.runtime.run import Run

PACKED_BAR, WINDOW_BAR = 1.15, 0.35
PACKED: dict[str, Any] = {"plain": False, "packed": "auto"}
TOKENS = 16
CONTEXT = 8192


def memory(task: Task) -> tuple[list[Bar], dict[str, Any]]:
    bars, figures = [], {}
    for dtype in task.dtypes:
        found = {name: started(task, dtype, name) for name in PACKED}
        for what in ("settled", "peak"):
            ratio = found["packed"][what] / found["plain"][what]
            mib = f"{found['packed'][what] >> 20} and {found['plain'][what] >> 20} MiB"
            bar = f"<= {PACKED_BAR}"
            bars.append(
                Bar(f"{what} memory, packed / plain, {dtype}", bar, f"{ratio:.2f} ({mib})", ratio <= PACKED_BAR)
            )
        figures[dtype] = found
    say("K/V behind windows")
    kept, full = windows()
    share = kept / full
    text = f"{share:.2f} ({kept >> 10} of {full >> 10} KiB)"
    bars.append(Bar(f"K/V of Gemma-3's shape at {CONTEXT}, of full", f"<= {WINDOW_BAR}", text, share <= WINDOW_BAR))
    return bars, {**figures, "windows": {"kept": kept, "full": full}}


def started(task: Task, dtype: str, name: str) -> dict[str, int]:
    """What a process of its own says."""
    say(f"{dtype}: memory, {name}")
    options = ["--model", task.model, "--artifact", task.artifact, "--job", f"{dtype}:{name}"]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.cpu", *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def held(task: Task, job: str) -> dict[str, int]:
    """Bytes that this process holds after some decoding: at most, and once what was freed has been given back."""
    dtype, name = job.split(":")
    engine = task.engine(dtype, prefix_cache=0, packed=PACKED[name])
    engine.generate([random_tokens(64, engine.backend.head.vocab)], "ar", max_new_tokens=TOKENS, ignore_eos=True)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return {"settled": resident(), "peak": peak_resident()}


def windows(context: int = CONTEXT) -> tuple[int, int]:
    """Bytes of K/V that a model like Gemma 3 keeps of a text, and of all its positions in all layers.

    Like it in what matters: five layers of six see 1,024 positions.
    """
    config = Gemma3TextConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=12, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, sliding_window=1024, max_position_embeddings=context,
        layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with Engine.from_model(model) as engine, torch.inference_mode():
        cache = engine.backend.new_cache(1, context)
        cache.open(0, context)
        run = Run(engine.backend, cache, Processing(), engine.layout, engine.limits)
        prefill_step(run, [Request(0, random_tokens(context - 1, 256), 0, 1, frozenset(), slot=0)])
        full = 2 * 12 * 32 * context * model.dtype.itemsize
        return tensor_bytes(cache), full


def tensor_bytes(holder: object) -> int:
    """Bytes of memory behind all tensors that an object holds, whatever it keeps them in; shared memory once."""
    storages: dict[int, int] = {}
    waiting: list[Any] = [holder]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, (list, tuple, set)):
            waiting += one
        elif type(one).__module__.startswith("retrofit.runtime.backends.hf.cache") or one is holder:
            waiting += vars(one).values()
    return sum(storages.values())
