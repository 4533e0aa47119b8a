"""Imports point one way, heavy packages are met late, and some packages have one place only."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import retrofit

PACKAGE = Path(retrofit.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import its own layer and those below.  Others (`__init__.py`, `cli/`) are the face, on top.
LAYERS = {"errors": 0, "adapters": 2, "runtime": 3, "recipes": 4, "report": 6}
LAYERS |= dict.fromkeys(("eval", "tasks", "exporting", "importing", "serving"), 5)
BELOW = ("artifact", "gguf_files", "hub", "launch", "locating", "machine", "named_bases", "processors", "progress",
         "weight_files")  # fmt: skip
LAYERS |= dict.fromkeys((*BELOW, "quantised", "sharing"), 1)
FACE = 7


@cache
def imports(path: Path) -> list[tuple[str, int]]:
    """(absolute dotted name, column) of every import in the file, those inside functions too."""
    found = []
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    package = parts if path.name == "__init__.py" else parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.col_offset) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = f"{start}{node.module or ''}".rstrip(".")
            found += [(f"{module}.{alias.name}", node.col_offset) for alias in node.names]
    return found


def layer(dotted: str) -> int:
    """The layer of `retrofit.x.y`."""
    parts = dotted.split(".")
    return 0 if parts[1:] == ["__version__"] else LAYERS.get(parts[1] if len(parts) > 1 else "", FACE)


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def found_everywhere() -> list[tuple[Path, str]]:
    """(file, name it imports), of every file."""
    return [(path, name) for path in FILES for name, _ in imports(path)]


def test_imports_point_down():
    ours = [(path, name) for path, name in found_everywhere() if name.split(".")[0] == "retrofit"]
    assert len(ours) > 1000, "so that the rule does not hold of nothing"
    assert [(name_of(path), name) for path, name in ours if layer(name) > layer(dotted(path))] == []


RECIPES = {
    "schema": 0,
    "sections": 0,
    "yaml_text": 0,
    "problems": 0,
    "overrides": 0,
    "naming": 0,
    "processes": 0,
    "text": 1,
    "training": 2,
    "dry_run": 3,
}
"""Within `recipes/`, a file or folder may import those below it and its own; `convert` and `publish` are on top."""


def test_recipes_go_one_way():
    def place(name):
        return RECIPES.get(next(iter(name.split(".")[2:]), ""), 4)

    ours = [
        (p, name) for p, name in found_everywhere() if "recipes" in p.parts and name.startswith("retrofit.recipes.")
    ]
    assert len(ours) > 50
    assert [(name_of(path), name) for path, name in ours if place(name) > place(dotted(path))] == []


def test_only_the_command_line_imports_click():
    wrong = [path for path, name in found_everywhere() if name.split(".")[0] == "click"]
    assert [name_of(path) for path in wrong if path.parent != PACKAGE / "cli"] == []
    assert wrong, "the command line does"


def test_outside_packages_have_one_place():
    places = {"pydantic": ("recipes/schema.py", "recipes/sections.py"), "datasets": ("recipes/text/documents.py",)}
    found = {(top, name_of(path)) for path, name in found_everywhere() if (top := name.split(".")[0]) in places}
    assert found == {(top, file) for top, files in places.items() for file in files}


ROOMS = {"kernels": 0, "rules": 0, "backends": 1, "auto": 2, "host": 3, "device": 3, "engine": 4}
"""Rooms of the runtime: each imports its own and those below."""


def test_rooms_of_the_runtime_import_down_but_where_a_backend_makes_its_stepper():
    def room(dotted):
        parts = dotted.split(".")
        return parts[2] if parts[:2] == ["retrofit", "runtime"] and len(parts) > 2 else ""

    early, late = set(), set()
    for path in FILES:
        own = room(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
        for name, column in imports(path) if own in ROOMS else []:
            other = room(name)
            if other in ROOMS and other != own and ROOMS[other] >= ROOMS[own]:
                (early if column == 0 else late).add((path.relative_to(PACKAGE / "runtime").as_posix(), other))
    assert early == set()
    assert late == {
        *((f"backends/{name}.py", "auto") for name in ("interface", "hf/backend", "fused/backend")),  # types only
        ("backends/hf/backend.py", "host"),
        ("backends/fused/backend.py", "host"),
        ("backends/fused/backend.py", "device"),
    }


def test_datasets_is_imported_inside_functions_only():
    early = [
        name_of(path)
        for path in FILES
        for name, column in imports(path)
        if name.split(".")[0] == "datasets" and column == 0
    ]
    assert early == []


def test_kernels_import_nothing_of_ours():
    kernels = [path for path in FILES if "kernels" in path.relative_to(PACKAGE).parts]
    ours = [(name_of(path), name) for path in kernels for name, _ in imports(path)]
    assert [(path, name) for path, name in ours if name.startswith("retrofit") and ".kernels." not in name] == []


def heavy_after(steps: dict[str, str]) -> dict[str, str]:
    """Heavy packages that a fresh interpreter has loaded after each of the steps, by their names; none is left out."""
    check = "print(name, *{'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules), sep=',')"
    code = f"import sys\nfor name, code in {steps!r}.items():\n    exec(code)\n    {check}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(line.partition(",")[::2] for line in done.stdout.splitlines())
    assert list(found) == list(steps)
    return {name: heavy for name, heavy in found.items() if heavy}


def test_light_modules_import_no_torch():
    modules = (
        *("retrofit", "retrofit.errors", "retrofit.artifact.folder", "retrofit.recipes.schema"),
        *("retrofit.runtime.params", "retrofit.runtime.results"),
    )
    assert heavy_after({module: f"import {module}" for module in modules}) == {}


def invoked(arguments: list[str], code: int) -> str:
    """A step of `heavy_after`: a command that ends with this exit code."""
    return (
        "from click.testing import CliRunner\n"
        "from retrofit.cli.main import main\n"
        f"result = CliRunner().invoke(main, {arguments!r})\n"
        f"assert result.exit_code == {code}, result.output"
    )


def test_help_imports_no_torch():
    commands = ([], ["convert"], ["generate"], ["certify"], ["doctor"], ["eval"], ["data"], ["data", "preview"])
    steps = {" ".join(["retrofit", *words]): invoked([*words, "--help"], 0) for words in commands}
    assert heavy_after(steps) == {}


def test_an_artifact_that_is_not_there_is_refused_at_once():
    """torch is imported by what loads a model, seconds later."""
    more = {"export": ["--format", "peft", "-o", "out"], "serve": ["--engine", "vllm"]}
    commands = ("generate", "chat", "certify", "eval", "export", "serve", "inspect")
    for name in ("nowhere", "", "tiny"):
        steps = {command: invoked([command, name, *more.get(command, [])], 2) for command in commands}
        assert heavy_after(steps) == {}, name


def test_what_a_module_loads_is_seen():
    assert heavy_after({"light": "import retrofit", "heavy": "import retrofit.adapters.layout, numpy"}) == {
        "heavy": "numpy"
    }


def test_lazy_names_are_listed_and_others_refused():
    assert {"Engine", "convert", "certify"} <= set(dir(retrofit))
    with pytest.raises(AttributeError, match="no attribute 'engine_'"):
        retrofit.engine_  # noqa: B018


@pytest.mark.parametrize("name", ["Engine", "convert", "certify", "evaluate"])
def test_lazy_names_lead_somewhere(name):
    assert getattr(retrofit, name).__module__.startswith("retrofit.")


def test_the_package_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "retrofit", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"retrofit {retrofit.__version__}\n")
