"""What cannot be done is refused by name, before anything is changed or run."""

from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, CONTEXT, REFUSED, build
from torch import nn

from retrofit.adapters.attach import attach
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.roles import resolve_targets
from retrofit.errors import ArtifactError, UnsupportedModelError, UsageError
from retrofit.runtime.backends.hf import backend as hf
from retrofit.runtime.engine import Engine

REASONS = {
    "rwkv": "RwkvForCausalLM .*recurrent",
    "bloom": "BloomForCausalLM does not call transformers' attention interface",
    "falcon": "FalconForCausalLM does not call transformers' attention interface",
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_are_refused_by_name_and_left_alone(name: str) -> None:
    model = REFUSED[name]()
    modules = {n: type(m) for n, m in model.named_modules()}
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(UnsupportedModelError, match=REASONS[name]):
        Engine.from_model(model)
    assert {n: type(m) for n, m in model.named_modules()} == modules
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trainable


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_is_found_without_a_forward(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=REASONS[name]):
        hf.refuse_unsupported(REFUSED[name]())


@pytest.mark.parametrize("name", REFUSED)
def test_the_first_forward_is_a_second_net(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a model not on the list, no wrong logits would come out of it."""
    monkeypatch.setattr(hf, "refuse_unsupported", lambda model: None)
    model = REFUSED[name]()
    if not hasattr(model.config, "max_position_embeddings"):
        model.config.max_position_embeddings = CONTEXT
    # Recurrent layers give the right logits of plain text; what they cannot do is a row plan, so they do not count.
    with pytest.raises((UnsupportedModelError, TypeError)):
        hf.HFBackend(model, hf.Gate())


def test_logits_that_are_not_the_models_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Something after the last norm that the runtime does not know."""
    model = build("llama")
    head = model.lm_head
    right = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = right(*args, **kwargs)
        out.logits = out.logits * 1.1
        return out

    monkeypatch.setattr(model, "forward", scaled)
    with pytest.raises(UnsupportedModelError, match="logits through row plans differ"):
        Engine.from_model(model)
    assert model.lm_head is head
    assert not any("lora" in n for n, _ in model.named_parameters())


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_model(build("llama"), layout=DraftLayout(block=4))


def no_prompts_run(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any) -> None:
        raise AssertionError("a forward ran before the options were checked")

    monkeypatch.setattr(engine.backend, "forward", forbidden)


BAD_PROMPTS: list[tuple[Any, str]] = [
    ([[1] * CONTEXT], f"prompt 0 has {CONTEXT} tokens; the model's context is {CONTEXT}"),
    ([[1], [1] * (CONTEXT + 9)], f"prompt 1 has {CONTEXT + 9} tokens"),
    ([[1, 64]], "prompt 0 holds token id 64; the vocabulary has 64"),
    ([[-1]], "token id -1"),
    ([[]], "prompt 0 is empty"),
    ([""], "prompt 0 is empty"),
    ("text", "list of prompts"),
    (["text"], "tokenizer"),
    ([[{"role": "user", "content": "hi"}]], "tokenizer"),
]


@pytest.mark.parametrize(("prompts", "message"), BAD_PROMPTS)
def test_prompts(prompts: Any, message: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    no_prompts_run(engine, monkeypatch)
    with pytest.raises(UsageError, match=message) as caught:
        engine.generate(prompts)
    assert caught.value.exit_code == 2


def test_the_longest_prompt_leaves_room_for_one_token(engine: Engine) -> None:
    (result,) = engine.generate([[1] * (CONTEXT - 1)], "self_spec", strategy="fused", max_new_tokens=50)
    assert (len(result.tokens), result.finish_reason) == (1, "length")


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"mode": "beam"}, "mode 'beam' does not exist"),
    ({"strategy": "magic"}, "strategy 'magic' does not exist"),
    ({"prepare": "most"}, "prepare is 'most'"),
    ({"prepare": 0}, "prepare is 0"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"threshold": 1.5}, "threshold is 1.5"),
    ({"temperature": -1.0}, "temperature is -1.0"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"top_k": 0}, "top_k is 0"),
    ({"top_p": 0.0}, "top_p is 0.0"),
    ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ({"stop": "x"}, "stop strings need a tokenizer"),
    ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_options(options: dict[str, Any], message: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """`stream` too refuses at the call, not at the first event."""
    no_prompts_run(engine, monkeypatch)
    for call in (engine.generate, engine.stream):
        with pytest.raises(UsageError, match=message) as caught:
            call([[1, 2]], **options)
        assert caught.value.exit_code == 2


def test_fused_needs_an_anchored_layout() -> None:
    engine = Engine.from_model(build("llama"), layout=DraftLayout(block=4, seed_row="draft"))
    with pytest.raises(UsageError, match="fused needs an artifact with draft"):
        engine.generate([[1]], "self_spec", strategy="fused")


def test_load_refuses_what_is_no_artifact(tmp_path: Any) -> None:
    with pytest.raises(ArtifactError):
        Engine.load(tmp_path)
    for options in ({"backend": "fpga"}, {"exact": "very"}):
        with pytest.raises(UsageError, match=next(iter(options.values()))):
            Engine.load(tmp_path, **options)


# Roles


def test_unknown_and_unmatched_roles() -> None:
    with pytest.raises(UsageError, match="unknown role 'w'") as caught:
        resolve_targets(build("llama"), ["q", "w"])
    assert "q, k, v, o, gate, up, down" in str(caught.value.hint)

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = nn.Linear(2, 2)

    with pytest.raises(UsageError, match="role 'q' matches no module of Other") as caught:
        resolve_targets(Other(), ["q"])
    assert "mixer" in str(caught.value.hint)
    with pytest.raises(UsageError, match="leaves nothing to adapt"):
        resolve_targets(build("qwen3_moe"), ["gate", "up", "down"])


DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "qwen3_moe": DENSE[:4],
    "deepseek_v2": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"],
    "deepseek_v3_no_q_lora": ["q_proj", "kv_a_proj_with_mqa", "o_proj"],
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_roles_resolve_to_the_models_own_projections(name: str) -> None:
    model = build(name)
    family = {"phi3_window": "phi3", "phi3_longrope": "phi3", "deepseek_v2_lite": "deepseek_v3_no_q_lora"}
    family |= {"deepseek_v3": "deepseek_v2", "gpt_oss": "qwen3_moe", "llama4": "qwen3_moe"}
    want = TARGETS.get(family.get(name, name), DENSE)
    assert resolve_targets(model, ["q", "k", "v", "o", "gate", "up", "down"]) == want
    roles = ["q", "k", "v", "o", "gate", "up", "down"]
    attached = attach(model, DraftLayout(), rank=2, alpha=2, targets=roles, markov_rank=2, confidence=True)
    adapted = {n.split(".lora_A")[0] for n, _ in attached.peft_model.named_parameters() if ".lora_A" in n}
    wrapped = {n.rsplit(".", 1)[-1] for n in adapted}
    assert wrapped == set(want)
    assert not any("experts" in n.split(".") or n.endswith(("kv_b_proj", "lm_head")) for n in adapted)
    per_layer = {n.split("layers.")[1].split(".")[0] for n in adapted}
    assert len(per_layer) == model.config.num_hidden_layers
    assert torch.equal(attached.heads.mask_vector, model.get_input_embeddings().weight.detach().mean(0))
