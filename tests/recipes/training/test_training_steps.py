"""Whole training steps: sums are exact however they are cut, and gradients are autograd's."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from decoding import random_prompts
from torch import Tensor
from training_pieces import document, engine_for

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import Block
from retrofit.recipes.schema import load_recipe
from retrofit.recipes.text.documents import Document
from retrofit.recipes.text.sources import document_rng
from retrofit.recipes.training.blocks import (
    BlockBatch,
    add_sequence,
)
from retrofit.recipes.training.clean.forward import clean_forward
from retrofit.recipes.training.objective import Blocks, Sums, Teacher, backward_draft
from retrofit.recipes.training.step import Trainer


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


@pytest.mark.parametrize("layout", [DraftLayout(4), DraftLayout(4, shift=0, seed_row="draft")], ids=["base", "seed"])
def test_a_stage_of_the_curriculum_trains_as_blocks_of_its_length_do(
    layout: DraftLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as many of half the length, then the whole length; every gradient and figure is that of such a recipe."""
    seed = {"draft.shift": layout.shift, "draft.seed_row": layout.seed_row}
    growing = trainer_for(layout, **{"train.curriculum": [2], "train.steps": 2, "train.warmup": 0, **seed})
    short = trainer_for(replace(layout, block=2), **{"train.anchors": 16, **seed})
    batches = [[(d, 0) for d in DOCUMENTS]]
    first = gradients_of(growing, batches, monkeypatch)
    want = gradients_of(short, batches, monkeypatch)
    assert first[2] == want[2]
    assert all(torch.equal(a, b) for a, b in zip(first[0], want[0], strict=True))
    assert first[1].loss == want[1].loss and torch.equal(first[1].sums.accept, want[1].sums.accept)
    second = gradients_of(growing, batches, monkeypatch)
    whole = gradients_of(trainer_for(layout, **seed), batches, monkeypatch)
    assert second[2][0] == whole[2][0]  # those that no draft has a say in
    assert (first[1].draft_rows, second[1].draft_rows) == (want[1].draft_rows, whole[1].draft_rows)


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

    hidden = group.rectangle(backend.run_trunk(backend.row_plan(group.rows()), cache))
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

    hidden = group.rectangle(backend.run_trunk(backend.row_plan(group.rows()), cache))
    sums = Sums()
    teacher = Teacher(clean, backend.head, heads.vocab, kind == "kl")
    gradient, best = backward_draft(Blocks(hidden=hidden, **tensors), teacher, heads, sums, kind, "uniform")
    hidden.backward(gradient)
    assert sums.draft == pytest.approx(float(loss.detach()), rel=1e-5)
    assert sums.draft_weight == int(tensors["eligible"].sum()) == 4 + 4 + 1
    assert torch.equal(best, q.argmax(-1).view_as(best))
    for parameter, expected in zip(parameters, want, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-5)
