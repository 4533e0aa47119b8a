"""What was recorded of a model's modules gives their bits, and gives way when anything about them changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from decoding import randomise
from tiny_models import build
from torch import Tensor, nn

from retrofit.adapters.gated_lora import GatedLoraLinear
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.runtime.backends.hf.exact_attention import GROUPED
from retrofit.runtime.backends.hf.linear import products
from retrofit.runtime.backends.hf.linear.packing import pack, refused
from retrofit.runtime.backends.hf.recorded import steps
from retrofit.runtime.backends.hf.recorded.program import program
from retrofit.runtime.backends.hf.recorded.trace import Recorder, Unrecordable
from retrofit.runtime.engine import Engine

FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss")
PROMPT = 9
KINDS = {
    "ar": ([5], None, []),
    "fused": ([5, 6, 7], None, [Block(PROMPT + 3, [MASK] * 2, anchor=2)]),
    "tree": ([5, 6, 7, 8], [-1, 0, 0, 1], [Block(PROMPT + 2, [MASK] * 2, anchor=1)]),
}


class Steps:
    """An engine behind a prompt, whose next forward can run again and again."""

    def __init__(self, family: str, dtype: torch.dtype = torch.float32, level: str = "off"):
        model = build(family).to(dtype)
        self.engine = randomise(Engine.from_model(model, layout=DraftLayout(block=2), exact="off"))
        self.backend: Any = self.engine.backend
        self.backend.hold(level, None if level == "off" else GROUPED, 1 if level == "off" else 2)
        self.cache = self.backend.new_cache(1, 64)
        self.cache.open(0, 64)
        self._run([SequenceRows(0, 0, list(range(1, PROMPT + 1)), last_logits_only=True)])

    @torch.inference_mode()
    def _run(self, rows: list[SequenceRows]) -> Tensor:
        return self.backend.run_trunk(self.backend.row_plan(rows), self.cache)

    def take(self, kind: str = "ar", shift: int = 0) -> Tensor:
        """[N, H]; shift: of the tokens."""
        tokens, parents, blocks = KINDS[kind]
        return self._run([SequenceRows(0, PROMPT, [t + shift for t in tokens], blocks, parents=parents)])

    def by_modules(self, kind: str = "ar", shift: int = 0) -> Tensor:
        self.backend.recorded.on = False
        try:
            return self.take(kind, shift)
        finally:
            self.backend.recorded.on = True

    def record(self, kind: str = "ar") -> None:
        for n in range(steps.AFTER + steps.PROOFS):
            self.take(kind, n)

    def close(self) -> None:
        self.engine.close()


@pytest.fixture
def llama() -> Iterator[Steps]:
    made = Steps("llama")
    made.record()
    assert made.backend.recorded.kinds == 1
    yield made
    made.close()


@pytest.mark.parametrize("how", [(torch.float32, "off"), (torch.bfloat16, "invariant")], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_steps_have_the_bits_of_modules(family: str, how: tuple[torch.dtype, str]) -> None:
    made = Steps(family, *how)
    recorded = made.backend.recorded
    for kind in KINDS:
        made.record(kind)
    assert recorded.why is None and recorded.kinds == len(KINDS)
    for kind in KINDS:
        for shift in (11, 23):
            assert steps.same_bits(made.take(kind, shift), made.by_modules(kind, shift)), kind
    made.close()


def test_no_module_runs_once_steps_are_recorded(llama: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_: Any, **__: Any) -> None:
        raise AssertionError("a module ran")

    monkeypatch.setattr(type(llama.backend.trunk), "forward", called)
    llama.take()


def change_norm(trunk: Any) -> None:
    trunk.norm.weight = nn.Parameter(trunk.norm.weight * 2)


def write_norm(trunk: Any) -> None:
    trunk.norm.weight.data.mul_(2)


def hook_layer(trunk: Any) -> None:
    trunk.layers[0].register_forward_hook(lambda _, __, out: out * 2)


def hook_product(trunk: Any) -> None:
    trunk.layers[0].self_attn.q_proj.register_forward_hook(lambda _, __, out: out * 2)


def own_forward(trunk: Any) -> None:
    trunk.layers[1].mlp.forward = lambda x: x


def other_module(trunk: Any) -> None:
    trunk.layers[1].mlp = nn.Identity()


def other_setting(trunk: Any) -> None:
    trunk.layers[0].input_layernorm.variance_epsilon = 1.0


def other_type(trunk: Any) -> None:
    trunk.norm.weight.data = trunk.norm.weight.data.double().mul(1.1)


def other_adapter(trunk: Any) -> None:
    layer = trunk.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.factors()[1].fill_(3.0)


CHANGES = (change_norm, write_norm, hook_layer, hook_product, own_forward, other_module, other_setting, other_type)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_modules_is_seen_at_the_next_step(llama: Steps, change: Any) -> None:
    before = llama.take()
    change(llama.backend.trunk)
    after = llama.take()
    assert steps.same_bits(after, llama.by_modules())
    assert not steps.same_bits(after, before)


def test_drafts_go_by_the_adapter_as_it_is_now(llama: Steps) -> None:
    llama.record("fused")
    before = llama.take("fused")
    other_adapter(llama.backend.trunk)
    after = llama.take("fused")
    assert steps.same_bits(after, llama.by_modules("fused")) and not steps.same_bits(after, before)


def test_a_global_hook_is_called(llama: Steps) -> None:
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        llama.take()
    finally:
        handle.remove()
    assert llama.backend.trunk.norm in seen


def test_modules_with_hooks_are_not_recorded() -> None:
    made = Steps("llama")
    handle = made.backend.trunk.norm.register_forward_hook(lambda *_: None)
    made.record()
    made.record()
    assert made.backend.recorded.kinds == 0
    handle.remove()
    made.record()
    assert made.backend.recorded.kinds == 1
    made.close()


def test_a_forward_of_the_users_is_called() -> None:
    made = Steps("llama")
    mlp, how = made.backend.trunk.layers[1].mlp, {"factor": 1.0}
    own = mlp.forward
    mlp.forward = lambda x: own(x) * how["factor"]
    made.record()
    before = made.take()
    how["factor"] = 2.0
    assert not steps.same_bits(made.take(), before) and made.backend.recorded.kinds == 0
    del mlp.forward
    made.record()
    assert made.backend.recorded.kinds == 1
    made.close()


def test_another_level_forgets(llama: Steps) -> None:
    llama.backend.hold("off", None)
    assert llama.backend.recorded.kinds == 0


def test_nothing_is_held_of_weights_that_were_let_go_or_given_back() -> None:
    made = Steps("llama")
    recorded = made.backend.recorded
    if refused(made.backend) is None:
        made.record()
        undo = pack(made.backend, alone=False)
        assert recorded.kinds == 0
        made.record()
        assert steps.same_bits(made.take(), made.by_modules()) and recorded.kinds == 1
        undo()
        assert recorded.kinds == 0
    made.record()
    made.close()
    assert recorded.kinds == 0 and recorded._watch is None


@pytest.fixture(params=("llama", "phi3", "qwen3_moe"))
def packed(request: pytest.FixtureRequest) -> Iterator[Steps]:
    made = Steps(request.param, torch.bfloat16, "invariant")
    if refused(made.backend) is not None:
        pytest.skip("no packed products here")
    made.backend.until_closed(pack(made.backend, alone=False))
    yield made
    made.close()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_products_are_recorded_as_their_calls(packed: Steps, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed.record(kind)
    assert packed.backend.recorded.kinds == 1
    for shift in (11, 23):
        assert steps.same_bits(packed.take(kind, shift), packed.by_modules(kind, shift))
    ran: list[Tensor] = []
    monkeypatch.setattr(products, "in_cut", lambda run, x, cut: ran.append(x) or run(x))
    packed.take(kind)
    layers = sum(isinstance(module, GatedLoraLinear) for module in packed.backend.trunk.modules())
    assert not ran if kind == "ar" else 0 < len(ran) <= layers  # with draft rows a layer looks after itself


def hook_base(layer: Any) -> None:
    layer.base_layer.register_forward_hook(lambda _, __, out: out * 2)


def other_product(layer: Any) -> None:
    own = layer.product

    class Doubled:
        is_packed = False

        def __call__(self, x: Tensor) -> Tensor:
            return own(x) * 2

    layer.product = Doubled()


@pytest.mark.parametrize("change", [hook_base, other_product])
def test_a_change_of_a_packed_layer_is_seen_at_the_next_step(change: Any) -> None:
    made = Steps("llama")
    if refused(made.backend) is not None:
        pytest.skip("no packed products here")
    made.backend.until_closed(pack(made.backend, alone=False))
    made.record()
    before = made.take()
    change(made.backend.trunk.layers[0].self_attn.o_proj)
    after = made.take()
    assert steps.same_bits(after, made.by_modules()) and not steps.same_bits(after, before)
    made.close()


def recorded(function: Any, *given: Tensor, weights: tuple[Tensor, ...] = ()) -> Any:
    """A function as it was recorded with these arguments."""
    recorder = Recorder(given, weights)
    with torch.inference_mode(), recorder:
        result = function(*given)
    recorder.trace.result = recorder.value_of(result)
    return program(recorder.trace)


KEPT = torch.tensor([3.0])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2 if x.sum() > 0 else x * 3,
        lambda x: x * x.max().item(),
        lambda x: x * x.tolist()[0],
        lambda x: x[x > 0],
        lambda x: x[torch.where(x > 0)[0]],
        lambda x: x[x.nonzero()],
        lambda x: torch.repeat_interleave(x, x.long()),
        lambda x: x + torch.from_numpy(x.numpy() * 2),
        lambda x: x + KEPT,
        lambda x: x * range(10)[x.long()[0]],
    ],
)
def test_what_goes_by_values_is_refused(function: Any) -> None:
    with pytest.raises(Unrecordable):
        recorded(function, torch.tensor([1.0, 2.0]))


def test_a_weight_that_is_written_to_is_refused() -> None:
    with pytest.raises(Unrecordable, match="weight"):
        recorded(lambda x: x + KEPT.add_(1), torch.ones(1), weights=(KEPT,))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x + 1) * (x + 1),
        lambda x: x.to(torch.float32) * x.to(torch.float64).to(torch.float32),
        lambda x: x * 0.0 + x * -0.0,
        lambda x: torch.cat([x, x[..., :2]], -1).split(2)[0],
        lambda x: (x + 1).mul_(2) + (x + 1),
        lambda x: x.clone().index_add_(0, torch.zeros(1, dtype=torch.long), x[:1]),
        lambda x: (x.unsqueeze(0) + x.unsqueeze(0).contiguous())[0],
    ],
)
def test_a_program_computes_what_it_was_recorded_from(function: Any) -> None:
    one, other = torch.randn(4), torch.randn(4)
    run = recorded(function, one)
    assert steps.same_bits(run(other), function(other))


def test_a_kind_that_gives_other_bits_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Steps("llama")
    monkeypatch.setattr(steps, "program", lambda trace: lambda embeds, *_: embeds)
    made.record()
    assert made.backend.recorded.kinds == 0 and "other bits" in made.backend.recorded.why
    made.close()
