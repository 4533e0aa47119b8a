"""The adapter acts on draft rows only: identity at the start, base bits with the gate shut or NaN inside."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoding import poison, random_prompts, randomise, reference_greedy
from tiny_models import ARCHITECTURES, build
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from retrofit.adapters.gated_lora import GatedLoraLinear
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.runtime.backends.hf import backend as hf
from retrofit.runtime.backends.hf.attention import ATTENTION, row_attention
from retrofit.runtime.backends.hf.backend import HFBackend, Output
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.engine import Engine

PROMPTS = random_prompts((20, 13))
START = (16, 10)  # so many positions are prefilled, the rest runs beside draft rows
CAUSAL = DraftLayout(block=4, attention="causal")


def prefilled(backend: HFBackend) -> KVCache:
    cache = KVCache(2, 64)
    rows = [SequenceRows(slot=s, start=0, tokens=p[:n]) for s, (p, n) in enumerate(zip(PROMPTS, START, strict=True))]
    backend.forward(backend.row_plan(rows), cache)
    return cache


def mixed_rows() -> list[SequenceRows]:
    """Base rows of both sequences, two blocks of tokens on the one and one of masks on the other."""
    (a, b), (n, m) = PROMPTS, START
    return [
        SequenceRows(0, n, a[n:], [Block(n + 1, a[n + 1 : n + 4]), Block(n + 2, [MASK] * 4)]),
        SequenceRows(1, m, b[m:], [Block(m + 1, [MASK] * 3)]),
    ]


@torch.inference_mode()
def mixed_forward(engine: Engine) -> tuple[Output, KVCache]:
    cache = prefilled(engine.backend)
    return engine.backend.forward(engine.backend.row_plan(mixed_rows()), cache), cache


def own_logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([PROMPTS[0]]), use_cache=False).logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_new_adapter_is_the_identity(name: str) -> None:
    """Draft rows that read tokens, under causal attention, are base rows up to rounding until the LoRA is trained."""
    engine = Engine.from_model(build(name), layout=CAUSAL)
    tokens, start = PROMPTS[0], START[0]
    with torch.inference_mode():
        cache = prefilled(engine.backend)
        draft = SequenceRows(0, start, [], [Block(start, tokens[start:])])
        as_draft = engine.backend.forward(engine.backend.row_plan([draft]), cache).draft_hidden
        base = SequenceRows(0, start, tokens[start:])
        as_base = engine.backend.forward(engine.backend.row_plan([base]), cache).base_hidden
        torch.testing.assert_close(as_draft, as_base, rtol=1e-4, atol=1e-4)
        heads = engine.attached.heads
        trunk = engine.backend.head(as_draft)
        previous = torch.tensor(tokens[start:])
        assert torch.equal(heads.draft_logits(trunk, previous), trunk)
        assert torch.equal(heads.confidence(as_draft[None], previous[None], True), torch.full((1, len(previous)), 0.5))
        randomise(engine)
        changed = engine.backend.forward(engine.backend.row_plan([draft]), cache).draft_hidden
    assert (changed - as_base).abs().max() > 0.01, "the adapter does nothing on draft rows"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nan_adapter_leaves_base_rows_bitwise_unchanged(name: str) -> None:
    engine = Engine.from_model(build(name), layout=CAUSAL)
    outputs = []
    for change in (lambda e: e, randomise, poison):
        out, cache = mixed_forward(change(engine))
        outputs.append((out, {layer: [t.clone() for t in pair] for layer, pair in cache.layers.items()}))
    (fresh, fresh_kv), (random, random_kv), (nan, nan_kv) = outputs
    for other, kv in ((random, random_kv), (nan, nan_kv)):
        assert torch.equal(other.base_logits, fresh.base_logits)
        assert torch.equal(other.base_hidden, fresh.base_hidden)
        for layer, pair in fresh_kv.items():
            assert all(torch.equal(x, y) for x, y in zip(pair, kv[layer], strict=True))
    assert fresh.base_logits.isfinite().all()
    assert nan.draft_hidden.isnan().all()
    assert not torch.equal(random.draft_hidden, fresh.draft_hidden)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4"])
def test_grouped_experts_too_run_base_rows_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In forwards of many rows experts are grouped, and a group's size may change the bits of each of its rows."""
    monkeypatch.setattr(hf, "FEW_ROWS", 0)
    engine = Engine.from_model(build(name), layout=CAUSAL)
    fresh, _ = mixed_forward(engine)
    for change in (randomise, poison):
        out, _ = mixed_forward(change(engine))
        assert torch.equal(out.base_logits, fresh.base_logits)
        assert out.base_logits.isfinite().all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_mask_vector_meets_the_embedding_multiplier(name: str) -> None:
    """A mask vector that equals a token's embedding is that token."""
    engine = Engine.from_model(build(name))
    with torch.no_grad():
        engine.attached.heads.mask_vector.copy_(engine.backend.embedding.weight[9])
        rows = SequenceRows(0, 3, [], [Block(3, [9, MASK, 4])])
        embedded = engine.backend.embed(engine.backend.row_plan([rows]))
    torch.testing.assert_close(embedded[1], embedded[0])
    assert not torch.equal(embedded[2], embedded[0])


def multiplied_gate(self: GatedLoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The gate as a factor: 0 * NaN = NaN."""
    first = x.shape[-2] if self.gate.base_rows is None else self.gate.base_rows
    update = self.lora_B["default"](self.lora_A["default"](x)) * self.scaling["default"]
    gate = (torch.arange(x.shape[-2]) >= first).to(x.dtype)[:, None]
    return self.base_layer(x) + gate * update


def shifted_gate(self: GatedLoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The last base row gets the adapter too."""
    out = self.base_layer(x).clone()
    first = self.gate.base_rows
    if first is not None:
        rows = x[..., first - 1 :, :]
        out[..., first - 1 :, :] += self.lora_B["default"](self.lora_A["default"](rows))
    return out


@pytest.mark.parametrize("fault", [multiplied_gate, shifted_gate])
def test_a_leaking_gate_is_caught(fault: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.from_model(build("llama"), layout=CAUSAL)
    fresh, _ = mixed_forward(engine)
    monkeypatch.setattr(GatedLoraLinear, "forward", fault)
    nan, _ = mixed_forward(poison(engine))
    assert not torch.equal(nan.base_logits, fresh.base_logits)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_masked_draft_slots_in_a_base_rows_call_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What shared attention with a mask computes: a draft row's value, times a weight of 0."""

    def shared(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, weights = row_attention(module, query, key, value, *args, **kwargs)
        n = kwargs["retrofit_rows"].plan.num_base
        out[:, :n] += 0 * value[:, :, n:].sum()
        return out, weights

    engine = Engine.from_model(build(name), layout=CAUSAL)
    monkeypatch.setitem(AttentionInterface._global_mapping, ATTENTION, shared)
    fresh, _ = mixed_forward(engine)
    nan, _ = mixed_forward(poison(engine))
    assert not torch.equal(nan.base_logits, fresh.base_logits)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_live_model_keeps_its_bits_and_comes_back_whole(name: str) -> None:
    model = build(name)
    before = own_logits(model)
    prompts = [PROMPTS[1]]
    text = reference_greedy(model, prompts, 6)
    state = snapshot(model)

    engine = randomise(Engine.from_model(model, layout=DraftLayout(block=4)))
    assert torch.equal(own_logits(model), before)
    stream = engine.stream(PROMPTS, "self_spec", strategy="fused", max_new_tokens=5, ignore_eos=True)
    while next(stream, None) is not None:  # between two steps of ours the model is the user's
        assert torch.equal(own_logits(model), before)
    assert reference_greedy(model, prompts, 6) == text
    trained = {id(p) for p in engine.attached.parameters()}
    base = {n: p for n, p in model.named_parameters() if "lora_" not in n}
    assert len(base) == len(state["parameters"])
    assert all(id(p) not in trained for p in base.values())
    assert not any(p.requires_grad for p in base.values())
    assert all(p.requires_grad for p in engine.attached.parameters())

    engine.close()
    assert snapshot(model) == state
    assert torch.equal(own_logits(model), before)


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """All that wrapping could leave changed; tensors by identity and version."""
    return {
        "modules": {name: (id(m), type(m), "forward" in m.__dict__) for name, m in model.named_modules()},
        "parameters": {n: (id(p), p._version, p.requires_grad) for n, p in model.named_parameters()},
        "buffers": {n: id(b) for n, b in model.named_buffers() if not n.endswith("inv_freq")},
        "attributes": set(model.__dict__),
        "implementation": (model.config._attn_implementation, model.config._experts_implementation),
        "config": model.config.to_dict(),
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "training": model.training,
    }


def test_only_adapter_parameters_get_gradients() -> None:
    engine = Engine.from_model(build("llama"))
    plan = engine.backend.row_plan(mixed_rows())
    with torch.no_grad():
        cache = prefilled(engine.backend)
    randomise(engine)
    with torch.enable_grad():
        hidden = engine.backend.run_trunk(plan, cache)
    hidden[plan.num_base :].sum().backward()
    with_gradient = {n for n, p in engine.attached.peft_model.named_parameters() if p.grad is not None}
    assert with_gradient and all("lora_" in n for n in with_gradient)
    assert engine.attached.heads.mask_vector.grad is not None


def test_an_error_in_a_forward_restores_the_live_model() -> None:
    model = build("llama")
    before = own_logits(model)
    engine = randomise(Engine.from_model(model))

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_decoder().layers[1].register_forward_pre_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, "self_spec", strategy="fused", max_new_tokens=4)
    handle.remove()
    assert torch.equal(own_logits(model), before)
    assert model.config._attn_implementation != "retrofit"
