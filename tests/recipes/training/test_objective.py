"""The loss terms against numbers worked out by hand, against autograd, and however they are chunked."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from retrofit.adapters.heads import Heads
from retrofit.recipes.training import objective
from retrofit.recipes.training.losses.rows import data_loss, draft_loss, total_variation
from retrofit.recipes.training.losses.slots import (
    dpace_weights,
    exponential_weights,
    reached_weights,
    uniform_weights,
)
from retrofit.recipes.training.objective import Blocks, Sums, Teacher, backward_diffusion, backward_draft

V, H, B, D, P = 7, 5, 6, 4, 20


def by_hand() -> tuple[Tensor, Tensor]:
    """p = (1/2, 1/4, 1/4) and q = (1/4, 1/2, 1/4): TV 1/4, argmax p = 0, argmax q = 1."""
    return torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]]).log()


def test_draft_loss_by_hand() -> None:
    p, logits = by_hand()
    assert total_variation(p, logits.exp()).item() == pytest.approx(0.25)
    loss, gradient, tv, best = draft_loss(logits.clone(), p, "tv_ce")
    assert loss.item() == pytest.approx(0.9 * 0.25 + 0.1 * math.log(4))
    assert (tv.item(), best.item()) == (pytest.approx(0.25), 1)
    # s = (-1, 1, 0), <s, q> = 1/4: dTV = q (s - 1/4) / 2; dCE = q - (1, 0, 0)
    dtv = [0.25 * -1.25 / 2, 0.5 * 0.75 / 2, 0.25 * -0.25 / 2]
    dce = [0.25 - 1, 0.5, 0.25]
    want = [0.9 * a + 0.1 * b for a, b in zip(dtv, dce, strict=True)]
    assert gradient[0].tolist() == pytest.approx(want)
    assert draft_loss(logits.clone(), p, "tv")[0].item() == pytest.approx(0.25)
    kl, gradient, _, _ = draft_loss(logits, p, "kl")
    assert kl.item() == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5))
    assert gradient[0].tolist() == pytest.approx([-0.25, 0.25, 0.0])


def test_kl_with_an_impossible_token_is_finite() -> None:
    loss, gradient, _, _ = draft_loss(torch.zeros(1, 4), torch.tensor([[0.5, 0.5, 0.0, 0.0]]), "kl")
    assert loss.item() == pytest.approx(math.log(2))
    assert gradient.isfinite().all()


def test_data_loss_by_hand() -> None:
    _, logits = by_hand()
    loss, gradient = data_loss(logits, torch.tensor([2]))
    assert loss.item() == pytest.approx(math.log(4))
    assert gradient[0].tolist() == pytest.approx([0.25, 0.5, -0.75])


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tv": lambda p, q: 0.5 * (p - q).abs().sum(-1),
    "tv_ce": lambda p, q: (
        0.9 * 0.5 * (p - q).abs().sum(-1) - 0.1 * q.log().gather(-1, p.argmax(-1, keepdim=True)).squeeze(-1)
    ),
    "kl": lambda p, q: (p * (p / q).log()).sum(-1),
    "lk": lambda p, q: lk(p, q),
}


def lk(p: Tensor, q: Tensor) -> Tensor:
    tv, kl = FORMULAS["tv"](p, q), FORMULAS["kl"](p, q)
    lam = (-(1 - tv.detach()) / 2).exp()
    return lam * kl + (1 - lam) * tv - q.log().gather(-1, p.argmax(-1, keepdim=True)).squeeze(-1)


@pytest.mark.parametrize("kind", FORMULAS)
def test_draft_gradient_against_autograd(kind: str) -> None:
    logits = torch.randn(50, V, requires_grad=True)
    p = torch.softmax(2 * torch.randn(50, V), -1)
    want = FORMULAS[kind](p, torch.softmax(logits, -1))
    (expected,) = torch.autograd.grad(want.sum(), logits)
    loss, gradient, tv, best = draft_loss(logits.detach().clone(), p, kind)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(tv, FORMULAS["tv"](p, torch.softmax(logits.detach(), -1)))
    assert torch.equal(best, logits.argmax(-1))


def test_the_text_as_teacher_is_the_data_loss() -> None:
    """With the distance to the base's own distribution beside it, which weights and acceptance are made of."""
    logits, target = torch.randn(50, V), torch.randint(0, V, (50,))
    p = torch.softmax(2 * torch.randn(50, V), -1)
    want, slope = data_loss(logits.clone(), target)
    loss, gradient, tv, best = draft_loss(logits.clone(), p, "ce", target_N=target)
    assert torch.equal(loss, want) and torch.equal(gradient, slope) and torch.equal(best, logits.argmax(-1))
    torch.testing.assert_close(tv, total_variation(p, torch.softmax(logits, -1)))


def test_data_gradient_against_autograd() -> None:
    logits, target = torch.randn(50, V, requires_grad=True), torch.randint(0, V, (50,))
    want = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    (expected,) = torch.autograd.grad(want.sum(), logits)
    loss, gradient = data_loss(logits.detach(), target)
    torch.testing.assert_close(loss, want.detach())
    torch.testing.assert_close(gradient, expected)


def test_dpace_against_the_formula() -> None:
    """w_j = prod_{i<j} a_i (1 + sum_{m>j} prod_{j<i<=m} a_i): products and sums written out."""
    tv = torch.rand(20, 5, dtype=torch.float64)
    lengths = torch.arange(20) % 6
    eligible = torch.arange(5) < lengths[:, None]
    got = dpace_weights(tv, eligible)
    for b in range(20):
        a = [0.5 * (1 - float(tv[b, i])) + 0.5 for i in range(int(lengths[b]))]
        for j in range(5):
            want = 0.0
            if j < len(a):
                tail = sum(math.prod(a[j + 1 : m + 1]) for m in range(j + 1, len(a)))
                want = math.prod(a[:j]) * (1 + tail)
            assert got[b, j].item() == pytest.approx(want)


def test_dpace_is_the_slope_of_the_expected_accepted_length() -> None:
    """sum_m prod_{i<=m} a_i is linear in a_j, and w_j is its slope."""
    tv = torch.rand(1, 5, dtype=torch.float64, requires_grad=True)
    a = 0.5 * (1 - tv) + 0.5
    (slope,) = torch.autograd.grad(a.cumprod(1).sum(), a)
    torch.testing.assert_close(dpace_weights(tv.detach(), torch.ones(1, 5, dtype=torch.bool)), slope)


def test_fixed_weights() -> None:
    tv, eligible = torch.rand(1, 3), torch.tensor([[True, True, False]])
    assert exponential_weights(tv, eligible)[0].tolist() == pytest.approx([1, math.exp(-0.25), 0])
    assert uniform_weights(tv, eligible)[0].tolist() == [1, 1, 0]


def test_slots_that_decoding_reaches() -> None:
    """Up to and with the first miss; an ineligible slot ends the block as well."""
    hit = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    eligible = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1]], dtype=torch.bool)
    want = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert reached_weights(torch.rand(4, 4), eligible, hit).tolist() == want


class Problem:
    """Random blocks, a linear vocabulary head, and Heads whose every value matters."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.heads = Heads(H, V, D, 3, True)
        with torch.no_grad():
            for parameter in self.heads.parameters():
                parameter.copy_(normal(*parameter.shape))
        self.projection = normal(V, H)
        self.taught: list[int] = []
        """Rows of each projection for the teacher."""
        self.clean = normal(P, H)
        lengths = torch.tensor([4, 4, 3, 1, 0, 2])
        tokens = torch.randint(0, V, (P + 1,), generator=generator)
        source = torch.arange(B)[:, None] + torch.arange(D)
        self.blocks = Blocks(
            hidden=normal(B, D, H),
            source=source,
            previous=torch.randint(0, V + 1, (B, D), generator=generator),
            target=tokens[source + 1],
            eligible=torch.arange(D) < lengths[:, None],
            weight=torch.rand(B, D, generator=generator) * (torch.rand(B, D, generator=generator) < 0.6),
        )

    def project(self, hidden: Tensor) -> Tensor:
        return hidden @ self.projection.T

    def teach(self, hidden: Tensor) -> Tensor:
        if not hidden.requires_grad:
            self.taught.append(len(hidden))
        return self.project(hidden)

    def part(self, where: slice) -> Blocks:
        fields = {name: getattr(self.blocks, name)[where] for name in Blocks.__dataclass_fields__}
        return Blocks(**fields)

    def backward(self, kind: str, parts: tuple[slice, ...] = (slice(None),)) -> tuple[Sums, Tensor, dict[str, Tensor]]:
        """Sums, gradient of the hidden states, gradients of the heads; of L_draft and L_conf, or of L_diff."""
        self.heads.zero_grad()
        sums, gradients = Sums(), []
        teacher = Teacher(self.clean, self.teach, V, False)
        for where in parts:
            if kind == "diff":
                gradients.append(backward_diffusion(self.part(where), self.project, self.heads, sums))
            else:
                got = backward_draft(self.part(where), teacher, self.heads, sums, "tv_ce", "dpace")
                gradients.append(got[0])
        heads = {n: p.grad.clone() for n, p in self.heads.named_parameters() if p.grad is not None}
        return sums, torch.cat(gradients), heads

    def expected(self, kind: str) -> tuple[dict[str, float], Tensor, dict[str, Tensor]]:
        """The same by autograd, from the definitions, all at once."""
        b, heads = self.blocks, self.heads
        hidden = b.hidden.clone().requires_grad_()
        logits = heads.draft_logits(self.project(hidden).view(-1, V), b.previous.flatten()).view(B, D, V)
        log_q = torch.log_softmax(logits, -1)
        values: dict[str, float] = {}
        if kind == "diff":
            ce = -log_q.gather(-1, b.target[..., None]).squeeze(-1)
            loss = (ce * b.weight * b.eligible).sum()
            values |= {"diff": float(loss.detach()), "diff_count": int(b.eligible.sum())}
        else:
            p = torch.softmax(self.project(self.clean[b.source]), -1)
            tv = FORMULAS["tv"](p, log_q.exp())
            weight = dpace_weights(tv.detach(), b.eligible)
            draft = (FORMULAS["tv_ce"](p, log_q.exp()) * weight).sum()
            hit = (logits.argmax(-1) == p.argmax(-1)).float()
            table = heads.markov_w1[b.previous].detach()
            features = torch.cat([b.hidden, table], -1)
            c = torch.sigmoid(features @ heads.confidence_weight.T + heads.confidence_bias)
            conf = torch.zeros(())
            for n, want in enumerate((hit, 1 - tv.detach())):
                bce = -(want * c[..., n].log() + (1 - want) * (1 - c[..., n]).log())
                conf = conf + (bce * b.eligible).sum()
            loss = draft + conf
            values |= {
                "draft": float(draft.detach()),
                "draft_weight": float(weight.sum()),
                "conf": float(conf.detach()),
                "conf_count": int(b.eligible.sum()),
            }
        names = [n for n, _ in heads.named_parameters() if n != "mask_vector"]
        parameters = [dict(heads.named_parameters())[n] for n in names]
        grads = torch.autograd.grad(loss, [hidden, *parameters], allow_unused=True)
        return values, grads[0], {n: g for n, g in zip(names, grads[1:], strict=True) if g is not None}


@pytest.mark.parametrize("kind", ["draft", "diff"])
def test_terms_and_gradients_against_autograd(kind: str) -> None:
    problem = Problem()
    values, hidden, heads = problem.expected(kind)
    sums, got_hidden, got_heads = problem.backward(kind)
    for name, value in values.items():
        assert getattr(sums, name) == pytest.approx(value, rel=1e-5), name
    torch.testing.assert_close(got_hidden, hidden, rtol=1e-4, atol=1e-5)
    assert set(got_heads) == set(heads)
    for name, gradient in heads.items():
        torch.testing.assert_close(got_heads[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["draft", "diff"])
@pytest.mark.parametrize("rows", [D, 2 * D + 1, 5 * D])
def test_chunks_and_accumulation_add_up(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem()
    whole, hidden, heads = problem.backward(kind)
    apart = problem.backward(kind, (slice(0, 2), slice(2, None)))
    monkeypatch.setattr(objective, "FEWEST_ROWS", 1)
    monkeypatch.setitem(objective.CHUNK_ELEMENTS, "cpu", rows * V)
    chunked = problem.backward(kind)
    for sums, got_hidden, got_heads in (apart, chunked):
        # L_AR counts the distinct positions of each call.
        for name in (
            *(("ar", "ar_count") if sums is chunked[0] else ()),
            "diff",
            "diff_count",
            "draft",
            "draft_weight",
            "conf",
            "conf_count",
        ):
            assert getattr(sums, name) == pytest.approx(getattr(whole, name), rel=1e-5)
        torch.testing.assert_close(sums.accept, whole.accept)
        torch.testing.assert_close(got_hidden, hidden)
        for name, gradient in heads.items():
            torch.testing.assert_close(got_heads[name], gradient)


def test_no_chunk_is_larger_than_it_may_be() -> None:
    """8,192 drafting rows meet a vocabulary in pieces of at most CHUNK_ELEMENTS, or FEWEST_ROWS, or one block."""
    for blocks, drafts, vocab in ((1024, 8, 151_936), (1024, 8, 2048), (3, 128, 1 << 20)):
        parts = objective._chunks(blocks, drafts, vocab, torch.device("cpu"))
        sizes = [p.stop - p.start for p in parts]
        assert sum(sizes) == blocks
        most = max(objective.CHUNK_ELEMENTS["cpu"], objective.FEWEST_ROWS * vocab)
        assert all(n == 1 or n * drafts * vocab <= most for n in sizes)


GROUPS = (slice(1, 6), slice(0, 4))


@pytest.mark.parametrize("kept", [0, 3, 100])
@pytest.mark.parametrize("rows", [D, 2 * D, 5 * D])
def test_each_position_is_projected_once(rows: int, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the chunks are: blocks overlap, also those of two chunks and of two groups; `kept` positions wait."""
    whole, hidden, heads = Problem().backward("draft", GROUPS)
    monkeypatch.setattr(objective, "FEWEST_ROWS", 1)
    monkeypatch.setitem(objective.CHUNK_ELEMENTS, "cpu", rows * V)
    monkeypatch.setitem(objective.KEPT_BYTES, "cpu", kept * V * 4)
    problem = Problem()
    sums, got_hidden, got_heads = problem.backward("draft", GROUPS)
    first, second = (set(problem.blocks.source[g].flatten().tolist()) for g in GROUPS)
    waiting = second & set(sorted(first)[:kept])
    least, most = len(first | second), len(first) + len(second - waiting)
    assert least <= sum(problem.taught) <= most, (problem.taught, least, most)
    assert least < most or kept == 100
    assert (sums.ar, sums.ar_count) == (pytest.approx(whole.ar, rel=1e-5), whole.ar_count)
    torch.testing.assert_close(sums.accept, whole.accept)
    torch.testing.assert_close(got_hidden, hidden)
    for name, gradient in heads.items():
        torch.testing.assert_close(got_heads[name], gradient)


def test_teacher_loss_counts_each_position_once() -> None:
    problem = Problem()
    sums, _, _ = problem.backward("draft")
    b = problem.blocks
    positions = {int(s): int(t) for s, t in zip(b.source[b.eligible], b.target[b.eligible], strict=True)}
    log_p = torch.log_softmax(problem.project(problem.clean), -1)
    assert sums.ar_count == len(positions)
    assert sums.ar == pytest.approx(-sum(float(log_p[s, t]) for s, t in positions.items()), rel=1e-5)


def test_acceptance_estimates() -> None:
    problem = Problem()
    sums, _, _ = problem.backward("draft")
    assert sums.accept[:, 2].tolist() == problem.blocks.eligible.sum(0).tolist()
    assert (sums.accept[:, :2] <= sums.accept[:, 2:]).all()


def test_total_is_the_weighted_sum_of_terms_by_their_own_denominators() -> None:
    sums = Sums(ar=6.0, ar_count=3, diff=8.0, diff_count=2, draft=9.0, draft_weight=4.5, conf=5.0, conf_count=10)
    loss = sums.loss(0.3, 0.7, 0.1)
    want: dict[str, Any] = {"ar": 2.0, "diff": 4.0, "draft": 2.0, "conf": 0.5}
    assert loss == {**want, "total": pytest.approx(2.0 + 0.3 * 4 + 0.7 * 2 + 0.1 * 0.5)}
    assert Sums().loss(1, 1, 1)["total"] == 0
