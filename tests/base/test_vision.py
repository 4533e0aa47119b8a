"""A vision-language model as a base: loaded whole, converted on text alone, asked about images on the command line."""

import json

import pytest
import tiny_vision
import torch
from commands import SHORT, done, refused, run
from saved import save_artifact, save_base
from tiny_models import build
from transformers import AutoConfig, AutoModelForImageTextToText

from retrofit.hub import empty_model, load_base, model_class

TEXT = "the cat sat on the mat, and then it went away. what is it that you see here? a dog, a tree. "


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_vision.build("gemma3").save_pretrained("vl")
    tiny_vision.gemma3_processor().save_pretrained("vl")
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / f"texts/{name}.txt").write_text(TEXT * 10)
    tiny_vision.image(20, 16).save("a.png")
    return "vl"


def test_converted_on_text_and_asked_about_an_image(base):
    done("convert", base, "data.source=texts", *SHORT, "-q")
    asked = ["generate", "vl-retrofit", "--image", "a.png", "what is it?", "--max-new-tokens", 12, "--json"]
    result = json.loads(done(*asked, "--exact", "off"))
    message = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "what is it?"}]
    inputs = tiny_vision.gemma3_processor().apply_chat_template(
        [{"role": "user", "content": message}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    want = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    assert result["tokens"] == want
    assert json.loads(done(*asked, "--mode", "ar"))["tokens"] == want
    assert "no image that can be read" in refused(run(*asked, "--image", "vl/config.json"), 2)
    assert "no file b.png" in refused(run(*asked, "--image", "b.png"), 2)
    assert "belongs to one PROMPT" in refused(run(*asked, "another"), 2)


def test_a_base_of_text_alone_takes_no_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_vision.image(20, 16).save("a.png")
    save_artifact(tmp_path / "text-retrofit", save_base(tmp_path / "text"))
    assert "takes text alone" in refused(run("generate", "text-retrofit", "--image", "a.png", "hello"), 2)


def test_the_class_that_the_files_were_saved_from(tmp_path):
    for name in ("qwen3_vl", "qwen3_5", "llama4", "mistral3"):
        model = tiny_vision.build(name)
        model.save_pretrained(tmp_path / name)
        loaded = load_base(str(tmp_path / name), need_tokenizer=False)
        assert type(loaded.model) is type(model)
        assert type(empty_model(str(tmp_path / name))) is type(model)
    build("llama").save_pretrained(tmp_path / "text")
    assert model_class(AutoConfig.from_pretrained(tmp_path / "text")).__name__ == "AutoModelForCausalLM"
