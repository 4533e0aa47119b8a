"""Checkpoints that come quantised, and bases that are loaded so: run, or refused by name."""

import json
from pathlib import Path

import pytest
import torch
from commands import PROMPT, SHORT, done, refused, run
from safetensors.torch import load_file, save_file
from saved import save_artifact, save_base, save_tokenizer, texts
from transformers import LlamaConfig, LlamaForCausalLM

from retrofit.artifact import folder as artifacts
from retrofit.errors import ArtifactError, ResourceError, UnsupportedModelError, UsageError
from retrofit.eval.weights import compare_base
from retrofit.hub import load_base
from retrofit.quantised import methods
from retrofit.quantised.linear import quantised_layers, weight_bytes
from retrofit.quantised.methods import KINDS
from retrofit.runtime.engine import Engine
from retrofit.weight_files import file_fingerprint

SIDE = 128
PROJECTION = "model.layers.0.mlp.up_proj"


def wide(folder: Path) -> Path:
    """Wide enough for every method's groups."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, max_position_embeddings=128, bos_token_id=None,
                         eos_token_id=None, pad_token_id=None, **sizes)  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def declare(folder: Path, **settings: object) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def in_int8(folder: Path, suffix: str, most: float = 127.0) -> dict[str, torch.Tensor]:
    """Its projections as int8 numbers with what a row is divided by beside them; written in place."""
    state = load_file(folder / "model.safetensors")
    plain = dict(state)
    for name in [name for name in state if name.endswith("proj.weight")]:
        largest = state[name].float().abs().amax(1)
        state[name] = (state[name].float() / largest[:, None] * 127).round().to(torch.int8)
        state[name.removesuffix("weight") + suffix] = largest if most == 1 else (largest / most).bfloat16()[:, None]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return plain


def fp8(folder: Path) -> Path:
    """A tiny model in fp8, each block of its projections with a scale of its own."""
    sizes = {"hidden_size": 2 * SIDE, "intermediate_size": 2 * SIDE, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes)).bfloat16().save_pretrained(folder)
    save_tokenizer(folder)
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if name.endswith("proj.weight")]:
        blocks = state[name].float().view(2, SIDE, 2, SIDE)
        scale = blocks.abs().amax((1, 3)) / 448
        state[name] = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).view(2 * SIDE, 2 * SIDE)
        state[f"{name}_scale_inv"] = scale
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return declare(folder, quant_method="fp8", weight_block_size=[SIDE, SIDE], fmt="e4m3")


def test_blocks_of_fp8_are_unpacked(tmp_path: Path) -> None:
    folder = fp8(tmp_path / "fp8")
    base = load_base(str(folder), dtype="bfloat16", offline=True)
    packed = load_file(folder / "model.safetensors")
    name = f"{PROJECTION}.weight"
    scale = packed[f"{name}_scale_inv"].repeat_interleave(SIDE, 0).repeat_interleave(SIDE, 1)
    assert torch.equal(base.model.state_dict()[name], (packed[name].float() * scale).bfloat16())
    assert base.precision == "stored: fp8, unpacked"
    found = compare_base(base.model, folder, base.precision)
    assert found["compared"] == found["tensors"] and not found["changed"]
    with torch.no_grad():
        base.model.model.layers[0].mlp.up_proj.weight[3, 5] += 1
    assert compare_base(base.model, folder, base.precision)["changed"] == 1


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "bitnet"])
def test_other_methods_are_refused_by_name(method: str, tmp_path: Path) -> None:
    base = declare(save_base(tmp_path / "base"), quant_method=method, bits=4)
    for dry in ([], ["--dry-run"]):
        message = refused(run("convert", base, "-o", tmp_path / "out", "--offline", *dry), 1)
        assert f"({method})" in message and "base.quantization=nf4" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "compressed-tensors"])
def test_what_reads_a_checkpoint_is_named_where_it_is_missing(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = declare(save_base(tmp_path / "base"), quant_method=method)
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    message = refused(run("convert", base, "--offline"), 4)
    assert f"needs the package {method}" in message and f"pip install 'retrofit-lm[{method}]'" in message


@pytest.mark.parametrize("kind", KINDS)
def test_what_quantises_is_named_where_it_is_missing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=f"quantization={kind} needs the package {KINDS[kind]}"):
        load_base("tiny", quantization=kind, offline=True)


def test_a_checkpoint_that_comes_quantised_is_not_quantised_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "find_spec", lambda name: name)  # it is refused before the package is needed
    with pytest.raises(UsageError, match=r"is quantised already \(fp8\)") as caught:
        load_base(str(fp8(tmp_path / "fp8")), quantization="nf4", offline=True)
    assert "base.quantization of a recipe, --quantization of a command" in str(caught.value.hint)


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    artifact = save_artifact(tmp_path / "artifact", save_base(tmp_path / "base"))
    with pytest.raises(UsageError, match="fused backend holds plain weights"):
        Engine.load(artifact, "cpu", backend="fused", quantization="nf4", offline=True)
    with pytest.raises(UsageError, match="'nf5' does not exist"):
        Engine.load(artifact, "cpu", quantization="nf5", offline=True)


def test_groups_that_do_not_divide_a_layer_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    with pytest.raises(UnsupportedModelError, match="48 inputs, which int4wo cannot divide"):
        load_base(str(save_base(tmp_path / "base")), quantization="int4wo", offline=True)  # 48 wide inside


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_is_loaded_so(kind: str, tmp_path: Path) -> None:
    """Converted, decoded, compared with its checkpoint; what it holds does not depend on the type it runs in."""
    pytest.importorskip(KINDS[kind])
    base, out = wide(tmp_path / "base"), tmp_path / "out"
    text = f"data.source={texts(tmp_path / 'text')}"
    done("convert", base, "-o", out, "--offline", *SHORT, text, f"base.quantization={kind}")
    assert artifacts.read(out).config["base"]["quantization"] == kind
    answers = [done("generate", out, PROMPT, "--max-new-tokens", "12", *more) for more in ([], ["--mode", "ar"])]
    assert answers[0] == answers[1]
    half, whole = (load_base(str(base), dtype=t, quantization=kind, offline=True) for t in ("bfloat16", "float32"))
    for name, layer in quantised_layers(half.model).items():
        other = quantised_layers(whole.model)[name].held.parts()
        assert all(torch.equal(part, other[key]) for key, part in layer.held.parts().items())
    assert weight_bytes(half.model) < weight_bytes(load_base(str(base), dtype="bfloat16", offline=True).model)
    found = compare_base(half.model, base, half.precision)
    assert found["compared"] == found["tensors"] and not found["changed"]
    first = next(iter(quantised_layers(half.model).values())).held.parts()
    next(part for name, part in first.items() if part.numel() > 64 and name.startswith("weight")).view(-1)[:1] += 1
    assert compare_base(half.model, base, half.precision)["changed"] == 1


def test_an_adapter_runs_on_another_precision_of_its_base(tmp_path: Path) -> None:
    """Which is said; another model is refused as ever."""
    pytest.importorskip("bitsandbytes")
    base = save_base(tmp_path / "base")
    artifact = save_artifact(tmp_path / "artifact", base)
    told = run("generate", artifact, PROMPT, "--max-new-tokens", "8", "--quantization", "int8", "--dtype", "float32")
    assert told.exit_code == 0 and "trained on plain weights, running on int8" in told.stderr
    assert "running on" not in run("generate", artifact, PROMPT, "--max-new-tokens", "8").stderr
    stored = save_base(tmp_path / "stored")
    in_int8(stored, "SCB", most=1)
    declare(stored, quant_method="bitsandbytes", load_in_8bit=True, load_in_4bit=False)
    with Engine.load(artifact, "cpu", base=str(stored), offline=True) as engine:
        assert engine.base is not None and engine.base.precision == "stored: bitsandbytes int8"
        assert len(quantised_layers(engine.attached.model)) == 14
        found = compare_base(engine.attached.model, stored, engine.base.precision)
        assert found["compared"] == found["tensors"] and not found["changed"]
    exported = run("export", artifact, "--format", "peft", "-o", tmp_path / "peft", "--base", stored)
    assert "trained on plain weights, running on stored: bitsandbytes int8" in exported.stderr, exported.stderr
    other = save_base(tmp_path / "other", seed=1)
    in_int8(other, "SCB", most=1)
    declare(other, quant_method="bitsandbytes", load_in_8bit=True, load_in_4bit=False)
    with pytest.raises(ArtifactError, match=r"differs from .* in its norms"):
        Engine.load(artifact, "cpu", base=str(other), offline=True)


def test_scales_do_not_count_among_the_norms(tmp_path: Path) -> None:
    plain, stored = save_base(tmp_path / "plain"), save_base(tmp_path / "stored")
    in_int8(stored, "SCB", most=1)
    one, other = (file_fingerprint(folder, {}) for folder in (plain, stored))
    assert one["norms"] == other["norms"] and one["headers"] != other["headers"]


def test_compressed_tensors_are_unpacked(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    folder = wide(tmp_path / "base")
    in_int8(folder, "weight_scale")
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    declare(folder, quant_method="compressed-tensors", format="int-quantized", quantization_status="compressed",
            ignore=["lm_head"], config_groups={"group_0": {"targets": ["Linear"], "weights": weights}})  # fmt: skip
    base = load_base(str(folder), dtype="float32", offline=True)
    held = load_file(folder / "model.safetensors")
    want = (held[f"{PROJECTION}.weight"].bfloat16() * held[f"{PROJECTION}.weight_scale"]).float()
    assert torch.equal(base.model.state_dict()[f"{PROJECTION}.weight"], want)
    assert base.precision == "stored: compressed-tensors, unpacked"
