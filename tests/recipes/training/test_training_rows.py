"""Training runs the rows that decoding runs: the same logits for every layout."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from decoding import random_prompts
from torch import Tensor
from training_pieces import document, engine_for

from retrofit.adapters.heads import Heads
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.recipes.text.sources import document_rng
from retrofit.recipes.training.blocks import (
    BlockBatch,
    add_sequence,
)
from retrofit.recipes.training.clean.forward import clean_forward
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.engine import Engine
from retrofit.runtime.host.infilling import fill_surest
from retrofit.runtime.plan import StepPlan, speculative_rows
from retrofit.runtime.request import Request
from retrofit.runtime.rules.sampling import Processing
from retrofit.runtime.run import Run

LAYOUTS = [
    DraftLayout(4, fill, attention, shift, seed_row)
    for fill in ("mask", "noise")
    for attention in ("bidirectional", "causal")
    for shift, seed_row in ((1, "base"), (1, "draft"), (0, "draft"))
]
IDS = ["-".join(str(v) for v in layout.to_dict().values()) for layout in LAYOUTS]
NAMES = ["llama", "gemma3", "deepseek_v3"]
TEXTS = random_prompts((22, 17), seed=5)
ANCHORS = ([5, 9, 20], [8, 16 - 1])


def training_blocks(engine: Engine, diffusion: bool) -> tuple[BlockBatch, dict[str, Tensor], Tensor, Tensor, KVCache]:
    """Group, its index tensors, hidden [B, K, H], logits [B, D, V] of drafting rows as training has them; the K/V."""
    heads, backend = engine.attached.heads, engine.backend
    group = BlockBatch(engine.layout, heads.unknown)
    first = 0
    for tokens, anchors in zip(TEXTS, ANCHORS, strict=True):
        rng = document_rng(0, 0, str(first))
        add_sequence(group, tokens, [True] * len(tokens), anchors, first, rng, 64, diffusion)
        first += len(tokens)
    cache, _ = clean_forward(backend, [document(tokens) for tokens in TEXTS])
    with torch.inference_mode():
        hidden = group.rectangle(backend.run_trunk(backend.row_plan(group.rows()), cache))
        drafting = hidden[:, engine.layout.first_drafting_row :]
        tensors = group.tensors(hidden.device)
        logits = heads.draft_logits(backend.head(drafting.flatten(0, 1)), tensors["previous"].flatten()).view(
            *drafting.shape[:2], -1
        )
    return group, tensors, hidden, logits, cache


def decoding_request(tokens: list[int], anchor: int, slot: int) -> Request:
    """The state in which decoding hangs a block on `anchor`: the seed stands there, everything before is committed."""
    request = Request(0, tokens[:anchor], 0, 64, frozenset(), slot=slot)
    request.tokens.append(tokens[anchor])
    request.committed = anchor
    return request


def as_in_training(rows: SequenceRows, blocks: Sequence[Block]) -> SequenceRows:
    """Noise is arbitrary, so training's inputs are taken over, but nothing else."""
    wanted = [
        replace(b, inputs=list(t.inputs) + list(b.inputs[len(t.inputs) :]))
        for b, t in zip(rows.blocks, blocks, strict=True)
    ]
    return replace(rows, blocks=wanted)


@torch.inference_mode()
def committed(engine: Engine, tokens: list[int], count: int) -> KVCache:
    """A cache as decoding leaves it: prefill of the first tokens, the others one by one."""
    cache = KVCache(1, 64)
    first = min(4, count)
    rows = [SequenceRows(0, 0, tokens[:first])]
    rows += [SequenceRows(0, i, [tokens[i]]) for i in range(first, count)]
    for row in rows:
        engine.backend.forward(engine.backend.row_plan([row]), cache)
    return cache


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
@pytest.mark.parametrize("name", NAMES)
def test_draft_rows_give_the_logits_of_decoding(name: str, layout: DraftLayout) -> None:
    """Each block of a training batch against the forward decoding runs at the same anchor."""
    engine = engine_for(name, layout)
    group, tensors, _, trained, _ = training_blocks(engine, diffusion=False)
    number = 0
    for tokens, anchors, blocks in zip(TEXTS, ANCHORS, group.sequences, strict=True):
        for anchor, block in zip(anchors, blocks, strict=True):
            request = decoding_request(tokens, anchor, 0)
            rows = speculative_rows(request, StepPlan(0, (0,)), layout, engine.limits, 64)
            rows = as_in_training(rows, [block])
            assert rows.blocks[0].start == block.start
            # Training cuts a block at the end of its document; a bidirectional row would see the difference.
            if len(block.inputs) < layout.block:
                rows = replace(rows, blocks=[Block(block.start, block.inputs)])
            with torch.inference_mode():
                out = engine.backend.forward(engine.backend.row_plan([rows]), committed(engine, tokens, anchor))
                hidden = out.draft_hidden[layout.first_drafting_row :]
                live = len(hidden)
                # Teacher-forced: the previous token is the text's own, from the seed (or the true next) on.
                at = anchor + (1 if layout.anchored else 0)
                previous = torch.tensor([tokens[min(at + i, len(tokens) - 1)] for i in range(live)])
                decoded = engine.attached.heads.draft_logits(engine.backend.head(hidden), previous)
            torch.testing.assert_close(trained[number, :live], decoded, rtol=2e-4, atol=2e-4)
            # The target is what a draft of that slot is held against, the teacher the base row that judges it.
            for slot in range(live):
                if tensors["eligible"][number, slot]:
                    assert tensors["target"][number, slot] == tokens[at + slot + 1]
            number += 1


@pytest.mark.parametrize("name", NAMES)
def test_a_fused_forward_runs_the_blocks_of_training(name: str) -> None:
    """Blocks on every accept length, in one forward with the rows that verify them."""
    layout, tokens, p = DraftLayout(block=4), TEXTS[0], 8
    engine = engine_for(name, layout)
    heads, backend = engine.attached.heads, engine.backend
    group = BlockBatch(layout, heads.unknown)
    anchors = [p, p + 1, p + 2, p + 3]
    add_sequence(group, tokens, [True] * len(tokens), anchors, 0, document_rng(0, 0, "a"), 64, False)
    cache, clean = clean_forward(backend, [document(tokens)])
    request = decoding_request(tokens, p, 0)
    request.drafts = tokens[p + 1 : p + 4]
    rows = speculative_rows(request, StepPlan(3, (0, 1, 2, 3)), layout, engine.limits, 64)
    with torch.inference_mode():
        trained = backend.run_trunk(backend.row_plan(group.rows()), cache)
        out = backend.forward(backend.row_plan([rows]), committed(engine, tokens, p))
    torch.testing.assert_close(out.draft_hidden, trained, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(out.base_hidden, clean[p : p + 4], rtol=2e-4, atol=2e-4)
    assert [int(s[0]) for s in group.source] == [p + 1, p + 2, p + 3, p + 4]


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_denoising_gives_the_logits_of_l_diff(layout: DraftLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that fill masked slots of a gap are those under L_diff's weight, with the same logits."""
    engine = engine_for("llama", layout)
    heads = engine.attached.heads
    group, tensors, _, trained, _ = training_blocks(engine, diffusion=True)
    recorded: list[Tensor] = []
    right = Heads.draft_logits

    def record(self: Heads, trunk: Tensor, previous: Tensor, ids: Tensor | None = None) -> Tensor:
        recorded.append(right(self, trunk, previous, ids))
        return recorded[-1]

    monkeypatch.setattr(heads, "draft_logits", record.__get__(heads))
    number = compared = 0
    for tokens, blocks in zip(TEXTS, group.sequences, strict=True):
        for block in blocks:
            live = torch.where(tensors["eligible"][number], tensors["weight"][number], 0.0) > 0
            masked = np.arange(len(block.inputs)) > 0
            if layout.input == "mask":
                masked &= np.asarray(block.inputs) == MASK
            else:
                text = tokens[block.start : block.start + len(block.inputs)]
                masked &= np.asarray(block.inputs) != np.asarray(text)
            whole = len(block.inputs) == layout.block
            if whole and masked.any() and live.sum() == masked.sum():
                request = decoding_request(tokens, block.start, 0)
                request.block = [MASK if m else t for m, t in zip(masked, tokens[block.start :], strict=False)]
                cache = committed(engine, tokens, block.start)
                run = Run(engine.backend, cache, Processing(), layout, engine.limits, threshold=2.0)  # none is filled
                rows = SequenceRows(slot=request.slot, start=request.committed, blocks=[block])
                with torch.inference_mode():
                    recorded.clear()
                    out = engine.backend.forward(engine.backend.row_plan([rows]), cache)
                    fill_surest(run, request, out.draft_hidden)
                torch.testing.assert_close(torch.cat(recorded), trained[number, live], rtol=2e-4, atol=2e-4)
                compared += 1
            number += 1
    assert compared >= 2
