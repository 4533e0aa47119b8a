"""The load check: what a model would get wrong later is refused when it is loaded, with the true reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoding import randomise
from tiny_models import ARCHITECTURES, WINDOW, build
from torch import Tensor

from benchmarks import decoders
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import RowPlan
from retrofit.errors import UnsupportedModelError
from retrofit.hub import Base
from retrofit.recipes.training.prepare import attached_to, resolve
from retrofit.runtime.backends.hf import load_check
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.engine import Engine

TIMES = "attends 8 times in layer 0 of one forward"
REASONS = {
    "hrm_text": TIMES,
    "electra": "has embeddings of width 128 for hidden states of 32",
    "mllama": "2 of 3 layers call transformers' attention interface",
    "doge": "makes an attention mask of its own",
    "deepseek_v4": "attends to compressed keys",
    "rwkv": "recurrent",
    "xlstm": "recurrent",
    "zaya": r"layers \(hybrid\), of a kind",
    "zamba": r"layers \(hybrid, linear_attention\), of a kind",
    "inkling_text": r"layers \(hybrid_sliding\), of a kind",
    "inkling2_text": r"layers \(hybrid_sliding\), of a kind",
}


def built(name: str) -> Any:
    try:
        return decoders.build(name)
    except Exception as error:
        pytest.skip(f"transformers cannot build it: {error}")


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_is_the_true_one_and_the_model_is_left_alone(name: str) -> None:
    model = built(name)
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(UnsupportedModelError, match=REASONS[name]) as caught:
        Engine.from_model(model)
    assert type(model).__name__ in str(caught.value) or "Attention" in str(caught.value)
    assert {n: type(m) for n, m in model.named_modules()} == before


def test_an_encoder_is_no_decoder() -> None:
    model = built("bert")
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    model.config.is_decoder = False
    with pytest.raises(UnsupportedModelError, match="attend to later ones"):
        Engine.from_model(model)


def test_a_conversion_is_refused_before_anything_is_trained() -> None:
    model = built("hrm_text")
    plan = resolve(None, "tiny", {"data.max_length": 64})
    with pytest.raises(UnsupportedModelError, match=TIMES):
        attached_to(Base(model, None, "hrm_text", None, None, {}), plan)


# Faults of our own, or of a family not seen yet


class Fault:
    """One each; every one of them leaves the first forward, over base rows alone, as it is."""

    @staticmethod
    def positions_from_the_cache(patch: pytest.MonkeyPatch) -> None:
        right = HFBackend.run_trunk

        def run(self: HFBackend, plan: RowPlan, *rest: Any) -> Tensor:
            plan.positions = torch.arange(plan.num_rows)[None]
            return right(self, plan, *rest)

        patch.setattr(HFBackend, "run_trunk", run)

    @staticmethod
    def draft_rows_see_one_too_few(patch: pytest.MonkeyPatch) -> None:
        right = RowPlan._draft_group

        def group(self: RowPlan) -> Any:
            found = right(self)
            if found is not None:
                found.limit = found.limit - 1
            return found

        patch.setattr(RowPlan, "_draft_group", group)

    @staticmethod
    def sequences_see_each_other(patch: pytest.MonkeyPatch) -> None:
        """The second sequence reads the first one's cache."""
        from retrofit.runtime.backends.hf.cache import KVCache

        right = KVCache.read
        patch.setattr(KVCache, "read", lambda self, layer, slots, n: right(self, layer, [0] * len(slots), n))

    @staticmethod
    def windows_forgotten_behind_the_cache(patch: pytest.MonkeyPatch) -> None:
        right = RowPlan.base_mask

        def mask(self: RowPlan, window: int | None, dtype: torch.dtype) -> Any:
            return right(self, window if self.alone else None, dtype)

        patch.setattr(RowPlan, "base_mask", mask)


FAULTS = [
    ("llama", Fault.positions_from_the_cache, "base rows behind a cache"),
    ("llama", Fault.draft_rows_see_one_too_few, "draft rows"),
    ("llama", Fault.sequences_see_each_other, "rows of a second sequence"),
    ("mistral_window", Fault.windows_forgotten_behind_the_cache, "base rows behind a cache"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "plant", "where"), FAULTS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_planted_faults(name: str, plant: Any, where: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(UnsupportedModelError, match=f"logits of {where} differ"):
        Engine.from_model(build(name).to(dtype))


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounding_is_no_fault(name: str, attention: str, dtype: torch.dtype) -> None:
    model = ARCHITECTURES[name]().to(dtype)
    if dtype == torch.float64 and getattr(model.config, "_experts_implementation", None):
        model.set_experts_implementation("eager")  # grouped_mm knows no fp64
    Engine.from_model(model, layout=DraftLayout(block=4, attention=attention)).close()


def test_what_the_adapter_has_learned_is_no_fault() -> None:
    engine = randomise(Engine.from_model(build("llama")))
    load_check.check_model(engine.backend)
    gated = [m for m in engine.attached.model.modules() if hasattr(m, "gate")]
    assert gated and all(m.gate is engine.backend.gate for m in gated)


def test_windows_go_where_the_configuration_has_them() -> None:
    mixed = SimpleNamespace(
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
    )
    load_check.check_calls("M", mixed, 64, [(0, 8), (1, None)])
    for calls, reason in (
        ([(0, None), (1, None)], "does not hand it to its attention function .layer 0."),
        ([(0, 8), (1, 8)], "to a layer that sees everything"),
        ([(0, 4), (1, None)], "of 4; its configuration says 8"),
        ([(0, 8)], "1 of 2 layers"),
        ([(0, 8), (1, None), (1, None)], "attends 2 times in layer 1"),
    ):
        with pytest.raises(UnsupportedModelError, match=reason):
            load_check.check_calls("M", mixed, 64, calls)


def test_a_small_window_is_crossed_and_a_large_one_costs_nothing() -> None:
    """A real model's check takes no more rows than one without a window."""
    assert load_check.check_length(build("mistral_window").config, 4096) >= 2 * (WINDOW + 2)
    large = SimpleNamespace(sliding_window=4096, keep_window_size=2048)
    assert load_check.check_length(large, 32768) == load_check.check_length(build("llama").config, 32768) <= 16
    assert load_check.check_length(large, 5) == 5


def test_being_out_of_memory_is_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.model, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        Engine.from_model(model)


def test_what_a_model_trips_over_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    right = model.model.forward

    def fails(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("needs\ninput_ids")
        return right(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", fails)
    with pytest.raises(UnsupportedModelError, match="cannot run a forward of rows: ValueError: needs input_ids"):
        Engine.from_model(model)
