"""A GGUF file as a base: the model that transformers makes of it, whole or refused by name."""

import shutil
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import CONFIGS, EOS, add_tensor, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from retrofit import gguf_files
from retrofit.errors import ResourceError, UnsupportedModelError, UsageError
from retrofit.eval.weights import compare_base
from retrofit.gguf_files import read_header, stored_kind
from retrofit.hub import Base, load_base, load_tokenizer
from retrofit.runtime import loading

TEXT = "the theory (of a thing): a=b+c.\n"
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_1")


def load(place: Path, **options: Any) -> Base:
    return load_base(str(place), **{"dtype": "float32", "offline": True, **options})


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(40)[None] % 60
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_is_the_model_that_transformers_loads(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    original = write_gguf(path, name, kind)
    base = load(path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ours, others = base.model.state_dict(), theirs.state_dict()
    assert ours.keys() == others.keys() and all(torch.equal(ours[key], others[key]) for key in ours)
    assert torch.equal(logits(base.model), logits(theirs))
    if kind == "F32":  # nothing was rounded, so that this is the model the file was written from
        assert torch.equal(logits(base.model), logits(original))
    assert stored_kind(read_header(path)) == kind
    assert base.tokenizer is not None
    assert (
        base.tokenizer(TEXT)["input_ids"]
        == AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")(TEXT)["input_ids"]
    )
    assert base.tokenizer.decode(base.tokenizer(TEXT)["input_ids"]) == TEXT
    assert base.model.config.eos_token_id == EOS


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_its_tensors_are_those_of_a_fresh_dequantisation(dtype: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama", "Q8_0")
    base = load(tmp_path / "model.gguf", dtype=dtype)
    assert base.place is not None
    found = compare_base(base.model, base.place)
    assert found["compared"] == found["tensors"] == len(read_header(base.place).tensors) and found["dtype"] == dtype
    assert [found[kind] for kind in ("changed", "not_loaded", "not_in_checkpoint")] == [0, 0, 0]
    with torch.no_grad():
        base.model.model.layers[1].mlp.up_proj.weight[3, 4] += 1
    assert compare_base(base.model, base.place)["changed_names"] == ["model.layers.1.mlp.up_proj.weight"]


def test_a_dequantised_model_is_a_plain_one(tmp_path: Path) -> None:
    """It saves as a folder, which loads as the same model."""
    write_gguf(tmp_path / "model.gguf", "llama", "Q4_1")
    base = load(tmp_path / "model.gguf")
    assert getattr(base.model.config, "quantization_config", None) is None and not base.model.is_quantized
    base.model.save_pretrained(tmp_path / "plain")
    assert base.tokenizer is not None
    base.tokenizer.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(load(tmp_path / "plain").model), logits(base.model))


def test_a_file_of_the_same_name_in_the_working_folder_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    originals = {there: write_gguf(there / "model.gguf", "llama"), here: write_gguf(here / "model.gguf", "qwen2")}
    monkeypatch.chdir(here)
    for path, folder in ((there, there), (Path(), here), (Path("../there"), there)):
        assert torch.equal(logits(load(path / "model.gguf").model), logits(originals[folder]))


def test_fingerprints_tell_files_apart(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", "llama", "Q8_0")
    write_gguf(tmp_path / "b.gguf", "llama", "Q4_1")
    shutil.copy(tmp_path / "a.gguf", tmp_path / "copy.gguf")
    a, b, copied = (load(tmp_path / f"{name}.gguf", with_model=False).fingerprint for name in ("a", "b", "copy"))
    assert a == copied and a["config"] == b["config"] and a["norms"] == b["norms"] and a["headers"] != b["headers"]


def test_the_header_is_read_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "gemma3", "Q8_0")
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert header.metadata["general.architecture"] == "gemma3"
    content = path.read_bytes()
    for ours, theirs in zip(header.tensors, reader.tensors, strict=True):
        assert (ours.name, ours.kind) == (theirs.name, theirs.tensor_type.name)
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        assert content[ours.data] == theirs.data.tobytes()


def test_a_tokenizer_alone(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama")
    tokenizer, vocab = load_tokenizer(str(tmp_path / "model.gguf"), offline=True)
    assert vocab == 64 and tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT


# Refusals


@pytest.mark.parametrize("keep", [0, 3, 40, 900, -1])
def test_a_file_cut_short_is_named(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UnsupportedModelError, match=f"{path}: no intact GGUF file") as caught:
        load(path)
    assert "again" in str(caught.value.hint)


KEY = b"general.alignment"
NUMBERED = struct.pack("<Q", len(KEY)) + KEY
DAMAGED = {
    "alignment of 0": NUMBERED + struct.pack("<II", 4, 0),
    "alignment in words": NUMBERED + struct.pack("<IQ", 8, 1) + b"x",
    "lists of lists": NUMBERED + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000,
}


@pytest.mark.parametrize("value", DAMAGED.values(), ids=DAMAGED)
def test_a_header_of_nonsense_is_named(value: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + value)
    with pytest.raises(UnsupportedModelError, match="no intact GGUF file"):
        read_header(tmp_path / "model.gguf")


def test_an_architecture_that_transformers_does_not_know(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama", arch="plamo")
    with pytest.raises(UnsupportedModelError, match="architecture plamo is not supported yet") as caught:
        load(tmp_path / "model.gguf")
    assert "safetensors" in str(caught.value.hint)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "model.gguf", "llama")
    monkeypatch.setattr(gguf_files, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="the package gguf is not installed") as caught:
        load(tmp_path / "model.gguf")
    assert "pip install gguf" in str(caught.value.hint)


def extended(path: Path, tensor: str, values: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """A llama file that holds one more tensor."""
    write = gguf.GGUFWriter.write_header_to_file

    def with_one_more(writer: gguf.GGUFWriter) -> None:
        add_tensor(writer, tensor, values)
        write(writer)

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_one_more)
        write_gguf(path, "llama")


@pytest.mark.parametrize(
    ("tensor", "values", "refused"),
    [
        ("rope_freqs.weight", np.ones(4, np.float32), False),
        ("rope_freqs.weight", np.array([1, 1, 2, 8], np.float32), True),
        ("blk.0.extra.weight", np.ones(4, np.float32), True),
    ],
)
def test_tensors_that_transformers_would_leave_out(
    tensor: str, values: np.ndarray, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    extended(path, tensor, values, monkeypatch)
    if not refused:
        load(path)
        return
    with pytest.raises(UnsupportedModelError, match=f"no place in LlamaForCausalLM for 1 .*{tensor}"):
        load(path)


def test_a_scaled_rotation_that_transformers_would_leave_out(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama", llama__rope__scaling__type="linear")
    with pytest.raises(UnsupportedModelError, match="scales its rotation"):
        load(tmp_path / "model.gguf")


def test_the_fused_backend_refuses_a_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama")
    assert not loading.fits_fused(str(tmp_path / "model.gguf"), None, "cpu", "bfloat16", True)
    with pytest.raises(UnsupportedModelError, match="reads safetensors"):
        loading.fused_backend(load(tmp_path / "model.gguf", with_model=False), None, "cpu")


# Folders


def test_a_folder_of_one_file_is_that_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama")
    assert load(tmp_path).place == tmp_path / "model.gguf"


def test_a_folder_of_two_files_says_nothing(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", "llama")
    write_gguf(tmp_path / "b.gguf", "qwen2")
    with pytest.raises(UsageError, match=r"holds 2 GGUF files \(a.gguf, b.gguf\)") as caught:
        load(tmp_path)
    assert "--gguf a.gguf" in str(caught.value.hint)
    assert load(tmp_path / "b.gguf").model.config.model_type == "qwen2"


def test_safetensors_are_a_folder_s_model(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "model.gguf", "llama", "Q4_1")
    model.save_pretrained(tmp_path)
    base = load(tmp_path, need_tokenizer=False)
    assert base.place == tmp_path and torch.equal(logits(base.model), logits(model))
