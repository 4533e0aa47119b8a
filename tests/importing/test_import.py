"""`retrofit import`: what comes over drafts as its own program does, and what cannot is refused, all of it."""

import json

import pytest
import torch
from commands import done, refused, run
from replay import Replay
from safetensors.torch import load_file, save_file
from saved import save_artifact, texts
from tiny_models import build

from retrofit import import_adapter
from retrofit.adapters.attach import attach
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.roles import ROLES
from retrofit.artifact import folder as artifacts
from retrofit.cli.exchange import STYLES as OFFERED
from retrofit.errors import ArtifactError, DataError, UsageError
from retrofit.exporting.export import export
from retrofit.importing.import_adapter import STYLES
from retrofit.recipes.schema import load_recipe
from retrofit.runtime.engine import Engine
from retrofit.runtime.plan import noise_token

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NOISE = DraftLayout(3, input="noise", attention="causal")
BLOCK = DraftLayout(4, shift=0, seed_row="draft")
ALONE = {"markov_rank": 0, "confidence": False}
PROMPTS = [[5, 9, 2, 33, 7, 1, 60, 12], [4, 5], *([n] * 5 for n in range(6))]
NEW = 40
VOCABULARY = 64
MASK = 7


def peft_folder(folder, *, targets=("o",), rank=4, alpha=16, trunk="encoder", config=None, change=None):
    """An adapter as Nemotron's is published; config: keys that are otherwise; change: of the tensors."""
    torch.manual_seed(1)
    attached = attach(build("llama"), BLOCK, rank=rank, alpha=alpha, targets=targets, **ALONE)
    names = sorted(attached.adapter_config()["target_modules"])
    state = {
        name.replace("base_model.model.model.", f"base_model.model.{trunk}."): torch.randn_like(tensor) * 0.1
        for name, tensor in attached.adapter_state().items()
    }
    if change is not None:
        state = change(state)
    told = {"peft_type": "LORA", "task_type": None, "r": rank, "lora_alpha": alpha, "target_modules": names}
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps({**told, "bias": "none", "inference_mode": True, **(config or {})}))
    save_file(state, folder / WEIGHTS)
    return folder


def decoded(artifact, base, prompts=PROMPTS):
    with Engine.load(artifact, base=str(base), dtype="float32") as engine:
        found = engine.generate(prompts, strategy="two_forward", max_new_tokens=NEW)
    return [one.tokens for one in found], [one.stats.accepted for one in found]


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def test_nemotron_drafts_as_its_own_program_does(base, tmp_path):
    found = peft_folder(tmp_path / "linear_spec_lora")
    told = run(
        *("import", tmp_path, "--subfolder", found.name, "--base", base, "--style", "nemotron"),
        *("--mask-token", MASK, "-o", tmp_path / "out", "draft.block=4"),
    )
    assert told.exit_code == 0, told.stderr
    assert told.stdout.strip() == str(tmp_path / "out") and "nothing was measured" in told.stderr
    replay, kept, told_apart = Replay(base, found, trunk="encoder"), 0, False
    tokens, accepted = decoded(tmp_path / "out", base)
    for n, prompt in enumerate(PROMPTS):
        theirs, theirs_accepted = replay.nemotron(prompt, NEW, BLOCK.block, MASK)
        assert theirs == tokens[n]
        assert theirs_accepted[:-2] == accepted[n][: len(theirs_accepted) - 2]  # the last are cut to the budget
        kept += sum(theirs_accepted[:-2])
        told_apart |= theirs_accepted != replay.nemotron(prompt, NEW, BLOCK.block, MASK + 1)[1]
    assert kept > 5 and told_apart


def test_uno_comes_back_from_its_export_as_it_was(base, tmp_path):
    adapter = {"rank": 4, "alpha": 32.0, "targets": list(ROLES), **ALONE}
    made = save_artifact(tmp_path / "made", base, NOISE, adapter)
    folder = export(made, "uno", tmp_path / "uno").folder
    back = import_adapter(folder, str(base), tmp_path / "back", "uno", ["draft.block=3"])
    first = artifacts.read(made)
    assert back.adapter_state.keys() == first.adapter_state.keys()
    assert all(torch.equal(back.adapter_state[name], tensor) for name, tensor in first.adapter_state.items())
    for key in ("draft", "adapter", "parameters"):
        assert back.config[key] == first.config[key]
    assert decoded(back.folder, base) == decoded(made, base)
    replay = Replay(base, folder)
    accepted = decoded(back.folder, base)[1]
    theirs = replay.uno(PROMPTS[0], NEW, 4, lambda place: noise_token(0, place, VOCABULARY))[1]
    assert theirs[:-2] == accepted[0][: len(theirs) - 2]


def test_masks_come_back_from_an_export_by_their_token(base, tmp_path):
    adapter = {"rank": 2, "alpha": 8.0, "targets": ["q", "down"], **ALONE}
    made = save_artifact(tmp_path / "made", base, BLOCK, adapter)
    first = artifacts.read(made)
    mask = load_file(base / "model.safetensors")["model.embed_tokens.weight"][MASK]
    artifacts.write(
        made,
        **{name: getattr(first, name) for name in ("config", "adapter_config", "adapter_state")},
        heads={"mask_vector": mask.clone()},
        recipe_yaml=(made / "recipe.yaml").read_text(),
        card="",
        overwrite=True,
    )
    folder = export(made, "peft", tmp_path / "peft").folder
    back = import_adapter(folder, str(base), tmp_path / "back", "nemotron", {"draft.block": 4}, mask_token=MASK)
    assert back.config["adapter"] == first.config["adapter"]
    assert decoded(back.folder, base) == decoded(made, base)
    other = import_adapter(folder, str(base), tmp_path / "other", "nemotron", {"draft.block": 4}, mask_token=MASK + 1)
    assert decoded(other.folder, base)[1] != decoded(made, base)[1]


@pytest.mark.parametrize(
    ("style", "alpha", "targets"), [("uno", 2048, tuple(ROLES)), ("nemotron", 512, ("o",))], ids=STYLES
)
def test_published_settings_come_over(base, tmp_path, style, alpha, targets):
    found = peft_folder(tmp_path / "in", targets=targets, rank=128, alpha=alpha, trunk="model")
    made = import_adapter(found, str(base), tmp_path / "out", style, mask_token=MASK if style == "nemotron" else None)
    recipe, named = load_recipe(made.folder / "recipe.yaml"), load_recipe(style)
    assert recipe.adapter == named.adapter and recipe.draft == named.draft
    assert made.config["adapter"]["rank"] == 128 and made.config["adapter"]["alpha"] == alpha
    assert made.config["imported"]["style"] == style and made.config["acceptance"] == made.config["training"] == {}
    card = (made.folder / "README.md").read_text()
    assert f"imported from a folder and drafts as `{style}` does" in card and "| not measured |" in card
    assert str(tmp_path) not in json.dumps(made.config) + card + (made.folder / "recipe.yaml").read_text()
    assert f"from a folder, as {style}" in done("inspect", made.folder)


def test_half_the_bytes_stay_half(base, tmp_path):
    narrow = peft_folder(tmp_path / "in", change=lambda state: {n: t.bfloat16() for n, t in state.items()})
    made = import_adapter(narrow, str(base), tmp_path / "out", "nemotron", mask_token=MASK)
    theirs = sorted(load_file(narrow / WEIGHTS).items())
    assert all(
        torch.equal(ours, tensor) and ours.dtype == torch.bfloat16
        for (_, ours), (_, tensor) in zip(sorted(made.adapter_state.items()), theirs, strict=True)
    )


def test_acceptance_is_measured_where_there_is_text(base, tmp_path):
    found = peft_folder(tmp_path / "in")
    source = texts(tmp_path / "texts")
    common = ("import", found, "--base", base, "--style", "nemotron", "--mask-token", MASK, "draft.block=4")
    told = run(*common, f"data.source={source}", "data.max_length=32", "-o", tmp_path / "out", "--json")
    assert told.exit_code == 0, told.stderr
    conditional = json.loads(told.stdout)["acceptance"]["conditional"]
    assert len(conditional["greedy"]) == BLOCK.drafts and all(0 < share < 1 for share in conditional["sampled"])
    with pytest.raises(DataError, match="no draft block of 4 fits"):
        import_adapter(
            found, str(base), tmp_path / "none", "nemotron",
            {"draft.block": 4, "data.source": str(source), "data.held_out": 0}, mask_token=MASK,
        )  # fmt: skip
    assert left(tmp_path) == ["in", "out", "texts"]


def renamed(old, new):
    return lambda state: {name.replace(old, new): tensor for name, tensor in state.items()}


def first_changed(to):
    def change(state):
        name = min(state)
        return {**state, name: to(state[name])}

    return change


WRONG = {
    "kind": ({"peft_type": "LOHA"}, None, r"peft_type is 'LOHA'"),
    "dora": ({"use_dora": True}, None, "use_dora is True"),
    "scale": ({"use_rslora": True}, None, "use_rslora is True"),
    "ranks": ({"rank_pattern": {"q": 8}}, None, "rank_pattern is {'q': 8}"),
    "scales": ({"alpha_pattern": {"q": 8}}, None, "alpha_pattern is "),
    "bias": ({"bias": "all"}, None, "bias is 'all'"),
    "more": ({"modules_to_save": ["lm_head"]}, None, r"modules_to_save is \['lm_head'\]"),
    "base changed": ({"init_lora_weights": "pissa"}, None, "init_lora_weights is 'pissa'"),
    "activated": ({"alora_invocation_tokens": [1, 2]}, None, r"alora_invocation_tokens is \[1, 2\]"),
    "code": ({"auto_mapping": {"parent_library": "os"}}, None, "auto_mapping is "),
    "unknown": ({"new_in_peft_9": 3}, None, "new_in_peft_9 is 3"),
    "rank": ({"r": 2000}, None, "adapter.rank: 2000 is out of range"),
    "no rank": ({"r": True}, None, "r is True"),
    "alpha": ({"lora_alpha": 9000}, None, "adapter.alpha: 9000 is out of range"),
    "other rank": ({"r": 8}, None, "4 tensors .* of another shape than the base wants"),
    "layer": (
        {},
        renamed("layers.1.", "layers.9."),
        "2 tensors .* without a place .* 1 module .* not adapted, as others",
    ),
    "tower": ({}, renamed("encoder.", "vision."), "no tensor is a LoRA on a projection"),
    "head": (
        {},
        lambda state: {**state, "base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)},
        "1 tensor .* without",
    ),
    "magnitude": ({}, lambda state: {**state, "o_proj.lora_magnitude_vector": torch.ones(4)}, "without a place"),
    "letters": ({}, lambda state: {**state, "\x1b[31m\n": torch.ones(4)}, r"'\\x1b\[31m\\n'"),
    "half": (
        {},
        lambda state: {n: t for n, t in state.items() if n != min(state)},
        "1 module .* with one factor of two",
    ),
    "shape": ({}, first_changed(lambda tensor: tensor[:, :-1].contiguous()), r"1 tensor .* \[4, 31\] for \[4, 32\]"),
    "dimensions": ({}, first_changed(lambda tensor: tensor[None]), "1 tensor .* of another shape"),
    "type": ({}, first_changed(lambda tensor: tensor.long()), "1 tensor .* of a type that is none of a LoRA's"),
    "narrow type": (
        {},
        lambda state: {n: t.to(torch.float8_e4m3fn) for n, t in state.items()},
        "4 tensors .* of a type",
    ),
    "scalar": ({"r": "4"}, first_changed(lambda tensor: tensor.sum()), "r is '4'; 1 tensor .* of another shape"),
    "not finite": ({}, first_changed(lambda tensor: tensor.fill_(torch.nan)), "1 tensor .* not finite"),
    "nothing": ({}, lambda state: {n: t * ("lora_A" in n) for n, t in state.items()}, "it changes nothing"),
}


@pytest.fixture
def unloaded(monkeypatch):
    """What an adapter lacks is known before the weights of the base are read."""
    monkeypatch.setattr("retrofit.importing.import_adapter.load_base", None)


@pytest.mark.parametrize(("config", "change", "problem"), WRONG.values(), ids=WRONG)
@pytest.mark.usefixtures("unloaded")
def test_what_no_recipe_can_express_is_refused(base, tmp_path, config, change, problem):
    found = peft_folder(tmp_path / "in", config=config, change=change)
    with pytest.raises(ArtifactError, match=problem):
        import_adapter(found, str(base), tmp_path / "out", "nemotron", mask_token=MASK)
    assert left(tmp_path) == ["in"]


def test_all_that_stands_in_the_way_is_told_at_once(base, tmp_path):
    many = {"use_dora": True, "rank_pattern": {"q": 8}, "lora_alpha": 9000, "base_model_name_or_path": "a/b"}
    found = peft_folder(tmp_path / "in", config=many, change=renamed("layers.1.", "layers.9."))
    common = ("import", found, "--base", base, "--style", "nemotron", "-o", tmp_path / "out")
    refusal = refused(run(*common, "--mask-token", MASK), 1)
    for word in ("use_dora", "rank_pattern", "adapter.alpha: 9000", "without a place", "not adapted", "for a/b"):
        assert word in refusal
    assert left(tmp_path) == ["in"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--style", "nemotron"], "draft rows read a mask token, and"),
        (["--style", "nemotron", "--mask-token", "64"], "mask token 64 is none of the 64"),
        (["--style", "nemotron", "--mask-token", "<mask>"], "'<mask>' is no token of"),
        (["--style", "uno", "--mask-token", "3"], "draft rows read noise"),
        (["--style", "uno", "adapter.rank=3", "train.lr=0.1"], "adapter.rank, train.lr: cannot be set"),
        (["--style", "uno", "data.max_length=9"], "nothing is measured without data.source"),
        (["--style", "uno", "draft.blok=9"], "did you mean `draft.block`?"),
        (["--style", "uno", "draft.block=32", "--subfolder", "../in"], "is no folder inside of"),
        (["--style", "uno", "--subfolder", "nowhere"], "no such folder"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_error(base, tmp_path, arguments, problem):
    found = peft_folder(tmp_path / "in", trunk="model")
    assert problem in refused(run("import", found, "--base", base, "-o", tmp_path / "out", *arguments), 2)
    assert left(tmp_path) == ["in"]


def test_a_mask_token_by_its_text_or_by_the_base(base, tmp_path):
    found = peft_folder(tmp_path / "in")
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    by_text = import_adapter(found, str(base), tmp_path / "text", "nemotron", mask_token="?")
    assert torch.equal(by_text.heads["mask_vector"], table[0]) and by_text.heads.keys() == {"mask_vector"}
    named = tmp_path / "named"
    named.mkdir()
    for path in base.iterdir():
        (named / path.name).write_bytes(path.read_bytes())
    (named / "config.json").write_text(
        json.dumps(json.loads((base / "config.json").read_text()) | {"mask_token_id": 9})
    )
    by_base = import_adapter(found, str(named), tmp_path / "out", "nemotron")
    assert torch.equal(by_base.heads["mask_vector"], table[9])


def test_other_files_than_an_adapters_two_are_not_read(base, tmp_path):
    found = peft_folder(tmp_path / "in")
    (found / "training_args.bin").write_bytes(b"a pickle")
    import_adapter(found, str(base), tmp_path / "out", "nemotron", mask_token=MASK)
    (found / WEIGHTS).rename(found / "adapter_model.bin")
    with pytest.raises(ArtifactError, match=r"adapter_model\.bin may be a pickle"):
        import_adapter(found, str(base), tmp_path / "none", "nemotron", mask_token=MASK)
    (found / WEIGHTS).symlink_to(base / "model.safetensors")
    with pytest.raises(ArtifactError, match="leads out"):
        import_adapter(found, str(base), tmp_path / "none", "nemotron", mask_token=MASK)


def test_an_artifact_that_is_there_stays(base, tmp_path, made):
    found = peft_folder(tmp_path / "in")
    with pytest.raises(UsageError, match="holds an artifact already"):
        import_adapter(found, str(base), made, "nemotron", mask_token=MASK)


def test_the_command_line_offers_what_there_is(tmp_path):
    assert list(STYLES) == OFFERED
    with pytest.raises(UsageError, match="style 'eagle' does not exist"):
        import_adapter(tmp_path, "tiny", tmp_path / "out", "eagle")
