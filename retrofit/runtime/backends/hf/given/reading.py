"""A processor's output, through the model's own code up to its text decoder: what that is handed is what rows take in.

    model.generate(**inputs)   embeds tokens, runs towers, puts images in their places, numbers positions, makes masks
      text decoder(...)        caught here, before it runs

So families differ only in what they hand over.  What of it a row plan cannot say is refused by name, and the first
prompt of a backend is decoded both ways: its last logits and those of a step behind it have to be the model's own.
Not here: how it runs (`rows.py`).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from retrofit.adapters.given import Given
from retrofit.adapters.rows import SequenceRows
from retrofit.adapters.visibility import Chunk, Window, first_seen
from retrofit.errors import RetrofitError, UnsupportedModelError, UsageError, out_of_memory
from retrofit.runtime.backends.hf.cache import ROOM, STEP, KVCache
from retrofit.runtime.backends.hf.load_check import differs, row_errors

if TYPE_CHECKING:
    from retrofit.runtime.backends.hf.backend import HFBackend

Prompt = tuple[list[int], Given]
KNOWN = {
    "inputs_embeds", "position_ids", "attention_mask", "visual_pos_masks", "deepstack_visual_embeds",
    "per_layer_inputs", "input_ids", "past_key_values", "cache_position",
}  # fmt: skip
"""What the text decoder is handed that is read here, or says nothing that a row plan does not."""
READING = threading.Lock()
"""A model keeps what it numbers positions by in itself, from its prompt to its next step."""


class _Caught(Exception):
    """The text decoder has been reached."""


def read_prompts(backend: HFBackend, inputs: Mapping[str, Any]) -> list[Prompt]:
    """Token ids and what was given of each prompt of a processor's output.

    Raises UsageError where the model's own code refuses it, UnsupportedModelError where rows cannot say it.
    """
    inputs = {name: _placed(backend, value) for name, value in inputs.items() if value is not None}
    ids = inputs["input_ids"]
    inputs.setdefault("attention_mask", torch.ones_like(ids))
    check = not backend.gives_checked
    with READING, torch.no_grad():
        calls, logits = _own_calls(backend, inputs, 2 if check else 0)
    prompts = [_prompt(backend, calls[0], inputs["attention_mask"], row, ids) for row in range(len(ids))]
    if check:
        _check(backend, prompts[0], *(step[0] for step in logits))
        backend.gives_checked = True
    return prompts


def _placed(backend: HFBackend, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(backend.device, backend.dtype if value.is_floating_point() else None)


def _own_calls(
    backend: HFBackend, inputs: Mapping[str, Any], steps: int
) -> tuple[list[dict[str, Any]], tuple[Tensor, ...]]:
    """What `generate` hands its text decoder, and the logits [B, V] of so many steps; 0: it does not run."""
    model, calls, me = backend.model, [], threading.get_ident()

    def catch(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        if threading.get_ident() != me:
            return
        if positional:
            raise _unsayable(backend, "hands its text decoder arguments without names")
        calls.append(dict(named))
        if not steps:
            raise _Caught

    how = GenerationConfig(
        do_sample=False, num_beams=1, min_new_tokens=steps, max_new_tokens=max(1, steps), pad_token_id=0,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    hook = backend.trunk.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        logits = model.generate(**inputs, generation_config=how).logits
    except _Caught:
        logits = ()
    except RetrofitError:
        raise
    except Exception as error:
        if out_of_memory(error) is not None:
            raise
        what = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{type(model).__name__} refuses these prompts: {what}",
            "give what this model's own processor makes of text and images, all of it",
        ) from error
    finally:
        hook.remove()
    return calls, logits


def _prompt(backend: HFBackend, call: Mapping[str, Any], mask: Tensor, row: int, ids: Tensor) -> Prompt:
    """One of the prompts, without its padding."""
    there = mask[row].bool()
    named = inspect.signature(backend.trunk.forward).parameters
    unknown = [n for n, v in call.items() if n in named and n not in KNOWN and isinstance(v, Tensor | list | tuple)]
    if unknown:
        raise _unsayable(backend, f"hands its text decoder {unknown[0]}")
    embeds = call.get("inputs_embeds")
    if embeds is None or embeds.shape[1] != ids.shape[1]:
        raise _unsayable(backend, "does not hand its text decoder the embeddings of a whole prompt")
    positions, shift = _positions(call.get("position_ids"), row, there)
    marks, added = call.get("visual_pos_masks"), call.get("deepstack_visual_embeds") or ()
    if marks is not None:
        first = int(marks[:row].sum())
        added = [layer[first : first + int(marks[row].sum())].to(embeds) for layer in added]
    per_layer = call.get("per_layer_inputs")
    tokens = ids[row][there].tolist()
    given = Given(
        embeds[row][there],
        positions,
        shift,
        _limits(backend, call.get("attention_mask"), row, there),
        None if marks is None else marks[row][there],
        tuple(added),
        None if per_layer is None else per_layer[row][there],
    )
    _check_width(backend, given)
    return tokens, given


def _positions(position_ids: Tensor | None, row: int, there: Tensor) -> tuple[Tensor | None, int]:
    """[P, L] what RoPE goes by, None where that is the position; and how far it is from the position behind these."""
    if position_ids is None:
        return None, 0
    numbers = position_ids[None] if position_ids.ndim == 2 else position_ids
    found = numbers[:, row if numbers.shape[1] > 1 else 0][:, there]
    counted = torch.arange(found.shape[1], device=found.device)
    if bool((found == counted).all()):
        return None, 0
    # Of four numbers the first is the position itself, which masks go by.
    return found, int(found[-3:].max()) + 1 - found.shape[1]


def _limits(backend: HFBackend, masks: Any, row: int, there: Tensor) -> list[int] | None:
    """Below which position each sees; None: up to itself.  From the model's own masks, all of which have to say so."""
    kinds = dict(masks) if isinstance(masks, Mapping) else {"full_attention": masks}
    seen = {kind: _seen(backend, mask, row, there) for kind, mask in kinds.items()}
    found = {kind: some for kind, some in seen.items() if some is not None}
    if not found:
        return None
    widest = found.get("full_attention", next(iter(found.values())))
    count = len(widest)
    keys = torch.arange(count, device=widest.device)
    limits = (widest * (keys + 1)).amax(1)
    windows: dict[str, Window | None] = {
        "full_attention": None,
        "sliding_attention": getattr(backend.config, "sliding_window", None),
        "chunked_attention": Chunk(size) if (size := getattr(backend.config, "attention_chunk_size", None)) else None,
    }
    for kind, some in found.items():
        want = keys < limits[:, None]
        if (window := windows.get(kind)) is not None:
            want &= keys >= first_seen(keys[:, None], window)
        if not torch.equal(want, some):
            raise _unsayable(backend, f"lets positions of images see others in a way of its own ({kind})")
    return None if torch.equal(limits, keys + 1) else limits.tolist()


def _seen(backend: HFBackend, mask: Any, row: int, there: Tensor) -> Tensor | None:
    """bool [L, L] which positions see which, of a mask [B, 1, L, L]; None: those before and themselves."""
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        hint = "load it with attn_implementation='sdpa'"
        raise UnsupportedModelError(f"{type(backend.model).__name__} makes masks that retrofit does not read", hint)
    own = mask[row if len(mask) > 1 else 0, 0]
    return (own if own.dtype == torch.bool else own == 0)[there][:, : len(there)][:, there]


def _check_width(backend: HFBackend, given: Given) -> None:
    """All rows of an image that see each other run in one forward."""
    if given.limits is None:
        return
    widest = max(limit - t for t, limit in enumerate(given.limits))
    room = min(backend.prefill_rows, ROOM - STEP) if backend.sliding else backend.prefill_rows
    if widest > room:
        raise UsageError(
            f"an image of this prompt takes {widest} positions that see each other; {room} fit into one forward",
            "give it smaller",
        )


@torch.inference_mode()
def _check(backend: HFBackend, prompt: Prompt, last_V: Tensor, next_V: Tensor) -> None:
    """Raise UnsupportedModelError unless rows give the model's own logits [V], of the prompt and of a step behind."""
    tokens, given = prompt
    token = int(last_V.argmax())
    cache = KVCache(1, len(tokens) + 1)
    rows = [
        SequenceRows(0, 0, tokens, last_logits_only=True, given=given),
        SequenceRows(0, len(tokens), [token], given=given),
    ]
    got = torch.cat([backend.forward(backend.row_plan([one]), cache).base_logits[-1:] for one in rows]).float()
    want = torch.stack([last_V, next_V]).float()
    routed = any("experts" in name.split(".") for name, _ in backend.model.named_modules())
    if differs(got, want, backend.dtype, routed):
        errors = row_errors(got, want).tolist()
        raise _unsayable(
            backend,
            f"gives other logits for a prompt with images than rows do, by {errors[0]:.2g} of their spread, and "
            f"{errors[1]:.2g} behind it",
        )


def _unsayable(backend: HFBackend, what: str) -> UnsupportedModelError:
    hint = "prompts of text alone run"
    return UnsupportedModelError(f"{type(backend.model).__name__} {what}, which retrofit does not run as rows", hint)
