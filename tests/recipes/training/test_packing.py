"""Packed documents train as documents alone do: equal losses and gradients, whatever runs beside them.

A batch is one forward of all its documents' rows, end to end and without padding: each document is a sequence of its
own, with positions from 0, keys and values of its own, and draft blocks that hang on its own rows only.  Here that is
held against one forward for each document, which nothing can leak into.  Nor does it matter in how many pieces the
clean rows of a batch are computed, those of one document maybe.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decoding import random_prompts, randomise
from recurrent_models import any_tiny
from tiny_models import WINDOW, build
from torch import Tensor

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.recipes.schema import load_recipe
from retrofit.recipes.text.documents import Document
from retrofit.recipes.training.clean import forward
from retrofit.recipes.training.clean.forward import clean_forward, pieces_of
from retrofit.recipes.training.step import StepResult, Trainer
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.engine import Engine

NAMES = ["llama", "llama_rope_yarn", "mistral_window", "gemma2", "deepseek_v3", "qwen3_moe", "qwen3_5"]
LENGTHS = (5, 31, 12, 2, 23, 9)

# Sums over the same numbers in another order: fp32 rounding of values that are themselves sums of thousands.
ROUNDING: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-6}


def document(tokens: Sequence[int], name: str, prompt: int) -> Document:
    return Document(name, tuple(tokens), tuple(position >= prompt for position in range(len(tokens))))


DOCUMENTS = [
    document(tokens, name, prompt=min(4, len(tokens) - 1) * (number % 2))
    for number, (tokens, name) in enumerate(zip(random_prompts(LENGTHS, seed=4), "abcdef", strict=True))
]


def step(name: str, groups: list[list[Document]], **overrides: Any) -> tuple[list[Tensor], StepResult]:
    """Gradients and report of one optimizer step over the documents, each inner list packed into one forward."""
    layout = DraftLayout(4)
    engine = randomise(Engine.from_model(any_tiny(name), layout=layout), seed=3)
    settings = {"draft.block": 4, "train.anchors": 8, "train.clip": 1e9, "objective.diffusion_share": 0.5, **overrides}
    trainer = Trainer(engine.attached, engine.backend, load_recipe("tiny", settings))
    taken: list[Tensor] = []
    trainer.optimizer.step = lambda: taken.extend(p.grad.clone() for p in trainer.trained)  # type: ignore[method-assign]
    result = trainer.step([[(document, 0) for document in group] for group in groups])
    return taken, result


def same(a: tuple[list[Tensor], StepResult], b: tuple[list[Tensor], StepResult]) -> None:
    for key, value in a[1].loss.items():
        assert b[1].loss[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key
    for one, other in zip(a[0], b[0], strict=True):
        torch.testing.assert_close(other, one, **ROUNDING)
    assert (a[1].clean_rows, a[1].draft_rows) == (b[1].clean_rows, b[1].draft_rows)
    assert a[1].sums.diff_count == b[1].sums.diff_count > 0


@pytest.mark.parametrize("name", NAMES)
def test_packed_equals_unpacked(name: str) -> None:
    """All documents in one forward, against each in a forward of its own; in two other groupings too."""
    alone = step(name, [[one] for one in DOCUMENTS])
    assert alone[1].clean_rows == sum(LENGTHS), "no padding: packing costs no row"
    a, b, c, d, e, f = DOCUMENTS
    same(alone, step(name, [DOCUMENTS]))
    same(alone, step(name, [[f, b, d], [e, c, a]]))
    same(alone, step(name, [[a, b, c, d], [e], [f]]))


@pytest.mark.parametrize("draft_loss", ["tv", "kl"])
def test_packed_equals_unpacked_in_every_loss(draft_loss: str) -> None:
    alone = step("llama", [[one] for one in DOCUMENTS], **{"objective.draft_loss": draft_loss})
    same(alone, step("llama", [DOCUMENTS], **{"objective.draft_loss": draft_loss}))


def draft_hidden(backend: HFBackend, documents: list[Document], blocks: dict[str, list[Any]]) -> list[Tensor]:
    """Per document: hidden states of its base rows, then of the rows of its blocks."""
    cache, clean = clean_forward(backend, documents)
    rows = [SequenceRows(slot=s, start=0, blocks=blocks[d.id]) for s, d in enumerate(documents)]
    with torch.no_grad():
        draft = backend.run_trunk(backend.row_plan(rows), cache)
    sizes = [sum(len(block.inputs) for block in blocks[d.id]) for d in documents]
    base = clean.split([len(d.tokens) for d in documents])
    return [torch.cat(both) for both in zip(base, draft.split(sizes), strict=True)]


@pytest.mark.parametrize("name", ["llama", "mistral_window", "deepseek_v3"])
def test_documents_never_see_each_other(name: str) -> None:
    """Another neighbour, another order, another place: not a bit of a document's rows changes."""
    engine = randomise(Engine.from_model(any_tiny(name), layout=DraftLayout(4)), seed=3)
    ours = document(random_prompts((20,), seed=8)[0], "ours", 0)
    assert len(ours.tokens) > WINDOW
    one, other = (document(tokens, "theirs", 0) for tokens in random_prompts((20, 20), seed=9))
    blocks = {name: [Block(3, [MASK] * 4), Block(9, [MASK] * 4)] for name in ("ours", "theirs")}
    backend = engine.backend
    packed = draft_hidden(backend, [one, ours], blocks)
    assert torch.equal(packed[1], draft_hidden(backend, [other, ours], blocks)[1])
    assert not torch.equal(packed[0], draft_hidden(backend, [other, ours], blocks)[0])
    torch.testing.assert_close(draft_hidden(backend, [ours, one], blocks)[0], packed[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(draft_hidden(backend, [ours], blocks)[0], packed[1], rtol=1e-5, atol=1e-5)


def test_positions_begin_anew_with_every_document() -> None:
    engine = Engine.from_model(build("llama"), layout=DraftLayout(4))
    rows = [SequenceRows(slot=s, start=0, tokens=d.tokens) for s, d in enumerate(DOCUMENTS)]
    positions = engine.backend.row_plan(rows).positions[0].tolist()
    assert positions == [position for length in LENGTHS for position in range(length)]


def in_pieces(patch: pytest.MonkeyPatch, rows: int, mask: int) -> None:
    patch.setattr(forward, "PIECE_ROWS", {"cpu": rows})
    patch.setattr(forward, "PIECE_MASK", {"cpu": mask})


@pytest.mark.parametrize("name", [*NAMES, "phi3"])
def test_pieces_leave_what_the_whole_leaves(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """K/V and hidden states; also where more forwards are run than it takes, as beside another process."""
    backend = randomise(Engine.from_model(any_tiny(name), layout=DraftLayout(4)), seed=3).backend
    cache, hidden = clean_forward(backend, DOCUMENTS)
    in_pieces(monkeypatch, 10, 31 * 7)
    pieces = pieces_of(LENGTHS, torch.device("cpu"))
    assert max(map(len, pieces)) > 1 and sum(piece[0][1] > 0 for piece in pieces) > 1
    run, forwards = backend.run_trunk, [0]

    def counted(*arguments: Any) -> Tensor:
        forwards[0] += 1
        return run(*arguments)

    backend.run_trunk = counted  # type: ignore[method-assign]
    for least, taken in ((0, len(pieces)), (30, 30)):
        forwards[0] = 0
        again, in_parts = clean_forward(backend, DOCUMENTS, least)
        assert forwards[0] == taken
        torch.testing.assert_close(in_parts, hidden, rtol=1e-5, atol=2e-5)
        for layer, kept in cache.layers.items():
            for whole, part in zip(kept, again.layers[layer], strict=True):
                for slot, length in enumerate(LENGTHS):
                    torch.testing.assert_close(part[slot, :, :length], whole[slot, :, :length], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradients_do_not_depend_on_the_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = step(name, [DOCUMENTS])
    in_pieces(monkeypatch, 10, 31 * 7)
    same(whole, step(name, [DOCUMENTS]))


def test_every_row_stands_in_one_piece_and_no_piece_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    in_pieces(monkeypatch, 100, 25_000)
    lengths = [90, 250, 7, 30, 101, 100, 1, 29, 500]
    pieces = pieces_of(lengths, torch.device("cpu"))
    rows = sorted((n, row) for piece in pieces for n, first, stop in piece for row in range(first, stop))
    assert rows == [(n, row) for n, length in enumerate(lengths) for row in range(length)]
    for piece in pieces:
        assert len(piece) * max(stop - first for _, first, stop in piece) <= 100
    assert sorted(piece for piece in pieces if len(piece) > 1) == [[(6, 0, 1), (2, 0, 7), (7, 0, 29)]]
    parts = {n: [first for piece in pieces for number, first, _ in piece if number == n] for n in (1, 4, 8)}
    assert parts == {1: [0, 100, 200], 4: [0, 100], 8: [*range(0, 500, 50)]}
