"""A GGUF base is what an engine reads: the dequantised model, bit for bit, unpacked once."""

import shlex

import torch
from commands import done
from gguf_models import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.cpu.subjects import write_artifact
from retrofit.adapters.attach import attach
from retrofit.adapters.layout import DraftLayout
from retrofit.hub import load_base

ADAPTER = {"rank": 2, "alpha": 2.0, "targets": ["q", "v"], "markov_rank": 2, "confidence": True}


def test_it_is_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.setattr("retrofit.serving.starting.installed", lambda: "0.32.0")
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "model.gguf", "llama", "Q8_0")
    base = load_base(str(tmp_path / "model.gguf"), dtype="float32")
    attached = attach(base.model, DraftLayout(block=4), **ADAPTER)
    made = write_artifact(tmp_path / "made", base.name, base.fingerprint, base.model, attached, ADAPTER)
    attached.detach()
    told = shlex.split(done("serve", made, "--engine", "vllm", "--base", tmp_path / "model.gguf", "--print"))
    place = told[told.index("serve") + 1]
    assert [path.name for path in (tmp_path / "cache" / "unpacked").iterdir()] == [place.rpartition("/")[2]]
    theirs = AutoModelForCausalLM.from_pretrained(place)
    assert theirs.dtype == torch.float32 and not hasattr(theirs.config, "quantization_config")
    own = base.model.state_dict()
    assert theirs.state_dict().keys() == own.keys()
    assert all(torch.equal(tensor, own[name]) for name, tensor in theirs.state_dict().items())
    text = "the tale of a hat"
    assert AutoTokenizer.from_pretrained(place)(text)["input_ids"] == base.tokenizer(text)["input_ids"]
    assert theirs.generation_config.eos_token_id == base.model.generation_config.eos_token_id
    monkeypatch.setattr("retrofit.serving.unpacking.load_base", None)  # it is there
    again = done("serve", made, "--engine", "vllm", "--base", tmp_path / "model.gguf", "--print")
    assert shlex.split(again)[: len(told)] == told
