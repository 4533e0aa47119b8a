"""One optimizer step against the design's formulas: the weighted loss of all terms, by autograd, and its learning rate.

    L = L_AR + alpha L_diff + beta L_draft + gamma L_conf

each a sum over its tokens, of all accumulation batches and groups, divided by a denominator of its own.
"""

import math
from typing import Any

import pytest
import torch
from decoding import random_prompts, randomise
from tiny_models import build
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from retrofit.adapters.gated_lora import GatedLoraLinear
from retrofit.adapters.layout import DraftLayout
from retrofit.recipes.schema import load_recipe
from retrofit.recipes.text.documents import Document
from retrofit.recipes.training.blocks import BlockBatch, missed_anchors, shares
from retrofit.recipes.training.objective import Teacher
from retrofit.recipes.training.schedule import learning_rate
from retrofit.recipes.training.step import Trainer, expected_tau, slot_report
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.engine import Engine

DOCUMENTS = [
    Document(name, tuple(tokens), tuple(i >= 3 for i in range(len(tokens))))
    for name, tokens in zip("abc", random_prompts((30, 19, 26), seed=9), strict=True)
]
BATCHES = [[(DOCUMENTS[0], 0)], [(DOCUMENTS[1], 0), (DOCUMENTS[2], 1)]]
Group = tuple[BlockBatch, KVCache, Tensor, bool]


def trainer_for(layout: DraftLayout, **overrides: Any) -> Trainer:
    engine = randomise(Engine.from_model(build("llama"), layout=layout), seed=3)
    settings = {"draft.block": layout.block, "train.anchors": 7, "objective.diffusion_share": 0.3}
    settings |= {"objective.draft_loss": "tv_ce", "objective.slot_weights": "dpace", **overrides}
    return Trainer(engine.attached, engine.backend, load_recipe("tiny", {"train.clip": 1e9, **settings}))


def groups_of(trainer: Trainer, patch: pytest.MonkeyPatch) -> list[Group]:
    """What each group of blocks of the steps to come ran on: its rows, the base's K/V and last hidden states."""
    found: list[Group] = []
    right = trainer._group

    def recorded(group: BlockBatch, cache: KVCache, teacher: Teacher, sums: Any, masked: bool) -> Any:
        found.append((group, cache, teacher.clean, masked))
        return right(group, cache, teacher, sums, masked)

    patch.setattr(trainer, "_group", recorded)
    return found


def dpace(tv: list[float]) -> list[float]:
    """w_j = prod_{i<j} a_i (1 + sum_{m>j} prod_{j<i<=m} a_i) of the slots of one block that count."""
    a = [0.5 * (1 - v) + 0.5 for v in tv]
    tails = [sum(math.prod(a[j + 1 : m + 1]) for m in range(j + 1, len(a))) for j in range(len(a))]
    return [math.prod(a[:j]) * (1 + tail) for j, tail in enumerate(tails)]


def loss_of(trainer: Trainer, groups: list[Group], alpha: float, beta: float, gamma: float) -> dict[str, Tensor]:
    """The four terms and their sum, slot by slot."""
    objective = trainer.recipe.objective
    backend, heads, layout = trainer.backend, trainer.attached.heads, trainer.attached.layout
    terms: dict[str, list[Tensor]] = {"ar": [], "diff": [], "draft": [], "conf": []}
    counts = {"ar": 0.0, "diff": 0.0, "draft": 0.0, "conf": 0.0}
    for group, cache, clean, masked in groups:
        hidden = group.rectangle(backend.run_trunk(backend.row_plan(group.rows()), cache))
        hidden = hidden[:, layout.first_drafting_row :]
        has = group.tensors(hidden.device)
        p = torch.softmax(backend.head(clean), -1)
        judged: set[int] = set()
        for b in range(len(group)):
            live = has["eligible"][b].nonzero().flatten().tolist()
            previous, target = has["previous"][b], has["target"][b]
            log_q = torch.log_softmax(heads.draft_logits(backend.head(hidden[b]), previous), -1)
            if masked:
                counts["diff"] += len(live)
                terms["diff"] += [has["weight"][b, j] * -log_q[j, target[j]] for j in live]
                continue
            base = p[has["source"][b]]
            tv = [0.5 * (base[j] - log_q[j].exp()).abs().sum() for j in live]
            if objective.draft_loss == "kl":
                losses = [(base[j] * (base[j].log() - log_q[j])).sum() for j in live]
            else:
                losses = [0.9 * v - 0.1 * log_q[j, base[j].argmax()] for j, v in zip(live, tv, strict=True)]
            distances = [float(v.detach()) for v in tv]
            weights = dpace(distances) if objective.slot_weights == "dpace" else [1.0] * len(live)
            terms["draft"] += [w * v for w, v in zip(weights, losses, strict=True)]
            counts["draft"] += sum(weights)
            features = torch.cat([hidden[b], heads.markov_w1[previous]], -1).detach()
            for j, v in zip(live, tv, strict=True):
                greedy, sampled = features[j] @ heads.confidence_weight.T + heads.confidence_bias
                hit = (log_q[j].argmax() == base[j].argmax()).float()
                terms["conf"].append(binary_cross_entropy_with_logits(greedy, hit))
                terms["conf"].append(binary_cross_entropy_with_logits(sampled, 1 - v.detach()))
                counts["conf"] += 1
                judged.add(int(has["source"][b, j]))
        tokens = dict(zip(has["source"].flatten().tolist(), has["target"].flatten().tolist(), strict=True))
        terms["ar"] += [cross_entropy(backend.head(clean)[s], torch.tensor(tokens[s])) for s in judged]
        counts["ar"] += len(judged)
    loss = {name: torch.stack(parts).sum() / counts[name] for name, parts in terms.items()}
    loss["total"] = loss["ar"] + alpha * loss["diff"] + beta * loss["draft"] + gamma * loss["conf"]
    return loss


@pytest.mark.parametrize("weights", [(0.3, 0.7, 0.2), (2.0, 0.1, 5.0)], ids=str)
@pytest.mark.parametrize(
    ("layout", "losses"),
    [
        (DraftLayout(4), ("tv_ce", "dpace")),
        (DraftLayout(4), ("kl", "uniform")),
        (DraftLayout(4, shift=0, seed_row="draft"), ("kl", "dpace")),
    ],
    ids=["anchor", "anchor-kl", "seed-kl"],
)
def test_the_gradient_is_that_of_the_weighted_loss(
    layout: DraftLayout,
    losses: tuple[str, str],
    weights: tuple[float, float, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two accumulation batches of three groups each; alpha, beta and gamma differ, and so do the denominators."""
    names = ("draft_loss", "slot_weights", "alpha", "beta", "gamma")
    settings = {f"objective.{name}": value for name, value in zip(names, (*losses, *weights), strict=True)}
    trainer = trainer_for(layout, **settings)
    groups = groups_of(trainer, monkeypatch)
    result = trainer.gradients(BATCHES)
    assert [masked for *_, masked in groups] == [False, False, True] * 2
    sums = result.sums
    denominators = {sums.ar_count, sums.diff_count, round(sums.draft_weight, 3), sums.conf_count}
    assert len(denominators) == (4 if losses[1] == "dpace" else 3), "one slot, one weight: as many as of L_conf"
    got = [p.grad.clone() for p in trainer.trained]

    monkeypatch.setattr(GatedLoraLinear, "by_hand", False)
    loss = loss_of(trainer, groups, *weights)
    want = torch.autograd.grad(loss["total"], trainer.trained)
    assert result.loss == pytest.approx({name: float(value.detach()) for name, value in loss.items()}, rel=1e-4)
    for name, found, expected in zip(trainer.names, got, want, strict=True):
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    norm = torch.stack([g.norm() for g in want]).norm()
    assert result.gradient_norm == pytest.approx(float(norm), rel=1e-3)


def test_gradients_are_clipped_to_the_norm_of_the_recipe() -> None:
    whole, cut = trainer_for(DraftLayout(4)), trainer_for(DraftLayout(4), **{"train.clip": 0.01})
    norm = whole.gradients(BATCHES).gradient_norm
    assert cut.gradients(BATCHES).gradient_norm == pytest.approx(norm, rel=1e-5)
    for p, q in zip(whole.trained, cut.trained, strict=True):
        torch.testing.assert_close(q.grad, p.grad * 0.01 / norm, rtol=1e-3, atol=1e-8)


# Which blocks


def test_the_second_group_hangs_where_the_first_one_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each document as many anchors as were missed, up to the share; all are response tokens or the one before."""
    trainer = trainer_for(DraftLayout(4), **{"train.anchors": 12})
    made: list[tuple[BlockBatch, Any]] = []
    right = trainer._group
    monkeypatch.setattr(
        trainer, "_group", lambda group, *rest: made.append((group, right(group, *rest))) or made[-1][1]
    )
    found = trainer.gradients(BATCHES).anchors
    uniform, again, masked = shares(12, 0.3, 4)
    assert (uniform, again, masked) == (4, 4, 4)
    missed = [anchors for batch in (0, 1) for anchors in missed_by(made[3 * batch], len(BATCHES[batch]))]
    assert [len(a["missed"]) for a in found] == [min(again, len(m)) for m in missed] and all(missed)
    for anchors, wanted, document in zip(found, missed, DOCUMENTS, strict=True):
        assert set(anchors["missed"]) <= set(wanted)
        assert len(anchors["uniform"]) == uniform and len(anchors["masked"]) == masked
        assert min(min(chosen) for chosen in anchors.values()) >= 2  # two tokens of prompt stand before
        assert max(max(chosen) for chosen in anchors.values()) <= len(document.tokens) - 2


def missed_by(group: tuple[BlockBatch, Tensor], documents: int) -> list[list[int]]:
    batch, best = group
    return missed_anchors(batch, best.numpy(), documents)


def test_blocks_are_drawn_by_the_seed_of_the_recipe() -> None:
    drawn = [trainer_for(DraftLayout(4), **{"train.seed": seed}).gradients(BATCHES).anchors for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]


# Learning rate


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        # 4 steps up, then 10 down to 5 %, which the step after the last would have
        ("constant", {4: 1.0, 9: 1.0, 13: 1.0, 14: 1.0}),
        ("linear", {4: 1.0, 9: 0.525, 13: 0.145, 14: 0.05}),
        ("cosine", {4: 1.0, 9: 0.525, 13: 0.05 + 0.95 * 0.0244717, 14: 0.05}),
        ("wsd", {4: 1.0, 9: 1.0, 12: 1.0, 13: 0.525, 14: 0.05}),  # a fifth of 14 is 2
    ],
)
def test_learning_rate_by_hand(schedule: str, rates: dict[int, float]) -> None:
    plan = load_recipe("tiny", {"train.lr": 2e-3, "train.warmup": 4, "train.steps": 14, "train.schedule": schedule})
    rates = {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, **rates}
    assert {step: learning_rate(plan, step) / 2e-3 for step in rates} == pytest.approx(rates)
    assert all(learning_rate(plan, step) >= 0.05 * 2e-3 for step in range(4, 15))


def test_no_warm_up_and_nothing_but_warm_up() -> None:
    plain = {"train.lr": 1e-3, "train.schedule": "linear"}
    assert learning_rate(load_recipe("tiny", {**plain, "train.warmup": 0, "train.steps": 10}), 0) == 1e-3
    assert learning_rate(load_recipe("tiny", {**plain, "train.warmup": 5, "train.steps": 5}), 4) == 1e-3


def test_each_step_moves_at_its_own_rate() -> None:
    """Adam's first step moves a weight by the rate, whatever its gradient."""
    settings = {"train.lr": 1e-3, "train.warmup": 4, "train.steps": 9, "train.schedule": "linear"}
    trainer = trainer_for(DraftLayout(4), **settings)
    before = trainer.attached.heads.confidence_bias.detach().clone()
    trainer.step(BATCHES)
    moved = (trainer.attached.heads.confidence_bias - before).abs()
    torch.testing.assert_close(moved, torch.full((2,), 0.25e-3), rtol=1e-3, atol=0)
    rates = []
    for _ in range(7):
        trainer.step(BATCHES[:1])
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    down = [1e-3 * (1 - 0.95 * n / 5) for n in range(4)]
    assert rates == pytest.approx([0.5e-3, 0.75e-3, 1e-3, *down])


def test_the_second_step_is_adams() -> None:
    """Betas .9 and .95, no weight decay: the moments of two gradients, worked out."""
    trainer = trainer_for(DraftLayout(4), **{"train.lr": 1e-3, "train.warmup": 0, "train.schedule": "constant"})
    weight = trainer.attached.heads.confidence_weight
    gradients, places = [], []
    for batches in (BATCHES, BATCHES[:1]):
        trainer.gradients(batches)
        gradients.append(weight.grad.clone())
        trainer.update()
        places.append(weight.detach().clone())
    (one, two), (before, after) = gradients, places
    mean = (0.9 * 0.1 * one + 0.1 * two) / (1 - 0.9**2)
    square = (0.95 * 0.05 * one**2 + 0.05 * two**2) / (1 - 0.95**2)
    torch.testing.assert_close(after - before, -1e-3 * mean / square.sqrt(), rtol=1e-2, atol=1e-6)


# What is logged


def test_acceptance_by_slot_and_the_tokens_it_promises() -> None:
    trainer = trainer_for(DraftLayout(4))
    sums = trainer.gradients(BATCHES).sums
    sums.accept = torch.tensor([[3.0, 2.0, 4.0], [0.5, 1.0, 2.0], [0.0, 0.0, 0.0]])
    assert slot_report(sums) == {"sampled": [0.75, 0.25, 0.0], "greedy": [0.5, 0.5, 0.0]}
    assert expected_tau([0.5, 0.5, 0.4]) == pytest.approx(1 + 0.5 + 0.25 + 0.1)
    assert expected_tau([]) == 1.0
