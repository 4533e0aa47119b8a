"""What we lean on in other packages without a promise: listed, and there."""

import ast
import importlib
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import peft
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from packaging.requirements import Requirement
from packaging.version import Version

import retrofit
from retrofit.private_apis import PRIVATE_APIS, TRIED

ROOT = Path(retrofit.__file__).parent.parent
SOURCES = sorted(p for folder in ("retrofit", "benchmarks", "scripts") for p in (ROOT / folder).rglob("*.py"))
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}
OWN = {"retrofit", "benchmarks", "scripts", ""}

# Attributes that only instances have.
INSTANCES = {
    "torch.nn.Module": lambda: torch.nn.Linear(1, 1),
    "torch.UntypedStorage": lambda: torch.zeros(1).untyped_storage(),
    "torch._ops.OpOverload": lambda: torch.ops.aten.add.Tensor,
    "torch._dynamo.eval_frame": lambda: torch.compile(lambda x: x),
    "transformers.PreTrainedConfig": lambda: transformers.LlamaForCausalLM(SMALL).config,
    "transformers.GenerationConfig": lambda: transformers.GenerationConfig(),
    "accelerate.hooks": lambda: add_hook_to_module(torch.nn.Linear(1, 1), ModelHook()),
}
SMALL = transformers.LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
)


def resolve(dotted: str):
    """The object of a dotted name, modules imported on the way."""
    parts = dotted.split(".")
    found = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:number]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("api", PRIVATE_APIS, ids=lambda api: api.name)
def test_it_is_there(api):
    package, (owner, _, name) = api.name.split(".")[0], api.name.rpartition(".")
    if package == "triton":
        pytest.importorskip("triton")
    holder = INSTANCES[owner]() if owner in INSTANCES else resolve(owner)
    assert hasattr(holder, name), (
        f"{api.name} vanished from {package} {version(package)} (it was in {TRIED[package]}). "
        f"It is used by {', '.join(api.used_by)}: {api.why}"
    )


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def ours(tree: ast.AST) -> set[str]:
    """Private names that a file of ours defines: functions, classes, variables, attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def used(tree: ast.AST) -> set[str]:
    """Private names that a file takes from others: imported, as attributes, or by name from getattr and the like."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = [getattr(node, "module", None) or ""]
            if isinstance(node, ast.Import) or module[0].split(".")[0] not in OWN:
                for dotted in [*module, *(alias.name for alias in node.names)]:
                    found |= {part for part in dotted.split(".") if is_private(part)}
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "getattr", "hasattr", "setattr", "delattr", "get", "pop", "import_module",
        ):  # fmt: skip
            for text in (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)):
                found |= set(text.split("."))
    return {name for name in found if is_private(name)}


LISTED = {part for api in PRIVATE_APIS for part in api.name.split(".") if is_private(part)}


def test_no_private_name_is_used_that_is_not_listed():
    trees = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in SOURCES}
    own = set().union(*map(ours, trees.values())) - LISTED
    names = {file: used(tree) - own - NAMED_TUPLE for file, tree in trees.items()}
    assert {file: found - LISTED for file, found in names.items() if found - LISTED} == {}, (
        "private names of another package: do without, or list them in private_apis.py"
    )
    assert any(names.values()), "so that the rule does not hold of nothing"
    assert [
        (file, api.name)
        for file, found in names.items()
        for api in PRIVATE_APIS
        if api.name.rpartition(".")[2] in found and file not in api.used_by
    ] == [], "add the file to used_by"


@pytest.mark.parametrize("api", PRIVATE_APIS, ids=lambda api: api.name)
def test_what_is_listed_is_used_where_it_says(api):
    name = re.compile(rf"\b{api.name.rpartition('.')[2]}\b")
    assert [file for file in api.used_by if not name.search((ROOT / file).read_text())] == []


def test_the_versions_tried_are_those_allowed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    bounds = {requirement.name: requirement.specifier for requirement in map(Requirement, listed)}
    for package, tried in TRIED.items():
        assert tried in bounds[package]
        assert f"{Version(tried).major + 1}" not in bounds[package], f"{package}: the next major may break us"


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("from torch._utils import x", {"_utils"}),
        ("import torch._dynamo", {"_dynamo"}),
        ("import_module('torch._dynamo')", {"_dynamo"}),
        ("from click._compat import x", {"_compat"}),
        ("model._thing", {"_thing"}),
        ("getattr(model, '_thing', None)", {"_thing"}),
        ("from retrofit.x import _own", set()),
        ("model.__dict__", set()),
    ],
)
def test_the_search_finds_private_names(code, names):
    assert used(ast.parse(code)) == names


def test_a_vanished_name_is_named():
    api = PRIVATE_APIS[0]._replace(name="peft.LoraConfig._gone", why="for a reason")
    with pytest.raises(AssertionError, match=r"peft\.LoraConfig\._gone vanished from peft .* for a reason"):
        test_it_is_there(api)
    assert peft.LoraConfig is resolve("peft.LoraConfig")
