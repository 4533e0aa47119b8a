"""Roles name the projections of every family, and of the text model only; what is saved is a plain PEFT folder."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import randomise
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from tiny_models import build
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV32Config
from transformers.pytorch_utils import Conv1D

from benchmarks import decoders
from retrofit.adapters.attach import Attached, attach
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.roles import ROLES, resolve_targets
from retrofit.adapters.rows import Block, SequenceRows
from retrofit.artifact import folder as artifacts
from retrofit.errors import ArtifactError, UnsupportedModelError, UsageError
from retrofit.hub import live_fingerprint
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.engine import Engine

SPLIT = ["q_proj", "k_proj", "v_proj"]
FAMILIES = {
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "gpt_bigcode": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
    "gpt_neox": ["query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"],
    "persimmon": ["query_key_value", "self_attn.dense", "dense_h_to_4h", "dense_4h_to_h"],
    "nemotron": [*SPLIT, "o_proj", "up_proj", "down_proj"],
    "apertus": [*SPLIT, "o_proj", "up_proj", "down_proj"],
    "starcoder2": [*SPLIT, "o_proj", "c_fc", "mlp.c_proj"],
    "phi": [*SPLIT, "self_attn.dense", "fc1", "fc2"],
    "opt": [*SPLIT, "out_proj", "fc1", "fc2"],
    "biogpt": [*SPLIT, "out_proj", "fc1", "fc2"],
    "nanochat": [*SPLIT, "o_proj", "fc1", "fc2"],
    "dbrx": ["Wqkv", "out_proj"],
    "bert": ["self.query", "self.key", "self.value", "attention.output.dense", "intermediate.dense", "output.dense"],
    "jetmoe": ["kv_proj"],
    "mixtral": [*SPLIT, "o_proj"],
    "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"],
}
WITH_TOWERS = ["phi4_multimodal", "gemma3", "moss_transcribe_diarize"]
SMALL: dict[str, Any] = {"rank": 2, "alpha": 4.0, "targets": ROLES, "markov_rank": 2, "confidence": True}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_resolve_their_roles_by_themselves(name: str) -> None:
    model = decoders.build(name)
    assert resolve_targets(model, ROLES) == FAMILIES[name]
    per_layer = Counter(n.split(".lora_A")[0].rsplit(".", 1)[-1] for n in adapted(attached_to(model)))
    layers = model.config.num_hidden_layers
    assert all(count % layers == 0 for count in per_layer.values())


def attached_to(model: Any, **changes: Any) -> Attached:
    return attach(model, DraftLayout(block=4), **{**SMALL, **changes})


def adapted(attached: Attached) -> list[str]:
    return [n for n, m in attached.model.named_modules() if hasattr(m, "lora_A")]


def test_all_roles_means_those_there_are_and_a_shorter_list_is_meant() -> None:
    model = decoders.build("opt")
    assert "fc1" in resolve_targets(model, ROLES)
    assert set(resolve_targets(model, ROLES[::-1])) == set(resolve_targets(model, ROLES))
    assert resolve_targets(model, ["o", "up"]) == ["out_proj", "fc1"]
    with pytest.raises(UsageError, match="role 'gate' matches no module of OPTForCausalLM") as caught:
        resolve_targets(model, ["q", "gate"])
    assert "fc1" in str(caught.value.hint) and "lm_head" not in str(caught.value.hint)


# Text only


@pytest.mark.parametrize("name", WITH_TOWERS)
def test_no_lora_goes_into_a_tower(name: str) -> None:
    model = decoders.build(name)
    layers = "model.layers." if name == "phi4_multimodal" else "model.language_model.layers."
    same = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(("q_proj", "down_proj"))]
    assert any(not n.startswith(layers) for n in same)  # a tower has projections of these names
    attached = attached_to(model)
    names = adapted(attached)
    assert names and all(n.startswith(layers) for n in names)
    assert len(names) % model.config.get_text_config().num_hidden_layers == 0

    plain = plain_peft(decoders.build(name), attached)
    assert {n for n, m in plain.get_base_model().named_modules() if hasattr(m, "lora_A")} == set(names)


def plain_peft(model: Any, attached: Attached) -> PeftModel:
    """The model with the adapter by PEFT alone, on every row."""
    saved = attached.adapter_config()
    shape = {k: saved[k] for k in ("r", "lora_alpha", "target_modules", "fan_in_fan_out", "task_type")}
    plain = get_peft_model(model, LoraConfig(**shape))
    report = set_peft_model_state_dict(plain, attached.adapter_state())
    assert not report.unexpected_keys
    assert not [key for key in report.missing_keys if "lora" in key]
    return plain


def test_an_mlp_that_peft_takes_for_routed_experts() -> None:
    """In a family that has them, of which this model has none: refused before it is trained, and left as it was."""
    model = AutoModelForCausalLM.from_config(decoders.shrunk(DeepseekV32Config, {"first_k_dense_replace": 2}))
    before = {n: type(m) for n, m in model.named_modules()}
    adapter = {"rank": 4, "alpha": 4.0, "markov_rank": 0, "confidence": False}
    with pytest.raises(UnsupportedModelError, match="PEFT takes projections of the MLP of DeepseekV32ForCausalLM"):
        attach(model, DraftLayout(), targets=ROLES, **adapter)
    assert {n: type(m) for n, m in model.named_modules()} == before
    attach(model, DraftLayout(), targets=("q", "o"), **adapter)


def test_an_artifact_that_names_its_modules_by_ending_still_loads(tmp_path: Path) -> None:
    """Before roles meant the text model only, the towers' modules of the same names were in it too."""
    endings = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    old = attached_to(decoders.build("gemma3"), modules=endings)
    assert any("vision" in n for n in adapted(old))
    folder = written(tmp_path / "old", old, endings)
    engine = Engine.from_model(decoders.build("gemma3"), adapter=folder)
    assert sorted(adapted(engine.attached)) == sorted(adapted(old))
    new = attached_to(decoders.build("gemma3"))
    folder = written(tmp_path / "new", new, sorted(new.adapter_config()["target_modules"]))
    engine = Engine.from_model(decoders.build("gemma3"), adapter=folder)
    assert sorted(adapted(engine.attached)) == sorted(adapted(new))


def written(folder: Path, attached: Attached, modules: list[str]) -> Path:
    adapter = {**{k: SMALL[k] for k in ("rank", "alpha", "markov_rank", "confidence")}, "targets": list(ROLES)}
    base = {"model": "live", "revision": None, "architecture": type(attached.model).__name__, "dtype": "float32"}
    return artifacts.write(
        folder,
        adapter_config=attached.adapter_config(),
        adapter_state=attached.adapter_state(),
        heads=attached.heads_state(),
        config={
            "format": 1,
            "retrofit": "0",
            "base": {**base, "fingerprint": live_fingerprint(attached.model)},
            "profile": "frozen",
            "draft": attached.layout.to_dict(),
            "adapter": {**adapter, "modules": modules},
            "parameters": {"adapter": 1, "heads": 1, "base": 1},
            "acceptance": {},
            "training": {},
        },
        recipe_yaml="data:\n  source: elsewhere\n",
        card="card",
    )


def test_modules_that_the_model_does_not_have() -> None:
    model = build("llama")
    with pytest.raises(ArtifactError, match="LlamaForCausalLM has none of the modules that carry the adapter: c_attn"):
        attached_to(model, modules=["c_attn"])
    assert not any(hasattr(m, "lora_A") for m in model.modules())


# GPT-2's Conv1D keeps its weight the other way round


def test_draft_rows_of_a_conv1d_are_those_of_plain_peft() -> None:
    """A causal block from position 0 is a plain forward with the adapter on."""
    engine = randomise(Engine.from_model(decoders.build("gpt2"), layout=DraftLayout(block=4, attention="causal")))
    attached, backend = engine.attached, engine.backend
    assert any(isinstance(m.base_layer, Conv1D) for m in attached.model.modules() if hasattr(m, "lora_A"))
    assert attached.adapter_config()["fan_in_fan_out"] is True
    tokens = [5, 9, 33, 2, 17]
    plan = backend.row_plan([SequenceRows(0, 0, [], [Block(0, tokens)])])
    with torch.inference_mode():
        cache = KVCache(1, 8)
        backend.forward(backend.row_plan([SequenceRows(0, 0, [1])]), cache)  # a cache to read from
        drafted = backend.head(backend.run_trunk(plan, cache))
    plain = plain_peft(decoders.build("gpt2"), attached)
    with torch.inference_mode():
        own = plain(input_ids=torch.tensor([tokens])).logits[0]
        merged = plain.merge_and_unload()(input_ids=torch.tensor([tokens])).logits[0]
    assert (drafted - own).abs().max() < 1e-4 * own.abs().max()
    assert (merged - own).abs().max() < 1e-4 * own.abs().max()
    bare = decoders.build("gpt2")(input_ids=torch.tensor([tokens])).logits[0]
    assert (bare - own).abs().max() > 0.1  # the adapter says something


def test_a_conv1d_learns() -> None:
    """Gradients of the adapter over draft rows, the base frozen."""
    engine = Engine.from_model(decoders.build("gpt2"), layout=DraftLayout(block=4))
    backend = engine.backend
    cache = KVCache(1, 8)
    with torch.no_grad():
        backend.forward(backend.row_plan([SequenceRows(0, 0, [5, 9, 33])]), cache)
    plan = backend.row_plan([SequenceRows(0, 3, [], [Block(3, [2, 17])])])
    backend.run_trunk(plan, cache).square().sum().backward()
    up = [p for n, p in engine.attached.peft_model.named_parameters() if "lora_B" in n]
    assert up and all(p.grad is not None and p.grad.abs().sum() > 0 for p in up)
    frozen = [p for n, p in engine.attached.model.named_parameters() if "lora_" not in n]
    assert all(p.grad is None for p in frozen)
