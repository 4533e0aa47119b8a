"""Rules of the house that a machine can keep: which folder may know which, sizes, one default a setting, words."""

import ast
import inspect
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import retrofit
from retrofit.adapters.layout import DraftLayout
from retrofit.cli.main import main
from retrofit.eval.certify import certify
from retrofit.eval.doctor import diagnose
from retrofit.recipes.convert import convert
from retrofit.recipes.schema import load_recipe
from retrofit.report.evaluate import evaluate
from retrofit.runtime.engine import Engine

PACKAGE = Path(retrofit.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = [
    folder for name in ("retrofit", "benchmarks", "scripts", "examples", "tests") if (folder := ROOT / name).is_dir()
]
SOURCES = [path for tree in TREES for path in sorted(tree.rglob("*.py"))]
FOLDERS = [folder for tree in TREES for folder in sorted({path.parent for path in tree.rglob("*.py")})]
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def named(path):
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path):
    """The syntax tree of a file, which several rules read."""
    return ast.parse(path.read_text())


# Arrows.  A node is a folder; a file that stands beside folders is a node of its own.


@cache
def node(dotted):
    """The node that a dotted name of ours leads to."""
    at, parts = PACKAGE, dotted.split(".")[1:]
    while parts and (at / parts[0]).is_dir():
        at, parts = at / parts[0], parts[1:]
    file = at / f"{parts[0]}.py" if parts else at / "__init__.py"
    return node_of(file if file.is_file() else at / "__init__.py")


@cache
def node_of(path):
    has_folders = any(
        child.is_dir() and child.name != "__pycache__" and any(child.rglob("*.py")) for child in path.parent.iterdir()
    )
    return (path.with_suffix("") if has_folders else path.parent).relative_to(PACKAGE).as_posix()


@cache
def imported(path):
    """(node, whether at module level) of every import of ours that is not for type checkers alone."""
    own = path.relative_to(PACKAGE.parent).with_suffix("").parts
    package = own if path.name == "__init__.py" else own[:-1]

    def visit(tree, early):
        for child in ast.iter_child_nodes(tree):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for other in child.orelse:
                    yield from visit(other, early)
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, early) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                start = ".".join(package[: len(package) - child.level + 1]) + "." if child.level else ""
                yield from ((f"{start}{child.module or ''}".rstrip(".") + f".{a.name}", early) for a in child.names)
            yield from visit(child, early and not isinstance(child, FUNCTIONS))

    return {(node(name), early) for name, early in visit(tree_of(path), True) if name.split(".")[0] == "retrofit"}


@cache
def arrows(early=True):
    """node -> nodes it imports at module level, or inside functions."""
    found = {}
    for path in FILES:
        own = node_of(path)
        others = {other for other, when in imported(path) if when == early and other not in (own, "__init__")}
        found.setdefault(own, set()).update(others)
    return found


# In each line, none knows one to its right; what stands in one place may know each other, as long as there is no cycle.
ORDERS = {
    "runtime": (
        ("runtime/rules",),
        ("runtime/backends",),
        ("runtime/host", "runtime/device", "runtime/auto"),
        ("runtime/engine",),
    ),
    "recipes": (
        ("recipes/schema", "recipes/problems"),
        ("recipes/text",),
        ("recipes/training",),
        ("recipes/dry_run",),
    ),
}
STEPPER = "`Backend.stepper` says who plans the steps of a call, so a caller need not know which backend it has"
LAZY_UPWARD = {
    ("runtime/backends/hf/backend", "runtime/host"): STEPPER,
    ("runtime/backends/fused", "runtime/host"): STEPPER,
    ("runtime/backends/fused", "runtime/device"): STEPPER,
}
"""(node, node) of imports inside functions that go against an arrow, and why each has to."""


def place(order, found):
    """Where a node stands in an order; None where it does not."""
    spots = [i for i, names in enumerate(order) if any(found == n or found.startswith(f"{n}/") for n in names)]
    return spots[0] if spots else None


def upward(early):
    wrong = set()
    for order in ORDERS.values():
        for own, others in arrows(early).items():
            here = place(order, own)
            wrong |= {
                (own, other)
                for other in others
                if here is not None and (there := place(order, other)) is not None and there > here
            }
    return wrong


def test_folders_know_those_below_them_only():
    assert upward(early=True) == set()


def test_imports_that_go_up_are_inside_functions_and_listed():
    assert upward(early=False) == set(LAZY_UPWARD)


def test_there_are_no_cycles_between_folders():
    graph = arrows()

    def reached(own, seen):
        for other in graph.get(own, ()):
            if other not in seen:
                seen.add(other)
                reached(other, seen)
        return seen

    assert sorted(own for own in graph if own in reached(own, set())) == []


def test_kernels_know_nothing_of_ours():
    assert [other for early in (True, False) for other in arrows(early)["runtime/kernels"]] == []


def test_rules_know_torch_and_the_layout_of_a_block_only():
    """What decides tokens is a function of tensors: no model, no request, no step."""
    assert arrows()["runtime/rules"] == {"adapters"} and arrows(early=False)["runtime/rules"] == set()
    trees = [tree_of(path) for path in sorted((PACKAGE / "runtime" / "rules").glob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    others = {name for name in modules if name.split(".")[0] not in (*sys.stdlib_module_names, "torch")}
    others = {name for name in others if not name.startswith("retrofit.runtime.rules.")}
    assert others == {"retrofit.adapters.layout"}


def test_the_arrows_are_read():
    """So that the rules above do not hold of an empty graph."""
    assert "runtime/rules" in arrows()["runtime/host"]
    assert "runtime/kernels" in arrows()["runtime/backends/fused"]
    assert any(name.startswith("eval") for name in arrows(early=False)["cli"])
    assert all(place(order, name) is not None for order in ORDERS.values() for names in order for name in names)
    known = {name for own in arrows() for name in (own, own.rpartition("/")[0])}
    assert [name for order in ORDERS.values() for names in order for name in names if name not in known] == []


# Sizes


PLAIN = [path for path in SOURCES if "kernels" not in path.parts]


def test_a_file_has_400_lines_at_most():
    assert {named(path): n for path in PLAIN if (n := len(path.read_text().splitlines())) > 400} == {}


def test_a_function_has_60_lines_at_most():
    functions = [(path, n) for path in PLAIN for n in ast.walk(tree_of(path)) if isinstance(n, FUNCTIONS)]
    assert len(functions) > 1000, "so that the rule does not hold of nothing"
    assert {
        f"{named(path)}: {f.name}": lines for path, f in functions if (lines := f.end_lineno - f.lineno + 1) > 60
    } == {}


def test_a_folder_has_16_files_at_most():
    counts = {
        named(folder): len([path for path in folder.iterdir() if path.is_file() and path.name != "__init__.py"])
        for folder in FOLDERS
    }
    assert {folder: count for folder, count in counts.items() if count > 16} == {}


# One default a setting


def defaults(function):
    return {n: p.default for n, p in inspect.signature(function).parameters.items() if p.default is not p.empty}


SETTINGS = pytest.mark.parametrize(
    ("command", "function"),
    [
        ("convert", convert), ("certify", certify), ("doctor", diagnose), ("eval", evaluate),
        ("generate", Engine.generate), ("generate", Engine.load), ("chat", Engine.stream), ("chat", Engine.load),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__qualname__,
)  # fmt: skip


@SETTINGS
def test_the_command_line_has_the_defaults_of_python(command, function):
    arguments = [] if command in ("convert", "doctor") else ["ARTIFACT"]
    given = main.commands[command].make_context(command, arguments).params
    for other in ("out", "device"):  # the name of the model gives the one, the test below is of the other
        given.pop(other, None)
    theirs = {name: value or None for name, value in defaults(function).items() if name in given}
    ours = {name: value or None for name, value in given.items() if name in theirs}
    if "dtype" in theirs:
        ours["dtype"] = ours["dtype"] or "auto"  # what it is where it is not given
    assert len(ours) >= 3
    assert ours == theirs


@SETTINGS
def test_the_device_is_auto_everywhere(command, function):
    options = {option.name: option.default for option in main.commands[command].params}
    assert defaults(function).get("device", options["device"]) == options["device"] == "auto"


def test_the_python_functions_have_the_same_defaults():
    of_loading = defaults(Engine.load)
    for function in (certify, diagnose, convert, evaluate):
        shared = {name: value for name, value in defaults(function).items() if name in of_loading}
        assert shared == {name: of_loading[name] for name in shared}, function.__name__
    of_stream, of_generate = defaults(Engine.stream), defaults(Engine.generate)
    assert {n: v for n, v in of_generate.items() if n in of_stream} == {
        n: v for n, v in of_stream.items() if n in of_generate
    }


def test_a_draft_layout_has_the_defaults_of_the_recipe():
    assert DraftLayout().to_dict() == load_recipe("default").draft.model_dump()


# Words

WORDS = ("/work/", "/root/", "/tmp/", "../shared", "worktree", "subagent", "branch point")
BINARY = {".safetensors", ".png"}


def tracked_files():
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("no checkout of git")
    found = [ROOT / name for name in listed.stdout.splitlines()]
    return [path for path in found if path.is_file() and path.suffix not in BINARY and path != Path(__file__)]


def test_no_file_names_a_machines_folders_or_how_it_was_made():
    pattern = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, WORDS))}|/(home|mnt)/\w)", re.IGNORECASE)
    found = []
    for path in tracked_files():
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if match := pattern.search(line):
                found.append(f"{named(path)}:{number}: {match[0]}")
    assert found == []
