"""A model's own indexers, run over the base rows of a forward of ours: which keys each row sees of those before it.

    an indexer of theirs    scores all keys up to a row by small heads of its own, and names the best few: keys
                            (DeepSeek 3.2, GLM), or blocks of keys for each head of K/V (MiniMax M3)
    its keys                kept in the cache like K/V, as those of layer INDEX + layer, with no V; so they are staged,
                            stored, copied and forgotten with them
    rows of a prompt        a sequence at a time, as transformers' prefill does; those of a part of a prompt over as
                            many keys as the whole has, later ones hidden
    rows of a step          one at a time, over just the keys that it would have alone

So each row is scored over as many keys as in `generate`: equal scores are common (all heads at 0), and which of them
`topk` takes depends on how many there are.
Its `forward` runs as it is: ours hands it a cache and a mask of these rows.  Draft rows run no indexer.
Not here: the attention over what was picked (`attention.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrofit.adapters.rows import RowPlan, SequenceRows
from retrofit.runtime.backends.hf.answers import rows_now
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.backends.hf.instead import instead, unbound

INDEX = 1 << 20
"""Added to a layer's number: where the cache keeps its indexer's keys."""
NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)
"""What layers with an indexer are handed as their mask, which they cut a part out of; nobody reads it."""
TAKEN = {"hidden_states", "q_resid", "position_embeddings", "attention_mask", "position_ids", "past_key_values"}
"""Arguments of the indexers' `forward` that are known."""


@dataclass
class Picked:
    """What base rows see of the positions up to their own, by the indexer.

    mask: bool [S, G, T, P], rectangles of the plan's base group; G is 1, or a choice for each head of K/V.
    None: there are no base rows.
    """

    mask: Tensor | None


class Masks(dict[str, Tensor]):
    """Masks by kind of layer, as models with an indexer take them: of other kinds there is none."""

    def __missing__(self, _: str) -> None:
        return None


def masks() -> Masks:
    return Masks(indexed_attention=NO_MASK)


def every_key(plan: RowPlan) -> Picked:
    """As if an indexer had left nothing out."""
    group = plan.base
    assert group is not None
    positions = _longest(plan)
    return Picked(torch.ones(len(group.slots), 1, group.width, positions, dtype=torch.bool, device=plan.device))


def _longest(plan: RowPlan) -> int:
    """Behind the last position that a base row sees, itself included."""
    group = plan.base
    assert group is not None
    return max(int(group.limit.max()), int(group.query.max()) + 1)


def indexers_of(trunk: nn.Module) -> list[nn.Module]:
    """The indexers that rows get through."""
    return [i for m in trunk.modules() if isinstance(i := getattr(m, "indexer", None), nn.Module) and _known(i)]


def _known(indexer: nn.Module) -> bool:
    written = inspect.unwrap(type(indexer).forward)
    takes = set(inspect.signature(written).parameters) - {"self"}
    asks = {"update_indexer", "update_index"} & set(written.__code__.co_names)
    return bool(asks) and {"hidden_states", "past_key_values"} <= takes <= TAKEN


def install(trunk: nn.Module) -> Callable[[], None]:
    """Let rows of ours through a model's indexers; returns the undo."""
    undone = [instead(indexer, _through(indexer)) for indexer in indexers_of(trunk)]

    def undo() -> None:
        for one in undone:
            one()

    return undo


def _through(indexer: nn.Module) -> Callable[..., Any]:
    forward = unbound(indexer)
    signature = inspect.signature(type(indexer).forward)

    def run(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        context = rows_now()
        if context is None:
            return forward(self, *arguments, **named)
        given = dict(signature.bind(self, *arguments, **named).arguments)
        del given["self"]
        with torch.no_grad():
            return _pick(self, context.plan, context.cache, lambda **some: forward(self, **some), given)

    return MethodType(run, indexer)


def _pick(
    indexer: nn.Module, plan: RowPlan, cache: KVCache, forward: Callable[..., Tensor], given: dict[str, Any]
) -> Picked:
    group = plan.base
    if group is None:
        return Picked(None)
    layer: int = INDEX + indexer.layer_idx  # type: ignore[operator, assignment]
    longest = _longest(plan)
    found: list[list[Tensor]] = []
    own: list[Tensor] = []
    for sequence, first in _sequences(plan):
        picked: list[Tensor] = []
        keys: list[Tensor] = []
        for rows in _at_once(plan, sequence):
            held = _Keys(cache, layer, sequence, rows, keys if plan.tree else None)
            index = forward(**_of_rows(given, slice(first + rows.start, first + rows.stop), held))
            picked.append(_as_mask(indexer, index, longest))
        found.append(picked)
        own += keys
    if plan.tree:
        staged = torch.cat(own)
        cache.stage(layer, staged, staged[..., :0])
    return Picked(torch.cat([_padded(torch.cat(one, 2), group.width) for one in found]))


def _sequences(plan: RowPlan) -> Iterator[tuple[SequenceRows, int]]:
    """Those that have base rows, and where those begin."""
    first = 0
    for sequence in plan.sequences:
        if sequence.tokens:
            yield sequence, first
        first += len(sequence.tokens)


def _at_once(plan: RowPlan, sequence: SequenceRows) -> list[slice]:
    """Its rows that are scored together."""
    count = len(sequence.tokens)
    return [slice(0, count)] if plan.prompts else [slice(n, n + 1) for n in range(count)]


class _Keys:
    """Stands where an indexer has its cache: takes its keys of these rows, gives those that they are scored against."""

    def __init__(self, cache: KVCache, layer: int, sequence: SequenceRows, rows: slice, own: list[Tensor] | None):
        """own: of a tree, the keys [1, 1, D] of the rows before, which grows; None: drafts do not branch."""
        self.cache, self.layer, self.slot, self.start, self.rows, self.own, self.whole = (
            cache, layer, sequence.slot, sequence.start, rows, own, sequence.whole,
        )  # fmt: skip
        self.path = [] if own is None else _path(sequence, rows.start)
        self.layers = _Same(self)

    @property
    def stop(self) -> int:
        """Behind the rows' own keys."""
        return self.start + (self.rows.stop if self.own is None else len(self.path))

    @property
    def total(self) -> int:
        """How many keys, those behind the rows' own, which are hidden, included."""
        return max(self.stop, self.whole or 0)

    def update_indexer(self, key: Tensor, *_: Any) -> Tensor:
        """[1, n, D] of these rows -> [1, T, D]"""
        return self.update_index(key[:, None])[:, 0]

    def update_index(self, key: Tensor) -> Tensor:
        """[1, 1, n, D] of these rows -> [1, 1, T, D]"""
        if self.own is None:
            first = self.start + self.rows.start
            return self.cache.append(self.layer, self.slot, first, key, key[..., :0], self.total)[0]
        self.own.append(key[0])
        before = self.cache.read(self.layer, [self.slot], self.start)[0] if self.start else key[:, :, :0]
        return torch.cat([before, *(self.own[row][None] for row in self.path)], 2)


class _Same:
    """The same for every layer."""

    def __init__(self, keys: _Keys):
        self.keys = keys

    def __getitem__(self, _: int) -> _Keys:
        return self.keys


def _path(sequence: SequenceRows, row: int) -> list[int]:
    """The rows that a row of a tree follows, from the first on, itself last."""
    parents, path = sequence.parents, [row]
    while (before := row - 1 if parents is None else parents[row]) >= 0:
        path.append(row := before)
    return path[::-1]


def _of_rows(given: dict[str, Any], rows: slice, held: _Keys) -> dict[str, Any]:
    """An indexer's arguments for some rows of one sequence."""
    some = dict(given, past_key_values=held)
    for name in ("hidden_states", "q_resid"):
        if name in given:
            some[name] = given[name][:, rows]
    if "position_embeddings" in given:
        some["position_embeddings"] = tuple(t[:, rows] for t in given["position_embeddings"])
    keys = torch.arange(held.total, device=some["hidden_states"].device)
    places = keys[held.stop - (rows.stop - rows.start) : held.stop]
    if "position_ids" in given:
        some["position_ids"] = places[None]
    if "attention_mask" in given:
        some["attention_mask"] = (keys <= places[:, None])[None]
    return some


def _as_mask(indexer: nn.Module, index: Tensor, positions: int) -> Tensor:
    """bool [1, G, n, positions] of keys [1, n, k] that were picked, or of blocks [1, G, n, k], -1 for none.

    Rows that see few keys name hidden ones too, which may lie beyond the positions.
    """
    index = (index[:, None] if index.ndim == 3 else index).long()
    size = int(getattr(indexer, "block_size", 1))
    blocks = -(-positions // size)
    picked = torch.zeros(*index.shape[:3], blocks + 1, dtype=torch.bool, device=index.device)
    picked.scatter_(3, torch.where(index < 0, blocks, index.clamp(max=blocks)), True)
    return picked[..., :blocks].repeat_interleave(size, 3)[..., :positions]


def _padded(mask: Tensor, width: int) -> Tensor:
    """[1, G, n, P] -> [1, G, width, P]; padding sees everything: nobody reads it, but it has to be finite."""
    return F.pad(mask, (0, 0, 0, width - mask.shape[2]), value=True)
