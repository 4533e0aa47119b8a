"""`retrofit convert`: its folder runs, its recipe is the one asked for, and bad input is one clear error."""

import json
from pathlib import Path

import click
import pytest
from commands import PROMPT, SHORT, done, refused, run
from saved import save_tokenizer, texts
from tiny_models import CONTEXT, build

from retrofit.cli import convert as convert_command
from retrofit.cli import main as cli


def test_convert_prints_the_folder_and_its_artifact_runs(base, tmp_path):
    source = texts(tmp_path / "texts")
    result = run("convert", base, f"data.source={source}", *SHORT, "--seed", 5)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "base-retrofit\n"
    assert "measured on held-out text: conditional" in result.stderr
    assert "next: retrofit certify base-retrofit" in result.stderr
    assert json.loads(done("recipes", "show", "base-retrofit/recipe.yaml", "--json"))["train"]["seed"] == 5
    options = ["--max-new-tokens", 8]
    spec = done("generate", "base-retrofit", PROMPT, "--strategy", "fused", *options)
    assert spec == done("generate", "base-retrofit", PROMPT, "--mode", "ar", *options)
    before = Path("base-retrofit/retrofit.json").read_bytes()
    assert "overwrite" in refused(run("convert", base, f"data.source={source}", *SHORT), 2)
    assert Path("base-retrofit/retrofit.json").read_bytes() == before
    again = run("convert", base, f"data.source={source}", *SHORT, "--json", "-q", "--overwrite")
    assert json.loads(again.stdout)["artifact"] == "base-retrofit"
    assert again.stderr == ""


def test_a_file_with_an_equals_sign_is_a_model_not_an_override(tmp_path):
    (tmp_path / "a=b").mkdir()
    assert convert_command._model_and_overrides(["a=b", "train.steps=3"]) == ("a=b", ["train.steps=3"])


@pytest.mark.parametrize(
    ("model", "recipe", "name"),
    [
        (None, None, "tiny"),
        ("tiny", None, "tiny"),
        ("some/model", None, "default"),
        ("a/b", "qwen3-8b", "qwen3-8b"),
    ],
)
def test_which_recipe(model, recipe, name):
    from retrofit.recipes.schema import load_recipe

    with click.Context(cli.convert):
        found = convert_command._recipe(model, recipe, ["train.steps=321"])
    overrides = {"train.steps": 321, **({"base.model": model} if model else {})}
    assert found == load_recipe(name, overrides)


CONVERT_BAD = {
    "unknown model": (["./nowhere"], 2, "no folder or file ./nowhere"),
    "unknown Hub id": (["nobody/nothing", "--offline"], 4, "nobody/nothing"),
    "two models": (["a/b", "train.steps"], 2, "more than one model"),
    "model twice": (["BASE", "base.model=x"], 2, "given twice"),
    "unknown key": (["BASE", "train.stpes=3"], 2, "did you mean `train.steps`"),
    "value out of range": (["BASE", "draft.block=0"], 2, "draft.block: 0 is out of range"),
    "unknown role": (["BASE", "adapter.targets=[q_prj]"], 2, "adapter.targets"),
    "unknown recipe": (["BASE", "--recipe", "tinny"], 2, "did you mean `tiny`"),
    "recipe is not YAML": (["BASE", "--recipe", "bad.yaml"], 2, "bad.yaml"),
    "block and context": (
        ["BASE", "draft.block=128", "data.max_length=256"],
        2,
        f"context of BASE is {CONTEXT}",
    ),
    "data too long": (["BASE", f"data.max_length={2 * CONTEXT}"], 2, f"context of BASE is {CONTEXT}"),
    "no data": (["BASE", "data.source=nowhere.jsonl"], 2, "nowhere.jsonl"),
    "empty data": (["BASE", "data.source=empty.jsonl"], 1, "empty.jsonl:1: the file is empty"),
    "malformed data": (["BASE", "data.source=bad.jsonl"], 1, "bad.jsonl:3"),
    "malformed text": (["BASE", "data.source=bad.txt", "data.held_out=0"], 1, "bad.txt:2: not UTF-8"),
    "out is a file": (["BASE", "-o", "bad.txt"], 2, "bad.txt"),
    "out holds other things": (["BASE", "-o", "full"], 2, "full"),
    "unknown device": (["BASE", "--device", "gpu"], 2, "gpu"),
}


@pytest.mark.parametrize("case", CONVERT_BAD)
def test_convert_refuses(case, base, tmp_path):
    arguments, code, message = CONVERT_BAD[case]
    Path("empty.jsonl").write_text("\n")
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": \n')
    Path("bad.txt").write_bytes(b"fine\nnot \xff fine\n")
    Path("bad.yaml").write_text("train: [1\n")
    Path("full").mkdir()
    Path("full/notes.md").write_text("mine")
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    given = [a.replace("BASE", str(base)) for a in arguments]
    overrides = [o for o in SHORT if not any(a.split("=")[0] == o.split("=")[0] for a in given)]
    result = run("convert", *given, *overrides)
    assert message.replace("BASE", str(base)) in refused(result, code)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def test_convert_refuses_roles_that_match_nothing(tmp_path):
    build("qwen3_moe").save_pretrained(tmp_path / "experts")
    save_tokenizer(tmp_path / "experts")
    overrides = [f"data.source={texts(tmp_path / 'texts')}", *SHORT, "adapter.targets=[gate, up]"]
    message = refused(run("convert", tmp_path / "experts", *overrides), 2)
    assert "adapter.targets" in message
    assert "hint: on mixture-of-experts models the roles are q, k, v, o" in message
    assert not Path("experts-retrofit").exists()


def test_convert_refuses_a_model_without_tokenizer(tmp_path):
    build("llama").save_pretrained(tmp_path / "mute")
    assert "no tokenizer" in refused(run("convert", tmp_path / "mute", *SHORT), 2)
    assert not Path("mute-retrofit").exists()
