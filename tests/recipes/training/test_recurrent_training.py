"""Training through recurrent layers: the state at an anchor, the rows of a block and their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding import random_prompts, randomise
from recurrent_models import build
from torch import Tensor
from training_pieces import document

from retrofit.adapters.gated_lora import GatedLoraLinear
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.recipes.training.clean import forward
from retrofit.recipes.training.clean.forward import clean_forward
from retrofit.runtime.backends.hf.recurrent import anchors, layer_rows
from retrofit.runtime.engine import Engine

FAMILIES = ("qwen3_next", "olmo_hybrid", "lfm2", "bamba", "falcon_h1", "jamba", "kimi_linear",
            "minimax", "recurrent_gemma")  # fmt: skip
TEXTS = random_prompts((41, 17), seed=5)
ANCHORS = ((5, 15, 20, 38), (0, 8, 14))  # by a kept state, on it, far from one; at the end of a text
BLOCK = 4


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several kept states a text, several pieces of blocks."""
    for module in (anchors, layer_rows):
        monkeypatch.setattr(module, "STRIDE", 16)
    monkeypatch.setattr(anchors, "PIECE_BYTES", {"cpu": 4096})


def engine_for(name: str, attention: str) -> Engine:
    return randomise(Engine.from_model(build(name), layout=DraftLayout(block=BLOCK, attention=attention)), seed=3)


def blocks(text: list[int], places: tuple[int, ...]) -> list[Block]:
    """Those at the end of a text are shorter."""
    return [Block(p + 1, [MASK] * min(BLOCK, len(text) - p - 1)) for p in places]


def draft_hidden(engine: Engine, texts: list[list[int]], places: list[tuple[int, ...]]) -> list[Tensor]:
    """Per text, hidden states of the rows of its blocks."""
    cache, _ = clean_forward(engine.backend, [document(text) for text in texts])
    found = [blocks(text, some) for text, some in zip(texts, places, strict=True)]
    plan = engine.backend.row_plan([SequenceRows(s, 0, blocks=some) for s, some in enumerate(found)])
    hidden = engine.backend.run_trunk(plan, cache)
    return list(hidden.split([sum(len(b.inputs) for b in some) for some in found]))


def naive(engine: Engine) -> Tensor:
    """The same rows by the model's own forward, a text and a block at a time, under plain autograd."""
    backend, vector = engine.backend, engine.attached.heads.mask_vector
    outs = []
    for text, places in zip(TEXTS, ANCHORS, strict=True):
        for block in blocks(text, places):
            before = backend.embedding(torch.tensor([text[: block.start]]))
            rows = torch.cat([before, vector.expand(1, len(block.inputs), -1)], dim=1)
            backend.gate.base_rows = block.start
            outs.append(backend.trunk(inputs_embeds=rows, use_cache=False).last_hidden_state[0, block.start :])
            backend.gate.base_rows = None
    return torch.cat(outs)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_plain_autograd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_for(name, "causal")
    trained = [*engine.attached.lora_parameters(), engine.attached.heads.mask_vector]
    for parameter in trained:
        parameter.requires_grad_(True)
    hidden = torch.cat(draft_hidden(engine, TEXTS, list(ANCHORS)))
    weight = torch.randn(hidden.shape)
    ours = torch.autograd.grad((hidden * weight).sum(), trained)
    monkeypatch.setattr(GatedLoraLinear, "by_hand", False)
    expected = naive(engine)
    torch.testing.assert_close(hidden, expected, rtol=2e-4, atol=2e-4)
    for mine, right in zip(ours, torch.autograd.grad((expected * weight).sum(), trained), strict=True):
        assert right.abs().max() > 0
        assert (mine - right).abs().max() <= 1e-4 * right.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_draft_rows_are_those_of_decoding(name: str) -> None:
    """A bidirectional block at an anchor of a text that ran whole, and behind the same text decoded up to there."""
    engine = engine_for(name, "bidirectional")
    backend, text = engine.backend, TEXTS[0]
    with torch.inference_mode():
        trained = draft_hidden(engine, TEXTS, list(ANCHORS))[0]
        cache, row = backend.new_cache(1, 64), 0
        backend.forward(backend.row_plan([SequenceRows(0, 0, text[:3], last_logits_only=True)]), cache)
        for position in range(3, max(ANCHORS[0]) + 1):
            here = blocks(text, (position,)) if position in ANCHORS[0] else []
            out = backend.forward(backend.row_plan([SequenceRows(0, position, [text[position]], here)]), cache)
            torch.testing.assert_close(
                out.draft_hidden, trained[row : row + len(out.draft_hidden)], rtol=2e-4, atol=2e-4
            )
            row += len(out.draft_hidden)
    assert row == len(trained)


@pytest.mark.parametrize("name", ["qwen3_5", "bamba"])
def test_neither_neighbours_nor_pieces_nor_forwards_change_a_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, options = engine_for(name, "bidirectional"), {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        together = draft_hidden(engine, TEXTS, list(ANCHORS))
        for n in range(2):
            torch.testing.assert_close(draft_hidden(engine, [TEXTS[n]], [ANCHORS[n]])[0], together[n], **options)
        monkeypatch.setattr(forward, "PIECE_ROWS", {"cpu": 10})
        monkeypatch.setattr(forward, "PIECE_MASK", {"cpu": 41 * 7})
        right: Any = forward.pieces_of
        assert len(right([41, 17], torch.device("cpu"))) > 2
        torch.testing.assert_close(draft_hidden(engine, TEXTS, list(ANCHORS)), together, **options)
        again = clean_forward(engine.backend, [document(text) for text in TEXTS], 20)[0].states.record
        once = clean_forward(engine.backend, [document(text) for text in TEXTS])[0].states.record
    assert again is not None and once is not None
    for key, states in once.states.items():
        assert torch.equal(states, again.states[key])
