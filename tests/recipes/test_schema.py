"""Recipes: all of them load, nothing wrong passes, every message names the key and the way out."""

import re

import pytest
from pydantic import ValidationError

from retrofit.errors import UsageError
from retrofit.recipes.schema import FIELDS, FOLDER, SECTIONS, Recipe, dump_recipe, load_recipe, recipe_names

README = (FOLDER / "README.md").read_text()
FILES = sorted(FOLDER.rglob("*.yaml"))

# (hidden, vocabulary, layers, sum of in + out features over the adapted projections of one layer, parameters
# of the base), from the published configurations.
SHAPES = {
    "tiny": (256, 2_048, 4, 512 + 2 * 384 + 512 + 3 * 928, 3_377_408),
    "llama-3.1-8b-instruct": (4096, 128_256, 32, 8192 + 2 * 5120 + 8192 + 3 * 18_432, 8_030_261_248),
    "qwen3-0.6b": (1024, 151_936, 28, 3072 + 2 * 2048 + 3072 + 3 * 4096, 596_049_920),
    "qwen3-8b": (4096, 151_936, 36, 8192 + 2 * 5120 + 8192 + 3 * 16_384, 8_190_735_360),
    "deepseek-r1-distill-qwen-7b": (3584, 152_064, 28, 7168 + 2 * 4096 + 7168 + 3 * 22_528, 7_615_616_512),
    # MLA: q_proj, kv_a_proj_with_mqa (keys and values share it), o_proj.
    "deepseek-v2-lite": (2048, 102_400, 27, 5120 + 2624 + 4096, 15_706_484_224),
}


MEASURED = ("tiny", "smollm2-135m")
"""Bases whose recipes have made something that was measured."""


def problem(*overrides: str, name: str | None = None) -> str:
    """The message with which these overrides are refused."""
    with pytest.raises(UsageError) as caught:
        load_recipe(name, overrides)
    return str(caught.value)


def written(tmp_path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def name_of(path) -> str:
    return path.relative_to(FOLDER).with_suffix("").as_posix()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_recipe_loads_is_listed_and_says_what_is_measured(path):
    recipe = load_recipe(name_of(path))
    assert load_recipe(path) == recipe
    assert f"`{name_of(path)}.yaml`" in README
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    assert "Measured:" in header
    assert recipe.base.model in MEASURED or "not measured" in header


def test_the_readme_lists_no_recipe_that_is_not_there():
    listed = set(re.findall(r"^\| `(.+?)\.yaml`", README, re.MULTILINE))
    assert listed == set(recipe_names()) == {name_of(path) for path in FILES}


@pytest.mark.parametrize("name", SHAPES)
def test_stated_adapter_size_is_the_computed_one(name):
    hidden, vocabulary, layers, features, base = SHAPES[name]
    adapter = load_recipe(name).adapter
    markov = (2 * vocabulary + 1) * adapter.markov_rank
    heads = hidden + markov + 2 * (hidden + adapter.markov_rank + 1)
    total = layers * features * adapter.rank + heads
    share = f"{100 * total / base:.2f} %"
    text = (FOLDER / f"{name}.yaml").read_text()
    assert f"{total:,} parameters, {share} of the base (computed" in text
    assert re.search(rf"`{re.escape(name)}\.yaml` .*\| {share} \|", README)
    if base > 7e9:
        assert total <= 0.02 * base
    if name == "tiny":
        assert total <= 0.25 * base


@pytest.mark.parametrize("name", recipe_names())
def test_dumped_recipe_loads_equal(name, tmp_path):
    recipe = load_recipe(name, ["data.field='1e5'", "base.revision='on'", "data.source='ü: x #y'"])
    assert load_recipe(written(tmp_path, dump_recipe(recipe))) == recipe


def test_a_dumped_recipe_has_every_key():
    dumped = dump_recipe(load_recipe(None))
    assert all(re.search(rf"^ *{path.rpartition('.')[2]}:", dumped, re.MULTILINE) for path in FIELDS)


def test_no_name_is_the_embedded_base():
    assert load_recipe(None) == load_recipe("tiny")
    assert load_recipe(None).base.model == "tiny"


def test_the_default_recipe_is_the_schema():
    assert load_recipe("default") == Recipe()


def test_every_key_has_help():
    assert [path for path, field in FIELDS.items() if not field.description] == []
    assert [name for name, section in SECTIONS.items() if not section.__doc__] == []


def test_recipes_are_frozen():
    recipe = load_recipe(None)
    with pytest.raises(ValidationError):
        recipe.train = recipe.train
    with pytest.raises(ValidationError):
        recipe.train.steps = 1
    assert isinstance(recipe.adapter.targets, tuple)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.stesp", "train.steps"),
        ("lr", "train.lr"),
        ("adapter.lr", "train.lr"),
        ("trian.lr", "train.lr"),
        ("adpater", "adapter"),
        ("train.lr.peak", "train.lr"),
    ],
)
def test_unknown_keys_suggest_what_was_meant(key, meant):
    assert problem(f"{key}=1") == f"recipe `tiny`: {key}: unknown key; did you mean `{meant}`?"


def test_unknown_keys_like_no_other_list_what_there_is():
    assert problem("draft.foo=1").endswith("`draft` has block, input, attention, shift, seed_row")
    assert problem("foo=1").endswith("a recipe has base, profile, adapter, draft, objective, data, train, joint")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr=3", "train.lr: 3 is out of range; must be a number > 0 and <= 1"),
        ("train.lr=.nan", "train.lr: nan is out of range; must be a number > 0 and <= 1"),
        ("train.lr=fast", "train.lr: must be a number > 0 and <= 1, not `fast`"),
        ("train.lr={peak: 1}", "train.lr: must be a number > 0 and <= 1, not a mapping"),
        ("train.steps=0", "train.steps: 0 is out of range; must be a whole number >= 1 and <= 1000000000"),
        (
            f"train.steps={'9' * 24}",
            f"train.steps: {'9' * 24} is out of range; must be a whole number >= 1 and <= 1000000000",
        ),
        ("train.steps=2.5", "train.steps: must be a whole number >= 1 and <= 1000000000, not 2.5"),
        ("train.steps=true", "train.steps: must be a whole number >= 1 and <= 1000000000, not true"),
        ("train.steps=", "train.steps: must be a whole number >= 1 and <= 1000000000, not empty"),
        ("train.batch_size=65537", "train.batch_size: 65537 is out of range; must be a whole number >= 1 and <= 65536"),
        ("draft.block=0", "draft.block: 0 is out of range; must be a whole number >= 1 and <= 128"),
        (
            "draft.attention=casual",
            "draft.attention: `casual` is not one of bidirectional, causal; did you mean `causal`?",
        ),
        ("draft.shift=2", "draft.shift: 2 is not one of 1, 0"),
        (
            "base.quantization=int4",
            "base.quantization: `int4` is not one of nf4, int8, int8wo, int4wo, null; did you mean `int4wo`?",
        ),
        ("profile=melted", "profile: `melted` is not one of frozen, joint"),
        ("adapter.confidence=1", "adapter.confidence: must be true or false, not 1"),
        ("adapter.targets=[q, x]", "adapter.targets: `x` is not one of q, k, v, o, gate, up, down"),
        (
            "adapter.targets=q",
            "adapter.targets: must be a list of one or more of q, k, v, o, gate, up, down, not `q`",
        ),
        (
            "adapter.targets=[]",
            "adapter.targets: must be a list of one or more of q, k, v, o, gate, up, down, not empty",
        ),
        ("adapter.targets=[q, q]", "adapter.targets: names a role twice; name each once"),
        ("base.revision=1234567", "base.revision: must be text or null, not 1234567; quote it"),
        ("data.source=''", "data.source: must be text or a list of sources, not empty"),
        ("data.source=3", "data.source: must be text or a list of sources, not 3; quote it"),
        ("data.source=[]", "data.source: must be text or a list of sources, not empty"),
        ("data.source=[{weight: 2}]", "data.source[0].source: is missing; must be text"),
        (
            "data.source=[a, {source: a, weigth: 2}]",
            "data.source[1].weigth: unknown key; did you mean `data.source[1].weight`?",
        ),
        (
            "data.source=[{source: a, weight: 0}]",
            "data.source[0].weight: 0 is out of range; must be a number > 0",
        ),
        (
            "objective.diffusion_share=1.5",
            "objective.diffusion_share: 1.5 is out of range; must be a number >= 0 and <= 1",
        ),
        ("train.lr=[1", "train.lr: `[1` is not valid YAML; quote it"),
        ("train.lr", "`train.lr` is no override; write key.path=value"),
        ("=3", "`=3` is no override; write key.path=value"),
    ],
)
def test_values_that_cannot_be(override, message):
    assert problem(override) == f"recipe `tiny`: {message}"


def test_a_section_is_no_value():
    want = "draft: is a section, not a value; set its keys one by one: draft.block, draft.input"
    assert want in problem("draft=3")
    assert want in problem("draft={block: 3}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["draft.shift=0"], "draft.shift: 0 does not go with draft.seed_row base"),
        (
            ["draft.block=8", "data.max_length=8"],
            "draft.block: 8 does not fit into windows of data.max_length 8 tokens",
        ),
        (["data.lengths=[64, 4]"], "draft.block: 4 does not fit into windows of data.lengths 4 tokens"),
        (["data.lengths=[64, 512]"], "data.lengths: 512 is not between 2 and data.max_length 256"),
        (["data.lengths=[0]"], "data.lengths: 0 is not between 2 and data.max_length 256"),
        (["data.lengths=512"], "data.lengths: must be a list of whole numbers, not 512"),
        (["train.steps=10", "train.warmup=11"], "train.warmup: 11 steps are more than train.steps 10"),
        (["draft.block=1", "objective.diffusion_share=.1"], "diffusion_share: a block of 1 has nothing to mask"),
        (["train.curriculum=[2, 4]"], "train.curriculum: the lengths 2, 4 do not rise from 1 or more to less than"),
        (["train.curriculum=[3, 2]"], "train.curriculum: the lengths 3, 2 do not rise"),
        (["train.curriculum=[0, 2]"], "train.curriculum: the lengths 0, 2 do not rise"),
        (
            ["train.curriculum=[1, 2]", "draft.shift=0", "draft.seed_row=draft"],
            "train.curriculum: the lengths 1, 2 do not rise from 2 or more to less than draft.block 4",
        ),
        (
            ["objective.infill_share=.5", "draft.attention=causal"],
            "with draft.attention causal no row sees what",
        ),
        (
            ["objective.infill_share=.5", "draft.input=noise"],
            "with draft.input noise a row cannot tell",
        ),
        (["objective.infill_share=.5"], "is a share of L_diff's rows"),
        (["objective.alpha=0", "objective.beta=0"], "objective: nothing trains the drafts: 0 of"),
    ],
)
def test_keys_that_do_not_go_together(overrides, message):
    assert message in problem(*overrides)


def test_combinations_that_do_go_together():
    assert load_recipe(None, ["draft.shift=0", "draft.seed_row=draft"]).draft.shift == 0
    assert load_recipe(None, ["draft.block=1"]).draft.block == 1
    assert load_recipe(None, ["data.max_length=9"]).data.max_length == 9
    assert load_recipe(None, ["train.curriculum=[1, 3]"]).train.curriculum == (1, 3)


def test_all_problems_come_at_once(tmp_path):
    path = written(tmp_path, "train: {lr: 7, stesp: 3}\ndraft: 5\nfoo: 1\nadapter: {targets: [q, q]}\n")
    lines = problem("trian.lr=1", "train.seed=x", name=path).splitlines()
    assert lines[0] == f"recipe `{path}` has 7 problems"
    assert sorted(line.strip().partition(":")[0] for line in lines[1:]) == sorted(
        ["train.lr", "train.stesp", "draft", "foo", "adapter.targets", "trian.lr", "train.seed"]
    )


def test_overrides_are_read_as_yaml_and_the_last_one_wins():
    train = load_recipe(None, ["train.lr=1", "train.lr=1e-5", "train.steps=2_000", "train.schedule=linear"]).train
    assert (train.lr, train.steps, train.schedule) == (1e-5, 2000, "linear")
    assert load_recipe(None, ["adapter.targets=[q, v]"]).adapter.targets == ("q", "v")
    assert load_recipe(None, ["base.revision="]).base.revision is None
    assert load_recipe(None, ["data.source=a=b"]).data.source == "a=b"


def test_a_mixture_is_a_list_of_sources(tmp_path):
    recipe = load_recipe(None, ["data.source=[a.jsonl, {source: b/c, weight: 2.5, split: test, field: body}]"])
    first, second = recipe.data.source
    assert (first.source, first.weight, first.split, first.field) == ("a.jsonl", 1.0, None, None)
    assert (second.source, second.weight, second.split, second.field) == ("b/c", 2.5, "test", "body")
    assert load_recipe(written(tmp_path, dump_recipe(recipe))) == recipe


def test_overrides_from_python():
    recipe = load_recipe(None, {"train.lr": 1e-4, "adapter.targets": ("q",), "base.model": "some/model"})
    assert (recipe.train.lr, recipe.adapter.targets, recipe.base.model) == (1e-4, ("q",), "some/model")
    with pytest.raises(UsageError, match="train: is a section"):
        load_recipe(None, {"train": {"lr": 1e-4}})


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "+1e-05", "1.0e-5", "0.00001"])
def test_every_way_of_writing_a_small_number(text, tmp_path):
    assert load_recipe(written(tmp_path, f"train:\n  lr: {text}\n")).train.lr == 1e-5


def test_an_empty_file_or_section_changes_nothing(tmp_path):
    assert load_recipe(written(tmp_path, "")) == Recipe()
    assert load_recipe(written(tmp_path, "train:\n"), ["train.steps=200"]).train.steps == 200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "must hold sections such as"),
        ("train: [", "is not valid YAML"),
        ("train:\n  lr: 1\n  lr: 2", "`lr` given twice (line 3)"),
        ("3: 4", "a key must be text (line 1)"),
        ("[1]: 4", "a key must be text (line 1)"),
        ("base: {model: 2020-99-99}", "is not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_files_that_hold_no_recipe(text, message, tmp_path):
    assert message in problem(name=written(tmp_path, text))


def test_recipes_that_are_not_there(tmp_path):
    assert problem(name="qwen3-8") == "recipe `qwen3-8` does not exist; did you mean `qwen3-8b`?"
    assert problem(name="no/such.yaml") == "recipe `no/such.yaml` does not exist"
    assert "is a folder" in problem(name=str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    assert "cannot be read" in problem(name=str(tmp_path / "binary.yaml"))


def test_every_whole_number_has_an_end():
    """One too many digits is said at once, not when the run does not end."""
    numbers = [key for key, field in FIELDS.items() if field.annotation in (int, int | None)]
    assert {"train.steps", "train.decay", "data.held_out", "draft.block"} <= set(numbers)
    for key in numbers:
        assert "out of range" in problem(f"{key}={'9' * 24}"), key


@pytest.mark.parametrize("value", ["-1", "{a: 1}", "[[]]", "word", "", ".inf"])
def test_every_key_takes_a_value_or_says_what_it_takes(value):
    refused = {}
    for key in FIELDS:
        try:
            load_recipe("tiny", [f"{key}={value}"])
        except UsageError as error:  # any other is a bug
            refused[key] = str(error)
    assert len(refused) > len(FIELDS) / 2
    assert [key for key, message in refused.items() if key not in message] == []
