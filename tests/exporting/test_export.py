"""`retrofit export`: each format is whole, read back and compared, or not there at all."""

import json
from dataclasses import replace

import pytest
import torch
from artifact_folders import FULL, contents, failing, trained_on
from commands import done, refused, run
from peft import PeftConfig, PeftModel
from saved import ADAPTER, BLOCKS_OF_4, save_artifact
from tiny_models import build
from transformers import AutoModelForCausalLM

from benchmarks.cpu.subjects import write_artifact
from retrofit.adapters.attach import attach
from retrofit.artifact import folder as artifacts
from retrofit.cli.exchange import FORMATS as OFFERED
from retrofit.errors import GateError, ResourceError, UnsupportedModelError, UsageError
from retrofit.exporting import export as exporting
from retrofit.exporting import peft_folder, transformers_folder
from retrofit.exporting.export import FORMATS, export
from retrofit.hub import file_fingerprint
from retrofit.runtime.loading import attach_artifact

IDS = torch.arange(20)[None] * 3 % 64


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_peft_leaves_the_base_alone_and_acts_when_told(made, base, tmp_path):
    out = tmp_path / "peft"
    assert done("export", made, "--format", "peft", "-o", out).strip() == str(out)
    assert left(out) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        plain = model(IDS).logits
        attached = attach_artifact(model, artifacts.read(made))
        attached.gate.base_rows = 0
        ours = model(IDS).logits
        attached.detach()
        loaded = PeftModel.from_pretrained(model, out)
        assert torch.equal(loaded(input_ids=IDS).logits, plain)
        config = PeftConfig.from_pretrained(out)
        config.alora_invocation_tokens = None
        acting = PeftModel.from_pretrained(loaded.unload(), out, config=config)(input_ids=IDS).logits
    torch.testing.assert_close(acting, ours)
    assert not torch.allclose(acting, plain)


def test_transformers_gets_what_its_code_reads(made, tmp_path):
    out = tmp_path / "deep" / "generate"
    told = run("export", made, "--format", "transformers", "-o", out, "--json")
    assert told.exit_code == 0, told.stderr
    assert json.loads(told.stdout)["folder"] == str(out) and "greedy and sampled" in json.loads(told.stdout)["compared"]
    assert set(contents(out)) == {
        "README.md", "retrofit.json", "heads.safetensors", "adapter/adapter_model.safetensors",
        "custom_generate/generate.py",
    }  # fmt: skip
    for name in ("retrofit.json", "heads.safetensors", "adapter/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (made / name).read_bytes()
    code = (out / "custom_generate" / "generate.py").read_text()
    assert "import retrofit" not in code and "from retrofit" not in code


def test_a_base_that_was_quantised_in_training_is_said_to_be_plain(made, tmp_path):
    trained_on("nf4", tmp_path / "few-bits", made)
    for folder, told in ((tmp_path / "few-bits", True), (made, False)):
        found = run("export", folder, "--format", "peft", "-o", tmp_path / f"peft-{told}")
        assert ("trained on nf4, running on plain weights" in found.stderr) is told and found.exit_code == 0


def test_a_base_that_comes_in_few_bits_is_said_too(made, base, tmp_path, monkeypatch):
    right = exporting.load_base
    monkeypatch.setattr(exporting, "load_base", lambda *a, **b: replace(right(*a, **b), precision="stored: fp8"))
    assert export(made, "peft", tmp_path / "peft", base=str(base)).other_precision.startswith(
        "trained on plain weights, running on stored: fp8"
    )


def test_an_adapter_that_peft_scales_otherwise_is_found(made, tmp_path, monkeypatch):
    def scaled(artifact, named):
        content = peft_folder.files(artifact, named.called)
        config = json.loads(content["adapter_config.json"])
        return {**content, "adapter_config.json": json.dumps(config | {"lora_alpha": 3.0}).encode()}

    monkeypatch.setitem(FORMATS, "peft", FORMATS["peft"]._replace(files=scaled))
    with pytest.raises(GateError, match="away from retrofit's draft rows"):
        export(made, "peft", tmp_path / "out")
    assert left(tmp_path) == []


def test_tensors_that_are_not_the_artifacts_are_found(made, tmp_path, monkeypatch):
    def other(artifact, named):
        content = peft_folder.files(artifact, named.called)
        state = content["adapter_model.safetensors"]
        return {**content, "adapter_model.safetensors": {name: tensor * 0 for name, tensor in state.items()}}

    monkeypatch.setitem(FORMATS, "peft", FORMATS["peft"]._replace(files=other))
    with pytest.raises(GateError, match="other tensors"):
        export(made, "peft", tmp_path / "out")
    assert left(tmp_path) == []


def test_code_that_takes_a_wrong_draft_is_found(made, tmp_path, monkeypatch):
    real = transformers_folder.inspect.getsource
    monkeypatch.setattr(
        transformers_folder.inspect, "getsource", lambda module: real(module).replace("token != drafts[n]", "False")
    )
    with pytest.raises(GateError, match="greedy output differs"):
        export(made, "transformers", tmp_path / "out")
    assert left(tmp_path) == []


@pytest.mark.parametrize("after", range(3))
def test_a_full_disk_leaves_nothing(made, tmp_path, monkeypatch, after):
    monkeypatch.setattr(exporting, "write_file", failing(exporting.write_file, after, FULL))
    with pytest.raises(ResourceError, match="No space left"):
        export(made, "peft", tmp_path / "deep" / "er" / "out")
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (["--format", "peft", "-o", "."], 2, "is there already"),
        (["--format", "peft", "-o", "out", "--base", "./nowhere"], 2, "no folder or file ./nowhere"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.usefixtures("somewhere")
def test_bad_input_is_one_clear_error(made, tmp_path, arguments, code, problem):
    (tmp_path / "mine.txt").write_text("mine")
    assert problem in refused(run("export", made, *arguments), code)
    assert left(tmp_path) == ["mine.txt"]


def test_a_format_that_there_is_not(made, tmp_path):
    with pytest.raises(UsageError, match="'gguf' does not exist") as error:
        export(made, "gguf", tmp_path / "out")
    assert error.value.hint == "it is one of peft, uno, nemotron, transformers"


def test_keys_that_turn_by_the_length_of_the_text_are_refused(tmp_path):
    model = build("llama_rope_dynamic")
    model.save_pretrained(tmp_path / "base")
    attached = attach(model, BLOCKS_OF_4, **ADAPTER)
    fingerprint = file_fingerprint(tmp_path / "base", model.config.to_dict())
    made = write_artifact(tmp_path / "made", str(tmp_path / "base"), fingerprint, model, attached, ADAPTER)
    with pytest.raises(UnsupportedModelError, match="rope_type dynamic"):
        export(made, "transformers", tmp_path / "out")
    assert left(tmp_path) == ["base", "made"]


def test_another_base_is_refused(base, made, tmp_path):
    build("llama", seed=1).save_pretrained(tmp_path / "other")
    refusal = refused(run("export", made, "--format", "peft", "-o", tmp_path / "out", "--base", tmp_path / "other"), 1)
    assert "belongs to another base" in refusal
    assert left(tmp_path) == ["other"]


def test_half_precision_and_cards_of_the_hub(base, tmp_path):
    made = save_artifact(tmp_path / "made", base)
    export(made, "peft", tmp_path / "half", dtype="bfloat16")
    card = peft_folder.files(artifacts.read(made), "owner/name")["README.md"].decode()
    assert "base_model: owner/name\n" in card and "rank 2, alpha 2," in card


def test_the_command_line_offers_what_there_is():
    assert list(FORMATS) == OFFERED
