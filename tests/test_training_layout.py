"""Training runs the rows that decoding runs, against the right targets: same logits, keyed anchors, exact sums."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_prompts, randomise
from tiny_models import build
from torch import Tensor

from retrofit.adapters.heads import Heads
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.recipes.schema import load_recipe
from retrofit.recipes.text.documents import Document
from retrofit.recipes.training.blocks import (
    BlockBatch,
    add_sequence,
    choose_anchors,
    document_rng,
    eligible_anchors,
    missed_anchors,
)
from retrofit.recipes.training.objective import Blocks, Sums, Teacher, backward_draft
from retrofit.recipes.training.step import Trainer, clean_forward
from retrofit.runtime import plan
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.engine import Engine
from retrofit.runtime.host import diffusion
from retrofit.runtime.host.modes import Run
from retrofit.runtime.plan import Choice, speculative_rows
from retrofit.runtime.request import Request
from retrofit.runtime.rules.sampling import Processing

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


def document(tokens: Sequence[int], name: str = "a", prompt: int = 0) -> Document:
    return Document(name, tuple(tokens), tuple(i >= prompt for i in range(len(tokens))))


def engine_for(name: str, layout: DraftLayout) -> Engine:
    return randomise(Engine.from_model(build(name), layout=layout), seed=3)


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
        hidden = group.rectangle(backend.run_trunk(backend.plan(group.rows()), cache))
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
        engine.backend.forward(engine.backend.plan([row]), cache)
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
            rows = speculative_rows(request, Choice(0, (0,)), layout, engine.limits, 64)
            rows = as_in_training(rows, [block])
            assert rows.blocks[0].start == block.start
            # Training cuts a block at the end of its document; a bidirectional row would see the difference.
            if len(block.inputs) < layout.block:
                rows = replace(rows, blocks=[Block(block.start, block.inputs)])
            with torch.inference_mode():
                out = engine.backend.forward(engine.backend.plan([rows]), committed(engine, tokens, anchor))
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
    rows = speculative_rows(request, Choice(3, (0, 1, 2, 3)), layout, engine.limits, 64)
    with torch.inference_mode():
        trained = backend.run_trunk(backend.plan(group.rows()), cache)
        out = backend.forward(backend.plan([rows]), committed(engine, tokens, p))
    torch.testing.assert_close(out.draft_hidden, trained, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(out.base_hidden, clean[p : p + 4], rtol=2e-4, atol=2e-4)
    assert [int(s[0]) for s in group.source] == [p + 1, p + 2, p + 3, p + 4]


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_denoising_gives_the_logits_of_l_diff(layout: DraftLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that fill masked slots in diffusion decoding are those under L_diff's weight, with the same logits."""
    engine = engine_for("llama", layout)
    heads = engine.attached.heads
    group, tensors, _, trained, _ = training_blocks(engine, diffusion=True)
    recorded: list[Tensor] = []
    right = Heads.draft_logits

    def record(self: Heads, trunk: Tensor, previous: Tensor) -> Tensor:
        recorded.append(right(self, trunk, previous))
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
                run = Run(engine.backend, committed(engine, tokens, block.start), Processing(), layout, engine.limits)

                def same_noise(*args: Any, block: Block = block) -> tuple[SequenceRows, str]:
                    rows, kind = plan.diffusion_rows(*args)
                    return as_in_training(rows, [block]), kind

                with monkeypatch.context() as patch, torch.inference_mode():
                    patch.setattr(diffusion, "diffusion_rows", same_noise)
                    recorded.clear()
                    diffusion.diffusion_step(run, [request])
                torch.testing.assert_close(recorded[0], trained[number, live], rtol=2e-4, atol=2e-4)
                compared += 1
            number += 1
    assert compared >= 2


# What a block is judged by


def judged(layout: DraftLayout, anchor: int, response: Sequence[bool], diffusion: bool = False) -> BlockBatch:
    tokens = [10, 11, 12, 13, 14, 15]
    batch = BlockBatch(layout, 64)
    add_sequence(batch, tokens, response, [anchor], 100, document_rng(0, 0, "a"), 64, diffusion)
    return batch


def test_targets_by_hand() -> None:
    """Text 10..15 at positions 0..5, clean rows from 100 on; the block of anchor 1 stands at 2 3 4 5."""
    batch = judged(DraftLayout(4), 1, [True] * 6)
    assert batch.sequences == [[Block(2, [MASK] * 4)]]
    assert batch.source[0].tolist() == [102, 103, 104, 105]
    assert batch.previous[0].tolist() == [12, 13, 14, 15]
    assert batch.target[0][:3].tolist() == [13, 14, 15]
    assert batch.eligible[0].tolist() == [True, True, True, False], "nothing follows the last token"

    batch = judged(DraftLayout(4, seed_row="draft"), 1, [True] * 6)
    assert batch.sequences == [[Block(1, [11, MASK, MASK, MASK])]]
    assert batch.source[0].tolist() == [101, 102, 103, 104]
    assert (batch.previous[0].tolist(), batch.target[0].tolist()) == ([11, 12, 13, 14], [12, 13, 14, 15])
    assert batch.eligible[0].all()

    batch = judged(DraftLayout(4, seed_row="draft", shift=0), 1, [True] * 6)
    assert batch.sequences == [[Block(1, [11, MASK, MASK, MASK])]]
    assert batch.source[0].tolist() == [101, 102, 103], "the row at 2 proposes 12, as the base row at 1 does"
    assert (batch.previous[0].tolist(), batch.target[0].tolist()) == ([11, 12, 13], [12, 13, 14])


def test_the_end_of_a_document_is_drafted_and_nothing_beyond_it() -> None:
    batch = judged(DraftLayout(4), 3, [True] * 6)
    assert batch.sequences == [[Block(4, [MASK, MASK])]], "rows stay inside the document"
    assert batch.eligible[0].tolist() == [True, False, False, False]
    assert batch.target[0][0] == 15, "the last token (EOS) is a target"
    assert judged(DraftLayout(4), 5, [True] * 6).sequences == [[]]
    assert len(judged(DraftLayout(4), 5, [True] * 6)) == 0


def test_only_response_tokens_are_targets() -> None:
    response = [False, False, False, True, True, False]
    assert eligible_anchors(response).tolist() == [2, 3], "the last prompt token and response tokens"
    batch = judged(DraftLayout(4), 1, response)
    assert batch.eligible[0].tolist() == [True, True, False, False]


@pytest.mark.parametrize("layout", [DraftLayout(6), DraftLayout(6, shift=0, seed_row="draft")], ids=["1", "0"])
def test_l_diff_weights(layout: DraftLayout) -> None:
    """m of K - 1 tokens masked, m uniform; (K - 1) / m on each predicting row; a masked left neighbour is unknown."""
    counts: dict[int, int] = {}
    tokens = list(range(40))
    rng = document_rng(0, 0, "a")
    batch = BlockBatch(layout, 64)
    add_sequence(batch, tokens, [True] * 40, [3] * 1000, 0, rng, 64, True)
    for block, weight, previous, target, eligible in zip(
        batch.sequences[0], batch.weight, batch.previous, batch.target, batch.eligible, strict=True
    ):
        masked = [i for i, token in enumerate(block.inputs) if token == MASK]
        m = len(masked)
        counts[m] = counts.get(m, 0) + 1
        assert 0 not in masked and 1 <= m <= 5
        rows = [i - layout.shift - layout.first_drafting_row for i in masked]
        want = np.zeros(layout.drafts)
        want[rows] = 5 / m
        np.testing.assert_allclose(weight, want)
        assert eligible[rows].all() and target[rows].tolist() == [tokens[block.start + i] for i in masked]
        for row, i in zip(rows, masked, strict=True):
            assert previous[row] == (64 if i - 1 in masked else tokens[block.start + i - 1])
        assert eligible.sum() == 5, "the denominator counts every token that could have been masked"
    assert all(150 < counts[m] < 250 for m in range(1, 6))


def test_missed_anchors_are_where_decoding_hangs_its_next_block() -> None:
    layout = DraftLayout(4)
    batch = BlockBatch(layout, 64)
    add_sequence(batch, list(range(12)), [True] * 12, [2, 6], 0, document_rng(0, 0, "a"), 64, False)
    # Anchor 2: block at 3..6 drafts 4 5 6 7 and gets 4, misses 5, so base row 4 emits it and is the next anchor.
    best = np.array([[4, 0, 0, 7], [8, 9, 10, 11]])
    assert missed_anchors(batch, best, 1) == [[4]]


def test_blocks_are_keyed_by_seed_epoch_and_document() -> None:
    draws = {
        key: choose_anchors(np.arange(200), 8, document_rng(*key)).tolist()
        for key in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]
    }
    assert len({tuple(v) for v in draws.values()}) == 4
    assert draws[(0, 0, "a")] == choose_anchors(np.arange(200), 8, document_rng(0, 0, "a")).tolist()


# Whole steps


def trainer_for(layout: DraftLayout, **overrides: Any) -> Trainer:
    settings = {
        "draft.block": layout.block,
        "train.anchors": 8,
        "train.clip": 1e9,
        "objective.diffusion_share": 0.5,
        **overrides,
    }
    engine = engine_for("llama", layout)
    return Trainer(engine.attached, engine.backend, load_recipe("tiny", settings))


DOCUMENTS = [document(t, n) for t, n in zip(random_prompts((30, 22, 26), seed=9), "abc", strict=True)]


def gradients_of(trainer: Trainer, batches: list[list[tuple[Document, int]]], patch: Any) -> Any:
    """(gradients, StepResult, blocks of each document) of one optimizer step."""
    blocks: dict[str, list[list[Block]]] = {}
    taken: list[Tensor] = []
    group = trainer._group

    def recorded(batch: BlockBatch, *rest: Any) -> Any:
        blocks.setdefault("groups", []).append([list(b) for b in batch.sequences])
        return group(batch, *rest)

    patch.setattr(trainer, "_group", recorded)
    patch.setattr(trainer.optimizer, "step", lambda: taken.extend(p.grad.clone() for p in trainer.trained))
    result = trainer.step(batches)
    return taken, result, blocks["groups"]


def test_accumulation_is_exact_and_blocks_follow_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = DraftLayout(4)
    one = [[(d, 0) for d in DOCUMENTS]]
    two = [[(DOCUMENTS[2], 0)], [(DOCUMENTS[1], 0), (DOCUMENTS[0], 0)]]
    whole, first, groups = gradients_of(trainer_for(layout), one, monkeypatch)
    parts, second, split = gradients_of(trainer_for(layout), two, monkeypatch)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    for key, value in first.loss.items():
        assert second.loss[key] == pytest.approx(value, rel=1e-4), key
    assert first.sums.diff_count == second.sums.diff_count
    assert first.sums.conf_count == second.sums.conf_count
    assert (first.clean_rows, first.draft_rows) == (second.clean_rows, second.draft_rows)
    # Three groups a batch: uniform anchors, missed anchors, masked blocks.
    assert len(groups) == 3 and len(split) == 6
    for kind in range(3):
        a, b, c = groups[kind]
        assert split[kind] == [c]
        assert split[3 + kind] == [b, a]


def test_a_step_moves_the_adapter_and_nothing_else() -> None:
    trainer = trainer_for(DraftLayout(4))
    model = trainer.attached.model
    own = {id(p) for p in trainer.attached.parameters()}
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in own}
    before = [p.detach().clone() for p in trainer.trained]
    ids = torch.tensor([DOCUMENTS[0].tokens])
    with torch.no_grad():
        logits = model(ids).logits
    trainer.step([[(DOCUMENTS[0], 0), (DOCUMENTS[1], 0)]])
    moved = [not torch.equal(p, b) for p, b in zip(trainer.trained, before, strict=True)]
    assert all(moved)
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters() if n in kept)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("kind", ["tv_ce", "kl"])
def test_gradients_against_autograd_through_the_whole_model(kind: str) -> None:
    """LoRA, mask vector and heads get the gradient that plain autograd gives the loss as the formula states it."""
    layout = DraftLayout(4)
    engine = engine_for("llama", layout)
    attached, backend = engine.attached, engine.backend
    heads, tokens = attached.heads, list(DOCUMENTS[0].tokens)
    group = BlockBatch(layout, heads.unknown)
    add_sequence(group, tokens, [True] * len(tokens), [4, 9, 27], 0, document_rng(0, 0, "a"), 64, False)
    cache, clean = clean_forward(backend, [DOCUMENTS[0]])
    parameters = [p for n, p in attached.peft_model.named_parameters() if "lora_" in n]
    parameters += [heads.mask_vector, heads.markov_w1, heads.markov_w2]

    hidden = group.rectangle(backend.run_trunk(backend.plan(group.rows()), cache))
    tensors = group.tensors(hidden.device)
    q = torch.log_softmax(heads.draft_logits(backend.head(hidden.flatten(0, 1)), tensors["previous"].flatten()), -1)
    with torch.no_grad():
        p = torch.softmax(backend.head(clean[tensors["source"].flatten()]), -1)
    tv = 0.5 * (p - q.exp()).abs().sum(-1)
    if kind == "kl":
        loss = (p * (p.log() - q)).sum(-1)
    else:
        loss = 0.9 * tv - 0.1 * q.gather(-1, p.argmax(-1, keepdim=True)).squeeze(-1)
    loss = (loss * tensors["eligible"].flatten()).sum()
    want = torch.autograd.grad(loss, parameters)

    hidden = group.rectangle(backend.run_trunk(backend.plan(group.rows()), cache))
    sums = Sums()
    teacher = Teacher(clean, backend.head, heads.vocab, kind == "kl")
    gradient, best = backward_draft(Blocks(hidden=hidden, **tensors), teacher, heads, sums, kind, "uniform")
    hidden.backward(gradient)
    assert sums.draft == pytest.approx(float(loss.detach()), rel=1e-5)
    assert sums.draft_weight == int(tensors["eligible"].sum()) == 4 + 4 + 1
    assert torch.equal(best, q.argmax(-1).view_as(best))
    for parameter, expected in zip(parameters, want, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5)
