"""The documentation is what its sources say: drawn pages, the code, commands and keys it names, and the site."""

import ast
import dataclasses
import importlib.util
import inspect
import logging
import re
import shlex
import socket
from pathlib import Path
from unittest.mock import patch
from xml.etree import ElementTree

import click
import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

import retrofit
from benchmarks.readme_numbers import __main__ as numbers
from benchmarks.readme_numbers.__main__ import ROOT
from benchmarks.readme_numbers.blocks import Results
from retrofit import errors
from retrofit.cli.main import main
from retrofit.recipes.schema import FIELDS
from retrofit.runtime.engine import Engine

DOCS = ROOT / "docs"
SPEC = importlib.util.spec_from_file_location("draw_docs", ROOT / "scripts" / "draw_docs.py")
assert SPEC is not None and SPEC.loader is not None
draw_docs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(draw_docs)

DRAWN = ("cli.md", "recipe-keys.md", "numbers.md", "supported-models.md")
"""Pages that hold nothing written by hand but a few words."""
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
WRITTEN = [path for path in PAGES if path.name not in DRAWN]
KEY = re.compile(r"\b((?:base|adapter|draft|objective|data|train)\.[a-z_]+)\b")


def name_of(path: Path) -> str:
    return path.name


def by_hand(path: Path) -> str:
    """A page without what is drawn into it."""
    return re.sub(r"<!-- (\w+):begin -->.*?<!-- \1:end -->", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize(("path", "drawn"), draw_docs.drawn().items(), ids=lambda value: getattr(value, "name", ""))
def test_drawn_pages_are_what_their_sources_say(path, drawn):
    assert path.read_text(encoding="utf-8") == drawn, draw_docs.HINT


def test_a_source_that_changes_changes_its_page(monkeypatch):
    before = draw_docs.drawn()
    option = next(o for o in main.commands["generate"].params if o.name == "batch_size")
    monkeypatch.setattr(option, "default", 9)
    monkeypatch.setitem(draw_docs.SCHEMA, "new.key", (bool, "something new"))
    monkeypatch.delitem(FIELDS, "train.steps")
    after = draw_docs.drawn()
    assert {path.name for path in after if after[path] != before[path]} == {
        "cli.md", "recipe-keys.md", "artifact-format.md",
    }  # fmt: skip


def test_the_cli_page_has_every_command_and_option():
    page = (DOCS / "cli.md").read_text()

    def walk(command: click.Command, name: str) -> None:
        assert f"\n## {name}\n" in page
        part = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for option in command.params:
            if isinstance(option, click.Option):
                assert f"`{option.opts[-1]}`" in part, name
                assert " ".join(option.help.split("  [default")[0].split()).replace("|", r"\|") in part, name
        for below, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{name} {below}")

    walk(main, "retrofit")


def test_what_help_does_not_wrap_stands_in_one_block():
    """Lines in columns, whether a title goes before them or not."""
    page = (DOCS / "cli.md").read_text()
    for path, first, last in (("export", "peft  ", "transformers  "), ("doctor", "bucket  ", "off  ")):
        blocks = fenced(page.split(f"\n## retrofit {path}\n")[1].split("\n## ")[0], "text")
        assert any(re.search(f"^{first}.*^{last}", block, re.MULTILINE | re.DOTALL) for block in blocks), path


def test_environment_variables_set_their_options(monkeypatch):
    rows = re.findall(r"^\| `(--[\w-]+)`.* \| `(RETROFIT_\w+)` \|", (DOCS / "cli.md").read_text(), re.MULTILINE)
    assert {("--device", "RETROFIT_DEVICE"), ("--max-new-tokens", "RETROFIT_MAX_NEW_TOKENS")} <= set(rows)
    generate = main.commands["generate"]
    assert [row for row in rows if row[1] != f"RETROFIT_{row[0].lstrip('-').upper().replace('-', '_')}"] == []
    asked = ("--device", "--batch-size", "--seed", "--json", "--chat", "--image", "--stop-token-id")
    for option, variable in (pair for pair in rows if pair[0] in asked):
        name = next(o.name for o in generate.params if option in o.opts)
        monkeypatch.setenv(variable, "1")
        context = generate.make_context("generate", ["folder"], parent=click.Context(main), ignore_unknown_options=True)
        monkeypatch.delenv(variable)
        assert context.get_parameter_source(name) is click.core.ParameterSource.ENVIRONMENT, option


def test_the_recipe_page_has_every_key():
    keys = re.findall(r"^\| `([a-z_.]+)` \|", (DOCS / "recipe-keys.md").read_text(), re.MULTILINE)
    assert set(FIELDS) <= set(keys) and len(keys) == len(set(keys))


def test_the_python_page_has_every_public_name():
    page = (DOCS / "python-api.md").read_text()
    shown = re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)
    members = re.search(r"^::: retrofit.errors\n.*?members: \[(.*?)\]", page, re.MULTILINE | re.DOTALL)
    assert members is not None
    named = {name.rsplit(".", 1)[-1] for name in shown} | set(members[1].split(", "))
    assert set(retrofit.__all__) - {"__version__"} <= named
    for name in shown:
        module, _, attribute = name.rpartition(".")
        assert name == "retrofit.errors" or hasattr(importlib.import_module(module), attribute), name
    ours = [n for n, e in vars(errors).items() if inspect.isclass(e) and issubclass(e, errors.RetrofitError)]
    assert members[1].split(", ") == ours


def defined(path: Path) -> set[str]:
    """Dotted names of what a file defines."""
    names = set()

    def walk(body: list[ast.stmt], before: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(before + node.name)
                if isinstance(node, ast.ClassDef):
                    walk(node.body, f"{before}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(before + target.id for target in targets if isinstance(target, ast.Name))

    walk(ast.parse(path.read_text()).body, "")
    return names


def named_code(text: str) -> list[tuple[str, str]]:
    """(file, function or nothing) of every `file.py::function` and `folder/file.py` in a page."""
    return re.findall(r"`([\w./-]+\.py)(?:::([\w.]+))?`", text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_functions_that_are_named_exist(page):
    for name, function in named_code(page.read_text(encoding="utf-8")):
        if "/" not in name and not function:
            continue  # a file's bare name, said of a folder
        found = [root / name for root in (ROOT / "retrofit", ROOT) if (root / name).is_file()]
        assert found, f"{page.name}: there is no {name}"
        assert not function or function in defined(found[0]), f"{page.name}: {name} has no {function}"


def test_how_it_works_walks_through_the_engine():
    named = {name for name, function in named_code((DOCS / "how-it-works.md").read_text()) if function}
    assert {"runtime/engine.py", "runtime/scheduler.py", "adapters/rows.py", "runtime/rules/accept.py"} <= named


def fenced(text: str, *languages: str) -> list[str]:
    return re.findall(rf"^ *```(?:{'|'.join(languages)})\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)


def commands_in(text: str) -> list[list[str]]:
    """The words of every retrofit command in a page's shell blocks, launchers taken off."""
    found = []
    for block in fenced(text, "sh", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(\$ )?(retrofit|torchrun .*retrofit|accelerate .*retrofit) ", line):
                words = shlex.split(line.removeprefix("$ "), comments=True)
                found.append(words[words.index("retrofit") + 1 :])
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_that_are_shown_can_be_given(page):
    for words in commands_in(page.read_text(encoding="utf-8")):
        command: click.Command = main
        context = click.Context(main)
        while isinstance(command, click.Group):
            name, *words = words
            assert name in command.commands, f"{page.name}: {name}"
            command = command.commands[name]
            if isinstance(command, click.Group):
                context = click.Context(command, parent=context)
        command.make_context(name, list(words), parent=context)  # raises click.UsageError


def test_the_pages_show_commands():
    assert sum(len(commands_in(page.read_text(encoding="utf-8"))) for page in PAGES) >= 15


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_recipe_keys_that_are_named_exist(page):
    text = "\n".join(re.findall(r"`([^`\n]+)`", by_hand(page)) + fenced(by_hand(page), "sh", "python"))
    named = {key for key in KEY.findall(text) if not key.endswith((".py", ".json"))}
    assert named - set(FIELDS) == set() or page.name == "artifact-format.md"


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_python_that_is_shown_calls_what_there_is(page):
    known = {
        "generate": Engine.generate, "stream": Engine.stream, "load": Engine.load, "from_model": Engine.from_model,
        "astream": Engine.stream, "SamplingParams": retrofit.SamplingParams,
        "convert": retrofit.convert, "certify": retrofit.certify,
    }  # fmt: skip
    of_an_output = {field.name for field in dataclasses.fields(retrofit.SamplingParams)}
    for block in fenced(by_hand(page), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in known:
                parameters = inspect.signature(known[node.func.attr]).parameters
                takes = set(parameters) | (of_an_output if "keywords" in parameters else set())
                assert {word.arg for word in node.keywords} <= takes, ast.unparse(node)


MEASURED = re.compile(r"\d+\.\d+ ?(?:x|s|ms|min|%|GB|MB)?\b|\b\d+ ?(?:%|x\b|tokens/s)")
SETTINGS = re.compile(
    r"\bT = [\d.]+|temperatures? [\d.]+( and [\d.]+)?|Python 3\.\d+( to 3\.\d+)?|TPF 1\.00|sm_\d+|Apache-2\.0|0\.1\.0"
)


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_no_measured_figure_is_typed(page):
    prose = re.sub(r"^ *```.*?^ *```|`[^`\n]*`|\]\([^)]*\)", "", by_hand(page), flags=re.MULTILINE | re.DOTALL)
    assert MEASURED.findall(SETTINGS.sub("", prose)) == []


def test_the_picture_has_a_box_for_every_token():
    run = Results(numbers.RESULTS).figures("run-cpu", "forwards")
    root = ElementTree.fromstring((DOCS / "run.svg").read_text(encoding="utf-8"))
    fills = [element.get("fill") for element in root if element.tag.endswith("rect")]
    legend = 1
    assert fills.count(draw_docs.draw_run.BASE) == len(run["forwards"]) + legend
    assert fills.count(draw_docs.draw_run.DRAFT) == sum(run["stats"]["accepted"]) + legend
    assert len(run["forwards"]) - 1 == sum(n for kind, n in run["stats"]["forwards"].items() if kind != "prefill")
    right = [float(e.get("x")) + float(e.get("width")) for e in root if e.tag.endswith("rect") and e.get("x")]
    assert max(right) < draw_docs.draw_run.WIDTH


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_quickstart_prints_what_the_base_says():
    """The recorded text is what `ar` decodes today: of the base alone, as no artifact changes it."""
    quickstart = Results(numbers.RESULTS).figures("run-cpu", "quickstart")
    _, fused, ar, default, _ = [command["lines"][:-1] for command in quickstart["printed"]]
    assert fused == ar == default and any(ar)
    from retrofit.hub import load_base

    base = load_base("tiny", dtype="float32", offline=True)
    with Engine.from_model(base.model, base.tokenizer) as engine:
        options = {"temperature": 0.8, "seed": quickstart["seed"], "max_new_tokens": 24}
        [result] = engine.generate([quickstart["prompt"]], "ar", **options)
        [run] = engine.generate([quickstart["prompt"]], "ar", **{**options, "max_new_tokens": 48})
    assert result.text.split("\n") == ar
    drawn = Results(numbers.RESULTS).figures("run-cpu", "forwards")["forwards"]
    assert "".join(piece for pieces in drawn for piece in pieces) == run.text


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation, built as `make docs` builds it; a warning of any kind fails."""
    folder = tmp_path_factory.mktemp("site")
    warnings: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage())

    handler = Kept(logging.WARNING)
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        with patch.object(socket.socket, "connect", side_effect=OSError("built without a network")):
            build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    assert warnings == []
    return folder


def test_the_site_fetches_nothing_from_elsewhere(site):
    asset = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\bsrc=[\"']?(?:https?:)?//|<link[^>]*\bhref=[\"']?(?:https?:)?//"
    )
    pages, sheets = list(site.rglob("*.html")), list(site.rglob("*.css"))
    assert len(pages) > 10 and sheets
    assert [path.name for path in pages if asset.search(path.read_text(encoding="utf-8"))] == []
    remote = re.compile(r"(?:url\([\"']?|@import [\"'])(?:https?:)?//")
    assert [path.name for path in sheets if remote.search(path.read_text(encoding="utf-8"))] == []
    assert (site / "run.svg").is_file()


def test_the_python_page_shows_signatures(site):
    page = (site / "python-api.html").read_text(encoding="utf-8")
    assert "max_new_tokens" in page and "trust_remote_code" in page and "UnsupportedModelError" in page
