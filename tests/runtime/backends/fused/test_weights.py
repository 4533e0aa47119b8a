"""Reading weights: every product computes what the original's modules compute; what does not fit is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import random_prompts, randomise, tokens_of
from fused_models import DEVICE, LAYOUT, VOCABULARY, small
from tiny_models import CONFIGS
from torch import Tensor

from retrofit.adapters.attach import attach
from retrofit.adapters.roles import ROLES
from retrofit.artifact import folder as artifacts
from retrofit.errors import ArtifactError, ResourceError, UnsupportedModelError, UsageError
from retrofit.hub import load_base
from retrofit.runtime import loading
from retrofit.runtime.backends.fused import backend as fused_gqa
from retrofit.runtime.backends.fused import weights
from retrofit.runtime.backends.fused.weights import Weights, from_folder, load, unsupported
from retrofit.runtime.engine import Engine

SCALE = 0.5
GROUPS = {
    "qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "o": ("self_attn", ("o_proj",)),
    "gate_up": ("mlp", ("gate_proj", "up_proj")),
    "down": ("mlp", ("down_proj",)),
}


def read(model: Any, adapter: dict[str, Tensor] | None = None, drop: str | None = None) -> Weights:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != drop}
    return load(model.config, lambda name: state[name], adapter or {}, SCALE, torch.device(DEVICE), torch.float32)


def adapter_of(name: str, targets: tuple[str, ...] = ROLES) -> dict[str, Tensor]:
    model = small(name)
    attached = attach(model, LAYOUT, rank=3, alpha=1.5, targets=targets, markov_rank=2, confidence=False)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return attached.adapter_state()


def module(model: Any, layer: int, block: str, name: str) -> Any:
    return getattr(getattr(model.model.layers[layer], block), name)


@pytest.mark.parametrize("name", ["llama", "llama_mqa", "llama_tied", "mistral_window", "qwen2", "qwen3"])
def test_products_are_those_of_the_modules(name: str) -> None:
    model = small(name)
    made = read(model)
    assert len(made.layers) == 2 and len(made.linears()) == 9
    with torch.inference_mode():
        for i, layer in enumerate(made.layers):
            original = model.model.layers[i]
            assert torch.equal(layer.input_norm.cpu(), original.input_layernorm.weight)
            assert torch.equal(layer.post_norm.cpu(), original.post_attention_layernorm.weight)
            for norm in ("q_norm", "k_norm"):
                have, want = getattr(layer, norm), getattr(original.self_attn, norm, None)
                assert (have is None) == (want is None)
                assert have is None or torch.equal(have.cpu(), want.weight)
            for group, (block, names) in GROUPS.items():
                linear = getattr(layer, group)
                x = torch.randn(3, linear.weight.shape[1])
                want = torch.cat([module(model, i, block, n)(x) for n in names], dim=-1)
                torch.testing.assert_close(linear(x.to(DEVICE)).cpu(), want)
                assert linear.up is None and linear.width == want.shape[1]
        x = torch.randn(3, model.config.hidden_size)
        torch.testing.assert_close(made.head(x.to(DEVICE)).cpu(), model.lm_head(x))
        assert torch.equal(made.norm.cpu(), model.model.norm.weight)
    assert (made.head.weight is made.embedding) == bool(model.config.tie_word_embeddings)


def test_our_own_product_computes_the_same() -> None:
    model = small("qwen2")
    made = read(model)
    for linear in made.linears():
        x = torch.randn(3, linear.weight.shape[1], device=DEVICE)
        library = linear(x)
        linear.own_kernel = True
        torch.testing.assert_close(linear(x), library)


@pytest.mark.parametrize("targets", [ROLES, ("q", "v", "down"), ("up",), ()])
def test_lora_stands_beneath_its_product(targets: tuple[str, ...]) -> None:
    """Its first factors are rows of the weight, its second ones are scaled; a role without LoRA adds exactly 0."""
    model = small("qwen2")
    adapter = adapter_of("qwen2", targets) if targets else {}
    made = read(model, adapter)
    roles = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}
    for i, layer in enumerate(made.layers):
        for group, (block, names) in GROUPS.items():
            linear = getattr(layer, group)
            adapted = [n for n in names if roles.get(n, n.removesuffix("_proj")) in targets]
            assert (linear.up is not None) == bool(adapted)
            if linear.up is None:
                assert len(linear.weight) == linear.width
                continue
            x = torch.randn(3, linear.weight.shape[1], device=DEVICE)
            (parts,), bias = linear.parts(x)
            assert bias is None
            rank, start = linear.up.shape[0], 0
            for n, name in enumerate(names):
                width = module(model, i, block, name).weight.shape[0]
                hidden = parts[:, linear.width + n * rank : linear.width + (n + 1) * rank]
                got = (hidden @ linear.up[:, start : start + width]).cpu()
                start += width
                if name not in adapted:
                    assert not got.any()
                    continue
                key = f"base_model.model.model.layers.{i}.{block}.{name}.lora_{{}}.weight"
                down, up = adapter[key.format("A")], adapter[key.format("B")]
                torch.testing.assert_close(got, SCALE * (x.cpu() @ down.T @ up.T), rtol=1e-4, atol=1e-4)
            assert start == linear.width


def test_windows_of_layers() -> None:
    assert [layer.window for layer in read(small("mistral_window")).layers] == [8, 8]
    assert [layer.window for layer in read(small("qwen3_window")).layers] == [None, 8]
    assert [layer.window for layer in read(small("qwen2")).layers] == [None, None]


# What is refused


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("phi3", "model type 'phi3'"),
        ("gemma2", "model type 'gemma2'"),
        ("qwen3_moe", "model type 'qwen3_moe'"),
        ("deepseek_v2", "model type 'deepseek_v2'"),
    ],
)
def test_other_families(name: str, reason: str) -> None:
    assert reason in str(unsupported(CONFIGS[name]()))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "RoPE type 'longrope'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "only a part of each head"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer types"),
        ({"head_dim": 7}, "head width 7 is odd"),
        ({}, "None"),
    ],
)
def test_what_the_decoder_cannot_run(changes: dict[str, Any], reason: str) -> None:
    config = CONFIGS["llama"]()
    for key, value in changes.items():
        setattr(config, key, value)
    assert reason in str(unsupported(config))


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"]
)
def test_a_missing_tensor_is_named(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=name):
        read(small("llama"), drop=name)


def test_a_tensor_of_another_shape_is_named() -> None:
    model = small("llama")
    state = dict(model.state_dict())
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(5, 16)
    with pytest.raises(
        UnsupportedModelError, match=r"model\.layers\.0\.mlp\.up_proj\.weight is missing or not \[24, 16\]"
    ):
        load(model.config, lambda name: state[name], {}, 1.0, torch.device(DEVICE), torch.float32)


def test_an_adapter_tensor_without_a_place_is_refused() -> None:
    stray = "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"
    with pytest.raises(UsageError, match=r"layers\.7\.mlp\.up_proj\.lora_A\.weight, which the fused backend has no"):
        read(small("llama"), {**adapter_of("llama"), stray: torch.zeros(3, 16)})


# From files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base folder, artifact folder) of a small Qwen2 with tied embeddings, in several files."""
    folder = tmp_path_factory.mktemp("fused")
    base, artifact = folder / "base", folder / "artifact"
    small("qwen2", tie_word_embeddings=True).save_pretrained(base, max_shard_size="4KB")
    assert len(list(base.glob("*.safetensors"))) > 1
    loaded = load_base(str(base), dtype="float32", need_tokenizer=False)
    engine = randomise(Engine.from_model(loaded.model, layout=LAYOUT))
    attached = engine.attached
    artifacts.write(
        artifact,
        adapter_config=attached.adapter_config(),
        adapter_state=attached.adapter_state(),
        heads=attached.heads_state(),
        config={
            "format": 1,
            "retrofit": "0",
            "base": {
                "model": str(base),
                "revision": None,
                "fingerprint": loaded.fingerprint,
                "architecture": "Qwen2ForCausalLM",
                "dtype": "float32",
            },
            "profile": "frozen",
            "draft": LAYOUT.to_dict(),
            "adapter": {
                "rank": 8,
                "alpha": 8.0,
                "targets": list(ROLES),
                "modules": [],
                "markov_rank": attached.heads.markov_w1.shape[1],
                "confidence": True,
            },
            "parameters": {"adapter": 1, "heads": 1, "base": 1},
            "acceptance": {},
            "training": {},
        },
        recipe_yaml="data:\n  source: elsewhere\n",
        card="card",
    )
    return base, artifact


def test_a_folder_is_read_by_name(made: tuple[Path, Path]) -> None:
    read_tensor = from_folder(made[0], DEVICE)
    for name, tensor in small("qwen2", tie_word_embeddings=True).state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(read_tensor(name).cpu(), tensor)
    with pytest.raises(KeyError):
        read_tensor("model.nothing.weight")


def test_an_artifact_decodes_as_on_the_hf_backend(made: tuple[Path, Path]) -> None:
    engine = Engine.load(made[1], device=DEVICE, backend="fused", rows=16)
    hf = Engine.load(made[1])
    assert (engine.backend.name, engine.backend.exact, engine.backend.dtype) == ("fused", "bucket", torch.float32)
    assert (hf.backend.name, engine.layout) == ("hf", LAYOUT)
    (prompt,) = random_prompts((4,), vocab=VOCABULARY)
    options = {"max_new_tokens": 4, "strategy": "two_forward", "batch_size": 1}
    assert tokens_of(engine, [prompt], "self_spec", **options) == tokens_of(hf, [prompt], "self_spec", **options)


def test_which_backend_runs(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is hf without a GPU; asked for by name, the fused one says what is missing."""
    assert Engine.load(made[1], device="cpu", backend="auto").backend.name == "hf"
    assert Engine.load(made[1], device="cpu", backend="hf", exact="off").backend.exact == "off"
    with pytest.raises(UsageError, match="'triton' does not exist"):
        Engine.load(made[1], backend="triton")
    with pytest.raises(UsageError, match="'very' does not exist"):
        Engine.load(made[1], backend="fused", exact="very")
    monkeypatch.setattr(fused_gqa, "interpreted", lambda: False)
    with pytest.raises(ResourceError, match="not on cpu with TRITON_INTERPRET") as refused:
        Engine.load(made[1], device="cpu", backend="fused")
    assert "TRITON_INTERPRET=1" in str(refused.value) + str(refused.value.hint)


def test_auto_on_a_gpu_takes_what_it_can_run(made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "check_device", lambda device: None)
    assert loading.fits_fused(str(made[0]), None, "cuda", "bfloat16", True)
    monkeypatch.setattr(weights, "FAMILIES", ("llama",))
    assert not loading.fits_fused(str(made[0]), None, "cuda", "bfloat16", True)


def test_another_base_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    small("qwen2", tie_word_embeddings=True, num_hidden_layers=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ArtifactError, match="belongs to another base"):
        Engine.load(made[1], device=DEVICE, backend="fused", base=str(tmp_path / "other"))
