"""Gradients of the profile `joint` against plain autograd on the plain model.

The naive way runs every block behind its whole prefix, as one text through transformers' own forward with gradients
everywhere; the prefix again for each of them.  What the drafts are judged by is detached, as the formulas say.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import recurrent_models
import tiny_models
import torch
import torch.nn.functional as F
from decoding import random_prompts, randomise
from torch import Tensor

from benchmarks.naive_training import confidence_term, draft_term, slot_weights
from retrofit.adapters.gated_lora import GatedLoraLinear
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK
from retrofit.recipes.schema import load_recipe
from retrofit.recipes.text.documents import Document
from retrofit.recipes.training import objective
from retrofit.recipes.training.blocks import BlockBatch
from retrofit.recipes.training.clean import forward
from retrofit.recipes.training.joint.drift import drift
from retrofit.recipes.training.joint.trainer import JointTrainer
from retrofit.recipes.training.prepare import recompute_layers
from retrofit.runtime.backends.hf import attention
from retrofit.runtime.backends.hf.recurrent import anchors, layer_rows
from retrofit.runtime.engine import Engine

WITHIN = {"llama": 1e-4, "qwen3_moe": 1e-4, "lfm2": 1e-4, "gemma3": 1e-4, "qwen3_next": 1e-3}
"""Of a tensor's largest gradient.  The chunks of a gated delta rule round more in fp32; in fp64 it is 2e-7."""
DOCUMENTS = [
    Document(name, tuple(tokens), tuple(i >= 3 for i in range(len(tokens))))
    for name, tokens in zip("abc", random_prompts((30, 19, 26), seed=9), strict=True)
]
BATCHES = [[(DOCUMENTS[0], 0)], [(DOCUMENTS[1], 0), (DOCUMENTS[2], 1)]]
RECURRENT = ("qwen3_next", "lfm2", "bamba", "olmo_hybrid")


def trainer_for(family: str, attention: str = "causal", **overrides: Any) -> JointTrainer:
    build = recurrent_models.build if family in RECURRENT else tiny_models.build
    layout = DraftLayout(4, attention=attention)
    engine = randomise(Engine.from_model(build(family), layout=layout), seed=3)
    settings = {"draft.block": 4, "draft.attention": attention, "train.anchors": 7, "train.clip": 1e9}
    settings |= {"profile": "joint", "objective.diffusion_share": 0.3, "objective.draft_loss": "tv_ce"}
    settings |= {"objective.slot_weights": "dpace"}
    settings |= {"joint.ce_weight": 0.7, "joint.kl_weight": 1.3, "joint.rank": 3, **overrides}
    trainer = JointTrainer(engine.attached, engine.backend, load_recipe("tiny", settings))
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():  # no longer the original, and no LoRA that is zero
        for kept in trainer.weights.trained.values():
            kept += 0.02 * torch.randn(kept.shape, generator=generator)
    trainer.follow()
    return trainer


def groups_of(trainer: JointTrainer, patch: pytest.MonkeyPatch) -> list[tuple[BlockBatch, bool]]:
    found: list[tuple[BlockBatch, bool]] = []
    right = trainer._group

    def recorded(group: BlockBatch, cache: Any, teacher: Any, sums: Any, masked: bool) -> Any:
        found.append((group, masked))
        return right(group, cache, teacher, sums, masked)

    patch.setattr(trainer, "_group", recorded)
    return found


def plain_hidden(trainer: JointTrainer, tokens: list[int], base_rows: int, mask: Tensor | None = None) -> Tensor:
    """[T, H] of one text by transformers' own forward, whose rows from `base_rows` on are draft rows."""
    backend = trainer.backend
    ids = torch.tensor(tokens)
    embeds = backend.embedding(ids.clamp(min=0))
    masked = (ids == MASK).nonzero()[:, 0]
    vector = trainer.attached.heads.mask_vector * float(getattr(backend.embedding, "embed_scale", 1.0))
    embeds = embeds.index_put((masked,), vector.expand(len(masked), -1))
    backend.gate.base_rows = base_rows
    try:
        hidden: Tensor = backend.trunk(inputs_embeds=embeds[None], attention_mask=mask).last_hidden_state[0]
    finally:
        backend.gate.base_rows = None
    return hidden


def seen_in_block(length: int, block: int) -> Tensor:
    """Additive mask [1, 1, T, T]: causal, and all of the last `block` rows by each other."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[length - block :, length - block :] = True
    return torch.zeros(length, length).masked_fill(~seen, float("-inf"))[None, None]


def naive_loss(trainer: JointTrainer, groups: list[tuple[BlockBatch, bool]]) -> Tensor:
    weights_of, heads, layout = trainer.recipe.objective, trainer.attached.heads, trainer.attached.layout
    terms = {name: torch.zeros(()) for name in ("ce", "kl", "diff", "draft", "conf")}
    counts = dict.fromkeys(("ar", "diff", "draft", "conf"), 0.0)
    head = trainer.backend.head
    for number, batch in enumerate(BATCHES):
        texts = [list(document.tokens) for document, _ in batch]
        clean = torch.cat([plain_hidden(trainer, text, len(text)) for text in texts])
        with trainer.weights.original():
            before = torch.cat([plain_hidden(trainer, text, len(text)) for text in texts])
            p_original = torch.softmax(head(before), -1)
        first = 0
        for document, _ in batch:
            for t in range(len(document.tokens) - 1):
                if document.response[t + 1]:
                    log_q = torch.log_softmax(head(clean[first + t][None]), -1)[0]
                    terms["ce"] = terms["ce"] - log_q[document.tokens[t + 1]]
                    p = p_original[first + t]
                    terms["kl"] = terms["kl"] + (p * (p.log() - log_q)).sum()
                    counts["ar"] += 1
            first += len(document.tokens)
        for group, masked in groups[3 * number : 3 * number + 3]:
            has = group.tensors(torch.device("cpu"))
            hidden = []
            for text, blocks in zip(texts, group.sequences, strict=True):
                for block in blocks:
                    rows = [*text[: block.start], *block.inputs]
                    seen = None if layout.causal else seen_in_block(len(rows), len(block.inputs))
                    found = plain_hidden(trainer, rows, block.start, seen)[block.start :]
                    hidden.append(F.pad(found, (0, 0, 0, 4 - len(found)))[layout.first_drafting_row :])
            rows_BDH = torch.stack(hidden)
            B, D, H = rows_BDH.shape
            flat, previous, target = rows_BDH.view(-1, H), has["previous"].flatten(), has["target"].flatten()
            log_q = torch.log_softmax(heads.draft_logits(head(flat), previous), -1)
            eligible = has["eligible"]
            if masked:
                weight = torch.where(eligible, has["weight"], 0.0).flatten()
                terms["diff"] = terms["diff"] - (log_q.gather(-1, target[:, None])[:, 0] * weight).sum()
                counts["diff"] += int(eligible.sum())
                continue
            p = torch.softmax(head(clean[has["source"].flatten()]), -1).detach()
            tv, top = 0.5 * (p - log_q.exp()).abs().sum(-1), p.argmax(-1)
            hit = (log_q.argmax(-1) == top).float()
            weight = slot_weights("dpace", tv.detach().view(B, D), eligible, hit.view(B, D))
            terms["draft"] = terms["draft"] + (draft_term("tv_ce", p, log_q, tv, top, target).view(B, D) * weight).sum()
            counts["draft"] += float(weight.sum())
            conf = confidence_term(heads, flat.detach(), previous, hit, 1 - tv.detach(), eligible)
            assert conf is not None
            terms["conf"] = terms["conf"] + conf
            counts["conf"] += int(eligible.sum())
    ar = (trainer.recipe.joint.ce_weight * terms["ce"] + trainer.recipe.joint.kl_weight * terms["kl"]) / counts["ar"]
    return (
        ar
        + weights_of.alpha * terms["diff"] / counts["diff"]
        + weights_of.beta * terms["draft"] / counts["draft"]
        + weights_of.gamma * terms["conf"] / counts["conf"]
    )


def farthest(trainer: JointTrainer, patch: pytest.MonkeyPatch) -> dict[str, float]:
    """By tensor: the largest difference of a gradient, as a share of the largest one."""
    groups = groups_of(trainer, patch)
    result = trainer.gradients(BATCHES)
    assert [masked for _, masked in groups] == [False, False, True] * 2
    got = [p.grad.clone() for p in trainer.trained]
    patch.setattr(GatedLoraLinear, "by_hand", False)
    loss = naive_loss(trainer, groups)
    assert result.loss["total"] == pytest.approx(float(loss.detach()), rel=1e-4)
    want = torch.autograd.grad(loss, trainer.forwarded, allow_unused=True)
    found = {}
    for name, one, other in zip(trainer.names, got, want, strict=True):
        other = torch.zeros_like(one) if other is None else other
        largest = float(other.abs().max())
        assert largest > 0 or "experts" in name or "gate" in name, name
        found[name] = float((one - other).abs().max()) / max(largest, 1e-9)
    return found


def in_parts(patch: pytest.MonkeyPatch) -> None:
    """Texts of several parts, each over what those before it have left; draft rows in tiles, not by one dense call."""
    patch.setattr(forward, "PIECE_ROWS", {"cpu": 8})
    for module in (anchors, layer_rows):
        patch.setattr(module, "STRIDE", 8)
    patch.setattr(attention, "FEW_SCORES", {"cpu": 0})
    patch.setattr(objective, "FEWEST_ROWS", 5)
    patch.setattr(objective, "CHUNK_ELEMENTS", {"cpu": 1})


@pytest.mark.parametrize("weights", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen3_next", "lfm2"])
def test_gradients_are_those_of_plain_autograd(family: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(family, **{"joint.weights": weights})
    found = farthest(trainer, monkeypatch)
    wrong = {name: value for name, value in found.items() if value > WITHIN[family]}
    assert not wrong
    assert any(name.startswith("joint.") for name in found)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next", "lfm2"])
def test_also_of_texts_in_several_parts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch)
    trainer = trainer_for(family, **{"joint.weights": "full"})
    found = farthest(trainer, monkeypatch)
    assert max(found.values()) <= WITHIN[family], max(found, key=lambda name: found[name])


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_also_of_blocks_whose_rows_all_see_each_other(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for("llama", "bidirectional", **{"joint.weights": weights})
    found = farthest(trainer, monkeypatch)
    assert max(found.values()) <= WITHIN["llama"], max(found, key=lambda name: found[name])


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_computing_layers_again_changes_no_gradient(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch)
    plain, again = (trainer_for("llama", **{"joint.weights": weights}) for _ in range(2))
    again.backend.until_closed(recompute_layers(again.backend))
    for trainer in (plain, again):
        trainer.gradients(BATCHES)
    for name, p, q in zip(plain.names, plain.trained, again.trained, strict=True):
        assert torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_packed_documents_train_as_documents_alone(weights: str) -> None:
    taken = []
    for batches in (
        BATCHES,
        [[one] for batch in BATCHES for one in batch],
        [[one for batch in BATCHES for one in batch]],
    ):
        trainer = trainer_for("qwen3_moe", **{"joint.weights": weights})
        taken.append((trainer.gradients(batches).loss, [p.grad for p in trainer.trained]))
    for loss, gradients in taken[1:]:
        assert loss == pytest.approx(taken[0][0], rel=1e-5, abs=1e-7)
        for one, other in zip(gradients, taken[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_drift_is_what_the_plain_models_say(weights: str) -> None:
    trainer = trainer_for("llama", **{"joint.weights": weights})
    found = drift(trainer.backend, trainer.weights, DOCUMENTS)
    sums, count = torch.zeros(4), 0
    for document in DOCUMENTS:
        text = list(document.tokens)
        own = trainer.backend.head(plain_hidden(trainer, text, len(text))).log_softmax(-1)[2:-1].detach()
        with trainer.weights.original():
            before = trainer.backend.head(plain_hidden(trainer, text, len(text))).log_softmax(-1)[2:-1]
        target = torch.tensor(text[3:])[:, None]
        nll = [-one.gather(-1, target).sum() for one in (own, before)]
        same = (own.argmax(-1) == before.argmax(-1)).sum()
        sums += torch.stack([(before.exp() * (before - own)).sum(), same.float(), *nll])
        count += len(target)
    kl, agreement, own_nll, nll_before = (sums / count).tolist()
    assert found["tokens"] == count and kl > 0
    assert found["kl"] == pytest.approx(kl, abs=2e-6) and found["agreement"] == pytest.approx(agreement, abs=1e-6)
    perplexities = [found["perplexity"], found["original_perplexity"]]
    assert perplexities == pytest.approx([math.exp(own_nll), math.exp(nll_before)], rel=1e-4)
