"""Linear layers that hold few bits, with weights that no package is needed for: products, gradients, exactness."""

import pytest
import torch
from tiny_models import build
from torch import Tensor, nn
from transformers import PreTrainedModel

from retrofit.adapters.attach import attach
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.roles import ROLES
from retrofit.errors import GateError
from retrofit.quantised.linear import EightBits, QuantisedLinear, quantised_layers, weight_bytes
from retrofit.quantised.loading import put, take_over
from retrofit.runtime.backends.hf.backend import wrap
from retrofit.runtime.backends.hf.exact_rows import settle
from retrofit.runtime.engine import Engine
from retrofit.runtime.loading import prepare, untrained

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8]]


def rounded(weight: Tensor) -> EightBits:
    largest = weight.detach().float().abs().amax(1)
    return EightBits((weight.detach().float() / largest[:, None] * 127).round().to(torch.int8), largest)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and not n.endswith("lm_head")}


def both(dtype: torch.dtype = torch.float32, kind: str = "llama") -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model in 8 bits, and a plain one of the weights that those stand for."""
    held = build(kind).to(dtype)
    for name, layer in linear_layers(held).items():
        shape = (layer.out_features, layer.in_features)
        put(held, name, QuantisedLinear(rounded(layer.weight), shape, dtype, layer.bias))
    plain = build(kind).to(dtype)
    for layer in linear_layers(plain).values():
        with torch.no_grad():
            layer.weight.copy_(rounded(layer.weight).dense(dtype))
    return held, plain


def test_the_weight_is_nowhere_and_the_bits_are_kept() -> None:
    held, plain = both()
    layer = held.model.layers[0].mlp.up_proj
    assert layer.weight.isnan().all() and layer.weight.untyped_storage().size() == layer.weight.element_size()
    assert weight_bytes(held) < 0.6 * weight_bytes(plain)
    before = {name: part.clone() for name, part in layer.held.parts().items()}
    held.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.shape == (48, 32)
    assert layer.weight.untyped_storage().size() == layer.weight.element_size()
    assert all(torch.equal(part, before[name]) for name, part in layer.held.parts().items())
    state = held.state_dict()
    assert state["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert "model.layers.0.mlp.up_proj.SCB" in state


@pytest.mark.parametrize("by_hand", [True, False])
def test_gradients_are_those_of_the_dequantised_model(by_hand: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the adapter, through every layer; and nothing of a weight's size is kept for the way back."""
    from retrofit.adapters.gated_lora import GatedLoraLinear

    monkeypatch.setattr(GatedLoraLinear, "by_hand", by_hand)
    gradients, sizes = [], set()
    layout = DraftLayout(block=4)
    options = {"rank": 4, "alpha": 4.0, "targets": ROLES, "markov_rank": 2, "confidence": True}
    weights = {(48, 32), (32, 48), (32, 32), (16, 32)}

    def kept(tensor: Tensor) -> Tensor:
        sizes.add(tuple(tensor.shape))
        return tensor

    for model in both():
        attached, backend = wrap(model, lambda model=model: attach(model, layout, **options))
        with torch.no_grad():
            for parameter in attached.lora_parameters():
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
        backend.gate.base_rows = 0
        with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
            logits = model(torch.tensor(PROMPTS[:1]), use_cache=False).logits
        if quantised_layers(model):
            assert not weights & sizes
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        gradients.append([parameter.grad for parameter in attached.lora_parameters()])
        backend.close()
    for got, want in zip(*gradients, strict=True):
        assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize("exact", ["off", "invariant"])
def test_texts_are_those_of_ar_and_of_generate(exact: str) -> None:
    held, plain = both()
    with Engine.from_model(held, exact=exact) as engine:
        want = engine.generate(PROMPTS, "ar", max_new_tokens=16, ignore_eos=True)
        got = engine.generate(PROMPTS, "self_spec", max_new_tokens=16, ignore_eos=True)
        assert [r.tokens for r in got] == [r.tokens for r in want]
    own = plain.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert want[0].tokens == own[0, len(PROMPTS[0]) :].tolist()


def test_weights_of_few_bits_are_not_packed() -> None:
    held, _ = both(torch.bfloat16)
    attached, backend = untrained(held, DraftLayout(block=4))
    prepare(backend, "auto", 4, None, "auto", alone=True)
    assert not backend.packed and "quantised" in str(backend.why_plain)
    backend.close()
    attached.detach()
    assert isinstance(held.model.layers[0].mlp.up_proj, QuantisedLinear)


class OutlierColumns(nn.Linear):
    """As LLM.int8() multiplies: columns in which any row has an outlier stay as they are, the others are rounded."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        whole = (rows.abs() > 6).any(0)
        rest = rows.masked_fill(whole, 0)
        scale = rest.abs().amax(1, keepdim=True) / 127
        near = (rest / scale.clamp_min(1e-9)).round() * scale
        out = (near + rows.masked_fill(~whole, 0)) @ self.weight.T
        return out.view(*x.shape[:-1], -1)


class LibrarysInt8(QuantisedLinear):
    """What bitsandbytes itself makes of the same bits: LLM.int8(), rows rounded too but in columns of outliers."""

    def forward(self, x: Tensor) -> Tensor:
        import bitsandbytes

        state = bitsandbytes.MatmulLtState()
        state.threshold, state.has_fp16_weights, state.is_training = 6.0, False, False
        held = self.held if isinstance(self.held, EightBits) else rounded(self.held.dense(torch.float32))
        state.CB, state.SCB = held.numbers, held.largest
        out: Tensor = bitsandbytes.matmul(x, self.weight, state=state, bias=self.bias)
        return out


@pytest.mark.parametrize("whose", ["ours", "by hand", "bitsandbytes"])
def test_rows_that_depend_on_their_neighbours_are_found(whose: str) -> None:
    """LLM.int8()'s products keep no level; ours of the same bits keep one."""
    if whose == "by hand":
        tried = build("llama").to(torch.bfloat16)
        for layer in linear_layers(tried).values():
            layer.__class__ = OutlierColumns
    else:
        tried, _ = both(torch.bfloat16)
    if whose == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
        for layer in quantised_layers(tried).values():
            layer.__class__ = LibrarysInt8
    attached, backend = untrained(tried, DraftLayout(block=4))
    found = settle(backend, "auto", 4)
    if whose == "ours":
        assert found.level != "off"
    else:
        assert found.level == "off" and "differs" in found.why
        for level in ("bucket", "invariant"):
            with pytest.raises(GateError, match="depend on the rows beside it") as caught:
                settle(backend, level, 4)
            assert f"exact='{level}'" not in str(caught.value.hint)
    backend.close()
    attached.detach()


def test_other_quantised_modules_are_refused() -> None:
    from retrofit.errors import UnsupportedModelError

    model = build("llama")
    norm = model.model.norm
    norm.weight = nn.Parameter(norm.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"model.norm.weight is a Tensor of torch.int8"):
        take_over(model, torch.float32)
