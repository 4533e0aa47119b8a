"""What a conversion measures of its drafter, on a base and a drafter whose every probability is known.

The base's next token depends on the last one (P), the drafter's on its slot (Q).  By hand, for block 2 on the text
2 0 1 0 1 1: slot 1 stands on tokens 0 1 0 1, slot 2 on 1 0 1 (where a token follows).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_conversion import run
from torch import Tensor

from retrofit.adapters.heads import Heads
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import SequenceRows
from retrofit.recipes.text.documents import Document
from retrofit.recipes.training import measure
from retrofit.recipes.training.measure import RANKS, TEMPERATURES, HeldOut, calibrate_confidence, held_out_acceptance
from retrofit.runtime.rules.sampling import hash_bits_plain

V = 4
P = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4], [0.25] * 4, [0.25] * 4])
Q = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.15, 0.35, 0.4]])
TEXT = (2, 0, 1, 0, 1, 1)
ON_TOKEN = ((0, 1, 0, 1), (1, 0, 1))
"""Of each slot, the tokens whose followers it drafted, in order of the anchors."""
SEED = 5


class KnownBackend:
    """Hidden states are logits: of a base row those of its token, of a draft row those of its place in the block."""

    device = torch.device("cpu")
    recurrent: frozenset[int] = frozenset()

    def row_plan(self, rows: Sequence[SequenceRows]) -> Sequence[SequenceRows]:
        return rows

    def run_trunk(self, rows: Sequence[SequenceRows], cache: Any) -> Tensor:
        base = [P[token].log() for row in rows for token in row.tokens]
        draft = [Q[i].log() for row in rows for block in row.blocks for i in range(len(block.inputs))]
        return torch.stack(base + draft)

    def head(self, hidden: Tensor) -> Tensor:
        return hidden


def attached(block: int = 2, markov_rank: int = 0) -> Any:
    layout = DraftLayout(block=block)
    heads = Heads(V, V, layout.drafts, markov_rank, True).requires_grad_(False)
    return SimpleNamespace(heads=heads, layout=layout)


def document(tokens: Sequence[int] = TEXT, prompt: int = 1, name: str = "a") -> Document:
    return Document(name, tuple(tokens), tuple(n >= prompt for n in range(len(tokens))))


def held_out(target: Any = None, documents: Sequence[Document] = (document(),), anchors: int = 99) -> HeldOut:
    return held_out_acceptance(KnownBackend(), target or attached(), documents, anchors, SEED)  # type: ignore[arg-type]


def padded(*chances: float) -> list[float]:
    return [*chances, *[0.0] * (RANKS - len(chances))]


def test_acceptance_by_hand() -> None:
    """argmax P is 0 after 0, 3 after 1; argmax Q is 0 in slot 1, 3 in slot 2."""
    got = held_out()
    assert got.eligible.sum(0).tolist() == [4, 3]
    # slot 1: TV .125 after 0 and .4 after 1, each twice.  slot 2: .05 after 1 (twice), .5 after 0.
    sampled = [(2 * 0.875 + 2 * 0.6) / 4, (2 * 0.95 + 0.5) / 3]
    assert got.conditional()["greedy"] == pytest.approx([2 / 4, 2 / 3], abs=1e-4)
    assert got.conditional()["sampled"] == pytest.approx(sampled, abs=1e-4)


def test_candidates_by_hand() -> None:
    """Slot 1 ranks 0 1 2 3, slot 2 3 2 1 0: the base's token is the first of them, or the last."""
    greedy = held_out().rank_chances()["greedy"]
    assert greedy == [padded(0.5, 0, 0, 0.5), pytest.approx(padded(2 / 3, 0, 0, 1 / 3), abs=1e-4)]


def test_targets_beyond_the_last_candidate_count_as_none() -> None:
    """Ranks 15, 16 and 99 of a large vocabulary: one is the last that is kept, two are beyond."""
    ranks = torch.tensor([[[15, 0]], [[16, 0]], [[99, 0]], [[0, 0]]])
    live = torch.tensor([[True], [True], [True], [False]])
    got = HeldOut(None, torch.zeros(4, 1, 2), ranks, live, torch.zeros(4)).rank_chances()
    assert got == {"greedy": [[0.0] * 15 + [0.3333]], "sampled": [padded(1)]}


def test_acceptance_by_context_by_hand() -> None:
    """Blocks behind 100 and 512 tokens, behind 513, none behind 1,025 to 2,048, two behind more, one of them cut."""
    greedy = torch.tensor([[1.0, 0], [0, 0], [1, 1], [1, 0], [0, 1]])
    sampled = torch.tensor([[0.5, 0.25], [0.25, 0.25], [0.5, 0.5], [0.25, 0.75], [0.75, 1]])
    live = torch.tensor([[True, True]] * 4 + [[True, False]])
    ranks = torch.zeros(5, 2, 2, dtype=torch.long)
    found = HeldOut(None, torch.stack([greedy, sampled], -1), ranks, live, torch.tensor([100, 512, 513, 2049, 4096]))
    assert found.by_context() == [
        {"up_to": 512, "blocks": 2, "tau": 1.4688, "greedy": [0.5, 0.0], "sampled": [0.375, 0.25]},
        {"up_to": 1024, "blocks": 1, "tau": 1.75, "greedy": [1.0, 1.0], "sampled": [0.5, 0.5]},
        {"up_to": 4096, "blocks": 2, "tau": 1.875, "greedy": [0.5, 0.0], "sampled": [0.5, 0.75]},
    ]
    short = HeldOut(None, torch.stack([greedy, sampled], -1), ranks, live, torch.tensor([1, 2, 3, 4, 512]))
    assert short.by_context() == []


def noisy(chances: Tensor, position: int) -> list[float]:
    """log p / 0.8 + g with the noise of decoding, one token at a time."""
    scores = []
    for token, p in enumerate(chances.tolist()):
        u = ((hash_bits_plain(SEED, position, token) >> 9) + 0.5) * 2.0**-23
        scores.append(math.log(p) / 0.8 - math.log(-math.log(u)))
    return scores


def test_sampled_candidates_share_the_noise_of_their_targets() -> None:
    long = [2, *torch.randint(0, 2, (60,), generator=torch.Generator().manual_seed(0)).tolist()]
    counts = [[0] * V, [0] * V]
    for anchor in range(len(long) - 1):
        for slot in range(2):
            position = anchor + 1 + slot
            if position + 1 < len(long):
                target, draft = noisy(P[long[position]], position), noisy(Q[slot], position)
                y = max(range(V), key=target.__getitem__)
                counts[slot][sum(d > draft[y] for d in draft)] += 1
    want = [padded(*(n / sum(slot) for n in slot)) for slot in counts]
    assert min(counts[0][:3]) > 0, "a text on which it matters"
    got = held_out(documents=[document(long)]).rank_chances()
    assert got["sampled"] == [pytest.approx(slot, abs=1e-4) for slot in want]
    assert got["sampled"] != got["greedy"]


def test_the_previous_token_counts() -> None:
    """A Markov head that turns the drafter into the base itself: everything is accepted, every target comes first."""
    same = attached(1, V)
    same.heads.markov_w1[:V] = torch.eye(V)
    same.heads.markov_w2.copy_((P.log() - Q[0].log()).T)
    got = held_out(same)
    assert got.conditional() == {"greedy": [1.0], "sampled": [1.0]}
    assert got.rank_chances() == {"greedy": [padded(1)], "sampled": [padded(1)]}


def test_chunks_and_documents_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = document(), document([0, 1, 1, 0], 2, "b")
    unanswered = document([0, 1, 0], 3, "c")
    monkeypatch.setattr(measure, "BLOCKS_AT_ONCE", 2)
    both = held_out(documents=[one, unanswered, other])
    parts = [held_out(documents=[d]) for d in (one, other)]
    for name in ("confidence", "accepted", "ranks", "eligible"):
        assert torch.equal(getattr(both, name), torch.cat([getattr(part, name) for part in parts])), name
    # the second: anchors 1 and 2; slot 1 on tokens 1 (at 2), slot 2 on nothing that is followed
    assert parts[1].eligible.tolist() == [[True, False], [False, False]]
    assert parts[1].conditional()["greedy"] == [0.0, 0.0]
    assert len(held_out(anchors=2).eligible) == 2


def test_nothing_held_out() -> None:
    target = attached()
    got = held_out(target, documents=[document([0, 1, 0], 3)])
    assert got.conditional() == {"greedy": [0, 0], "sampled": [0, 0]}
    assert got.rank_chances() == {"greedy": [padded()] * 2, "sampled": [padded()] * 2}
    calibrate_confidence(target, got)
    assert torch.equal(target.heads.confidence_temperature, torch.ones(2, 2))


def test_confidence_is_calibrated_for_each_slot_and_kind() -> None:
    """The head's logit depends on the slot only, so the best temperature makes it say what was accepted on average."""
    target = attached()
    wanted = TEMPERATURES[torch.tensor([[80, 60], [20, 40]])]  # 10, 3.16, 0.316, 1: greedy, then sampled
    accepted = torch.tensor([[0.5, 2 / 3], [0.7375, 0.8]])
    logits = torch.logit(accepted) * wanted
    logits[0, 0] = 0.5  # nothing can make it say 1/2: the largest temperature comes nearest
    target.heads.confidence_weight.copy_(logits @ torch.linalg.pinv(Q.log().T))
    measured = held_out(target)
    torch.testing.assert_close(measured.confidence[0], logits.T, rtol=1e-4, atol=1e-4)
    calibrate_confidence(target, measured)
    torch.testing.assert_close(target.heads.confidence_temperature, wanted)
    for kind, sampled in enumerate((False, True)):
        says = target.heads.confidence(Q.log()[None], torch.zeros(1, 2, dtype=torch.long), sampled)
        assert says[0].tolist() == pytest.approx(accepted[kind].tolist(), abs=0.02), sampled


def test_a_slot_without_held_out_rows_keeps_its_temperature() -> None:
    target = attached()
    target.heads.confidence_weight.fill_(0.3)
    calibrate_confidence(target, held_out(target, documents=[document([0, 1, 1, 0], 2)]))
    temperature = target.heads.confidence_temperature
    assert (temperature[:, 0] != 1).all() and (temperature[:, 1] == 1).all()
    plain = SimpleNamespace(heads=Heads(V, V, 2, 0, False), layout=DraftLayout(block=2))
    calibrate_confidence(plain, held_out(plain))  # type: ignore[arg-type]


def test_a_conversion_writes_what_it_measured(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retrofit.recipes import convert

    taken: list[HeldOut] = []

    def recorded(*arguments: Any) -> HeldOut:
        taken.append(held_out_acceptance(*arguments))
        return taken[-1]

    monkeypatch.setattr(convert, "held_out_acceptance", recorded)
    made = run(tmp_path / "out", texts, data__held_out=2)
    (measured,) = taken
    assert made.config["acceptance"] == {"conditional": measured.conditional(), "ranks": measured.rank_chances()}
    card = (tmp_path / "out" / "README.md").read_text()
    for said, kind in (("greedy acceptance", "greedy"), ("sampled acceptance, 1 - TV", "sampled")):
        assert f"| {said} | {measured.conditional()[kind]} |" in card
    temperature = load_file(tmp_path / "out" / "heads.safetensors")["confidence_temperature"]
    assert temperature.shape == (2, 4) and (temperature != 1).any()
