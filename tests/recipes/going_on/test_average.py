"""`average`: the mean of several artifacts or checkpoints of one base, as an artifact of its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import refused
from commands import run as command
from safetensors.torch import load_file
from several_processes import run_folder, saved_model

from retrofit import Engine
from retrofit.artifact import folder as artifact
from retrofit.artifact.files import sha256
from retrofit.errors import ArtifactError, UsageError
from retrofit.recipes.average import average
from retrofit.recipes.training.checkpoint import folder_of

SHORT = {"train__steps": 4, "train__save_every": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Path, texts: Path) -> tuple[Path, Path]:
    """Two artifacts of one base; the checkpoints of the first were kept."""
    folder = tmp_path_factory.mktemp("made")
    run_folder(folder / "one", model, texts, **SHORT, keep_checkpoints=True)
    run_folder(folder / "two", model, texts, **SHORT, train__seed=1)
    return folder / "one", folder / "two"


def weights(out: Path) -> dict[str, torch.Tensor]:
    named = load_file(out / artifact.ADAPTER) | load_file(out / artifact.HEADS)
    return {name: tensor for name, tensor in named.items() if name != "confidence_temperature"}


def test_the_mean_of_two(tmp_path: Path, made: tuple[Path, Path]) -> None:
    told: list[str] = []
    done = average(made, tmp_path / "mean", weights=[1, 3], offline=True, say=told.append)
    one, two, mean = weights(made[0]), weights(made[1]), weights(tmp_path / "mean")
    assert all(torch.equal(mean[n], (one[n].double() / 4 + two[n].double() * 3 / 4).float()) for n in one)
    averaged = done.config["averaged"]
    assert [(a["kind"], a["sha256"], a["steps"], a["weight"]) for a in averaged] == [
        ("artifact", sha256(folder / artifact.MANIFEST), 4, share)
        for folder, share in zip(made, (0.25, 0.75), strict=True)
    ]
    assert [line.partition(":")[0] for line in told[:3]] == [str(made[0]), str(made[1]), "their mean"]
    assert f"tau {averaged[0]['tau']:.3f}" in told[0]
    assert done.config["training"] == {} and done.config["acceptance"]["ranks"]
    assert str(tmp_path) not in (tmp_path / "mean" / artifact.CONFIG).read_text()
    assert "mean of 2" in (tmp_path / "mean" / "README.md").read_text()


def test_of_one_thing_twice_it_is_that(tmp_path: Path, made: tuple[Path, Path]) -> None:
    average([made[0]] * 2, tmp_path / "mean", ["data.held_out=0"], offline=True)
    one, mean = weights(made[0]), weights(tmp_path / "mean")
    assert all(torch.equal(one[name], mean[name]) for name in one)
    assert artifact.read_config(tmp_path / "mean")["acceptance"] == {}


def test_checkpoints_and_artifacts_mix(tmp_path: Path, made: tuple[Path, Path]) -> None:
    early, late = (folder_of(made[0]) / f"step-00000{step}" for step in (2, 4))
    average([early, late], tmp_path / "checkpoints", offline=True)
    average([early, made[0]], tmp_path / "mixed", offline=True)
    one, other = weights(tmp_path / "checkpoints"), weights(tmp_path / "mixed")
    assert all(torch.equal(one[name], other[name]) for name in one)
    kinds = [a["kind"] for a in artifact.read_config(tmp_path / "mixed")["averaged"]]
    assert kinds == ["checkpoint", "artifact"]


def test_what_it_replaces_leaves_no_certificate(tmp_path: Path, made: tuple[Path, Path]) -> None:
    own = shutil.copytree(made[0], tmp_path / "own")
    artifact.add(own, "certificate.json", json.dumps({"ok": True}))
    with pytest.raises(UsageError, match="holds an artifact already"):
        average([own, made[1]], own, offline=True)
    average([own, made[1]], own, offline=True, overwrite=True)
    assert not (own / "certificate.json").exists()
    artifact.check(own)


def test_it_decodes_as_its_base_does(tmp_path: Path, made: tuple[Path, Path]) -> None:
    average(made, tmp_path / "mean", offline=True)
    with Engine.load(tmp_path / "mean", device="cpu", offline=True) as engine:
        ar, spec = (
            engine.generate([[1, 2, 3]], mode=mode, max_new_tokens=12)[0].tokens for mode in ("ar", "self_spec")
        )
    assert ar == spec


def test_another_base_adapter_or_layout(tmp_path: Path, made: tuple[Path, Path], texts: Path) -> None:
    other = saved_model(tmp_path / "base", "qwen3")
    run_folder(tmp_path / "three", other, texts, **{**SHORT, "adapter__rank": 4, "draft__block": 3})
    with pytest.raises(ArtifactError) as caught:
        average([made[0], tmp_path / "three"], tmp_path / "mean", offline=True)
    for part in ("the config of its base", "adapter.rank (4, there 2)", "draft.block (3, there 4)"):
        assert part in str(caught.value)
    with pytest.raises(ArtifactError, match="base differs in its config from"):
        average(made, tmp_path / "mean", base=str(other), offline=True)
    assert not (tmp_path / "mean").exists()


def test_bases_held_in_other_bits(tmp_path: Path, made: tuple[Path, Path]) -> None:
    for name, held in (("nf4", "nf4"), ("int8", "int8wo")):
        found = artifact.read(made[0])
        config = {**found.config, "base": {**found.config["base"], "quantization": held}}
        texts = {"recipe_yaml": (made[0] / "recipe.yaml").read_text(), "card": "# One\n"}
        state = {"adapter_config": found.adapter_config, "adapter_state": found.adapter_state, "heads": found.heads}
        artifact.write(tmp_path / name, config=config, **state, **texts)
    for others, told in (((tmp_path / "nf4", tmp_path / "int8"), "int8wo, there nf4"), (
        (made[0], tmp_path / "nf4"), "nf4, there none",
    )):  # fmt: skip
        with pytest.raises(ArtifactError, match=rf"it has another base.quantization \({told}\)"):
            average(others, tmp_path / "mean", offline=True)
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize(
    ("count", "weights", "message"),
    [
        (1, None, "nothing to average"),
        (2, [1.0], "1 weights for 2"),
        (2, [1.0, 0.0], "weights 1, 0: each has to be"),
        (2, [1.0, float("nan")], "each has to be"),
    ],
)
def test_weights_that_are_none(
    tmp_path: Path, made: tuple[Path, Path], count: int, weights: list[float] | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        average(made[:count], tmp_path / "mean", weights=weights, offline=True)


def test_the_command(tmp_path: Path, made: tuple[Path, Path], somewhere: None) -> None:
    done = command("average", *made, "-o", "mean", "--weights", "1,2", "data.held_out=0", "--offline")
    assert (done.exit_code, done.stdout) == (0, "mean\n"), done.stderr
    assert "next: retrofit certify mean" in done.stderr
    shown = command("inspect", "mean").stdout
    assert "weight 0.333" in shown and "weight 0.667" in shown
    assert "numbers with commas" in refused(command("average", *made, "-o", "other", "--weights", "1;2"), 2)
    assert "--overwrite" in refused(command("average", *made, "-o", "mean"), 2)
