"""Conversions that begin with an artifact, or with a checkpoint of another one."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import refused
from commands import run as command
from safetensors.torch import load_file
from several_processes import run_folder, saved_model, together, values
from tiny_conversion import curve, interrupted, learned, run, tokenizer
from tiny_models import SIZES, build
from transformers import LlamaConfig, LlamaForCausalLM

from retrofit.artifact import folder as artifact
from retrofit.artifact.files import sha256
from retrofit.errors import ArtifactError, UsageError
from retrofit.recipes import beginning
from retrofit.recipes import convert as conversion
from retrofit.recipes.convert import convert
from retrofit.recipes.origin import read
from retrofit.recipes.training.checkpoint import folder_of
from retrofit.recipes.training.session import Session

SHORT = {"train__steps": 4, "train__schedule": "constant", "train__warmup": 0}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, model: Path, texts: Path) -> Path:
    """An artifact of four steps, whose checkpoints were kept."""
    out = tmp_path_factory.mktemp("first") / "out"
    run_folder(out, model, texts, **SHORT, keep_checkpoints=True)
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / artifact.ADAPTER) | load_file(out / artifact.HEADS)


def on(out: Path, origin: Path, model: Any = None, **options: Any) -> artifact.Artifact:
    """Go on from `origin` with its own recipe; keys of another recipe have `__` for the dot."""
    keys = {key.replace("__", "."): options.pop(key) for key in list(options) if "__" in key}
    options = {"quiet": True, "offline": True, **options}
    return convert(model, None, out, {"train.steps": 2, **keys}, start_from=origin, **options)


def goes_on(out: Path, origin: Path) -> None:
    """`on` of a process, which tells its parent nothing."""
    on(out, origin)


def untrained(patch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The weights that training begins with, of each conversion that comes to that."""
    seen: list[dict[str, torch.Tensor]] = []
    right = Session.run

    def noted(self: Session, *arguments: Any) -> None:
        seen.append({name: p.detach().clone() for name, p in self.trainer.attached.named().items()})
        right(self, *arguments)

    patch.setattr(Session, "run", noted)
    return seen


# An artifact


def test_training_begins_with_the_artifacts_weights_recipe_and_base(
    tmp_path: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = untrained(monkeypatch)
    made = on(tmp_path / "out", first)
    (began,) = seen
    held = {name.removeprefix("heads."): t for name, t in began.items()}
    assert all(torch.equal(t, held[name.replace(".weight", ".default.weight") if "lora_" in name else name])
               for name, t in weights(first).items() if name != "confidence_temperature")  # fmt: skip
    assert len(held) == len(weights(first)) - 1
    assert made.config["from"] == {
        "kind": "artifact", "sha256": sha256(first / artifact.MANIFEST), "steps": 4,
        "base": artifact.read_config(first)["base"]["model"],
    }  # fmt: skip
    assert made.config["training"]["steps"] == 2
    assert learned(tmp_path / "out") != learned(first)
    again = on(tmp_path / "third", tmp_path / "out", train__steps=1)
    assert again.config["from"]["steps"] == 6


def test_what_it_accepts_before_the_first_step_is_what_it_was_measured_to(
    tmp_path: Path, first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = on(tmp_path / "out", first, quiet=False)
    before = curve(tmp_path / "out" / "metrics.jsonl")[0]["before"]
    measured = artifact.read_config(first)["acceptance"]["conditional"]
    assert {kind: before[kind] for kind in measured} == measured
    assert made.config["training"]["before"] == before
    assert f"tau {before['tau']:.3f}" in capsys.readouterr().err
    assert "before" not in curve(tmp_path / "out" / "metrics.jsonl")[1]


def test_its_text_comes_in_another_order_than_it_was_trained_on(tmp_path: Path, first: Path) -> None:
    on(tmp_path / "out", first, train__steps=4)
    one, other = (curve(out / "metrics.jsonl") for out in (first, tmp_path / "out"))
    assert [r["loss"]["ar"] for r in one] != [r["loss"]["ar"] for r in other]
    begun, more = (artifact.read_config(out)["training"]["epochs"] for out in (first, tmp_path / "out"))
    assert more > begun


def test_interrupted_it_goes_on_as_if_it_had_not_been(tmp_path: Path, model: Path, texts: Path, first: Path) -> None:
    options: dict[str, Any] = {**SHORT, "train__steps": 5, "start_from": first}
    run(tmp_path / "straight", texts, **options)
    stop = interrupted(tmp_path / "out", texts, 3, resume="never", **options)
    assert stop.__notes__[0].endswith("the same command goes on from there, without --restart")
    with pytest.raises(UsageError, match=r"from: [0-9a-f]{64} -> nothing"):
        run(tmp_path / "out", texts, **{**options, "start_from": None})
    run(tmp_path / "out", texts, **options)
    assert learned(tmp_path / "out") == learned(tmp_path / "straight")
    assert curve(tmp_path / "out" / "metrics.jsonl") == curve(tmp_path / "straight" / "metrics.jsonl")


def test_another_base_of_the_same_shapes_and_another_block(
    tmp_path: Path, first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = build("llama", seed=7)
    other.save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    made = on(tmp_path / "out", first, str(tmp_path / "other"), draft__block=3, quiet=False)
    told = capsys.readouterr().err
    assert "differs in its norms" in told and "draft.block was 4, now 3" in told
    assert made.config["base"]["fingerprint"] != artifact.read_config(first)["base"]["fingerprint"]
    assert made.heads["confidence_temperature"].shape == (2, 3)


@pytest.mark.parametrize("better", [0, 1], ids=["kept", "anew"])
def test_on_another_base_the_markov_head_that_drafts_better_is_begun_with(
    tmp_path: Path, model: Path, first: Path, monkeypatch: pytest.MonkeyPatch, better: int
) -> None:
    """All else is the artifact's; on its own base nothing else is tried."""
    taus = iter([*((1.2, 1.3) if better else (1.3, 1.2)), 1.0])
    right, found = beginning.held_out_acceptance, []

    def measured(*arguments: Any) -> Any:
        found.append({**right(*arguments).figures(), "tau": next(taus)})
        return SimpleNamespace(figures=lambda: found[-1])

    monkeypatch.setattr(beginning, "held_out_acceptance", measured)
    other = saved_model(tmp_path / "other")
    build("llama", seed=7).save_pretrained(other)
    seen = untrained(monkeypatch)
    made = on(tmp_path / "out", first, str(other))
    (began,), kept = seen, weights(first)
    named = {name.removeprefix("heads.").replace(".default.weight", ".weight"): t for name, t in began.items()}
    changed = {name for name, tensor in named.items() if not torch.equal(tensor, kept[name])}
    assert changed == ({"markov_w1", "markov_w2"} if better else set())
    assert made.config["training"]["before"]["tau"] == 1.3
    on(tmp_path / "home", first)
    assert next(taus, None) is None and len(found) == 3


def test_a_base_of_other_shapes_is_refused_both_ways(tmp_path: Path, first: Path) -> None:
    def sized(**sizes: int) -> LlamaForCausalLM:
        return LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes}))

    deeper = sized(num_hidden_layers=3)
    with pytest.raises(ArtifactError, match=r"4 tensors? it does not hold \(.*layers\.2.*\)"):
        on(tmp_path / "out", first, deeper, tokenizer=tokenizer())
    flatter = sized(num_hidden_layers=1)
    with pytest.raises(ArtifactError, match=r"4 tensors without a place \(.*layers\.1.*\)"):
        on(tmp_path / "out", first, flatter, tokenizer=tokenizer())
    wider = sized(hidden_size=48)
    with pytest.raises(ArtifactError, match=r"of another shape \(.* \[\d+, \d+\] for \[\d+, \d+\]"):
        on(tmp_path / "out", first, wider, tokenizer=tokenizer())
    assert list(tmp_path.iterdir()) == []


def test_another_adapter_is_refused_with_the_keys_that_fit(tmp_path: Path, first: Path, texts: Path) -> None:
    with pytest.raises(
        UsageError, match=r"adapter\.rank is 4, there 2; adapter\.targets is \[q\], there \[q,down\]"
    ) as caught:
        on(tmp_path / "out", first, adapter__rank=4, adapter__targets=["q"])
    assert caught.value.hint == "add adapter.rank=2 adapter.targets=[q,down]"


def test_a_base_that_is_not_here_is_asked_for(tmp_path: Path, first: Path) -> None:
    copied = shutil.copytree(first, tmp_path / "copied")
    (copied / artifact.LOCAL).unlink()
    with pytest.raises(UsageError, match="lay on another machine") as caught:
        on(tmp_path / "out", copied)
    assert caught.value.hint == f"name the base: retrofit convert BASE --from {copied}"


def test_it_may_replace_what_it_began_with(tmp_path: Path, first: Path) -> None:
    own = shutil.copytree(first, tmp_path / "own")
    artifact.add(own, "certificate.json", json.dumps({"ok": True}))
    with pytest.raises(UsageError, match="holds an artifact already") as caught:
        on(own, own)
    assert caught.value.hint == (
        f"replace it with --overwrite, go on from it with `--from {own} -o ANOTHER`, or choose another name with -o"
    )
    made = on(own, own, overwrite=True)
    assert made.config["from"]["sha256"] == sha256(first / artifact.MANIFEST)
    assert not (own / "certificate.json").exists()


def test_several_processes_begin_with_the_same_weights(tmp_path: Path, first: Path) -> None:
    on(tmp_path / "one", first)
    values(together(goes_on, tmp_path / "two", first))
    for name, tensor in weights(tmp_path / "one").items():
        if name != "confidence_temperature":
            torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_command(first: Path, somewhere: None) -> None:
    done = command("convert", "--from", first, "-o", "more", "train.steps=1", "--offline")
    assert (done.exit_code, done.stdout) == (0, "more\n"), done.stderr
    assert "before the first step: held-out acceptance by slot" in done.stderr
    assert "began with" in command("inspect", "more").stdout
    assert "`--from more -o ANOTHER`" in refused(command("convert", "--from", first, "-o", "more", "--restart"), 2)
    for options in ([], ["--dry-run"]):
        told = refused(command("convert", "--from", first, "-o", "other", "--recipe", "default", *options), 2)
        assert "add adapter.rank=2 adapter.alpha=32 adapter.targets=[q,down] adapter.markov_rank=2" in told


# A checkpoint


def test_from_a_checkpoint_the_bits_are_those_of_a_run_without_a_break(
    tmp_path: Path, model: Path, texts: Path, first: Path
) -> None:
    """Optimizer, place in the text and the steps so far come along; a decay that begins after it may be added."""
    ending = {"train__steps": 6, "train__schedule": "wsd", "train__decay": 2}
    run_folder(tmp_path / "straight", model, texts, **{**SHORT, **ending})
    checkpoint = folder_of(first) / "step-000004"
    made = on(tmp_path / "out", checkpoint, **ending)
    assert learned(tmp_path / "out") == learned(tmp_path / "straight")
    one, other = (curve(out / "metrics.jsonl") for out in (tmp_path / "straight", tmp_path / "out"))
    assert [{k: v for k, v in record.items() if k != "before"} for record in other] == one
    assert "before" in other[4]
    assert made.config["from"] == {"kind": "checkpoint", "sha256": sha256(checkpoint / "manifest.json"), "steps": 4}
    assert str(tmp_path) not in json.dumps(made.config)


def test_from_a_checkpoint_interrupted(tmp_path: Path, model: Path, texts: Path, first: Path) -> None:
    run_folder(tmp_path / "straight", model, texts, **{**SHORT, "train__steps": 6})
    checkpoint, out = folder_of(first) / "step-000004", tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "_train", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            on(out, checkpoint, train__steps=6)
    assert [path.name for path in folder_of(out).glob("step-*")] == ["step-000004"]
    on(out, checkpoint, train__steps=6)
    assert learned(out) == learned(tmp_path / "straight")


def test_a_checkpoint_of_another_recipe_or_none(tmp_path: Path, first: Path) -> None:
    with pytest.raises(UsageError, match=r"train\.anchors: 4 -> 5") as caught:
        on(tmp_path / "out", folder_of(first) / "step-000004", train__anchors=5, train__steps=6)
    assert str(caught.value.hint).startswith("go on in spite of it with --force-resume, or leave --from out")
    with pytest.raises(UsageError, match="holds 2 checkpoints") as caught:
        on(tmp_path / "out", folder_of(first))
    assert str(caught.value.hint).endswith("step-000004")
    with pytest.raises(UsageError, match=r"is a checkpoint of .* itself"):
        on(first, folder_of(first) / "step-000004", overwrite=True)
    broken = shutil.copytree(folder_of(first) / "step-000004", tmp_path / "step-000004")
    (broken / "weights.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"weights\.safetensors is damaged"):
        on(tmp_path / "out", broken)


def test_a_published_recipe_finds_its_text_again(tmp_path: Path, model: Path, texts: Path) -> None:
    """Of a mixture each source by its own place; what was given otherwise stays so."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {letter} = " * 9}) + "\n" for letter in "abcdefghijk"))
    run_folder(tmp_path / "one", model, texts, **SHORT, data__source=[{"source": str(texts)}, {"source": str(rows)}])
    on(tmp_path / "two", tmp_path / "one", train__steps=1)
    places = json.loads((tmp_path / "two" / artifact.LOCAL).read_text())["data"]
    assert places == [str(texts), str(rows)]
    on(tmp_path / "three", tmp_path / "one", train__steps=1, data__source=str(texts))
    assert json.loads((tmp_path / "three" / artifact.LOCAL).read_text())["data"] == [str(texts)]


def test_a_checkpoint_that_is_gone_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "out.checkpoints" / "step-000006").mkdir(parents=True)
    with pytest.raises(UsageError, match="step-000004: there is no such checkpoint") as raised:
        read(tmp_path / "out.checkpoints" / "step-000004")
    assert "step-000006" in str(raised.value.hint)
