"""L_AR, and the way back from all terms through the clean half of a batch.

    clean forward, without gradient, as in the `frozen` profile  ->  K/V of every layer, states of recurrent ones
    draft rows, forward and backward                             ->  gradients of that K/V, a set for each term
    once all denominators are known, piece by piece, the last first:
        the piece again, now with gradient, over the K/V of those before it
        its hidden states are judged by L_AR; backward with that and with its K/V's gradients
        what earlier parts of the same text get of it is added to theirs

So draft rows train what base rows leave for them, and what stands in memory are the activations of one piece beside
K/V and its gradients.  Base rows run as in decoding, strictly causal: the `ar` that is trained is the one that decodes.
Not here: the draft rows (`step.py`), which weights are trained (`weights.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from retrofit.adapters.rows import SequenceRows
from retrofit.recipes.text.documents import Document
from retrofit.recipes.training.blocks import eligible_anchors
from retrofit.recipes.training.clean.forward import Part, pieces_of
from retrofit.recipes.training.objective import Sums, chunk_rows
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.backends.hf.recurrent import anchors as anchored

Key = tuple[str | int, ...]
Gradients = dict[Key, Tensor]
"""By what draft rows read of the clean half, as `read_by_drafts` names it."""


@dataclass
class Clean:
    """The clean half of one batch, until its gradients are known.

    original: [P, H] last hidden states of the original, where L_AR holds base rows to its distribution.
    """

    documents: Sequence[Document]
    cache: KVCache
    original: Tensor | None
    gradients: dict[str, Gradients] = field(default_factory=dict)
    """By term."""

    @property
    def targets(self) -> int:
        """How many base rows L_AR judges: those that a response token follows."""
        return sum(len(eligible_anchors(document.response)) for document in self.documents)

    def watch(self) -> None:
        """From now on gradients of all that draft rows read are kept."""
        for tensor in read_by_drafts(self.cache).values():
            tensor.requires_grad_()
        if self.cache.states.record is not None:
            self.cache.states.record.watched = True

    def take(self, term: str) -> None:
        """Move the gradients that came since the last call to those of a term."""
        into = self.gradients.setdefault(term, {})
        for key, tensor in read_by_drafts(self.cache).items():
            if tensor.grad is not None:
                into[key] = into[key] + tensor.grad if key in into else tensor.grad.float()
                tensor.grad = None

    def weighted(self, weights: dict[str, float]) -> Gradients:
        """Those of the whole loss; each term's are let go."""
        total: Gradients = {}
        for term, weight in weights.items():
            for key, gradient in self.gradients.pop(term, {}).items():
                part = gradient.mul_(weight)
                total[key] = total[key].add_(part) if key in total else part
        return total


def read_by_drafts(cache: KVCache) -> dict[Key, Tensor]:
    """All tensors of a clean half that draft rows read: `keys` and `values` [slots, heads, positions, width] of a
    layer, `rows` [slots, reach + positions, ..] and `states` [slots, n, ..] of a recurrent one."""
    found: dict[Key, Tensor] = {}
    for layer, (keys, values) in cache.layers.items():
        found["keys", layer], found["values", layer] = keys, values
    record = cache.states.record
    if record is not None:
        found |= {("rows", *key): tensor for key, tensor in record.rows.items()}
        found |= {("states", layer): tensor for layer, tensor in record.states.items()}
    return found


class CleanBackward:
    """Backward through the clean halves of a step.

    anchors: weights in L_AR of the cross-entropy to the text and of the divergence from the original.  original_logits:
    hidden states of the original [N, H] -> its logits [N, V].
    """

    def __init__(
        self,
        backend: HFBackend,
        anchors: tuple[float, float],
        original_logits: Callable[[Tensor], Tensor],
    ):
        self.backend, self.anchors, self.original_logits = backend, anchors, original_logits
        self.stride = anchored.STRIDE

    def __call__(self, clean: Clean, gradients: Gradients, sums: Sums) -> None:
        """Adds to the gradients of the base's parameters, and L_AR's terms to `sums`, whose `ar_count` is that of all
        batches and processes."""
        lengths = [len(document.tokens) for document in clean.documents]
        multiple = self.stride if self.backend.recurrent else 1
        for piece in reversed(pieces_of(lengths, self.backend.device, multiple)):
            self._piece(clean, piece, gradients, sums)

    def _piece(self, clean: Clean, piece: list[Part], gradients: Gradients, sums: Sums) -> None:
        rows = [
            SequenceRows(n, start, clean.documents[number].tokens[start:stop], last_logits_only=True)
            for n, (number, start, stop) in enumerate(piece)
        ]
        cache, before = self._cache_of(clean.cache, piece)
        with torch.enable_grad():
            hidden = self.backend.run_trunk(self.backend.row_plan(rows), cache)
            leaf = hidden.detach().requires_grad_()
            self._judge(clean, piece, leaf, sums)
        roots, given = [hidden], [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad]
        for key, tensor in read_by_drafts(cache).items():
            if key in gradients and tensor.requires_grad:
                roots.append(tensor)
                given.append(self._of_piece(key, gradients[key], piece, tensor))
        live = [n for n, root in enumerate(roots) if root.requires_grad]
        torch.autograd.backward([roots[n] for n in live], [given[n] for n in live])
        self._pass_on(clean.cache, gradients, piece, before)

    def _judge(self, clean: Clean, piece: list[Part], hidden: Tensor, sums: Sums) -> None:
        """L_AR of a piece's rows, forward and backward to their hidden states and the vocabulary's weights."""
        firsts = np.cumsum([0, *(len(document.tokens) for document in clean.documents)])
        here, everywhere, targets, row = [], [], [], 0
        for number, start, stop in piece:
            document = clean.documents[number]
            judged = eligible_anchors(document.response)
            judged = judged[(judged >= start) & (judged < stop)]
            here.append(judged - start + row)
            everywhere.append(judged + firsts[number])
            targets.append(np.asarray(document.tokens)[judged + 1])
            row += stop - start
        places, origins, wanted = (
            torch.from_numpy(np.concatenate(some)).to(hidden.device) for some in (here, everywhere, targets)
        )
        size = chunk_rows(self.backend.head.vocab, hidden.device)
        to_text, to_original = self.anchors
        for rows, origin, target in zip(places.split(size), origins.split(size), wanted.split(size), strict=True):
            if not len(rows):
                continue
            log_q = torch.log_softmax(self.backend.head(hidden[rows]).float(), dim=-1)
            ce = -log_q.gather(-1, target[:, None]).sum()
            loss, kl = to_text * ce, None
            if clean.original is not None:
                log_p = torch.log_softmax(self.original_logits(clean.original[origin]).float(), dim=-1)
                kl = (log_p.exp() * (log_p - log_q)).sum()
                loss = loss + to_original * kl
                sums.kl += float(kl.detach())
            sums.ar += float(ce.detach())
            (loss / max(sums.ar_count, 1)).backward()

    def _cache_of(self, whole: KVCache, piece: list[Part]) -> tuple[KVCache, Gradients]:
        """A cache for the piece's rows; of one that is no text's first also copies of what it reads of those before,
        whose gradients are wanted."""
        stop = max(stop for _, _, stop in piece)
        cache = KVCache(len(piece), stop)
        if self.backend.recurrent:
            cache.states.record = anchored.Record(len(piece), stop)
        number, start, _ = piece[0]
        before: Gradients = {}
        if start == 0:
            return cache, before

        def leaf(key: Key, tensor: Tensor) -> Tensor:
            before[key] = tensor.detach().clone().requires_grad_()
            return before[key]

        slot = slice(number, number + 1)
        for layer, (keys, values) in whole.layers.items():
            k, v = leaf(("keys", layer), keys[slot, :, :stop]), leaf(("values", layer), values[slot, :, :stop])
            cache.layers[layer] = k * 1, v * 1  # the rows write theirs into it
        record = whole.states.record
        if record is not None:
            cache.states.at[0] = start
            for layer, inputs in whole.states.inputs.items():
                kept = record.rows[layer, "before"][slot, start : start + inputs.shape[1]]
                cache.states.inputs[layer] = leaf(("rows", layer, "before"), kept) * 1
            for layer in whole.states.matrices:
                at = start // self.stride
                cache.states.matrices[layer] = leaf(("states", layer), record.states[layer][slot, at]) * 1
        return cache, before

    def _of_piece(self, key: Key, gradient: Tensor, piece: list[Part], like: Tensor) -> Tensor:
        """The part of a gradient that is of what the piece's rows wrote, zero elsewhere."""
        out = torch.zeros_like(like)
        for n, (number, start, stop) in enumerate(piece):
            if key[0] == "states":  # after STRIDE, 2 STRIDE, .. rows of the text
                some = slice(start // self.stride + 1, stop // self.stride + 1)
                out[n, some] = gradient[number, some].to(out.dtype)
            elif key[0] == "rows":
                reach = like.shape[1] - max(last for _, _, last in piece)
                some = slice(reach + start, reach + stop)
                out[n, some] = gradient[number, some].to(out.dtype)
            else:
                out[n, :, start:stop] = gradient[number, :, start:stop].to(out.dtype)
        return out

    def _pass_on(self, whole: KVCache, gradients: Gradients, piece: list[Part], before: Gradients) -> None:
        """Add what a part's rows want of the parts before it."""
        number, start, _ = piece[0]
        for key, tensor in before.items():
            if tensor.grad is None:
                continue
            if key not in gradients:
                gradients[key] = torch.zeros_like(read_by_drafts(whole)[key], dtype=torch.float32)
            if key[0] == "states":
                gradients[key][number, start // self.stride] += tensor.grad[0]
            elif key[0] == "rows":
                gradients[key][number, start : start + tensor.shape[1]] += tensor.grad[0]
            else:
                gradients[key][number, :, :start] += tensor.grad[0, :, :start]
