"""Less memory, fewer sequences at a time, fewer bits: the gradients stay the same, or nearly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import random_prompts
from tiny_conversion import curve, run, write_texts
from tiny_models import ARCHITECTURES, build
from torch import Tensor

from retrofit.adapters.attach import attach
from retrofit.adapters.layout import DraftLayout
from retrofit.errors import UnsupportedModelError
from retrofit.recipes.schema import load_recipe
from retrofit.recipes.text.documents import Document
from retrofit.recipes.training.recompute import recompute_layers
from retrofit.recipes.training.step import Trainer
from retrofit.runtime.backends.hf.backend import wrap

RECIPE = load_recipe(None, ["train.anchors=6", "train.precision=float32", "draft.block=4", "data.max_length=64"])


def documents(lengths: tuple[int, ...] = (30, 23, 19, 27)) -> list[tuple[Document, int]]:
    prompts = random_prompts(lengths, seed=2)
    return [(Document(str(n), tuple(tokens), (True,) * len(tokens)), 0) for n, tokens in enumerate(prompts)]


def trainer_for(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Trainer:
    """An adapter that no longer is the identity, so that every gradient matters."""
    model = build(name).to(dtype)
    attached, backend = wrap(
        model,
        lambda: attach(
            model, DraftLayout(block=4), rank=2, alpha=4.0, targets=("q", "o"), markov_rank=2, confidence=True
        ),
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in attached.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return Trainer(attached, backend, RECIPE)


def gradients(trainer: Trainer, batches: list[list[tuple[Document, int]]]) -> tuple[dict[str, float], list[Tensor]]:
    loss = trainer.gradients(batches).loss
    found = [p.grad.clone() for p in trainer.trained if p.grad is not None]
    trainer.optimizer.zero_grad()
    return loss, found


def kept_bytes(trainer: Trainer) -> tuple[int, list[Tensor]]:
    """Most bytes that were kept for a backward pass at one time, weights not counted; and the gradients."""
    alive = {"now": 0, "most": 0}
    weights = {p.data_ptr() for p in trainer.attached.peft_model.parameters()}

    class Kept:
        def __init__(self, tensor: Tensor):
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            alive["now"] += self.size
            alive["most"] = max(alive.values())

        def __del__(self) -> None:
            alive["now"] -= self.size

    def keep(tensor: Tensor) -> Any:
        return tensor if tensor.data_ptr() in weights else Kept(tensor)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor if isinstance(kept, Kept) else kept):
        found = gradients(trainer, [documents()])[1]
    return alive["most"], found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_recomputed_layers_give_the_same_bits(name: str) -> None:
    trainer = trainer_for(name)
    loss, wanted = gradients(trainer, [documents()])
    undo = recompute_layers(trainer.backend)
    loss_again, found = gradients(trainer, [documents()])
    assert loss_again == loss
    assert len(found) == len(wanted) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert any(bool(g.any()) for g in found)
    undo()
    assert all("forward" not in layer.__dict__ for layer in trainer.backend.trunk.layers)
    assert trainer.backend.gate.base_rows is None


def test_recomputed_layers_are_not_kept() -> None:
    trainer = trainer_for("gemma3")
    before, wanted = kept_bytes(trainer)
    recompute_layers(trainer.backend)
    after, found = kept_bytes(trainer)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert after < 0.6 * before  # of three layers one at a time, and the inputs of all


def test_layers_that_cannot_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for("llama")
    monkeypatch.setattr(trainer.backend.config, "num_hidden_layers", 5)
    with pytest.raises(UnsupportedModelError, match="keeps its layers elsewhere"):
        recompute_layers(trainer.backend)


def test_a_conversion_recomputes_and_may_change_its_mind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = write_texts(tmp_path / "texts")
    calls = []
    from retrofit.recipes import convert
    from retrofit.recipes.training import prepare

    monkeypatch.setattr(prepare, "recompute_layers", lambda backend: calls.append(1) or recompute_layers(backend))
    run(tmp_path / "kept", texts, train__steps=3)
    assert calls == []
    run(tmp_path / "again", texts, train__steps=3, train__checkpointing=True)
    assert calls == [1]
    assert curve(tmp_path / "kept" / "metrics.jsonl") == curve(tmp_path / "again" / "metrics.jsonl")
    assert "train.checkpointing" in convert.NOT_TRAINING


def test_accumulated_batches_are_one_large_batch() -> None:
    trainer = trainer_for("llama")
    four = documents()
    loss, wanted = gradients(trainer, [four])
    loss_twice, found = gradients(trainer, [four[:2], four[2:]])
    for key, value in loss.items():
        assert loss_twice[key] == pytest.approx(value, rel=1e-5)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_bfloat16_follows_float32() -> None:
    """The base computes in bfloat16; what is trained, and the optimizer's moments, stay in float32."""
    curves = {}
    for dtype in (torch.float32, torch.bfloat16):
        trainer = trainer_for("llama", dtype=dtype)
        curves[dtype] = [trainer.step([documents()]).loss["total"] for _ in range(8)]
        assert {p.dtype for p in trainer.trained} == {torch.float32}
        state = trainer.state()
        assert {t.dtype for kind in state.values() for t in kind.values()} == {torch.float32}
    for full, half in zip(*curves.values(), strict=True):
        assert half == pytest.approx(full, rel=0.02)  # bfloat16 has three digits
