"""The attention function of the `hf` backend: base K/V in a cache of ours, and every row sees what the row plan says.

Registered with transformers under the name `retrofit`; the plan arrives as the keyword argument `retrofit_rows`.

    base rows      write K/V, read base K/V: one call for sequences that have about as many keys; in pieces where a mask
                   or scores of all rows would be too large
    draft rows     read base K/V and their own block: likewise; while training see `block_attention.py`, unless few

Not here: what a row sees (`adapters/rows.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from retrofit.adapters.one_call import one_call
from retrofit.adapters.rows import RowPlan
from retrofit.adapters.sections import Section, cut, sections
from retrofit.adapters.visibility import Chunk, Group, Window
from retrofit.errors import UnsupportedModelError
from retrofit.runtime.backends.hf import exact_attention, parts
from retrofit.runtime.backends.hf.answers import rows_now
from retrofit.runtime.backends.hf.block_attention import Call, block_attention, tiles_of
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.backends.hf.dense_attention import attend, base_rows
from retrofit.runtime.backends.hf.exact_attention import Form
from retrofit.runtime.backends.hf.recurrent.forest import Forest, forest_of
from retrofit.runtime.backends.hf.refused import refuse_call
from retrofit.runtime.backends.hf.sparse.attention import picked_attention
from retrofit.runtime.backends.hf.sparse.indexers import NO_MASK, Picked
from retrofit.runtime.backends.sizes import size_for

How = tuple[Window | None, float, float | None, Tensor | None]
"""Window, scale, soft-cap, and attention sinks [Hq]: a score of each head that stands for no key."""
Pairs = list[tuple[Tensor, Tensor]]
"""K and V, one pair behind the other."""
ATTENTION = "retrofit"
NUMBERED = "retrofit_layer"
"""Attribute of attention modules whose layer was told by their names."""
STEP = 256
"""Keys in multiples of which lengths are told apart where no form says how many."""
INDICES = ("indices", "block_indices")
"""Arguments in which attention modules hand on what their indexer picked."""
FEW_SCORES = {"cpu": 1 << 21, "cuda": 0}
"""Up to so many scores draft rows attend by one dense call while training too: many small steps would take longer."""


@dataclass
class ForwardContext:
    """What the attention function needs; travels through the model as `retrofit_rows`."""

    plan: RowPlan
    cache: KVCache
    form: Form | None = None
    """How base rows attend where their bits must not depend on the rows beside them; None: as is fastest."""
    calls: list[tuple[int, Window | None]] = field(default_factory=list)
    """(layer, window) of every call."""
    recurrent: list[int] = field(default_factory=list)
    """Layer of every recurrent module that ran."""
    chunks: Mapping[int, Chunk] = field(default_factory=dict)
    """layer -> its chunks, of layers that attend within chunks: their attention does not say so."""
    sliding: RowPlan | None = None
    """The plan as layers see it that keep no more than a window."""

    def plan_at(self, layer: int) -> RowPlan:
        """The rows with positions that count from the first key which this layer keeps."""
        begins = self.cache.begins_of(layer)
        if begins is None:
            return self.plan
        if self.sliding is None:
            self.sliding = self.plan.counted_from(begins)
        return self.sliding

    @cached_property
    def forest(self) -> Forest:
        """The rows as recurrent layers see them."""
        return forest_of(self.plan)


class NoRowPlan(RuntimeError):
    """The attention function was called by something other than a forward of ours."""


@one_call
def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    retrofit_rows: ForwardContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function "retrofit": query [1, Hq, N, D], key/value [1, Hkv, N, .] -> [1, N, Hq, Dv].

    Base rows write their K/V first and then read base K/V only; draft rows read base K/V and their own block.
    """
    context = rows_now() if retrofit_rows is None else retrofit_rows  # not every model hands keyword arguments on
    if context is None:
        raise NoRowPlan("attention implementation 'retrofit' needs a row plan; it is set for one forward at a time")
    picked = next((kwargs.pop(name).mask for name in INDICES if isinstance(kwargs.get(name), Picked)), None)
    refuse_call(module, None if attention_mask is NO_MASK else attention_mask, kwargs)
    cache, layer = context.cache, layer_of(module)
    plan = context.plan_at(layer)
    window = context.chunks.get(layer) if sliding_window is None else sliding_window
    context.calls.append((layer, window))
    how = (window, scaling if scaling is not None else query.shape[-1] ** -0.5, softcap, s_aux)
    if plan.base is not None and picked is None and (plan.alone or (context.form is not None and plan.prompts)):
        return _alone(context, plan, layer, query, key, value, how)[None], None
    if plan.base is None and not plan.tree and any(t.requires_grad for t in (query, key, value)):
        group = plan.draft
        assert group is not None
        scores = len(group.slots) * query.shape[1] * group.width * (group.keys + group.width)
        if scores > size_for(FEW_SCORES, query.device):
            return _training_rows(plan, cache.layers[layer], query, key, value, *how), None
    n, first_draft = plan.num_base, plan.first_draft
    out: list[Tensor] = []
    tree: Pairs = []
    if plan.base is not None:
        _keep(cache, plan, plan.base, layer, key[:, :, :n], value[:, :, :n])
        if plan.tree:
            tree = [(_rectangle(plan.base, key, 0, n), _rectangle(plan.base, value, 0, n))]
        rows = _rectangle(plan.base, query, 0, n)
        if picked is None:
            made = _in_sections(_base_section, context, plan, plan.base, layer, rows, tree, how)
        else:
            made = picked_attention(context, plan, layer, rows, tree, how, picked)
        out.append(_flat(plan.base, made))
    if first_draft > n:
        out.append(value.new_zeros(first_draft - n, query.shape[1], value.shape[-1]))
    if plan.draft is not None:
        stop = plan.num_rows
        rows, k, v = (_rectangle(plan.draft, t, first_draft, stop) for t in (query, key, value))
        made = _in_sections(_draft_section, context, plan, plan.draft, layer, rows, [*tree, (k, v)], how)
        out.append(_flat(plan.draft, made))
    return (out[0] if len(out) == 1 else torch.cat(out))[None], None


def _keep(cache: KVCache, plan: RowPlan, group: Group, layer: int, key_1HND: Tensor, value_1HND: Tensor) -> None:
    """K/V of base rows: into the cache, or where drafts branch beside it until it is known which are kept."""
    if len(plan.sequences) == 1 and not plan.tree:
        cache.append(layer, group.slots[0], plan.sequences[0].start, key_1HND, value_1HND)
        return
    rows = [t[0].transpose(0, 1) for t in (key_1HND, value_1HND)]
    if plan.tree:
        cache.stage(layer, *rows)
    else:
        cache.write(layer, plan.base_slots, plan.base_positions, *rows)


def _rectangle(group: Group, x_1HND: Tensor, first: int, stop: int) -> Tensor:
    """[S, H, T, D] of rows `first` to `stop`; one sequence's are one as they come."""
    if len(group.slots) == 1:
        return x_1HND[:, :, first:stop]
    return group.rectangle(x_1HND[0, :, first:stop].transpose(0, 1))


def _flat(group: Group, out_SHTD: Tensor) -> Tensor:
    """`_rectangle` undone: [N, H, D]."""
    return out_SHTD[0].transpose(0, 1) if len(group.slots) == 1 else group.flatten(out_SHTD)


def layer_of(module: nn.Module) -> int:
    """Which layer's K/V this is.  Raises UnsupportedModelError."""
    layer = getattr(module, NUMBERED, getattr(module, "layer_idx", None))
    if layer is None:
        raise UnsupportedModelError(f"{type(module).__name__} does not say which layer it is (layer_idx)")
    return int(layer)


def number_layers(trunk: nn.Module) -> Callable[[], None]:
    """Number attention modules that do not know their layer, by their names (Zamba's); returns the undo."""
    unknown = {name: m for name, m in trunk.named_modules() if getattr(m, "layer_idx", 0) in (None, -1)}
    numbers = {name: [int(part) for part in name.split(".") if part.isdigit()] for name in unknown}
    numbered = [(unknown[name], found[0]) for name, found in numbers.items() if found]
    for module, layer in numbered:
        setattr(module, NUMBERED, layer)

    def undo() -> None:
        for module, _ in numbered:
            delattr(module, NUMBERED)

    return undo


def _alone(
    context: ForwardContext, plan: RowPlan, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How
) -> Tensor:
    """Base rows and nothing else but filler, [1, H, N, D] -> [N, Hq, Dv]: each sequence's as if there were no other."""
    assert plan.base is not None
    outs, n = [], 0
    for number, sequence in enumerate(plan.sequences):
        group = plan.base if plan.alone else plan.base.lone(number)
        rows = slice(n, n + group.width)
        n = rows.stop
        own = (query, key, value) if plan.num_rows == group.width else [t[:, :, rows] for t in (query, key, value)]
        outs.append(_sequence(context, plan, group, layer, sequence.start, own, how)[0].transpose(0, 1))
    filler = plan.num_rows - n
    if filler:
        sizes = ("filler", filler, *outs[0].shape[1:], outs[0].dtype)
        if sizes not in plan.base.masks:
            plan.base.masks[sizes] = outs[0].new_zeros(filler, *outs[0].shape[1:])
        outs.append(plan.base.masks[sizes])
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _sequence(
    context: ForwardContext, plan: RowPlan, group: Group, layer: int, start: int, own: Sequence[Tensor], how: How
) -> Tensor:
    """One sequence's rows, a rectangle as they come: [1, H, T, D] each of query, key and value -> [1, Hq, T, Dv]."""
    form, slot, (query, key, value) = context.form, group.slots[0], own
    if form is None:
        k, v = context.cache.append(layer, slot, start, key, value)
        return base_rows(plan, query, k, v, *how)
    columns = form.columns(start + group.width, context.cache.columns(layer), query.dtype)
    k, v = context.cache.append(layer, slot, start, key, value, columns)
    return _exact_rows(group, query, k, v, how, form)


def _in_sections(
    attended: Callable[[ForwardContext, RowPlan, int, Tensor, Pairs, How], Tensor],
    context: ForwardContext,
    plan: RowPlan,
    group: Group,
    layer: int,
    query: Tensor,
    own: Pairs,
    how: How,
) -> Tensor:
    """[S, Hq, T, D] of `plan.base` or `plan.draft`, the group: what `attended` makes of each section's rows."""
    outs = [
        attended(context, part, layer, query[of], [(k[of], v[of]) for k, v in own], how)
        for of, part in _sections(plan, group, context, query)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _sections(plan: RowPlan, group: Group, context: ForwardContext, query: Tensor) -> list[Section]:
    form = context.form
    if query.device.type == "cpu":
        return sections(plan, group, STEP if form is None else form.piece, spanning=form is None)
    # A GPU is taken to need less time for one call over more keys.
    apart = form is not None and group is plan.base and not plan.tree
    return cut(plan, group, group.runs if apart else [(0, len(group.slots))])


def _base_section(context: ForwardContext, plan: RowPlan, layer: int, query: Tensor, tree: Pairs, how: How) -> Tensor:
    """Base rows [S, Hq, T, D]; tree: K and V of these rows themselves, where drafts branch."""
    group, form, cache = plan.base, context.form, context.cache
    assert group is not None
    if form is None:
        k, v = _joined([cache.read(layer, group.slots, group.keys), *tree])
        return base_rows(plan, query, k, v, *how)
    there = cache.columns(layer)
    if tree:
        cached = cache.read(layer, group.slots, form.columns(plan.paths.stop, there, query.dtype))
        window, scale, softcap, sinks = how
        if form.kernel and parts.fits(query, tree[0][1], softcap):
            return parts.tree_attention(group, plan.paths, query, cached, tree[0], window, scale, sinks, form)
        return exact_attention.tree_attention(group, plan.paths, query, cached, tree[0], *how, form)
    k, v = cache.read(layer, group.slots, form.columns(group.keys, there, query.dtype))
    return _exact_rows(group, query, k, v, how, form)


def _exact_rows(group: Group, query: Tensor, key: Tensor, value: Tensor, how: How, form: Form) -> Tensor:
    """Base rows [S, Hq, T, D] over the base keys [S, Hk, L, .], in a form of their own."""
    window, scale, softcap, sinks = how
    if form.kernel and parts.fits(query, value, softcap):
        return parts.base_attention(group, query, key, value, window, scale, sinks, form)
    return exact_attention.base_attention(group, query, key, value, *how, form)


def _draft_section(context: ForwardContext, plan: RowPlan, layer: int, query: Tensor, own: Pairs, how: How) -> Tensor:
    """Draft rows [S, Hq, T, D]; own: K and V of a tree's base rows, where drafts branch, and of these rows."""
    group, (window, scale, softcap, sinks) = plan.draft, how
    assert group is not None
    cached = context.cache.read(layer, group.slots, group.keys)
    if parts.fits(query, own[-1][1], softcap) and not any(t.requires_grad for t in (query, *own[-1])):
        return parts.draft_attention(plan, query, cached, _joined(own), window, scale, sinks)
    k, v = _joined([cached, *own])
    return attend(query, k, v, plan.draft_mask(window, query.dtype), False, scale, softcap, sinks)


def _training_rows(
    plan: RowPlan,
    layer: tuple[Tensor, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Draft rows [1, H, N, D] of which gradients are wanted -> [1, N, Hq, Dv]."""
    rows = plan.block_rows
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    call = Call(tiles_of(rows, heads, window, plan.causal_blocks), rows.block, groups, scale, softcap, sinks)
    if rows.gather is None:
        out = block_attention(query[0], key[0], value[0], *layer, call)
    else:
        q, k, v = (t[0].index_select(1, rows.gather) for t in (query, key, value))
        out = block_attention(q, k, v, *layer, call)[:, rows.scatter]
    return out.transpose(0, 1)[None]


def _joined(parts: Pairs) -> tuple[Tensor, Tensor]:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([k for k, _ in parts], dim=2), torch.cat([v for _, v in parts], dim=2)


AttentionInterface.register(ATTENTION, row_attention)
