"""A live model that is refused is as it was, a user's adapter on it above all; what is on it when we leave stays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_conversion import RECIPE, tokenizer
from tiny_models import build
from torch import nn
from transformers import PreTrainedModel

from retrofit.adapters import attach as attaching
from retrofit.adapters.attach import attach
from retrofit.adapters.gated_lora import GatedLoraLinear
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.live import refuse_live
from retrofit.errors import UnsupportedModelError, UsageError
from retrofit.eval.certify import certify
from retrofit.recipes.convert import convert
from retrofit.runtime.engine import Engine

IDS = torch.tensor([[5, 9, 2, 33, 7, 1, 60, 12]])


def own(**changes: Any) -> LoraConfig:
    """A user's LoRA that changes what the model says."""
    options = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**options, **changes})


def peft_model() -> Any:
    return get_peft_model(build("llama"), own())


def added() -> PreTrainedModel:
    model = build("llama")
    model.add_adapter(own(), "mine")
    return model


def inside() -> Any:
    return peft_model().get_base_model()


def with_saved_modules() -> Any:
    return get_peft_model(build("llama"), own(modules_to_save=["lm_head"])).get_base_model()


def prompt_tuned() -> Any:
    tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_attention_heads=2, num_layers=2,
                                token_dim=32)  # fmt: skip
    return get_peft_model(build("llama"), tuning)


def seen(model: Any) -> dict[str, Any]:
    """All that a user could notice of a model, logits among them."""
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    return {
        "logits": logits.tolist(),
        "modules": {name: type(module).__name__ for name, module in model.named_modules()},
        "state": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "peft_config": {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()},
        "keys": sorted(vars(model)),
    }


def converted(model: Any, tmp_path: Path, texts: Path) -> None:
    convert(model, "tiny", tmp_path / "out", {**RECIPE, "data.source": str(texts)}, quiet=True, tokenizer=tokenizer())


def certified(model: Any, tmp_path: Path, texts: Path) -> None:
    certify(Engine.from_model(model), progress=False)


CALLS = {
    "convert": converted,
    "certify": certified,
    "from_model": lambda model, tmp_path, texts: Engine.from_model(model),
    "attach": lambda model, tmp_path, texts: attach(
        model, DraftLayout(), rank=2, alpha=2.0, targets=["q", "down"], markov_rank=2, confidence=True
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("make", [peft_model, added, inside, with_saved_modules])
def test_a_users_adapter_survives_the_refusal(make: Callable[[], Any], call: str, tmp_path: Path, texts: Path) -> None:
    model = make()
    before = seen(model)
    plain = seen(build("llama"))
    assert before["logits"] != plain["logits"]
    with pytest.raises(UnsupportedModelError, match="adapter of its own") as caught:
        CALLS[call](model, tmp_path, texts)
    assert "merge it first" in str(caught.value.hint)
    assert seen(model) == before
    assert list(tmp_path.iterdir()) == []


def test_a_merged_adapter_is_a_base(tmp_path: Path) -> None:
    """What the hint says to do works, and what the base says is then what the user's adapter made it say."""
    model = peft_model()
    with torch.no_grad():
        want = model(input_ids=IDS).logits
    merged = model.merge_and_unload()
    engine = Engine.from_model(merged)
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=IDS).logits, want, atol=1e-4)  # the sum is rounded once, not twice
    engine.close()


def test_prompt_tuning_is_refused_but_its_base_is_not() -> None:
    model = prompt_tuned()
    with pytest.raises(UnsupportedModelError, match="PeftModelForCausalLM carries an adapter"):
        Engine.from_model(model)
    Engine.from_model(model.get_base_model()).close()


def test_an_adapter_added_while_an_engine_is_open_stays() -> None:
    model = build("llama")
    engine = Engine.from_model(model)
    model.add_adapter(own(), "mine")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".mine." in name}
    assert len(state) == 2 * 2 * 2
    engine.close()
    assert {name: type(m) for name, m in model.named_modules() if isinstance(m, GatedLoraLinear)} == {}
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())
    assert list(model.peft_config) == ["mine"] and not any(".default." in name for name in now)
    alone = build("llama")
    alone.add_adapter(own(), "mine")
    alone.load_state_dict(now)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, alone(input_ids=IDS).logits)
        assert not torch.equal(model(input_ids=IDS).logits, build("llama")(input_ids=IDS).logits)


def test_a_wrapper_around_our_layer_stays() -> None:
    class Watch(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    model = build("llama")
    engine = Engine.from_model(model)
    layer = model.model.layers[0].self_attn
    layer.q_proj = Watch(layer.q_proj)
    engine.close()
    assert type(layer.q_proj) is Watch and type(layer.q_proj.inner) is nn.Linear


@pytest.mark.parametrize("fault", [ValueError, MemoryError, KeyboardInterrupt])
def test_an_error_while_attaching_leaves_the_model_as_it_was(
    fault: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise fault("planted")

    model = build("llama")
    model.model.embed_tokens.requires_grad_(False)
    before = seen(model)
    monkeypatch.setattr(attaching, "Heads", fails)
    with pytest.raises(fault, match="planted"):
        Engine.from_model(model)
    assert seen(model) == before


def test_a_second_engine_is_refused_and_harms_neither() -> None:
    model = build("llama")
    before = seen(model)
    first = Engine.from_model(model)
    want = first.generate([[1, 2, 3]], max_new_tokens=8)[0].tokens
    with pytest.raises(UsageError, match="in use by another engine") as caught:
        Engine.from_model(model)
    assert "close that one first" in str(caught.value.hint)
    assert first.generate([[1, 2, 3]], max_new_tokens=8)[0].tokens == want
    first.close()
    assert seen(model) == before
    Engine.from_model(model).close()


# Where it lies, and in what


def on_meta() -> Any:
    return build("llama").to("meta")


def partly_on_meta() -> Any:
    model = build("llama")
    model.model.layers[1].to("meta")
    return model


def offloaded() -> Any:
    """As accelerate does it for `device_map` with CPU offload, on a device that is here."""
    from accelerate import cpu_offload

    return cpu_offload(build("llama"), execution_device=torch.device("cpu"))


def in_integers() -> Any:
    model = build("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.to(torch.int8), requires_grad=False)
    return model


def in_float8() -> Any:
    model = build("llama")
    model.model.layers[0].mlp.up_proj.to(torch.float8_e4m3fn)
    return model


def dynamically() -> Any:
    from torch.ao.nn.quantized.dynamic import Linear as Dynamic

    model, linear = build("llama"), Dynamic(32, 48)
    model.model.layers[0].mlp.up_proj = linear
    return model


def by_its_loader() -> Any:
    model = build("llama")
    model.hf_quantizer = object()
    return model


PLACED = {
    on_meta: "not in memory",
    partly_on_meta: "not in memory",
    offloaded: "not in memory",
    in_integers: "up_proj.weight is a Tensor of torch.int8",
    in_float8: "of torch.float8_e4m3fn",
    dynamically: "torch.ao",
    by_its_loader: "its configuration says so",
}


@pytest.mark.parametrize("make", PLACED, ids=lambda make: make.__name__)
def test_models_that_cannot_be_wrapped(make: Callable[[], Any], tmp_path: Path, texts: Path) -> None:
    model = make()
    modules = {name: type(module) for name, module in model.named_modules()}
    for call in ("convert", "from_model"):
        with pytest.raises(UnsupportedModelError, match=PLACED[make]) as caught:
            CALLS[call](model, tmp_path, texts)
        assert caught.value.hint
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert list(tmp_path.iterdir()) == []


def test_other_devices_are_refused_by_name() -> None:
    """Of devices that are not here: by what their tensors say of themselves."""

    model = build("llama")
    for devices, message in (
        (["mps"], "is on mps; retrofit runs on cpu and cuda"),
        (["cpu", "xpu"], "is on xpu"),
        (["cuda:0", "cuda:1"], r"several devices \(cuda:0, cuda:1\)"),
        (["cuda:0", "cpu"], r"several devices \(cpu, cuda:0\)"),
    ):
        tensors = [type("Placed", (), {"device": torch.device(one)}) for one in devices]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "buffers", lambda tensors=tensors: tensors)
            if "cpu" not in devices:
                patch.setattr(model, "parameters", lambda: [])
            with pytest.raises(UnsupportedModelError, match=message):
                refuse_live(model)
    refuse_live(model)


@pytest.mark.parametrize("make", [torch.compile, nn.DataParallel, lambda model: model.state_dict(), lambda model: 7])
def test_what_is_no_model(make: Callable[[Any], Any], tmp_path: Path, texts: Path) -> None:
    """`convert` used to take such a thing for no model at all, and converted the embedded one."""
    thing = make(build("llama"))
    for call in ("convert", "from_model"):
        with pytest.raises(UsageError, match="is no transformers model"):
            CALLS[call](thing, tmp_path, texts)
    assert list(tmp_path.iterdir()) == []
