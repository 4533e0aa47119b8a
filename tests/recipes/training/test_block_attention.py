"""Draft rows' attention in training against one dense softmax over all there is, values and gradients.

Function by function first, on random tensors; then through whole models of every architecture, whole training steps
against the straightforward step that benchmarks keep, and how large any tensor gets when documents get longer.
"""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decoding import random_prompts, randomise
from tiny_models import CONFIGS, VOCABULARY, build
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.naive_training import NaiveTrainer, rows_and_gradients
from retrofit.adapters import gated_lora
from retrofit.adapters.gated_lora import GatedLoraLinear
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block, RowPlan, SequenceRows
from retrofit.adapters.visibility import BlockRows, Chunk, Window
from retrofit.recipes.schema import load_recipe
from retrofit.recipes.text.documents import Document
from retrofit.recipes.training import objective
from retrofit.recipes.training.clean.forward import clean_forward
from retrofit.recipes.training.step import Trainer
from retrofit.runtime.backends.hf import attention, block_attention, dense_attention
from retrofit.runtime.backends.hf.attention import _training_rows
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.backends.hf.dense_attention import attend
from retrofit.runtime.engine import Engine

TILES = (1, 300, 1 << 20)
"""From one block a tile to a whole sequence."""


def blocks(starts: Sequence[int], lengths: Sequence[int]) -> list[Block]:
    return [Block(start, [MASK] * n) for start, n in zip(starts, lengths, strict=True)]


SEQUENCES = {
    "whole": [
        SequenceRows(0, 0, blocks=blocks([0, 1, 9, 9, 30], [4] * 5)),
        SequenceRows(2, 0, blocks=blocks([7], [4])),
    ],
    "ragged": [
        SequenceRows(1, 0, blocks=blocks([3, 12, 36], [4, 4, 2])),
        SequenceRows(0, 0, blocks=blocks([0, 20, 21, 39], [4, 4, 4, 1])),
        SequenceRows(2, 0, blocks=blocks([5], [3])),
    ],
    "unsorted": [SequenceRows(0, 0, blocks=blocks([30, 2, 17], [4, 4, 4]))],
}


class Case:
    """Random draft rows over a random cache layer: 4 query heads, 2 key heads, values narrower than keys."""

    def __init__(self, sequences: list[SequenceRows], causal: bool, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return (2 * torch.randn(*shape, generator=generator)).to(dtype)

        self.plan = RowPlan(sequences, causal_blocks=causal)
        n = self.plan.num_rows
        self.rows = [normal(1, 4, n, 8), normal(1, 2, n, 8), normal(1, 2, n, 6)]
        self.layer = normal(3, 2, 48, 8), normal(3, 2, 48, 6)
        self.given = normal(1, n, 4, 6)
        self.sinks = normal(4)

    def run(self, dense: bool, window: Window | None, softcap: float | None, sinks: bool = False) -> list[Tensor]:
        """Output and the gradients of query, key and value."""
        rows = [t.clone().requires_grad_() for t in self.rows]
        beside = self.sinks if sinks else None
        if dense:
            group, cache = self.plan.draft, KVCache(3, 48)
            assert group is not None
            cache.layers[0] = self.layer
            q, k, v = (group.rectangle(t[0].transpose(0, 1)) for t in rows)
            seen = cache.read(0, group.slots, group.keys)
            k, v = (torch.cat(pair, dim=2) for pair in zip(seen, (k, v), strict=True))
            mask = self.plan.draft_mask(window, q.dtype)
            out = group.flatten(attend(q, k, v, mask, False, 0.3, softcap, beside))[None]
        else:
            out = _training_rows(self.plan, self.layer, *rows, window, 0.3, softcap, beside)
        return [out.detach(), *torch.autograd.grad(out, rows, self.given)]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (5.0, False), (None, True)], ids=["", "cap", "sinks"])
@pytest.mark.parametrize("window", [None, 3, 8, 100, Chunk(6)])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("sequences", SEQUENCES)
def test_equals_one_dense_softmax(
    sequences: str,
    causal: bool,
    window: Window | None,
    softcap: float | None,
    sinks: bool,
    tile: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(block_attention.TILE_SCORES, "cpu", tile)
    case = Case(SEQUENCES[sequences], causal)
    ours, dense = (case.run(dense, window, softcap, sinks) for dense in (False, True))
    for got, want in zip(ours, dense, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=5e-5)


def test_half_precision_sums_in_full() -> None:
    case = Case(SEQUENCES["ragged"], False, torch.bfloat16)
    exact = Case(SEQUENCES["ragged"], False)
    exact.rows = [t.float() for t in case.rows]
    exact.layer = (case.layer[0].float(), case.layer[1].float())
    exact.given = case.given.float()
    for got, want in zip(case.run(False, 8, None), exact.run(True, 8, None), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).abs().max() <= 0.02 * want.abs().max()


@pytest.mark.parametrize("gain", [1, 2, 4])
def test_scores_are_not_rounded_before_the_softmax(gain: int) -> None:
    """In bfloat16 with scores up to 70: hardly worse than the attention that decodes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    K, D, before = 8, 64, 400
    q, own, keys = (gain * normal(*shape) for shape in [(8, K, D), (8, K, D), (1, 8, 512, D)])
    q, own, keys, v, values = (t.bfloat16() for t in (q, own, keys, normal(8, K, D), normal(1, 8, 512, D)))
    rows = BlockRows([0], [before], [K], K, torch.device("cpu"), None, None)
    call = block_attention.Call(block_attention.tiles_of(rows, 8, None, False), K, 1, D**-0.5, None)
    got = block_attention.block_attention(q, own, v, keys, values, call)
    all_keys = torch.cat([keys[0, :, :before], own], 1)
    all_values = torch.cat([values[0, :, :before], v], 1)
    decoding = attend(q[None], all_keys[None], all_values[None], None, False, D**-0.5, None)[0]
    exact = torch.softmax(q.float() @ all_keys.float().transpose(1, 2) * D**-0.5, -1) @ all_values.float()
    assert (got.float() - exact).norm() <= 2 * (decoding.float() - exact).norm()


def test_hidden_keys_are_never_read() -> None:
    """NaN in every key that no block sees: beyond the last start, and in the other slots."""
    case = Case(SEQUENCES["unsorted"], False)
    clean = case.run(False, None, None)
    for t in case.layer:
        t[0, 30:] = float("nan")
        t[1:] = float("nan")
    for got, want in zip(case.run(False, None, None), clean, strict=True):
        assert torch.equal(got, want)


def test_frozen_keys_get_no_gradient() -> None:
    case = Case(SEQUENCES["whole"], False)
    for t in case.layer:
        t.requires_grad_()
    case.run(False, None, None)
    assert all(t.grad is None for t in case.layer)


# Whole models

LENGTHS = (21, 9, 30)


def document(tokens: Sequence[int], name: str) -> Document:
    return Document(name, tuple(tokens), tuple(position >= 2 for position in range(len(tokens))))


DOCUMENTS = [document(t, n) for t, n in zip(random_prompts(LENGTHS, seed=5), "abc", strict=True)]


def engine_of(name: str, layout: DraftLayout, **changes: Any) -> Engine:
    model = build(name)
    for key, value in changes.items():
        setattr(model.config, key, value)
    engine = randomise(Engine.from_model(model, layout=layout), seed=3)
    for module in engine.attached.peft_model.modules():
        if isinstance(module, GatedLoraLinear):
            module.scaling["default"] = 0.5
    return engine


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_and_gradients_of_every_architecture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention.FEW_SCORES, "cpu", 0)
    monkeypatch.setitem(block_attention.TILE_SCORES, "cpu", 500)
    engine = engine_of(name, DraftLayout(5))
    found = [SequenceRows(s, 0, blocks=blocks([4, 7, 17], [5, 5, 2 + s])) for s in (0, 2)]
    weights = [p for p in engine.attached.parameters() if p.requires_grad and p.shape[0] != VOCABULARY]
    cache, _ = clean_forward(engine.backend, DOCUMENTS)
    dense, ours = rows_and_gradients(engine, found, cache, weights)
    assert len(dense) > 5
    for got, want in zip(ours, dense, strict=True):
        assert (got - want).abs().max() <= 2e-4 * want.abs().max()


def gradients_of(kind: type[Trainer], name: str, layout: DraftLayout, **overrides: Any) -> tuple[list[Tensor], Any]:
    settings = {"train.anchors": 8, "train.clip": 1e9, "objective.diffusion_share": 0.3, **overrides}
    settings |= {f"draft.{key}": value for key, value in layout.to_dict().items()}
    engine = engine_of(name, layout)
    trainer = kind(engine.attached, engine.backend, load_recipe("tiny", settings))
    result = trainer.gradients([[(d, 0) for d in DOCUMENTS[:2]], [(DOCUMENTS[2], 0)]])
    return [p.grad for p in trainer.trained if p.grad is not None], result


LK = {"objective.draft_loss": "lk", "objective.slot_weights": "reached"}
STEPS: dict[str, tuple[str, DraftLayout, dict[str, Any]]] = {
    "llama": ("llama", DraftLayout(4), {}),
    "tv": ("llama", DraftLayout(4), {"objective.draft_loss": "tv", "objective.slot_weights": "uniform"}),
    "tv_ce": ("qwen3", DraftLayout(4), {"objective.draft_loss": "tv_ce", "objective.slot_weights": "exponential"}),
    "no markov": ("qwen3", DraftLayout(4), {"adapter.markov_rank": 0}),
    "seed row": ("mistral_window", DraftLayout(4, shift=0, seed_row="draft"), LK),
    "noise causal": ("gemma2", DraftLayout(4, input="noise", attention="causal"), {"objective.draft_loss": "ce"}),
    "gemma3": ("gemma3", DraftLayout(4), {"objective.draft_loss": "tv_ce"}),
    "mla": ("deepseek_v3", DraftLayout(4), {"objective.draft_loss": "tv_ce"}),
    "moe": ("qwen3_moe", DraftLayout(4), {}),
    "sinks": ("gpt_oss", DraftLayout(4), {}),
    "gaps": ("gemma2", DraftLayout(4), {"objective.infill_share": 0.5, "objective.diffusion_share": 0.6}),
    "chunks": ("llama4", DraftLayout(5), {"objective.draft_loss": "tv_ce"}),
}


@pytest.mark.parametrize("chunk", [64 * 4, 1 << 22], ids=["chunks", "whole"])
@pytest.mark.parametrize("case", STEPS)
def test_a_step_equals_the_straightforward_one(case: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "FEWEST_ROWS", 1)
    monkeypatch.setitem(objective.CHUNK_ELEMENTS, "cpu", chunk)
    monkeypatch.setitem(objective.KEPT_BYTES, "cpu", chunk * 16)
    monkeypatch.setitem(attention.FEW_SCORES, "cpu", 0)
    monkeypatch.setitem(block_attention.TILE_SCORES, "cpu", chunk)
    name, layout, overrides = STEPS[case]
    got, ours = gradients_of(Trainer, name, layout, **overrides)
    want, naive = gradients_of(NaiveTrainer, name, layout, **overrides)
    assert ours.anchors == naive.anchors
    for key, value in naive.loss.items():
        assert ours.loss[key] == pytest.approx(value, rel=2e-5, abs=1e-7), key
    for field in ("ar_count", "diff_count", "conf_count"):
        assert getattr(ours.sums, field) == getattr(naive.sums, field)
    assert ours.sums.draft_weight == pytest.approx(naive.sums.draft_weight, rel=1e-5)
    torch.testing.assert_close(ours.sums.accept, naive.sums.accept, rtol=1e-5, atol=1e-5)
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() <= 2e-4 * other.abs().max() + 1e-7


@pytest.mark.parametrize("ours", [gated_lora._FrozenPlusLowRank, block_attention._BlockAttention])
def test_the_straightforward_step_is_plain_autograd(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what ours is timed and tested against, so it may share none of what makes ours fast."""
    monkeypatch.setitem(attention.FEW_SCORES, "cpu", 0)

    def refuse(*args: Any) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(ours, "apply", refuse)
    gradients_of(NaiveTrainer, "llama", DraftLayout(4))
    with pytest.raises(RuntimeError, match="ours"):
        gradients_of(Trainer, "llama", DraftLayout(4))


# Base rows in pieces, and memory


MASKED = ("mistral_window", "gemma2", "gemma3", "phi3_window", "qwen2_window", "gpt_oss", "llama4")


@pytest.mark.parametrize("piece", [40, 700])
@pytest.mark.parametrize("name", MASKED)
def test_base_rows_in_pieces_equal_one_call(name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(name, DraftLayout(4))
    alone = [SequenceRows(0, 0, DOCUMENTS[2].tokens)]
    together = [SequenceRows(s, 0, d.tokens) for s, d in enumerate(DOCUMENTS)]
    with torch.no_grad():
        for rows in (alone, together):
            whole = engine.backend.run_trunk(engine.backend.row_plan(rows), KVCache(3, 40))
            with monkeypatch.context() as patch:
                for limit in ("LARGE_MASK", "LARGE_SCORES"):
                    patch.setattr(dense_attention, limit, 0)
                patch.setattr(dense_attention, "PIECE", piece)
                parts = engine.backend.run_trunk(engine.backend.row_plan(rows), KVCache(3, 40))
                cache = KVCache(3, 40)
                later = [SequenceRows(r.slot, len(r.tokens) // 2, r.tokens[len(r.tokens) // 2 :]) for r in rows]
                first = [SequenceRows(r.slot, 0, r.tokens[: len(r.tokens) // 2]) for r in rows]
                engine.backend.run_trunk(engine.backend.row_plan(first), cache)
                split = engine.backend.run_trunk(engine.backend.row_plan(later), cache)
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
            wanted = [
                t
                for r, s in zip(rows, _ranges(rows), strict=True)
                for t in range(s + len(r.tokens) // 2, s + len(r.tokens))
            ]
            torch.testing.assert_close(split, whole[wanted], rtol=1e-4, atol=1e-4)


def _ranges(rows: list[SequenceRows]) -> list[int]:
    """Where each sequence's rows begin."""
    return [sum(len(r.tokens) for r in rows[:n]) for n in range(len(rows))]


class Largest(TorchDispatchMode):
    """Bytes of the largest storage that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("name", ["llama", "mistral_window", "gemma2", "gemma3", "deepseek_v3"])
def test_no_tensor_grows_faster_than_the_document(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anchors fixed, documents of 1,000 and 2,000 tokens.  Thresholds are lowered so that tiny models are large."""
    for limit, value in (("LARGE_MASK", 1 << 14), ("LARGE_SCORES", 1 << 14), ("PIECE", 1 << 17)):
        monkeypatch.setattr(dense_attention, limit, value)
    monkeypatch.setitem(attention.FEW_SCORES, "cpu", 1 << 14)
    monkeypatch.setitem(block_attention.TILE_SCORES, "cpu", 1 << 14)
    engine = engine_of(name, DraftLayout(4), max_position_embeddings=4096)
    settings = {"draft.block": 4, "train.anchors": 4, "objective.diffusion_share": 0.5}
    trainer = Trainer(engine.attached, engine.backend, load_recipe("tiny", settings))
    found = []
    for length in (1000, 2000):
        tokens = random.Random(0).choices(range(VOCABULARY), k=length)
        with Largest() as largest:
            trainer.gradients([[(document(tokens, "a"), 0), (document(tokens[: length // 2], "b"), 0)]])
        found.append(largest.bytes)
    assert found[1] <= 2.1 * found[0], found
    assert found[1] <= 2000 * 1024, "bytes for each token: no mask and no scores of all rows"
