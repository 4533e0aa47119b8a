"""PEFT adapters of strangers: two files of a repository are fetched, whole and pinned to a commit, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import done
from loopback_hub import Hub
from safetensors.torch import save
from tiny_models import build

from retrofit.adapters.attach import attach
from retrofit.adapters.layout import DraftLayout
from retrofit.artifact.safety import LARGEST_JSON
from retrofit.errors import ArtifactError, ResourceError, UsageError
from retrofit.sharing.adapters import CONFIG, WEIGHTS, adapter_folder

NAME = "stranger/model"
FILES = {CONFIG: b"{}", WEIGHTS: save({"x": torch.ones(2)})}
INSIDE = {f"linear_spec_lora/{name}": data for name, data in FILES.items()}
OTHERS = {"model.safetensors": b"large", "modeling.py": b"import os", "linear_spec_lora/training_args.bin": b"a pickle"}


def fetched(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_only_its_two_files_come(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add(NAME, {**INSIDE, **OTHERS})
    found = adapter_folder(NAME, "linear_spec_lora")
    assert (found.repository, found.commit) == (f"{NAME}/linear_spec_lora", commit)
    assert {path.name: path.read_bytes() for path in found.folder.iterdir()} == FILES
    assert fetched(tmp_path / "cache") == ["@default", CONFIG, WEIGHTS]
    hub.log.clear()
    assert adapter_folder(NAME, "linear_spec_lora", offline=True) == found and hub.log == []
    with pytest.raises(ResourceError, match="nothing of that name from the Hub is kept"):
        adapter_folder(NAME, offline=True)


def test_in_the_root(hub: Hub) -> None:
    commit = hub.add(NAME, {**FILES, **OTHERS})
    found = adapter_folder(f"{NAME}@{commit}")
    assert (found.repository, found.commit) == (NAME, commit) and fetched(found.folder) == [CONFIG, WEIGHTS]


def test_it_says_where_an_adapter_is(hub: Hub) -> None:
    hub.add(NAME, {**INSIDE, **OTHERS})
    with pytest.raises(ArtifactError, match=r"holds no adapter_config\.json, so it is no PEFT adapter") as error:
        adapter_folder(NAME)
    assert error.value.hint == "add --subfolder linear_spec_lora"
    with pytest.raises(UsageError, match="is no folder inside of"):
        adapter_folder(NAME, "../linear_spec_lora")


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({CONFIG: b"{}", "adapter_model.bin": b"a pickle"}, "may be a pickle"),
        ({CONFIG: b"{}", WEIGHTS: b"none"}, rf"^{NAME} at \w{{12}}: {WEIGHTS}: no intact safetensors file"),
        ({CONFIG: b" " * (LARGEST_JSON + 1), WEIGHTS: FILES[WEIGHTS]}, f"has {LARGEST_JSON + 1:,} bytes"),
    ],
    ids=["pickle", "damaged", "huge"],
)
def test_what_is_none_is_not_kept(hub: Hub, tmp_path: Path, files: dict[str, bytes], problem: str) -> None:
    hub.add(NAME, files)
    with pytest.raises(ArtifactError, match=problem):
        adapter_folder(NAME)
    assert fetched(tmp_path / "cache") == ["@default"]


def test_a_repository_is_imported(hub: Hub, base: Path, tmp_path: Path) -> None:
    attached = attach(build("llama"), DraftLayout(), rank=2, alpha=4, targets=["o"], markov_rank=0, confidence=False)
    state = {name: torch.ones_like(tensor) for name, tensor in attached.adapter_state().items()}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"]}
    commit = hub.add(NAME, {f"lora/{CONFIG}": json.dumps(config).encode(), f"lora/{WEIGHTS}": save(state)})
    out = tmp_path / "out"
    done("import", NAME, "--subfolder", "lora", "--base", base, "--style", "uno", "-o", out)
    assert json.loads((out / "retrofit.json").read_text())["imported"]["commit"] == commit
    assert f"imported from `{NAME}/lora` on the Hub, commit {commit}," in (out / "README.md").read_text()
    assert f"from {NAME}/lora @ {commit}, as uno" in done("inspect", out)
