"""`adapter.dtype`: an artifact of half the size is the same adapter, rounded once."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_conversion import run, write_texts
from tiny_models import build

from retrofit.artifact.folder import ADAPTER, HEADS
from retrofit.runtime.engine import Engine


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / ADAPTER) | load_file(folder / HEADS)


def test_lora_and_markov_head_are_those_of_float32_rounded_and_nothing_else_is(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    run(tmp_path / "whole", texts)
    run(tmp_path / "half", texts, adapter__dtype="bfloat16")
    whole, half = tensors(tmp_path / "whole"), tensors(tmp_path / "half")
    assert whole.keys() == half.keys()
    for name, tensor in whole.items():
        assert tensor.dtype == torch.float32
        if "lora_" in name or name.startswith("markov_"):
            assert torch.equal(half[name], tensor.bfloat16()), name
            assert half[name].dtype == torch.bfloat16
        elif name != "confidence_temperature":  # fitted anew to what the rounded drafts have accepted
            assert torch.equal(half[name], tensor), name


def test_an_engine_holds_what_the_file_says(tmp_path: Path) -> None:
    run(tmp_path / "half", write_texts(tmp_path / "texts"), adapter__dtype="bfloat16")
    with Engine.load(tmp_path / "half", "cpu", "float32", base=saved_base(tmp_path)) as engine:
        held = engine.attached.adapter_state() | engine.attached.heads_state()
        for name, tensor in tensors(tmp_path / "half").items():
            assert torch.equal(held[name], tensor.float()), name


def saved_base(tmp_path: Path) -> str:
    folder = tmp_path / "base"
    build("llama").save_pretrained(folder)
    return str(folder)
