"""Which files hold a base's weights, and that every tensor of the model came from them: else refused, by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_conversion import RECIPE, tokenizer
from tiny_models import ARCHITECTURES, CONFIGS, build
from transformers import AutoModelForCausalLM

from retrofit.artifact import folder as artifact
from retrofit.cli import main as cli
from retrofit.errors import ArtifactError, UnsupportedModelError, UsageError
from retrofit.eval.weights import compare_base
from retrofit.hub import load_base
from retrofit.locating import locate
from retrofit.recipes.convert import convert
from retrofit.runtime import loading
from retrofit.runtime.backends.fused import weights
from retrofit.runtime.backends.fused.weights import from_folder
from retrofit.runtime.engine import Engine
from retrofit.weight_files import file_fingerprint, stored_dtype, weight_files, weights_here

INDEX = "model.safetensors.index.json"
SHORT = {"train.steps": 1, "train.warmup": 0, "train.save_every": 0, "data.held_out": 0}


def load(folder: Path, **options: Any) -> Any:
    return load_base(str(folder), dtype="float32", offline=True, need_tokenizer=False, **options)


def saved(folder: Path, name: str = "llama", shard: str | None = None) -> Path:
    model = build(name)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    tokenizer().save_pretrained(folder)
    return folder


def rewritten(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_transformers_saves_is_loaded_whole(name: str, tied: bool, tmp_path: Path) -> None:
    """No false alarm: tied or not, whatever a model's class leaves out of a file or renames in it."""
    config = CONFIGS[name]()
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    base = load(tmp_path)
    ours, theirs = base.model.state_dict(), model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert not hasattr(base.model.config, "transformers_weights")
    found = compare_base(base.model, tmp_path)
    assert [found[kind] for kind in ("changed", "not_loaded", "not_in_checkpoint")] == [0, 0, 0]


def test_buffers_of_old_checkpoints_are_no_weights(tmp_path: Path) -> None:
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    base = load(rewritten(saved(tmp_path / "base"), lambda state: {**state, **old}))
    assert compare_base(base.model, base.place)["not_loaded"] == 0
    loading._check_tensors("base", base.place, base.model.config)


def _renamed(prefix: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def _without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


NORM = "model.norm.weight"
FAULTS = {
    "compiled": (_renamed("_orig_mod."), "21 missing (lm_head.weight, ...)", "compiled model"),
    "peft": (_renamed("base_model.model."), "base_model.model.lm_head.weight", "merge its adapter first"),
    "adapter inside": (
        lambda state: {name.replace("q_proj.", "q_proj.base_layer."): tensor for name, tensor in state.items()},
        "q_proj.base_layer.weight",
        "merge it first",
    ),
    "ddp": (_renamed("module."), "module.lm_head.weight", "DistributedDataParallel"),
    "one missing": (_without(NORM), f"1 missing ({NORM})", "cut short"),
    "one more": (lambda state: {**state, "score.weight": torch.ones(2)}, "1 without a place in it (score.weight)", ""),
    "another shape": (lambda state: {**state, NORM: torch.ones(31)}, f"1 of another shape ({NORM})", "config.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_do_not_fit_are_refused_by_name(fault: str, tmp_path: Path) -> None:
    change, message, hint = FAULTS[fault]
    base = rewritten(saved(tmp_path / "base"), change)
    with pytest.raises(UnsupportedModelError) as caught:
        load(base)
    assert message in str(caught.value) and hint in str(caught.value.hint)
    whole = load(base, with_model=False)
    with pytest.raises(UnsupportedModelError) as caught:  # before a GPU is asked for
        loading._check_tensors(whole.name, base, loading.text_config(base))
    assert message in str(caught.value) and hint in str(caught.value.hint)


def command(*arguments: Any) -> Any:
    return CliRunner(env={"RETROFIT_DEVICE": "cpu"}).invoke(cli.main, [str(one) for one in arguments])


@pytest.mark.parametrize("fault", ["compiled", "one missing"])
def test_convert_refuses_and_writes_nothing(fault: str, tmp_path: Path, texts: Path) -> None:
    base = rewritten(saved(tmp_path / "base"), FAULTS[fault][0])
    done = command("convert", base, f"data.source={texts}", "-o", tmp_path / "out", "--offline", "--dtype", "float32",
                   "data.max_length=24")  # fmt: skip
    assert done.exit_code == 1, done.output
    assert FAULTS[fault][1] in done.stderr and FAULTS[fault][2] in done.stderr
    assert done.stderr.count("\n") == 2 and not done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# Files


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in several files, and an artifact made of it."""
    folder = saved(tmp_path_factory.mktemp("shards") / "base", shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def twice(base: Path, to: Path) -> Path:
    """The base with all its weights in one more file, named as other programs name theirs."""
    shutil.copytree(base, to)
    state = {}
    for path in sorted(to.glob("*.safetensors")):
        state.update(load_file(path))
    save_file({name.replace("model.", ""): tensor for name, tensor in state.items()}, to / "consolidated.safetensors")
    return to


def test_the_index_decides(shards: Path, tmp_path: Path, texts: Path) -> None:
    base = twice(shards, tmp_path / "base")
    names = {path.name for path in shards.glob("*.safetensors")}
    assert {path.name for path in weight_files(base)} == names
    plain, double = load(shards), load(base)
    assert plain.fingerprint == double.fingerprint
    assert stored_dtype(weight_files(base)) == "float32"
    found = compare_base(double.model, base)
    assert found["tensors"] == len(plain.model.state_dict()) and not found["not_loaded"]
    assert torch.equal(from_folder(base, "cpu")(NORM), plain.model.state_dict()[NORM])
    overrides = {**RECIPE, **SHORT, "data.source": str(texts)}
    convert(str(shards), "tiny", tmp_path / "out", overrides, quiet=True, offline=True)
    done = command("generate", tmp_path / "out", "abc", "--base", base, "--max-new-tokens", 4, "--offline")
    assert done.exit_code == 0, done.output
    assert compare_base(Engine.load(tmp_path / "out", base=str(base)).attached.model, base)["changed"] == 0


def test_an_artifact_that_counted_every_file_still_loads(shards: Path, tmp_path: Path) -> None:
    base = twice(shards, tmp_path / "base")
    loaded = load(base)
    every = file_fingerprint(base, loaded.model.config.to_dict(), list(base.glob("*.safetensors")))
    assert every != loaded.fingerprint

    old = {"model": "old", "fingerprint": every}
    loading.check_same_base(loaded, artifact.Artifact(tmp_path, {"profile": "frozen", "base": old}, {}, {}, {}))
    old["fingerprint"] = {**every, "norms": "other"}
    with pytest.raises(ArtifactError, match="another base"):
        loading.check_same_base(loaded, artifact.Artifact(tmp_path, {"profile": "frozen", "base": old}, {}, {}, {}))


def test_an_index_wins_over_a_single_file(shards: Path, tmp_path: Path) -> None:
    """What is loaded, and what the fingerprint tells of, are the same files."""
    base = tmp_path / "base"
    shutil.copytree(shards, base)
    stale = {name: torch.zeros_like(tensor) for name, tensor in build("llama").state_dict().items()}
    save_file(stale, base / "model.safetensors", {"format": "pt"})
    loaded = load(base)
    assert torch.equal(loaded.model.state_dict()[NORM], build("llama").state_dict()[NORM])
    assert loaded.fingerprint == load(shards).fingerprint
    assert compare_base(loaded.model, base)["changed"] == 0


def test_an_index_left_over_does_not_count(shards: Path, tmp_path: Path) -> None:
    """`save_pretrained` into a folder of shards removes them, and leaves their index there."""
    base = tmp_path / "base"
    shutil.copytree(shards, base)
    load(base).model.save_pretrained(base)
    assert (base / INDEX).is_file()
    assert [path.name for path in weight_files(base)] == [path.name for path in base.glob("*.safetensors")]
    assert torch.equal(load(base).model.state_dict()[NORM], build("llama").state_dict()[NORM])


def test_a_shard_that_is_missing_is_named(shards: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(shards, base)
    gone = sorted(base.glob("*.safetensors"))[1]
    gone.unlink()
    assert weights_here(base) == []
    done = command("convert", base, "-o", tmp_path / "out", "--offline", "--dtype", "float32", "data.max_length=24")
    assert done.exit_code == 1, done.output
    assert f"{gone}: missing, though {INDEX} names it" in done.stderr and "cut short" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_an_index_that_says_nothing(text: str, tmp_path: Path) -> None:
    saved(tmp_path / "base")
    (tmp_path / "base" / INDEX).write_text(text)
    with pytest.raises(UnsupportedModelError, match=f"{INDEX}: does not say which file holds which tensor"):
        load(tmp_path / "base")


def test_without_an_index(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    before = load(base).fingerprint
    save_file({"else": torch.ones(2)}, base / "adapter_model.safetensors")
    assert [path.name for path in weight_files(base)] == ["model.safetensors"]
    assert load(base).fingerprint == before
    (base / "model.safetensors").rename(base / "weights.safetensors")
    with pytest.raises(UnsupportedModelError, match="2 safetensors files, and no model"):
        load(base)
    (base / "adapter_model.safetensors").unlink()
    assert load(base).fingerprint == before  # the only one there is
    (base / "weights.safetensors").unlink()
    with pytest.raises(UsageError, match="no safetensors weights"):
        load(base)
    assert weights_here(base) == []


def test_a_configuration_may_name_its_weights(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    shutil.copy(base / "model.safetensors", base / "right.safetensors")
    rewritten(base, lambda state: {name: torch.zeros_like(tensor) for name, tensor in state.items()})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "transformers_weights": "right.safetensors"}))
    loaded = load(base)
    assert torch.equal(loaded.model.state_dict()[NORM], build("llama").state_dict()[NORM])
    assert compare_base(loaded.model, base)["changed"] == 0


@pytest.mark.parametrize("keep", [3, 5000])
def test_a_file_cut_short_is_named(keep: int, tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    for options in ({}, {"with_model": False}):
        with pytest.raises(UnsupportedModelError, match=f"{path}: no intact safetensors file") as caught:
            load(base, **options)
        assert "again" in str(caught.value.hint)


def test_a_tied_head_saved_with_another_value(tmp_path: Path) -> None:
    """transformers does not tie those two; the fused decoder reads the same head."""
    base = saved(tmp_path / "base", "llama_tied")
    rewritten(base, lambda state: {**state, "lm_head.weight": 2 * state["model.embed_tokens.weight"]})
    loaded = load(base)
    assert not torch.equal(loaded.model.lm_head.weight, loaded.model.model.embed_tokens.weight)
    read = weights.load(loaded.model.config, from_folder(base, "cpu"), {}, 1.0, torch.device("cpu"), torch.float32)
    assert torch.equal(read.head.weight, loaded.model.lm_head.weight)
    assert torch.equal(read.embedding, loaded.model.model.embed_tokens.weight)


@pytest.mark.parametrize("indexed", [True, False])
def test_only_what_is_loaded_is_downloaded(indexed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the Hub's own filter, over the names of a repository that holds its weights more than once."""
    from huggingface_hub.utils import filter_repo_objects

    shard = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    other = ["consolidated.safetensors", "consolidated-1.safetensors", "original/model.safetensors", "x/y.safetensors"]
    loaded = shard if indexed else ["model.safetensors"]
    names = ["config.json", "tokenizer.json", "pytorch_model.bin", "README.md", *loaded, *other]
    if indexed:
        names += [INDEX, "model.fp16.safetensors"]
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys("ab", shard[0]) | {"c": shard[1]}}))
    got: set[str] = set()

    def snapshot(name: str, allow_patterns: Any, ignore_patterns: Any = None, **options: Any) -> str:
        got.update(filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert locate("owner/model") == tmp_path
    assert got == {"config.json", "tokenizer.json", *loaded, *([INDEX] if indexed else [])}
    got.clear()
    locate("owner/model", weights=False)
    assert not any(name.endswith(".safetensors") for name in got)


@pytest.mark.parametrize("device", ["mps", "xpu", "meta", "cuda"])
def test_devices_that_are_not_served(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = command("convert", saved(tmp_path / "base"), "-o", tmp_path / "out", "--offline", "--device", device)
    assert done.exit_code == (4 if device == "cuda" else 2), done.output
    assert ("no CUDA GPU" if device == "cuda" else f"does not run on {device} devices") in done.stderr
    assert "use --device cpu" in done.stderr and not (tmp_path / "out").exists()


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="quantised") as caught:
        load(base)
    assert "original weights" in str(caught.value.hint)
