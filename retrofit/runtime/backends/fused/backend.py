"""The `fused` backend: our own decoder for Llama, Mistral, Qwen2 and Qwen3 over Triton kernels.

One layer is ten launches:

    qkv product | epilogue: bias, LoRA, q/k norm, RoPE, K/V write | attention, split | combine
    o product   | LoRA, residual, norm
    gate_up     | LoRA, SwiGLU
    down        | LoRA, residual, norm of the next layer

Rounding points are the original's.  Families differ by flags: biases, q/k norms, sliding windows, tied embeddings.
Not here: which rows run, sampling, CUDA graphs (`device/loop.py`), reading weights (`weights.py`).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from retrofit.adapters.given import Given
from retrofit.adapters.heads import Heads
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import FlatRows, SequenceRows
from retrofit.errors import ResourceError, UsageError
from retrofit.runtime.backends.context import context_length
from retrofit.runtime.backends.fused.paged import HEADROOM, PagedCache, pages_for
from retrofit.runtime.backends.fused.weights import Checkpoint, Linear, Weights, head_width, load
from retrofit.runtime.backends.interface import BUCKET_ROWS, PREFILL_ROWS, Output, Stepper, eos_set
from retrofit.runtime.backends.levels import EXACT
from retrofit.runtime.backends.turns import Line, Turns
from retrofit.runtime.kernels.attention import SPLIT, row_attention
from retrofit.runtime.kernels.interpreter import interpreted, patch
from retrofit.runtime.kernels.norm import add_rms_norm, embed_rms_norm
from retrofit.runtime.kernels.qkv import qkv
from retrofit.runtime.kernels.rows import PAGE, Rows, cut_tiles, tile_rows
from retrofit.runtime.kernels.sampling import choose
from retrofit.runtime.kernels.swiglu import swiglu
from retrofit.runtime.rules.sampling import Processing
from retrofit.runtime.rules.tree import paths_of
from retrofit.runtime.settings import Settings, read_settings

if TYPE_CHECKING:
    from retrofit.runtime.auto.policy import AutoPolicy
    from retrofit.runtime.request import Request
    from retrofit.runtime.run import Run

ONE_AT_A_TIME = Line()
"""Steps of all fused backends of the process: a step being recorded must not meet another, and Triton's interpreter
keeps its place in a launch in itself."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels are written for.  fp32 is for the interpreter and for comparisons: on a GPU it runs, but slowly."""


class FusedGQA:
    """Runs row plans, and the steps of the device loop, through our kernels."""

    name = "fused"
    prefill_rows = PREFILL_ROWS
    one_order = False

    def __init__(
        self,
        config: Any,
        checkpoint: Checkpoint,
        layout: DraftLayout,
        heads: Heads | None = None,
        adapter: Mapping[str, Tensor] | None = None,
        lora_scale: float = 1.0,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        exact: str = "bucket",
        rows: int = BUCKET_ROWS,
        settings: Settings | None = None,
    ):
        """config: the model's text configuration.  rows: row count of the level `bucket`.

        settings: the base's own generation settings; None: neutral.

        Raises UnsupportedModelError, UsageError, or ResourceError where kernels cannot run.
        """
        if dtype not in DTYPES:
            raise UsageError(
                f"the fused backend decodes in float32, bfloat16 or float16, not in {dtype}", "use backend='hf'"
            )
        if exact not in EXACT:
            raise UsageError(f"exact={exact!r} does not exist", f"levels are {', '.join(EXACT)}")
        if rows < 1:
            raise UsageError(f"the bucket has {rows} rows; it needs at least 1")
        self.turns = Turns(ONE_AT_A_TIME)
        self.device = torch.device(device)
        check_kernels(self.device)
        self.config, self.dtype, self.exact, self.layout, self.heads = config, dtype, exact, layout, heads
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.width = head_width(config)
        self.eps = float(config.rms_norm_eps)
        self.context_length = context_length(config)
        self.rope_boundary: int | None = None
        self.rope_restarts = False
        self.eos = eos_set(config.eos_token_id)
        self.settings = settings or read_settings(None, self.eos, config.vocab_size)
        self.input_vocab = int(config.vocab_size)
        self.most_rows = rows if exact == "bucket" else None
        self.most_nodes: int | None = HEADROOM - 1
        self.prefill_alone = exact != "off"
        self.weights: Weights = load(config, checkpoint, adapter or {}, lora_scale, self.device, dtype)
        for linear in self.weights.linears():
            linear.own_kernel = exact == "invariant"
        self.head = VocabHead(self.weights.head)
        self.work_per_row = 2.0 * sum(linear.weight.numel() for linear in self.weights.linears())
        self.cos, self.sin = rotary_table(config, self.context_length, dtype, self.device)
        if heads is not None:
            heads.to(self.device)
            self.mask_vector = heads.mask_vector.detach()
        else:
            self.mask_vector = torch.zeros(config.hidden_size, dtype=dtype, device=self.device)
        self.cache: PagedCache | None = None
        self._stream: torch.cuda.Stream | None = None

    def recording_stream(self) -> torch.cuda.Stream:
        """The side stream that steps are recorded on: only one, for the library keeps a workspace for each."""
        self._stream = self._stream or torch.cuda.Stream(self.device)
        return self._stream

    def check_usable(self) -> None:
        self.turns.check_open()

    def close(self) -> None:
        """Nothing of the user's was changed."""
        self.turns.end()

    def made_by(self) -> Hashable:
        """Its weights are its own and stay as they are."""
        return id(self)

    def lanes(self, requests: int) -> int:
        """The next power of two, so that few steps have to be recorded."""
        lanes = 1 << (requests - 1).bit_length()
        return min(lanes, self.most_rows or lanes)

    def new_cache(self, slots: int, capacity: int) -> PagedCache:
        """A cache for so many sequences of up to `capacity` positions; the last one again where it is large enough.

        Raises ResourceError when it does not fit into memory.
        """
        # Whole pages: a call of a few tokens more runs over the same memory, and the steps recorded over it.
        capacity = pages_for(capacity) * PAGE - HEADROOM
        have, pages = self.cache, slots * pages_for(capacity)
        if have is not None and not have.leased:
            if have.slots >= slots and have.capacity >= capacity and have.pages >= pages:
                have.leased = True
                return have
            # Its memory may be needed for the next one, and that of the steps recorded over it.
            have.loops.clear()
            self.cache = None
        del have
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        shape = (len(self.weights.layers), self.config.num_key_value_heads, self.width)
        cache = PagedCache(shape, slots, capacity, pages, self.dtype, self.device)
        cache.leased = True
        self.cache = self.cache or cache
        return cache

    def stepper(
        self, run: Run, requests: Sequence[Request], slots: int, on_host: AutoPolicy, on_device: AutoPolicy
    ) -> Stepper:
        """Steps planned on the device where that is built: not for diffusion, n-gram drafts alone or in a tree, options
        other than temperature, top-k and top-p, requests that differ in them or in what ends them, and blocks without
        an anchor."""
        from retrofit.runtime.device.steps import DeviceSteps
        from retrofit.runtime.host.steps import HostSteps

        if (
            run.strategy not in ("diffusion", "prompt_lookup", "hybrid")
            and run.warps_only
            and all(r.eos == (self.eos if requests[0].eos else frozenset()) for r in requests)
            and (run.strategy == "ar" or (self.layout.anchored and self.heads is not None))
        ):
            return DeviceSteps(run, requests, slots, on_device)
        return HostSteps(run, on_host)

    def read_prompts(self, inputs: Mapping[str, Any]) -> list[tuple[list[int], Given]]:
        raise UsageError("the fused backend takes text alone, and these prompts hold images", "use backend='hf'")

    def row_plan(self, sequences: list[SequenceRows]) -> FlatRows:
        return FlatRows(sequences)

    def forward(self, plan: FlatRows, cache: PagedCache) -> Output:
        """One forward of rows planned on the host."""
        rows = self.rows(plan, cache)
        hidden = self.run(rows, cache, plan.prefill)
        cache.staged = rows.places if plan.tree else None
        base = hidden[: rows.num_base]
        draft = hidden[rows.num_base : rows.num_rows]
        if not plan.prefill and self.exact == "bucket":
            logits = self.head(hidden)
            return Output(logits[: rows.num_base], base, draft, base, logits[rows.num_base : rows.num_rows])
        wanted = base if plan.logit_rows is None else base[torch.tensor(plan.logit_rows, device=self.device)]
        return Output(self.head(wanted), wanted, draft, base)

    def run(self, rows: Rows, cache: PagedCache, prefill: bool = False) -> Tensor:
        """[padded, H] last hidden states, normed.  Writes the base rows' K/V."""
        w, heads = self.weights, (self.config.num_attention_heads, self.config.num_key_value_heads, self.width)
        # A prompt's tiles are many, so each walks the whole cache: partial results of splits would outgrow it.
        split = cache.block_table.shape[1] * PAGE if prefill else SPLIT
        with full_precision_reductions(self.device):
            residual, x = embed_rms_norm(rows.ids, w.embedding, self.mask_vector, w.layers[0].input_norm, self.eps)
            for i, layer in enumerate(w.layers):
                keys, values = cache.keys[i], cache.values[i]
                norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
                parts, bias = layer.qkv.parts(x)
                query, draft_key, draft_value = qkv(
                    parts,
                    heads,
                    bias,
                    norms,
                    self.eps,
                    self.cos,
                    self.sin,
                    layer.qkv.up,
                    rows,
                    keys,
                    values,
                    self.dtype,
                )
                x = row_attention(
                    query, keys, values, cache.block_table, draft_key, draft_value, rows,
                    self.width**-0.5, layer.window, None, self.layout.causal, split=split,
                )  # fmt: skip
                parts, bias = layer.o.parts(x)
                residual, x = add_rms_norm(parts, residual, layer.post_norm, self.eps, layer.o.up, rows, bias)
                parts, bias = layer.gate_up.parts(x)
                inner = layer.gate_up.width // 2
                x = swiglu(parts, inner, layer.gate_up.up, rows, self.dtype, bias)
                parts, bias = layer.down.parts(x)
                following = w.layers[i + 1].input_norm if i + 1 < len(w.layers) else w.norm
                residual, x = add_rms_norm(parts, residual, following, self.eps, layer.down.up, rows, bias)
        return x

    def priced_by(self) -> None:
        """Its steps on the host are few, and those on the device are timed at once."""

    def choose(self, scores: Tensor, params: Processing, seed: Tensor, index: Tensor) -> Tensor:
        """The token of each row; scores have been through the processors, temperature included."""
        if len(seed) != len(scores):  # a greedy choice planned on the host draws no noise and brings no keys
            seed = index = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
        return choose(scores, 0.0 if params.temperature == 0 else 1.0, seed, index)

    def rows(self, plan: FlatRows, cache: PagedCache) -> Rows:
        """Rows planned on the host, on the device."""
        num_base, num_rows = plan.num_base, len(plan.ids)
        num_draft = num_rows - num_base
        padded = max(num_rows, 0 if plan.prefill else self.most_rows or 0)
        wide, narrow = np.int64, np.int32
        ids, positions = np.zeros(padded, wide), np.zeros(padded, wide)
        slots, limits, starts = np.zeros(padded, narrow), np.zeros(padded, narrow), np.zeros(padded, narrow)
        places, low, high = np.zeros(num_base, wide), np.zeros(num_draft, narrow), np.zeros(num_draft, narrow)
        paths = np.zeros((padded, max(len(s.tokens) for s in plan.sequences) if plan.tree else 1), narrow)
        ids[:num_rows], positions[:num_rows], slots[:num_rows] = plan.ids, plan.positions, plan.slots
        limits[:num_base] = positions[:num_base] + 1
        base = [s for s in plan.sequences if s.tokens]
        blocks = [(s, block) for s in plan.sequences for block in s.blocks]
        row = 0
        for s in base:
            span = slice(row, row + len(s.tokens))
            starts[span], places[span] = s.start, cache.places(s.slot, range(s.start, s.start + len(s.tokens)))
            if plan.tree:
                for j, path in enumerate(paths_of(s.follows)):
                    paths[row + j, : len(path)] = path
            row = span.stop
        for s, block in blocks:
            span = slice(row, row + len(block.inputs))
            own = slice(row - num_base, span.stop - num_base)
            limits[span], starts[span], low[own], high[own] = block.start, s.start, own.start, own.stop
            if plan.tree and s.tokens:
                path = paths_of(s.follows)[block.anchor]
                paths[span, : len(path)] = path
            row = span.stop
        counts_draft = [sum(len(b.inputs) for b in s.blocks) for s in plan.sequences if s.blocks]
        tiles = cut_tiles([len(s.tokens) for s in base], counts_draft, tile_rows(self.groups), self.device)

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(self.device)

        return Rows(
            num_base, num_draft, padded, put(ids), put(positions), put(slots), put(limits), put(places), put(low),
            put(high), *tiles, put(starts) if plan.tree else None, put(paths) if plan.tree else None,
        )  # fmt: skip


def check_kernels(device: torch.device) -> None:
    """Raises ResourceError where our kernels cannot run: compiled on the current GPU, or interpreted on the CPU.

    On the device `meta` there is nothing to run; `benchmarks/compiled.py` looks at what would be launched.
    """
    if interpreted():
        patch()
    if device.type == "meta" or (device.type == "cpu" and interpreted()):
        return
    if device.type != "cuda" or interpreted():
        raise ResourceError(
            f"the fused backend's kernels run on a CUDA GPU, or interpreted on the CPU; not on {device} "
            f"with TRITON_INTERPRET {'set' if interpreted() else 'not set'}",
            "use backend='hf' here; TRITON_INTERPRET=1 in the environment interprets them, slowly",
        )
    if device.index not in (None, torch.cuda.current_device()):
        raise ResourceError(
            f"the fused backend runs on the current GPU, cuda:{torch.cuda.current_device()}, not on {device}",
            f"choose the GPU with CUDA_VISIBLE_DEVICES={device.index}, or torch.cuda.set_device, and use device='cuda'",
        )


class VocabHead:
    """Projection to the vocabulary."""

    def __init__(self, linear: Linear):
        self.linear = linear
        self.vocab = linear.width

    def __call__(self, hidden_NH: Tensor) -> Tensor:
        """[N, H] -> [N, V]."""
        with full_precision_reductions(hidden_NH.device):
            return self.linear(hidden_NH)


def rotary_table(config: Any, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [length, head width] in the model's dtype, as transformers computes them for these positions."""
    like = torch.empty(0, dtype=dtype)
    cos, sin = LlamaRotaryEmbedding(config)(like, torch.arange(length)[None])
    return cos[0].contiguous().to(device), sin[0].contiguous().to(device)


@contextmanager
def full_precision_reductions(device: torch.device) -> Iterator[None]:
    """Let the library add partial sums of a matrix product in fp32, not in bf16 or fp16."""
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    # The second half of each setting, whether sums may be split at all, has a name of its own.
    before = [(getattr(settings, name), getattr(settings, f"{name}_split_k", True)) for name in names]
    for name in names:
        setattr(settings, name, False)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(settings, name, value if hasattr(settings, f"{name}_split_k") else value[0])
