"""Packed products: the plain model's numbers and texts, its bits given back, one copy of each weight."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decoding import random_prompts, randomise, tokens_of
from tiny_models import ARCHITECTURES, build
from transformers import AutoModelForCausalLM

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.errors import ResourceError, UsageError
from retrofit.eval.weights import base_state
from retrofit.runtime.backends.hf.linear import packing, products
from retrofit.runtime.backends.hf.linear.packing import own_memory, pack
from retrofit.runtime.backends.hf.linear.products import Cut, Packed, in_cut
from retrofit.runtime.engine import Engine

LAYOUT = DraftLayout(block=4)
PROMPTS = random_prompts((1, 7, 30))
without_bf16 = pytest.mark.skipif(
    packing.missing(torch.bfloat16) is not None, reason="this processor has no packed products in bfloat16"
)
TYPES = [torch.float32, pytest.param(torch.bfloat16, marks=without_bf16)]


def engine_of(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Engine:
    return randomise(Engine.from_model(build(name).to(dtype), layout=LAYOUT, exact="off", **options))


def mixed_forward(engine: Engine) -> list[torch.Tensor]:
    """Logits and hidden states of a prompt, and of verified rows with blocks behind it."""
    cache = engine.backend.new_cache(1, 60)
    with torch.inference_mode():
        first = engine.backend.forward(engine.backend.row_plan([SequenceRows(0, 0, PROMPTS[2])]), cache)
        rows = SequenceRows(0, 30, [1, 2, 3], [Block(32, [MASK] * 4), Block(33, [MASK] * 4)])
        second = engine.backend.forward(engine.backend.row_plan([rows]), cache)
    return [first.base_logits, first.base_hidden, second.base_logits, second.draft_hidden]


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_packed_model_computes_what_the_plain_one_does(name: str, alone: bool) -> None:
    """But for the order of addition."""
    engine = engine_of(name)
    plain = mixed_forward(engine)
    pack(engine.backend, alone)
    for got, want in zip(mixed_forward(engine), plain, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3_moe", "deepseek_v3", "gemma3"])
def test_the_bits_of_the_base_come_back(name: str, dtype: torch.dtype) -> None:
    """From `state_dict`, which is what a certificate compares; the plain weights themselves are gone."""
    engine = engine_of(name, dtype)
    model = engine.attached.model
    before = {key: tensor.clone() for key, tensor in base_state(model).items()}
    pack(engine.backend, alone=True)
    gone = sum(p.numel() for p in model.parameters() if p.is_meta)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    kept = sum(p.numel() for n, p in model.named_parameters() if not p.is_meta and "lora_" not in n)
    assert gone > 0 and tied == (not model.get_output_embeddings().weight.is_meta)
    assert kept + gone == sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    after = base_state(model)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key


def test_the_bits_of_transposed_weights_come_back() -> None:
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(6, 4)
    product = products.Product(module, None, Cut())
    product.packed = Packed(products.matrix(module).contiguous())
    assert torch.equal(product.plain(), module.weight)


def test_rows_of_layers_that_share_them_run_as_one_product() -> None:
    engine = engine_of("llama")
    pack(engine.backend, alone=True)
    together: dict[int, list[str]] = {}
    for name, product in engine.backend.products.items():
        if product.shared is not None and name.startswith("layers.0."):
            together.setdefault(id(product.shared[0]), []).append(name.split(".")[3])
    assert sorted(together.values()) == [["gate_proj", "up_proj"], ["q_proj", "k_proj", "v_proj"]]


def test_a_shared_product_is_made_anew_for_other_rows() -> None:
    weight = torch.randn(6, 8)
    shared = products.Shared(Packed(weight), [4, 2], Cut())
    one, other = torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(shared.part(0, one), F.linear(one, weight)[:, :4])
    for rows, number in ((one, 1), (other, 0), (one, 0), (one, 1), (other, 1)):
        want = F.linear(rows, weight).split([4, 2], -1)[number]
        torch.testing.assert_close(shared.part(number, rows), want)


@pytest.mark.parametrize("cut", [Cut(), Cut(2), Cut(2, 4), Cut(3, 4), Cut(4, 4), Cut(16, 32)], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 8, 9, 33])
def test_a_cut_changes_no_row(rows: int, cut: Cut) -> None:
    weight, seen = torch.randn(5, 8, dtype=torch.float64), []
    x = torch.randn(1, rows, 8, dtype=torch.float64)

    def run(part: torch.Tensor) -> torch.Tensor:
        seen.append(part.numel() // 8)
        return F.linear(part, weight)

    got = in_cut(run, x, cut)
    torch.testing.assert_close(got, F.linear(x, weight))
    assert all(count >= cut.least for count in seen)
    assert cut.most is None or all(count <= cut.most for count in seen)


def test_a_live_model_keeps_its_own_forward_and_its_weights() -> None:
    model = build("llama")
    ids = torch.tensor([PROMPTS[1]])
    before = model(ids).logits
    engine = randomise(Engine.from_model(model, layout=LAYOUT, packed=True))
    assert engine.backend.packed and not any(p.is_meta for p in model.parameters())
    assert torch.equal(model(ids).logits, before)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(ids).logits, before) and not twin(ids).logits.any()
    engine.close()
    assert torch.equal(model(ids).logits, before)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_its_own_forward_runs_packed_where_the_plain_weights_are_gone() -> None:
    model = build("qwen3_moe")
    ids = torch.tensor([PROMPTS[1]])
    before = model(ids).logits
    engine = Engine.from_model(model, layout=LAYOUT, exact="off")
    pack(engine.backend, alone=True)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3", "qwen3_moe", "deepseek_v3"])
def test_texts_are_those_of_ar_where_rows_keep_their_bits(name: str, dtype: torch.dtype) -> None:
    engine = randomise(Engine.from_model(build(name).to(dtype), layout=LAYOUT, packed=True))
    if engine.backend.exact != "invariant":
        pytest.skip(f"on this machine {engine.settled.why}")
    for sampling in ({}, {"temperature": 0.8}):
        options = {"max_new_tokens": 12, "seed": 3, "ignore_eos": True, **sampling}
        truth = tokens_of(engine, PROMPTS, "ar", batch_size=1, **options)
        assert tokens_of(engine, PROMPTS, "ar", batch_size=3, **options) == truth
        for way in ({"strategy": "two_forward"}, {"strategy": "fused", "tree": 9}, {"strategy": "prompt_lookup"}):
            for batch in (1, 3):
                assert tokens_of(engine, PROMPTS, "self_spec", **way, batch_size=batch, **options) == truth, (
                    way,
                    batch,
                )


def test_an_engine_that_loads_its_base_packs_it_and_says_so(made: Any) -> None:
    with Engine.load(made) as engine, Engine.load(made, packed=False) as plain:
        assert engine.backend.packed and not plain.backend.packed
        assert any(p.is_meta for p in engine.attached.model.parameters())
        options = {"max_new_tokens": 12, "ignore_eos": True}
        assert tokens_of(engine, PROMPTS, "self_spec", **options) == tokens_of(plain, PROMPTS, "self_spec", **options)


def vanished(monkeypatch: Any) -> None:
    def gone(*_: Any) -> None:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")

    monkeypatch.setattr(packing, "Packed", gone)


def wrong(monkeypatch: Any) -> None:
    right = Packed.__call__
    monkeypatch.setattr(Packed, "__call__", lambda self, x: right(self, x) * 1.5)


@pytest.mark.parametrize("plant", [vanished, wrong])
def test_where_products_cannot_be_had_weights_stay_plain(made: Any, plant: Any, monkeypatch: Any) -> None:
    plant(monkeypatch)
    with Engine.load(made) as engine:
        assert not engine.backend.packed
        assert tokens_of(engine, PROMPTS, "self_spec", max_new_tokens=4)
    with pytest.raises(ResourceError, match="packed products"):
        Engine.load(made, packed=True)


def test_a_model_that_computes_something_else_packed_is_left_plain(monkeypatch: Any) -> None:
    """Here because a part of a shared product is taken from the wrong place."""
    engine = engine_of("llama")
    plain = mixed_forward(engine)
    right = products.Shared.part
    monkeypatch.setattr(products.Shared, "part", lambda self, n, x: right(self, n, x).flip(-1))
    with pytest.raises(ResourceError, match="something else"):
        pack(engine.backend, alone=True)
    assert not engine.backend.packed and not any(p.is_meta for p in engine.attached.model.parameters())
    for got, want in zip(mixed_forward(engine), plain, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("given", ["on", 1, None])
def test_other_values_are_refused(given: Any) -> None:
    with pytest.raises(UsageError, match="packed="):
        Engine.from_model(build("llama"), packed=given)


def test_fp64_has_no_packed_products() -> None:
    with pytest.raises(ResourceError, match="float64"):
        Engine.from_model(build("llama").double(), packed=True)


def test_weights_are_packed_for_a_while_only() -> None:
    engine = engine_of("qwen3_moe")
    plain = mixed_forward(engine)
    with packing.packed_meanwhile(engine.backend):
        assert engine.backend.packed
        for got, want in zip(mixed_forward(engine), plain, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert not engine.backend.packed
    for got, want in zip(mixed_forward(engine), plain, strict=True):
        assert torch.equal(got, want)


def parameters_alive() -> list[torch.nn.Parameter]:
    gc.collect()
    return [o for o in gc.get_objects() if type(o) is torch.nn.Parameter and not o.is_meta]


def test_nothing_keeps_the_plain_weights_of_a_base_that_was_loaded(made: Any) -> None:
    before = parameters_alive()
    known = {id(p) for p in before}
    with Engine.load(made) as engine:
        let_go = {tuple(p.shape) for p in engine.attached.model.parameters() if p.is_meta}
        embedding = engine.attached.model.get_input_embeddings().weight
        kept = [p for p in parameters_alive() if id(p) not in known and p is not embedding]
        assert let_go and not [p.shape for p in kept if tuple(p.shape) in let_go]


def test_weights_that_stay_plain_leave_the_mapping_of_their_file(tmp_path: Any) -> None:
    """A weight in it would keep all of the file in memory.  A tied one stays one, and is watched as before."""
    build("llama_tied").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    if all(p.untyped_storage().resizable() for p in model.parameters()):
        pytest.skip("this transformers copies weights out of their file")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own_memory(model)
    assert all(p.untyped_storage().resizable() and not p.is_inference() for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_an_engine_that_packed_its_base_keeps_nothing_of_the_file(made: Any) -> None:
    with Engine.load(made, exact="off") as engine:
        weights = engine.attached.base_parameters()
        assert all(p.is_meta or p.untyped_storage().resizable() for p in weights)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_closed_engine_leaves_a_model_that_computes(name: str) -> None:
    model = build(name)
    ids = torch.tensor([PROMPTS[1]])
    before = model(ids).logits
    engine = Engine.from_model(model, layout=LAYOUT, exact="off")
    pack(engine.backend, alone=True)
    engine.close()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-4)


def test_packed_weights_say_that_they_give_no_gradients() -> None:
    model = build("llama")
    engine = Engine.from_model(model, layout=LAYOUT, exact="off")
    pack(engine.backend, alone=True)
    embeds = torch.randn(1, 4, model.config.hidden_size, requires_grad=True)
    with pytest.raises(UsageError, match="no gradients"):
        model(inputs_embeds=embeds)
