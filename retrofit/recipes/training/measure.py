"""Measure a trained drafter: acceptance on held-out documents, confidence temperatures, and a probe by real decoding.

Not here: reports and comparisons with the original (`retrofit.eval`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.adapters.attach import Attached
from retrofit.machine import give_back
from retrofit.recipes.text.documents import Document
from retrofit.recipes.text.sources import document_rng
from retrofit.recipes.training.blocks import BlockBatch, add_sequence, choose_anchors, eligible_anchors
from retrofit.recipes.training.clean.forward import clean_forward
from retrofit.recipes.training.losses.rows import total_variation
from retrofit.recipes.training.step import expected_tau
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.rules.sampling import gumbel_noise

TEMPERATURES = torch.logspace(-1, 1, 81)
"""Candidates for the confidence head's temperature per slot."""
MEASURED = 32
"""Held-out documents that acceptance is measured on; data.held_out may keep more out of training."""
BLOCKS_AT_ONCE = 16
CONTEXTS = 512
"""Blocks are told apart by context: up to so many tokens, twice, four times as many, and so on."""
RANKS = 16
"""Candidates per slot whose chances are kept."""
TREE_TEMPERATURE = 0.8


@dataclass
class HeldOut:
    """Held-out blocks: confidence logits [N, D, 2], greedy hit and 1 - TV [N, D, 2], eligible [N, D]."""

    confidence: Tensor | None
    accepted: Tensor
    ranks: Tensor
    """[N, D, 2] rank of the target among the drafter's candidates: greedy, and at T = 0.8 with coupled noise."""
    eligible: Tensor
    context: Tensor
    """[N] how many tokens stand before each block."""

    def conditional(self, which: Tensor | None = None) -> dict[str, list[float]]:
        """Chance that slot i is accepted given a true prefix, teacher-forced: greedy, and sampled (1 - TV).

        which: [N] the blocks that count; None: all.
        """
        eligible = self.eligible if which is None else self.eligible & which[:, None]
        count = eligible.sum(0).clamp(min=1)
        mean = (self.accepted * eligible[..., None]).sum(0) / count[:, None]
        return {"greedy": _rounded(mean[:, 0]), "sampled": _rounded(mean[:, 1])}

    def figures(self) -> dict[str, Any] | None:
        """`conditional`, and `tau`, what it makes of sampling (`expected_tau`); None where there is no block."""
        if not len(self.eligible):
            return None
        chances = self.conditional()
        return {**chances, "tau": round(expected_tau(chances["sampled"]), 4)}

    def by_context(self) -> list[dict[str, Any]]:
        """`conditional` of the blocks behind up to CONTEXTS tokens, of those behind more and up to twice as many, and
        so on as far as the text reaches; `tau` is what it makes of sampling, `expected_tau`.  Empty where no block
        stands behind more than CONTEXTS tokens.
        """
        found, low, high = [], 0, CONTEXTS
        longest = int(self.context.max()) if len(self.context) else 0
        while low < longest and longest > CONTEXTS:
            which = (self.context > low) & (self.context <= high)
            if which.any():
                chances = self.conditional(which)
                tau = round(expected_tau(chances["sampled"]), 4)
                found.append({"up_to": high, "blocks": int(which.sum()), "tau": tau, **chances})
            low, high = high, 2 * high
        return found

    def rank_chances(self) -> dict[str, list[list[float]]]:
        """Per slot the chance that the target is the candidate of rank 0, 1, .. RANKS - 1; shapes draft trees."""
        chances: dict[str, list[list[float]]] = {}
        for kind, name in enumerate(("greedy", "sampled")):
            chances[name] = []
            for slot in range(self.eligible.shape[1]):
                ranks = self.ranks[self.eligible[:, slot], slot, kind]
                counts = torch.bincount(ranks.clamp(max=RANKS), minlength=RANKS + 1)[:RANKS]
                chances[name].append(_rounded(counts / max(1, len(ranks))))
        return chances


@torch.no_grad()
def held_out_acceptance(
    backend: HFBackend, attached: Attached, documents: Sequence[Document], anchors: int, seed: int
) -> HeldOut:
    """Draft all-masked blocks on held-out documents and hold them against the base's own distribution."""
    heads, layout = attached.heads, attached.layout
    confidence, accepted, ranks, eligible, context = [], [], [], [], []
    for document in documents:
        candidates = eligible_anchors(document.response)
        if not len(candidates):
            continue
        rng = document_rng(seed, 0, document.id)
        group = BlockBatch(layout, heads.unknown)
        chosen = choose_anchors(candidates, anchors, rng).tolist()
        add_sequence(group, document.tokens, document.response, chosen, 0, rng, heads.vocab, False)
        if not len(group):
            continue
        give_back()
        cache, clean_hidden = clean_forward(backend, [document])
        hidden = group.rectangle(backend.run_trunk(backend.row_plan(group.rows()), cache))
        part = group.tensors(hidden.device)
        drafting = hidden[:, layout.first_drafting_row :]
        for i in range(0, len(group), BLOCKS_AT_ONCE):
            here = slice(i, i + BLOCKS_AT_ONCE)
            h, previous = drafting[here].flatten(0, 1), part["previous"][here].flatten()
            source = part["source"][here].flatten()
            base_logits = backend.head(clean_hidden[source]).float()
            draft_logits = heads.draft_logits(backend.head(h), previous)
            ranks.append(_candidate_ranks(base_logits, draft_logits, source, seed).view(-1, layout.drafts, 2))
            p, q = torch.softmax(base_logits, -1), torch.softmax(draft_logits, -1)
            hit = (p.argmax(-1) == q.argmax(-1)).float()
            accepted.append(torch.stack([hit, 1 - total_variation(p, q)], -1).view(-1, layout.drafts, 2))
            logits = heads.confidence_logits(h, previous)
            if logits is not None:
                confidence.append(logits.view(-1, layout.drafts, 2))
        eligible.append(part["eligible"])
        context += [block.start for blocks in group.sequences for block in blocks]
    if not accepted:
        empty = torch.zeros(0, layout.drafts)
        none = torch.zeros(0, layout.drafts, 2)
        return HeldOut(None, none, none.long(), empty.bool(), torch.tensor([]))
    return HeldOut(
        torch.cat(confidence).cpu() if confidence else None,
        torch.cat(accepted).cpu(),
        torch.cat(ranks).cpu(),
        torch.cat(eligible).cpu(),
        torch.tensor(context),
    )


def in_line(figures: Mapping[str, Any]) -> str:
    """`HeldOut.figures` for people."""
    greedy, sampled = (" ".join(f"{chance:.2f}" for chance in figures[kind]) for kind in ("greedy", "sampled"))
    return f"held-out acceptance by slot {sampled} sampled, {greedy} greedy; tau {figures['tau']:.3f}"


def _candidate_ranks(base_NV: Tensor, draft_NV: Tensor, positions_N: Tensor, seed: int) -> Tensor:
    """[N, 2] how many candidates the drafter puts before the base's own token: greedy, and sampled as decoding does."""
    noise = gumbel_noise(torch.full_like(positions_N, seed), positions_N, base_NV.shape[1])
    ranks = []
    for base, draft in (
        (base_NV, draft_NV),
        (base_NV / TREE_TEMPERATURE + noise, draft_NV / TREE_TEMPERATURE + noise),
    ):
        target = base.argmax(-1, keepdim=True)
        ranks.append((draft > draft.gather(-1, target)).sum(-1))
    return torch.stack(ranks, -1)


def calibrate_confidence(attached: Attached, held_out: HeldOut) -> None:
    """Set the confidence head's temperature of each slot and kind to the candidate with the least BCE."""
    if held_out.confidence is None or not len(held_out.eligible):
        return
    temperature = attached.heads.confidence_temperature
    for slot in range(attached.layout.drafts):
        live = held_out.eligible[:, slot]
        for kind in range(2):
            logits, want = held_out.confidence[live, slot, kind], held_out.accepted[live, slot, kind]
            if not len(logits):
                continue
            scaled = logits[None] / TEMPERATURES[:, None]
            losses = F.binary_cross_entropy_with_logits(scaled, want.expand_as(scaled), reduction="none").mean(1)
            temperature[kind, slot] = TEMPERATURES[losses.argmin()]


def _rounded(values: Tensor) -> list[float]:
    return [round(float(v), 4) for v in values]
