"""A model that was trained along is trained along further, or averaged with others, beside its original as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from several_processes import run_folder, saved_model
from tiny_conversion import curve, interrupted, learned, run
from tiny_models import build
from transformers import AutoModelForCausalLM

from retrofit.artifact import folder as artifact
from retrofit.errors import ArtifactError, GateError, UsageError
from retrofit.recipes.average import average
from retrofit.recipes.convert import convert
from retrofit.recipes.training.checkpoint import folder_of
from retrofit.runtime.engine import Engine

KINDS = ("lora", "full")
WEIGHTS = "model/model.safetensors"


def keys(kind: str, **more: Any) -> dict[str, Any]:
    return {"profile": "joint", "joint__weights": kind, "joint__rank": 2, "joint__lr": 1e-3, **more}


@pytest.fixture(scope="module", params=KINDS)
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path, texts: Path
) -> tuple[str, Path]:
    """An artifact whose checkpoints were kept."""
    out = tmp_path_factory.mktemp("joint") / "one"
    run_folder(out, model, texts, **keys(request.param), keep_checkpoints=True)
    return request.param, out


@pytest.mark.parametrize("then", KINDS)
def test_one_that_is_hardly_moved_is_what_it_was_and_has_drifted_as_far(
    tmp_path: Path, made: tuple[str, Path], then: str
) -> None:
    _, folder = made
    still = {"profile": "joint", "joint.weights": then, "joint.lr": 1e-12, "train.lr": 1e-12}
    still |= {"train.steps": 1, "train.warmup": 0}
    on = convert(None, None, tmp_path / "on", still, start_from=folder, quiet=True, offline=True)
    first = artifact.read_config(folder)
    assert on.config["original"] == first["original"] and on.config["from"]["kind"] == "artifact"
    measured = first["acceptance"]["conditional"]
    assert {kind: on.config["training"]["before"][kind] for kind in measured} == measured
    assert drift_of(on.folder) == pytest.approx(drift_of(folder), rel=1e-3, abs=1e-5)
    one, other = (load_file(place / WEIGHTS) for place in (folder, on.folder))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)


def test_trained_on_it_drifts_on_and_is_a_plain_model_still(tmp_path: Path, made: tuple[str, Path]) -> None:
    kind, folder = made
    more = {"profile": "joint", "train.steps": 4, "joint.lr": 3e-3, "joint.anchor": "ce"}
    on = convert(None, None, tmp_path / "on", more, start_from=folder, quiet=True, offline=True)
    assert on.config["drift"]["kl"] > artifact.read_config(folder)["drift"]["kl"] and on.config["from"]["steps"] == 9
    plain = AutoModelForCausalLM.from_pretrained(on.folder / "model").state_dict()
    with Engine.load(on.folder, "cpu", "float32", offline=True) as engine:
        held = {n.replace(".base_layer", ""): t for n, t in engine.attached.model.state_dict().items()}
        assert all(torch.equal(held[name], tensor) for name, tensor in plain.items())
    assert kind in KINDS


def test_interrupted_it_ends_with_the_same_bytes(tmp_path: Path, texts: Path, made: tuple[str, Path]) -> None:
    kind, folder = made
    again = keys(kind, start_from=folder, train__steps=5)
    run(tmp_path / "straight", texts, **again)
    stop = interrupted(tmp_path / "out", texts, 3, **again)
    assert "saved step 3" in stop.__notes__[0]
    run(tmp_path / "out", texts, **again)
    assert same(tmp_path / "out", tmp_path / "straight")


def test_a_checkpoint_goes_on_as_its_run_would_have(tmp_path: Path, made: tuple[str, Path]) -> None:
    _, folder = made
    step = folder_of(folder) / "step-000008"
    branch = convert(None, None, tmp_path / "branch", start_from=step, quiet=True, offline=True)
    assert same(branch.folder, folder)
    one, other = (drift_of(place) for place in (branch.folder, folder))
    assert one == other


def drift_of(folder: Path) -> dict[str, Any]:
    """But for what merging moved on the text that came first."""
    return {key: value for key, value in artifact.read_config(folder)["drift"].items() if key != "merge"}


def same(one: Path, other: Path) -> bool:
    lines = [
        [{k: v for k, v in line.items() if k != "before"} for line in curve(p / "metrics.jsonl")] for p in (one, other)
    ]
    assert lines[0] == lines[1]
    return learned(one) == learned(other) and (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()


# Means


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, model: Path, texts: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    for seed, (name, kind) in enumerate((("one", "full"), ("two", "lora"))):
        run_folder(folder / name, model, texts, **keys(kind, train__seed=seed, joint__lr=1e-2))
    return folder / "one", folder / "two"


def test_the_mean_of_two_is_that_of_their_models_too(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    told: list[str] = []
    mean = average(pair, tmp_path / "mean", weights=[1, 3], offline=True, say=told.append)
    one, two, found = (load_file(place / WEIGHTS) for place in (*pair, mean.folder))
    assert all(torch.equal(found[n], (one[n].double() / 4 + two[n].double() * 3 / 4).float()) for n in one)
    first = artifact.read_config(pair[0])
    assert mean.config["original"] == first["original"] and mean.config["profile"] == "joint"
    assert mean.config["drift"]["kl"] > 0 and "merge" not in mean.config["drift"]
    assert any(line.startswith("drift from") for line in told)
    card = (mean.folder / "README.md").read_text()
    assert "mean of 2" in card and "drift from" in card
    artifact.check(mean.folder)
    Engine.load(mean.folder, "cpu", offline=True).close()


def test_of_one_thing_twice_it_is_that_and_has_drifted_as_far(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    for folder in pair:
        mean = average([folder] * 2, tmp_path / folder.name, offline=True)
        assert learned(mean.folder)[0] == learned(folder)[0]
        one, found = (load_file(place / WEIGHTS) for place in (folder, mean.folder))
        assert all(torch.equal(found[name], tensor) for name, tensor in one.items())
        assert mean.config["drift"] == pytest.approx(drift_of(folder), rel=1e-4, abs=1e-6)


def test_what_has_no_mean_is_refused_by_name(
    tmp_path: Path, pair: tuple[Path, Path], made: tuple[str, Path], model: Path, texts: Path
) -> None:
    run_folder(tmp_path / "frozen", model, texts)
    with pytest.raises(ArtifactError, match=r"another profile \(frozen, there joint\)"):
        average([pair[0], tmp_path / "frozen"], tmp_path / "mean", offline=True)
    with pytest.raises(UsageError, match="profile joint, which has no model of its own yet"):
        average([pair[0], folder_of(made[1]) / "step-000008"], tmp_path / "mean", offline=True)
    with pytest.raises(UsageError, match="what is averaged is of the profile joint"):
        average(pair, tmp_path / "mean", ["profile=frozen"], offline=True)
    with pytest.raises(GateError, match=r"the mean drifted: KL .* joint.max_drift is 1e-06"):
        average(pair, tmp_path / "mean", ["joint.max_drift=1e-6"], offline=True)
    with pytest.raises(UsageError, match="is its own model"):
        average(pair, tmp_path / "mean", base=str(pair[0] / "model"), offline=True)
    assert not (tmp_path / "mean").exists()


# What it is trained beside


def test_another_original_is_refused(tmp_path: Path, made: tuple[str, Path]) -> None:
    _, folder = made
    along = {"profile": "joint", "train.steps": 2}
    with pytest.raises(UsageError, match="is its own model") as caught:
        convert(str(folder / "model"), None, tmp_path / "on", along, start_from=folder, quiet=True, offline=True)
    assert "profile=frozen" in str(caught.value.hint)
    other = saved_model(tmp_path / "other")
    build("llama", seed=1).save_pretrained(other)
    with pytest.raises(UsageError, match="another one, which differs in its norms"):
        convert(str(other), None, tmp_path / "on", along, start_from=folder, quiet=True, offline=True)


def test_a_checkpoint_keeps_its_profile_and_a_lora_that_began_elsewhere_is_no_beginning(
    tmp_path: Path, texts: Path, made: tuple[str, Path]
) -> None:
    kind, folder = made
    step = folder_of(folder) / "step-000008"
    with pytest.raises(UsageError, match="is a checkpoint of the profile joint, which goes on as it was begun"):
        convert(None, None, tmp_path / "on", ["profile=frozen"], start_from=step, quiet=True, offline=True)
    on = tmp_path / "twice"
    run(on, texts, **keys(kind, start_from=folder, train__steps=2), keep_checkpoints=True)
    step = folder_of(on) / "step-000002"
    if kind == "full":
        run(tmp_path / "more", texts, **keys(kind, start_from=step, train__steps=2))
        assert same(tmp_path / "more", on)
    else:
        with pytest.raises(UsageError, match="holds what changed since alone"):
            run(tmp_path / "more", texts, **keys(kind, start_from=step, train__steps=2))
