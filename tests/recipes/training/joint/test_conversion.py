"""A conversion of the profile `joint` from beginning to end: stopped, packed and shared out as any other, and what it
writes is a model that any tool loads, held against its own `ar` and never called the original."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (imported before the processes are forked)
import pytest
import torch
from click.testing import CliRunner
from decoding import random_prompts, reference_greedy
from reporting import only, small
from safetensors.torch import load_file, save_file
from several_processes import run_folder, saved_model, together
from tiny_conversion import RECIPE, child, curve, interrupted, learned, run, steps, tokenizer
from tiny_models import build
from transformers import AutoModelForCausalLM

from retrofit.artifact import folder as artifact
from retrofit.cli import main as cli
from retrofit.errors import ArtifactError, GateError, UnsupportedModelError, UsageError
from retrofit.exporting.export import export
from retrofit.quantised.linear import EightBits, QuantisedLinear
from retrofit.quantised.loading import put
from retrofit.recipes.convert import convert
from retrofit.recipes.schema import load_recipe
from retrofit.recipes.training.joint import weights
from retrofit.runtime.engine import Engine
from retrofit.serving import starting

PROCESSES = multiprocessing.get_context("fork")
KINDS = ("lora", "full")
WEIGHTS = "model/model.safetensors"


def keys(kind: str, **more: Any) -> dict[str, Any]:
    return {"profile": "joint", "joint__weights": kind, "joint__rank": 2, "joint__lr": 1e-3, **more}


def made(out: Path, texts: Path, kind: str, **more: Any) -> artifact.Artifact:
    return run(out, texts, **keys(kind, **more))


@pytest.fixture(scope="module", params=KINDS)
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, texts: Path) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("joint") / "out"
    made(out, texts, request.param)
    return request.param, out


def same(out: Path, straight: Path) -> bool:
    assert curve(out / "metrics.jsonl") == curve(straight / "metrics.jsonl")
    return learned(out) == learned(straight) and (out / WEIGHTS).read_bytes() == (straight / WEIGHTS).read_bytes()


# Stopped and gone on


def test_killed_and_gone_on_it_ends_with_the_same_bytes(
    tmp_path: Path, texts: Path, straight: tuple[str, Path]
) -> None:
    kind, wanted = straight
    out = tmp_path / "out"
    for call in (8, 3):  # of `write_file`: inside the second checkpoint, and when gone on inside the next one
        process = PROCESSES.Process(target=child, args=(out, texts, "write_file", call), kwargs=keys(kind))
        process.start()
        process.join()
        assert process.exitcode == -9
    assert steps(out) == [2]
    made(out, texts, kind, overwrite=True)
    assert same(out, wanted)


def test_interrupted_too_and_the_weights_published_are_those_of_the_step(
    tmp_path: Path, texts: Path, straight: tuple[str, Path]
) -> None:
    kind, wanted = straight
    out = tmp_path / "out"
    stop = interrupted(out, texts, 5, **keys(kind))
    assert "saved step 5" in stop.__notes__[0]
    made(out, texts, kind)
    assert same(out, wanted)


# Shared out


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_losses_and_weights_of_one(tmp_path: Path, texts: Path, kind: str) -> None:
    model = saved_model(tmp_path / "model", "llama")
    several = {"train__steps": 6, "train__batch_size": 4, "train__save_every": 0, "train__accumulation": 2}
    settings = keys(kind, **several)
    run_folder(tmp_path / "one", model, texts, **settings)
    for ended in together(run_joint, tmp_path / "two", model, texts, settings):
        assert ended is not None and ended.kind is None, (ended and ended.message, ended and ended.notes)
    one, two = (curve(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["rows"] == b["rows"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)
    for name in (WEIGHTS, "adapter/adapter_model.safetensors"):
        wanted, found = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        for key, tensor in wanted.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=1e-4)


def run_joint(out: Path, model: Path, texts: Path, settings: dict[str, Any]) -> None:
    run_folder(out, model, texts, **settings)


# What it writes


def test_model_is_a_plain_folder_whose_greedy_text_is_the_engines(straight: tuple[str, Path]) -> None:
    _, folder = straight
    prompts = random_prompts((5, 9, 3), vocab=30)
    plain = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    assert not any("lora" in name for name, _ in plain.named_parameters())
    wanted = reference_greedy(plain, prompts, 24)
    with Engine.load(folder, "cpu", "float32") as engine:
        for mode in ("ar", "self_spec"):
            assert [r.tokens for r in engine.generate(prompts, mode, max_new_tokens=24, ignore_eos=True)] == wanted
    original = build("llama").state_dict()
    moved = [name for name, tensor in plain.state_dict().items() if not torch.equal(tensor, original[name])]
    assert moved, "nothing was trained"


def test_what_it_says_of_itself(straight: tuple[str, Path]) -> None:
    """Drift and the original's name; nothing calls it the original, or lossless against that."""
    _, folder = straight
    config = artifact.read_config(folder)
    assert config["format"] == 2 and config["profile"] == "joint"
    assert config["original"]["model"] == "LlamaForCausalLM" and config["base"]["model"] == "model"
    assert config["drift"]["kl"] > 0 and 0 < config["drift"]["agreement"] <= 1
    card = (folder / "README.md").read_text()
    shown = CliRunner().invoke(cli.main, ["inspect", str(folder)]).output
    for text in (card, shown):
        assert "drift" in text and "untouched" not in text and "is the original model" not in text


def test_a_merge_that_is_not_what_was_trained_is_caught(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = weights._Update.merged

    def drifting(self: Any, weight: torch.Tensor) -> torch.Tensor:
        return right(self, weight) + 1e-3 * weight

    monkeypatch.setattr(weights._Update, "merged", drifting)
    with pytest.raises(GateError, match="merging the LoRA into the base moved its logits"):
        made(tmp_path / "out", texts, "lora")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_is_written_otherwise_is_caught(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    right = type(build("llama")).save_pretrained

    def other(self: Any, place: Any, state_dict: Any = None, **named: Any) -> None:
        name = "model.layers.1.mlp.down_proj.weight"
        right(self, place, state_dict={**state_dict, name: state_dict[name] * (1 + 1e-6)}, **named)

    monkeypatch.setattr(type(build("llama")), "save_pretrained", other)
    with pytest.raises(GateError, match=r"down_proj.weight is not what was trained"):
        made(tmp_path / "out", texts, kind)
    assert not (tmp_path / "out").exists()


def test_too_much_drift_is_not_published_and_can_be_allowed_after_all(tmp_path: Path, texts: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(GateError, match=r"joint.max_drift is 1e-06") as caught:
        made(out, texts, "full", joint__max_drift=1e-6)
    assert not out.exists() and "goes on from there" in caught.value.__notes__[0]
    made(out, texts, "full", joint__max_drift=100.0)
    assert artifact.read_config(out)["training"]["steps"] == 9


def test_a_probe_that_finds_too_much_drift_ends_the_training(tmp_path: Path, texts: Path) -> None:
    probed = {"train__probe_every": 2, "train__probe_prompts": 1, "train__probe_tokens": 4, "data__held_out": 2}
    with pytest.raises(GateError, match=r"at step 2, joint.max_drift"):
        made(tmp_path / "out", texts, "full", joint__max_drift=1e-6, **probed)
    made(tmp_path / "out", texts, "full", **probed)
    probes = [record["probe"] for record in curve(tmp_path / "out/metrics.jsonl") if "probe" in record]
    assert len(probes) == 5 and all(probe["kl"] > 0 and 0 < probe["agreement"] <= 1 for probe in probes)


# Held beside it, and handed on


def test_a_report_is_held_beside_its_own_model_and_says_how_far_that_drifted(
    tmp_path: Path, straight: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = straight
    only(monkeypatch, "losslessness")
    report = small(monkeypatch, folder, out=tmp_path / "report")
    drift = artifact.read_config(folder)["drift"]
    assert report.section("compared")["drift"] == drift
    assert report.section("compared")["base"]["model"] == "out/model"
    same, *_, drifted = report.data["verdict"]["lines"]
    assert same.startswith("It answers as its own model does") and "the original" not in same
    assert not any("original" in gate["says"] for gate in report.data["verdict"]["gates"])
    assert f"From LlamaForCausalLM, the original, it drifted: KL {drift['kl']:.4f} nats per token" in drifted
    for page in (report.markdown, report.html):
        assert f"KL {drift['kl']:.4f} nats per token" in page


@pytest.mark.parametrize("form", ["peft", "transformers"])
def test_an_export_is_tried_out_on_its_own_model(tmp_path: Path, straight: tuple[str, Path], form: str) -> None:
    _, folder = straight
    made = export(folder, form, tmp_path / form)
    assert "out/model/" in (made.folder / "README.md").read_text()
    original = tmp_path / "original"
    build("llama").save_pretrained(original)
    with pytest.raises(ArtifactError, match="has a model of its own"):
        export(folder, form, tmp_path / "another", base=str(original))


def test_vllm_serves_its_own_model_by_the_artifacts_name(
    straight: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = straight
    monkeypatch.setattr("retrofit.serving.starting.installed", lambda: "0.32.0")
    words, _ = starting.words(folder, str(folder), "vllm", ["--port", "1"], base=None, offline=True)
    assert words[words.index("serve") + 1] == str(folder / "model")
    assert words[words.index("--served-model-name") + 1] == "out"


def test_its_drafts_are_trained_further_on_its_own_model_which_stays_as_it_is(
    tmp_path: Path, straight: tuple[str, Path]
) -> None:
    _, folder = straight
    overrides = {"profile": "frozen", "train.steps": 2}
    made = convert(None, None, tmp_path / "on", overrides, start_from=folder, quiet=True, offline=True)
    assert made.config["profile"] == "frozen" and made.config["from"]["steps"] == 9
    fingerprints = [artifact.read_config(one)["base"]["fingerprint"] for one in (folder, made.folder)]
    assert fingerprints[0] == fingerprints[1]
    before = made.config["training"]["before"]
    measured = artifact.read_config(folder)["acceptance"]["conditional"]
    assert {kind: before[kind] for kind in measured} == measured
    prompts = random_prompts((5, 9), vocab=30)
    texts = []
    for place in (folder, made.folder):
        with Engine.load(place, "cpu", "float32", offline=True) as engine:
            texts.append([r.tokens for r in engine.generate(prompts, "self_spec", max_new_tokens=16, ignore_eos=True)])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_with_drafts_of_a_frozen_base(tmp_path: Path, model: Path, texts: Path, kind: str) -> None:
    run_folder(tmp_path / "frozen", model, texts)
    along = {"profile": "joint", "joint.weights": kind, "joint.rank": 2, "joint.lr": 1e-3, "train.steps": 2}
    made = convert(None, None, tmp_path / "on", along, start_from=tmp_path / "frozen", quiet=True, offline=True)
    first = artifact.read_config(tmp_path / "frozen")
    measured = first["acceptance"]["conditional"]
    assert {name: made.config["training"]["before"][name] for name in measured} == measured
    assert made.config["original"]["fingerprint"] == first["base"]["fingerprint"]
    assert made.config["drift"]["kl"] > 0 and made.config["from"]["steps"] == 9


# What is refused


def test_its_model_is_checked_on_every_load(tmp_path: Path, straight: tuple[str, Path]) -> None:
    _, folder = straight
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    artifact.check(own)
    state = load_file(own / WEIGHTS)
    save_file({**state, "lm_head.weight": state["lm_head.weight"] + 1e-3}, own / WEIGHTS, {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"model.safetensors: damaged or altered"):
        Engine.load(own, "cpu")
    shutil.copy(folder / WEIGHTS, own / WEIGHTS)
    (own / "model/adapter_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"adapter_config.json: does not belong there"):
        Engine.load(own, "cpu")
    (own / "model/adapter_config.json").unlink()
    shutil.rmtree(own / "model")
    with pytest.raises(ArtifactError, match="missing"):
        artifact.check(own)


def test_another_base_is_refused_though_its_hashes_are_the_same(tmp_path: Path, straight: tuple[str, Path]) -> None:
    """A LoRA changes neither configuration nor norms."""
    _, folder = straight
    other = tmp_path / "other"
    shutil.copytree(folder / "model", other)
    with pytest.raises(ArtifactError, match="has a model of its own"):
        Engine.load(folder, "cpu", base=str(other))


def test_recipes_that_make_no_sense_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"data.held_out: 0 leaves no text to measure drift on"):
        load_recipe("tiny", {"profile": "joint", "data.held_out": 0})
    with pytest.raises(UsageError, match=r"joint.anchor: kl has weight 0"):
        load_recipe("tiny", {"joint.anchor": "kl", "joint.kl_weight": 0})


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_refused_before_it_is_trained(tmp_path: Path, texts: Path, kind: str) -> None:
    model = build("llama")
    weight = model.model.layers[0].mlp.up_proj.weight.detach()
    largest = weight.abs().amax(1)
    held = EightBits((weight / largest[:, None] * 127).round().to(torch.int8), largest)
    put(model, "model.layers.0.mlp.up_proj", QuantisedLinear(held, (48, 32), torch.float32))
    recipe = {**RECIPE, "data.source": str(texts), "profile": "joint", "joint.weights": kind}
    with pytest.raises(UnsupportedModelError, match="profile joint trains the base's own weights"):
        convert(model, "tiny", tmp_path / "out", recipe, quiet=True, tokenizer=tokenizer())


def test_a_live_model_is_given_back_as_it_was(tmp_path: Path, texts: Path) -> None:
    model = build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for kind in KINDS:
        along = {"profile": "joint", "joint.weights": kind, "train.steps": 2, "train.warmup": 0}
        recipe = {**RECIPE, "data.source": str(texts), **along}
        convert(model, "tiny", tmp_path / kind, recipe, quiet=True, tokenizer=tokenizer())
        assert json.loads((tmp_path / kind / "retrofit.json").read_text())["profile"] == "joint"
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
