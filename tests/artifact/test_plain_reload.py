"""What an artifact does to a person who loads it with something else, and what it tells of who made it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from several_processes import saved_model
from tiny_conversion import RECIPE, tokenizer
from tiny_models import ARCHITECTURES, VOCABULARY, build
from transformers import AutoModelForCausalLM, PreTrainedModel

from retrofit.adapters.attach import Attached, attach
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.roles import ROLES
from retrofit.artifact import folder as artifact
from retrofit.cli import main as cli
from retrofit.errors import ArtifactError, UsageError
from retrofit.eval import certify
from retrofit.hub import Base
from retrofit.recipes.convert import convert
from retrofit.recipes.naming import published_base, published_recipe
from retrofit.recipes.schema import load_recipe
from retrofit.runtime.engine import Engine

USER = "alice-liddell"
SHORT = {"train.steps": 2, "train.warmup": 0, "train.save_every": 0}


def randomised(attached: Attached) -> Attached:
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.normal_(std=0.3)
    return attached


def peft_folder(model: PreTrainedModel, folder: Path) -> Path:
    """The adapter folder of an artifact whose adapter changes everything where it acts."""
    attached = randomised(
        attach(model, DraftLayout(), rank=2, alpha=2.0, targets=ROLES, markov_rank=2, confidence=True)
        if "experts" not in {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        else attach(model, DraftLayout(), rank=2, alpha=2.0, targets=ROLES[:4], markov_rank=2, confidence=True)
    )
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(attached.adapter_config("owner/model")))
    save_file(attached.adapter_state(), folder / "adapter_model.safetensors")
    attached.detach()
    return folder


def without_tokens(folder: Path) -> Path:
    """As `convert` wrote it before."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["alora_invocation_tokens"]
    path.write_text(json.dumps(config))
    return folder


PROMPTS = [[5, 9, 2, 33, 7, 1, 60, 12], [VOCABULARY - 1] * 5, list(range(40))]


def said(model: Any) -> list[Any]:
    """Logits of forwards of all kinds, and what is generated, with a cache and without."""
    model.eval()
    found: list[Any] = []
    with torch.no_grad():
        for prompt in PROMPTS:
            found.append(model(input_ids=torch.tensor([prompt])).logits)
        batch = torch.tensor([[0, 0, 0, 4, 8], [7, 6, 5, 4, 3]])
        mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
        found.append(model(input_ids=batch, attention_mask=mask).logits)
        embedded = model.get_input_embeddings()(torch.tensor([PROMPTS[0]]))
        found.append(model(inputs_embeds=embedded).logits)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        for use_cache in (True, False):
            found.append(model.generate(input_ids=batch, attention_mask=mask, use_cache=use_cache, **options))
        scores = model.generate(
            input_ids=torch.tensor([PROMPTS[0]]), output_logits=True, return_dict_in_generate=True, **options
        )
        found += [scores.sequences, *scores.logits]
    return found


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.filterwarnings("ignore")  # PEFT says that without token ids the adapter stays off
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plain_peft_leaves_the_base_as_it_was(name: str, tmp_path: Path) -> None:
    base, folder = build(name), peft_folder(build(name), tmp_path / "adapter")
    want = said(base)
    assert same(said(PeftModel.from_pretrained(build(name), folder)), want)
    assert not same(said(PeftModel.from_pretrained(build(name), without_tokens(folder))), want)


@pytest.mark.filterwarnings("ignore")
def test_so_do_transformers_and_an_adapter_put_in_by_hand(tmp_path: Path) -> None:
    folder = peft_folder(build("llama"), tmp_path / "adapter")
    want = said(build("llama"))
    loaded = build("llama")
    loaded.load_adapter(str(folder))
    assert any("lora_A" in key for key in loaded.state_dict())
    assert same(said(loaded), want)
    config = LoraConfig.from_pretrained(folder)
    by_hand = inject_adapter_in_model(config, build("llama"))
    set_peft_model_state_dict(by_hand, load_file(folder / "adapter_model.safetensors"))
    assert same(said(by_hand), want)


def test_it_cannot_be_merged_into_the_base(tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(build("llama"), peft_folder(build("llama"), tmp_path / "adapter"))
    with pytest.raises(NotImplementedError, match="aLoRA does not support"):
        model.merge_and_unload()


def test_no_vocabulary_has_the_tokens_that_would_wake_it(tmp_path: Path) -> None:
    model = build("llama")
    found = randomised(attach(model, DraftLayout(), rank=2, alpha=2.0, targets=["q"], markov_rank=2, confidence=True))
    config = found.adapter_config("owner/model")
    assert config["alora_invocation_tokens"] == [2**31 - 1]
    assert (config["task_type"], config["peft_type"]) == ("CAUSAL_LM", "LORA")
    assert config["base_model_name_or_path"] == "owner/model"


# What it tells


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A person's own folder, with a model and text in it."""
    home = tmp_path_factory.mktemp("home") / USER
    (home / "work").mkdir(parents=True)
    saved_model(home / "work" / "my-model")
    texts = home / "texts"
    texts.mkdir()
    for number in range(4):
        (texts / f"{number}.txt").write_text("def area(radius): return radius\n" * (3 + number))
    return home


@pytest.fixture(scope="module")
def made(home: Path) -> Path:
    """An artifact that the command writes there, and its certificate."""
    recipe = {**RECIPE, **SHORT, "data.source": [{"source": str(home / "texts")}, {"source": str(home / "texts")}]}
    model = home / "work" / "my-model"
    convert(str(model), "tiny", home / "out", recipe, quiet=True, offline=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(certify.LEVELS, "quick", certify.Size(1, 4, 200))
        certify.certify(home / "out", progress=False).save(home / "out")
    return home / "out"


def texts_of(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != artifact.LOCAL]
    return {path.relative_to(folder).as_posix(): path.read_bytes().decode(errors="replace") for path in files}


def test_no_file_tells_of_the_place_or_the_person(made: Path, home: Path) -> None:
    found = texts_of(made)
    assert {"retrofit.json", "recipe.yaml", "README.md", "metrics.jsonl", "certificate.json"} <= set(found)
    for name, text in found.items():
        for secret in (USER, str(home), str(home.parent), str(Path.cwd())):
            assert secret not in text, f"{name} tells {secret}"
    kept = json.loads((made / artifact.LOCAL).read_text())
    assert kept == {"base": str(home / "work" / "my-model"), "data": [str(home / "texts")] * 2}
    assert artifact.LOCAL not in json.loads(found["manifest.sha256.json"])["files"]


def test_what_is_told_instead(made: Path) -> None:
    config = artifact.read_config(made)
    named = {key: config["base"][key] for key in ("model", "revision", "local")}
    assert named == {"model": "my-model", "revision": None, "local": True}
    adapter = json.loads((made / "adapter/adapter_config.json").read_text())
    # A folder's name may be the id of somebody else's model.
    assert adapter["base_model_name_or_path"] is None and adapter["revision"] is None
    assert adapter["alora_invocation_tokens"] == [2**31 - 1]
    plan = load_recipe(made / "recipe.yaml")
    assert plan.base.model == "./my-model" and [one.source for one in plan.data.source] == ["./texts"] * 2


def command(*arguments: Any) -> Any:
    return CliRunner(env={"RETROFIT_DEVICE": "cpu"}).invoke(cli.main, [str(one) for one in arguments])


def test_the_same_machine_needs_no_option(made: Path) -> None:
    done = command("generate", made, "def ", "--max-new-tokens", 4, "--offline", "-q")
    assert done.exit_code == 0, done.output


def test_another_machine_is_told_what_to_give(made: Path, home: Path, tmp_path: Path) -> None:
    """A published copy lacks local.json; a copied one has it, but not the folder."""
    published, copied = tmp_path / "published", tmp_path / "copied"
    for folder in (published, copied):
        shutil.copytree(made, folder)
    (published / artifact.LOCAL).unlink()
    (copied / artifact.LOCAL).write_text(json.dumps({"base": str(tmp_path / "gone")}))
    for folder, message in ((published, "made of my-model, a model that lay"), (copied, f"{tmp_path}/gone, which is")):
        for words in (["generate", folder, "def "], ["certify", folder]):
            done = command(*words, "--offline", "-q")
            assert done.exit_code == 2, done.output
            assert message in done.stderr and "--base" in done.stderr and done.stderr.count("\n") == 2
        given = command("generate", folder, "def ", "--base", home / "work" / "my-model", "-q", "--max-new-tokens", 2)
        assert given.exit_code == 0, given.output
    (copied / artifact.LOCAL).write_text("[]")
    with pytest.raises(ArtifactError, match=r"local\.json: must be a JSON object"):
        Engine.load(copied)


def test_another_base_in_the_place_of_the_first_is_noticed(made: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(made, copied)
    other = tmp_path / "other"
    build("llama", seed=1).save_pretrained(other)
    (copied / artifact.LOCAL).write_text(json.dumps({"base": str(other)}))
    with pytest.raises(ArtifactError, match="belongs to another base"):
        Engine.load(copied)


def test_artifacts_that_name_a_path_still_load(made: Path, home: Path, tmp_path: Path) -> None:
    """As `convert` wrote them before: no `local`, no local.json, no tokens in the adapter's configuration."""
    found, config = artifact.read(made), json.loads((made / "retrofit.json").read_text())
    del config["base"]["local"]
    config["base"]["model"] = str(home / "work" / "my-model")
    plain = {key: value for key, value in found.adapter_config.items() if key != "alora_invocation_tokens"}
    old = artifact.write(
        tmp_path / "old", adapter_config=plain, adapter_state=found.adapter_state, heads=found.heads, config=config,
        recipe_yaml="profile: frozen\n", card="# card\n",
    )  # fmt: skip
    assert sorted(path.name for path in old.iterdir() if "json" in path.name) == [
        "manifest.sha256.json",
        "retrofit.json",
    ]
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    engines = [Engine.load(folder) for folder in (old, made)]
    for way in ({}, {"strategy": "two_forward"}, {"strategy": "fused", "tree": 0}, {"mode": "diffusion"}):
        one, other = (engine.generate(prompts, max_new_tokens=8, **way) for engine in engines)
        assert [result.tokens for result in one] == [result.tokens for result in other]
        if way:  # `auto` chooses by what forwards cost on the day
            assert [result.stats.forwards for result in one] == [result.stats.forwards for result in other]


def test_a_live_model_from_a_folder_tells_no_more(home: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(home / "work" / "my-model")
    recipe = {**RECIPE, **SHORT, "data.source": str(home / "texts")}
    convert(model, "tiny", tmp_path / "out", recipe, quiet=True, tokenizer=tokenizer())
    for name, text in texts_of(tmp_path / "out").items():
        assert USER not in text and str(home) not in text, name
    assert artifact.read_config(tmp_path / "out")["base"]["model"] == "my-model"
    assert Engine.load(tmp_path / "out").generate([[1, 2, 3]], max_new_tokens=4)
    convert(build("llama"), "tiny", tmp_path / "nameless", recipe, quiet=True, tokenizer=tokenizer())
    with pytest.raises(UsageError, match="made of LlamaForCausalLM"):
        Engine.load(tmp_path / "nameless")


NAMES = {
    "tiny": ("tiny", None, False),
    "Qwen/Qwen3-0.6B": ("Qwen/Qwen3-0.6B", "main", False),
    "gpt2": ("gpt2", "main", False),
    f"/home/{USER}/models/mine": ("mine", None, True),
    f"C:\\Users\\{USER}\\mine": ("mine", None, True),
    f"../{USER}/mine": ("mine", None, True),
    f"/home/{USER}/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/0123abc": (
        "Qwen/Qwen3-0.6B",
        "0123abc",
        False,
    ),
    "~": ("model", None, True),
    "/": ("model", None, True),
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    base = Base(None, None, name, "main" if NAMES[name][1] == "main" else None, None, {})
    named = published_base(base)
    assert (named["model"], named["revision"], named["local"]) == NAMES[name]
    plan = published_recipe(load_recipe(None, {"data.source": "owner/texts"}), named)
    assert plan.base.model == ("./" if named["local"] else "") + named["model"]
    assert plan.data.source == "owner/texts"


def test_a_home_is_not_told_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = saved_model(tmp_path / USER)
    monkeypatch.setenv("HOME", str(home))
    assert os.path.expanduser("~") == str(home)  # noqa: PTH111
    assert published_base(Base(None, None, str(home), None, home, {}))["model"] == "model"


# The card


def test_the_card_offers_nothing_that_it_forbids(made: Path, home: Path, tmp_path: Path) -> None:
    """The Hub shows how to load a model by its `library_name`, and by `base_model`, which must be an id there."""
    card = (made / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "library_name: retrofit\n" in front and "base_model" not in front
    assert "PeftModel" not in card and "Do not load" not in card
    assert "plain PEFT leaves the original model as it is" in card
    assert 'Engine.load("PATH-OF-THIS-FOLDER", base="PATH-OF-THE-BASE")' in card
    model = AutoModelForCausalLM.from_pretrained(home / "work" / "my-model")
    model.config._name_or_path = "owner/my-model"
    recipe = {**RECIPE, **SHORT, "data.source": str(home / "texts")}
    convert(model, "tiny", tmp_path / "out", recipe, quiet=True, tokenizer=tokenizer())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: owner/my-model\nbase_model_relation: adapter\n" in card.split("---\n")[1]
    assert 'Engine.load("PATH-OF-THIS-FOLDER")' in card
