"""Whether a model does through row plans what it does by itself: tried once, before anything is trained or decoded.

Three forwards of a dozen rows: the model's own, and two of ours.

    own       tokens 0 .. L-1 of two sequences, no cache
    first     base rows 0 .. m-1, empty cache
    second    base rows m .. L-2 behind it, draft rows fed the tokens that really come next, and beside them the other
              sequence from position 0

With the adapter off, every row's logits must be the model's own; and every layer must have called our attention
function once, with the window that the configuration gives it.  Windows of up to `SMALL` positions are crossed; of
larger ones only the structure is seen, so that the check costs a large model no more than a small one.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from retrofit.adapters.gated_lora import Gate, GatedLoraLinear
from retrofit.adapters.rows import Block, RowPlan, SequenceRows
from retrofit.adapters.visibility import Chunk, Window
from retrofit.errors import RetrofitError, UnsupportedModelError
from retrofit.runtime.backends.hf.attention import ForwardContext
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.backends.hf.refused import ROW_LAYERS, has_sliding_window

if TYPE_CHECKING:
    from retrofit.runtime.backends.hf.backend import HFBackend

ROWS = 12
SMALL = 64
NARROWING = ("window", "chunk", "index_topk", "index_block_size")
"""What the configuration calls how much a row sees."""
FEWEST = 4
BESIDE = 3
"""Rows of the other sequence."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest error of any row (`row_errors`).  Rounding costs an fp32 model some 1e-5, TF32 1e-3, a wrong position 0.3."""
HALF_TYPICAL, HALF_LARGEST = 0.1, 0.5
"""In half precision rounding costs a typical row 0.03, one of extreme activations 0.1, one whose router flips more."""


@torch.inference_mode()
def check_model(backend: HFBackend) -> dict[int, int]:
    """layer -> window, of the layers that slide.

    Raises UnsupportedModelError with the reason why this model's rows do not come out as its own.
    """
    name = type(backend.model).__name__
    # Beyond a longrope boundary the model's own forward would see other frequencies than rows before it.
    length = min(check_length(backend.config, backend.context_length), backend.rope_boundary or backend.context_length)
    if length < FEWEST:
        raise UnsupportedModelError(f"{name} has a context of {length} positions, too few to draft in")
    tokens, other = ([(7 * i + first) % backend.head.vocab for i in range(length)] for first in (3, 5))
    routed = any("experts" in module_name.split(".") for module_name, _ in backend.model.named_modules())
    own = _or_refused(name, "its own forward", lambda: own_logits(backend, [tokens, other]))
    want = own[0]
    cache = KVCache(2, length)
    middle = length // 2
    first = backend.row_plan([SequenceRows(0, 0, tokens[:middle], whole=length)])
    calls: list[tuple[int, Window | None]] = []
    got = _or_refused(name, "a forward of rows", lambda: row_logits(backend, first, cache, calls))
    if differs(got, want[:middle], backend.dtype, routed):
        raise UnsupportedModelError(f"{name}: {why_first(backend, want, got)}")
    drafts = draft_places(middle, length, backend.causal_blocks)
    blocks = [Block(places[0], [tokens[p] for p in places]) for places in drafts]
    both = [
        SequenceRows(0, middle, tokens[middle:-1], blocks, whole=length),
        SequenceRows(1, 0, other[:BESIDE], whole=length),
    ]
    got = _or_refused(name, "rows behind a cache", lambda: row_logits(backend, backend.row_plan(both), cache))
    kinds = {
        "base rows behind a cache": want[middle:-1],
        "rows of a second sequence": own[1, :BESIDE],
        "draft rows": want[[p for places in drafts for p in places]],
    }
    if backend.indexed and length > most_picked(backend.config):
        del kinds["draft rows"]  # they see more than the model's own rows
    for what, right in kinds.items():
        mine, got = got[: len(right)], got[len(right) :]
        if differs(mine, right, backend.dtype, routed):
            raise UnsupportedModelError(f"{name}: {why_second(what, mine, right)}")
    return {layer: window for layer, window in calls if isinstance(window, int)}


def check_length(config: Any, context: int) -> int:
    """How many tokens: past every window that is small."""
    small = [
        value
        for key, value in vars(config).items()
        if any(word in key for word in NARROWING) and type(value) is int and 0 < value <= SMALL
    ]
    return min(context, max([ROWS, *(2 * (value + 3) for value in small)]))


def most_picked(config: Any) -> int:
    """From how many positions on an indexer may leave some out."""
    blocks = getattr(config, "index_topk_blocks", None)
    return int(config.index_topk if blocks is None else config.index_block_size * blocks)


def draft_places(middle: int, length: int, causal: bool) -> list[list[int]]:
    """Positions of the draft rows, by block; in a bidirectional block a row of its own is all that equals the model."""
    if causal:
        return [list(range(middle, length - 1)), [length - 1]]
    return [[middle], [middle + 1], [length - 1]]


def own_logits(backend: HFBackend, tokens: list[list[int]]) -> Tensor:
    """[S, L, V] of the model as it is, at positions counted as `generate` counts them (RoBERTa's own begin later)."""
    ids = torch.tensor(tokens, device=backend.device)
    counted = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    takes = "position_ids" in inspect.signature(backend.model.forward).parameters
    more = {"position_ids": counted} if takes else {}
    logits: Tensor = backend.model(input_ids=ids, use_cache=False, **more).logits
    return logits.float()


def row_logits(
    backend: HFBackend, plan: RowPlan, cache: KVCache, calls: list[tuple[int, Window | None]] | None = None
) -> Tensor:
    """[N, V] of all rows, adapter off.  Raises UnsupportedModelError where layers call our attention wrongly.

    calls: gets (layer, window) of every call.
    """
    context = ForwardContext(plan, cache, calls=[] if calls is None else calls, chunks=backend.chunks)
    with adapter_off(backend):
        hidden = backend.run_trunk(plan, cache, context)
    name = type(backend.model).__name__
    check_calls(name, backend.config, backend.context_length, context.calls, context.recurrent)
    return backend.head(hidden).float()


@contextmanager
def adapter_off(backend: HFBackend) -> Iterator[None]:
    """Draft rows run the base alone, whatever the adapter has learned."""
    gated = [m for m in backend.model.modules() if isinstance(m, GatedLoraLinear)]
    off = Gate()
    for module in gated:
        module.gate = off
    try:
        yield
    finally:
        for module in gated:
            module.gate = backend.gate


def check_calls(
    name: str, config: Any, context_length: int, calls: list[tuple[int, Window | None]], recurrent: Sequence[int] = ()
) -> None:
    """Every layer once, each with its own window; `recurrent`: layers that advanced a state, which may attend too."""
    layers = Counter(layer for layer, _ in calls)
    if any(count > 1 for count in layers.values()):
        most, times = layers.most_common(1)[0]
        raise UnsupportedModelError(
            f"{name} attends {times} times in layer {most} of one forward (it runs layers several times, or splits "
            "their attention); retrofit keeps one K/V for each layer"
        )
    count = config.num_hidden_layers - sum(kind in ROW_LAYERS for kind in getattr(config, "layer_types", None) or ())
    if len(layers.keys() | set(recurrent)) != count:
        raise UnsupportedModelError(
            f"{name}: {len(layers)} of {count} layers call transformers' attention interface; "
            "retrofit needs all of them"
        )
    if not has_sliding_window(config, context_length):
        return
    kinds = getattr(config, "layer_types", None)
    for layer, window in calls:
        if isinstance(window, Chunk):  # by the configuration, not by the call
            continue
        slides = kinds is None or kinds[layer] == "sliding_attention"
        if slides and window is None:
            raise UnsupportedModelError(
                f"{name} has a sliding window but does not hand it to its attention function (layer {layer})"
            )
        if window is not None and not slides:
            raise UnsupportedModelError(f"{name} hands a sliding window to a layer that sees everything ({layer})")
        if slides and window != config.sliding_window:
            raise UnsupportedModelError(
                f"{name} hands its attention function a window of {window}; "
                f"its configuration says {config.sliding_window}"
            )


def differs(got: Tensor, want: Tensor, dtype: torch.dtype, routed: bool) -> bool:
    """Whether these are not the same logits [N, V] but for rounding."""
    errors = row_errors(got, want)
    if dtype in TOLERANCE:
        return not errors.max() <= TOLERANCE[dtype]
    return not (errors.median() <= HALF_TYPICAL and (routed or errors.max() <= HALF_LARGEST))


def row_errors(got: Tensor, want: Tensor) -> Tensor:
    """[N] root mean square of each row's difference, in units of how much its logits vary."""
    spread = (want - want.mean(-1, keepdim=True)).square().mean(-1).sqrt()
    return (got - want).square().mean(-1).sqrt() / spread.clamp_min(1e-6)


def why_first(backend: HFBackend, want: Tensor, got: Tensor) -> str:
    """What stands in the way of base rows on an empty cache."""
    attention = [m for m in backend.trunk.modules() if hasattr(m, "layer_idx")]
    if any(getattr(m, "is_causal", True) is False for m in attention):
        return "its rows attend to later ones (is_causal is False), so that it is no decoder as configured"
    error = row_errors(got, want[: len(got)]).max()
    return (
        f"logits through row plans differ from the model's own by {error:.2g} of their spread; it does "
        "something after its last norm or in its attention that retrofit does not know"
    )


def why_second(what: str, got: Tensor, want: Tensor) -> str:
    return f"logits of {what} differ from the model's own by {row_errors(got, want).max():.2g} of their spread"


def _or_refused(name: str, what: str, run: Callable[[], Tensor]) -> Tensor:
    """What a model's own code trips over is a reason to refuse it; being out of memory is none."""
    try:
        return run()
    except (RetrofitError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "allocate memory" in str(error):
            raise
        text = " ".join(str(error).split())
        raise UnsupportedModelError(f"{name} cannot run {what}: {type(error).__name__}: {text[:160]}") from error
