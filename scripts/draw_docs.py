"""Draw what the documentation says by itself: from the commands, the recipe schema, the artifact's schema, results/.

    docs/cli.md                every command and option, as click has them
    docs/recipe-keys.md        every key of a recipe, as recipes/schema.py has them
    docs/artifact-format.md    the keys of retrofit.json, between its markers
    docs/numbers.md, docs/index.md, README.md
                               the figures of results/ (benchmarks/readme_numbers/)
    docs/run.svg               the recorded run of results/run-cpu.json (scripts/draw_run.py)
    docs/report.svg            the report in results/report/, where there is one and matplotlib is installed

With --check nothing is written; exits 1 naming what is out of date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.readme_numbers import __main__ as numbers
from benchmarks.readme_numbers.__main__ import ROOT
from retrofit.artifact.schema import OPTIONAL, SCHEMA
from retrofit.cli.main import main as retrofit
from retrofit.recipes import schema
from retrofit.report import document
from retrofit.report.html import charts
from retrofit.report.html.picture import picture
from scripts import draw_run

DOCS = ROOT / "docs"
RECIPE_HEAD = ["key", "value", "default", "what it does"]
HINT = "run python scripts/draw_docs.py"
DO_NOT_EDIT = "Drawn by `python scripts/draw_docs.py` from {source}; do not edit."


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Only say what is out of date.")
def main(check: bool) -> None:
    old = {path: path.read_text(encoding="utf-8") if path.is_file() else "" for path in drawn()}
    stale = {path: text for path, text in drawn().items() if text != old[path]}
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)} is out of date; {HINT}" if check else f"wrote {path.relative_to(ROOT)}")
        if not check:
            path.write_text(text, encoding="utf-8")
    sys.exit(1 if check and stale else 0)


def drawn() -> dict[Path, str]:
    """Every page that is drawn, as it must be now."""
    pages = {
        DOCS / "cli.md": cli_page(),
        DOCS / "recipe-keys.md": recipe_page(),
        DOCS / "run.svg": draw_run.svg(draw_run.recorded(numbers.RESULTS)),
    }
    for path in numbers.PAGES:
        pages[path] = numbers.redrawn(path.read_text(encoding="utf-8"), numbers.RESULTS, path.name)
    pages |= report_picture(numbers.RESULTS / "report")
    page = DOCS / "artifact-format.md"
    pages[page] = numbers.filled(page.read_text(encoding="utf-8"), {"schema": schema_table()}, page.name)
    return pages


def report_picture(folder: Path) -> dict[Path, str]:
    """The one picture of a report; none where the folder holds no report, or where nothing can be drawn."""
    if not (folder / document.REPORT).is_file() or charts.missing():
        return {}
    return {DOCS / "report.svg": picture(document.read(folder))}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |" for cells in lines)


def cli_page() -> str:
    context = click.Context(retrofit, info_name="retrofit", **retrofit.context_settings)
    parts = [
        "# Command line",
        DO_NOT_EDIT.format(source="the commands themselves"),
        "`retrofit COMMAND --help` prints the same.  Any option can be set in the environment, by the name in its row; "
        "the command line goes before the environment.",
    ]
    for command, ctx, level in commands(retrofit, context, 2):
        parts += command_parts(command, ctx, level)
    return "\n\n".join(parts) + "\n"


def commands(
    command: click.Command, context: click.Context, level: int
) -> Iterator[tuple[click.Command, click.Context, int]]:
    """The command and all below it, each in the context it is called in, with the level of its heading."""
    yield command, context, level
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            settings = {**below.context_settings}
            yield from commands(below, click.Context(below, parent=context, info_name=name, **settings), 2)


def command_parts(command: click.Command, ctx: click.Context, level: int) -> list[str]:
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    parts = [f"{'#' * level} {ctx.command_path}", f"```text\n{usage}\n```", *help_parts(command.help or "")]
    if isinstance(command, click.Group):
        below = [(name, command.get_command(ctx, name)) for name in command.list_commands(ctx)]
        rows = [
            [f"[`{ctx.command_path} {name}`](#{anchor(f'{ctx.command_path} {name}')})", first_line(found)]
            for name, found in below
        ]
        parts.append(table(["command", "what it does"], rows))
    options = [option_row(option, ctx) for option in command.get_params(ctx) if isinstance(option, click.Option)]
    parts.append(table(["option", "values", "default", "environment", "what it does"], options))
    return [*parts, *help_parts(str(command.epilog or ""))]


def first_line(command: click.Command | None) -> str:
    assert command is not None
    return " ".join((command.help or "").split("\n\n")[0].split())


def anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower())


def help_parts(text: str) -> list[str]:
    """A command's help as Markdown: paragraphs, and what click is told not to wrap as it stands."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        lines = [line.rstrip() for line in paragraph.split("\n") if line.strip()]
        if lines and lines[0].strip() == "\b":
            title, rest = ([lines[1].strip()], lines[2:]) if lines[1].endswith(":") else ([], lines[1:])
            indent = min((len(line) - len(line.lstrip()) for line in rest), default=0)
            parts += [*title, "```text\n" + "\n".join(line[indent:] for line in rest) + "\n```"]
        elif lines:
            parts.append(" ".join(line.strip() for line in lines))
    return parts


def option_row(option: click.Option, ctx: click.Context) -> list[str]:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    text, default = told_default(option)
    variable = environment(option, ctx)
    return [names, values_of(option), default, f"`{variable}`" if variable else "", text]


def values_of(option: click.Option) -> str:
    """What an option takes, in words; nothing for a flag."""
    if option.is_flag:
        return ""
    if isinstance(option.type, click.Choice):
        return ", ".join(f"`{value}`" for value in option.type.choices)
    if isinstance(option.type, click.IntRange | click.FloatRange):
        word = "whole number" if isinstance(option.type, click.IntRange) else "number"
        low = "" if option.type.min is None else f"{'above' if option.type.min_open else 'from'} {option.type.min:g}"
        high = "" if option.type.max is None else f"{'below' if option.type.max_open else 'to'} {option.type.max:g}"
        return ", ".join(filter(None, (word, " ".join(filter(None, (low, high))))))
    return f"`{option.metavar}`" if option.metavar else "path" if isinstance(option.type, click.Path) else "text"


def told_default(option: click.Option) -> tuple[str, str]:
    """(help without its default, the default): what click shows, or what the help itself says in brackets."""
    text = " ".join((option.help or "").split())
    if found := re.search(r"\s*\[default: (.*)\]$", text):
        return text[: found.start()], found[1]
    if not option.show_default:
        return text, ""
    if option.secondary_opts:
        return text, f"`{(option.opts if option.default else option.secondary_opts)[0]}`"
    return text, f"`{option.default}`"


def environment(option: click.Option, ctx: click.Context) -> str | None:
    """RETROFIT_DEVICE, or whatever variable sets this option; None for --help and --version."""
    shows = {"--help", "--version"} & {*option.opts}  # click has a name of its own for the first
    if not option.allow_from_autoenv or shows or ctx.auto_envvar_prefix is None:
        return None
    return str(option.envvar or f"{ctx.auto_envvar_prefix}_{str(option.name).upper()}")


def recipe_page() -> str:
    parts = [
        "# Recipe keys",
        DO_NOT_EDIT.format(source="`retrofit/recipes/schema.py`"),
        "A recipe is one YAML file of sections and keys; a key left out has its default, an unknown one is an error "
        "that suggests the right one.  Any key can be set on the command line: "
        "`retrofit convert MODEL train.steps=8000 -o OUT`.  `retrofit recipes show NAME` prints a recipe with every "
        "key, `retrofit recipes ls` lists those that ship.",
    ]
    sections: dict[str, list[list[str]]] = {}
    for path, field in schema.FIELDS.items():
        section = path.partition(".")[0] if path.partition(".")[0] in schema.SECTIONS else ""
        sections.setdefault(section, []).append([f"`{path}`", kind_of(field), default_of(field), help_of(field)])
    for section, rows in sections.items():
        if section:
            parts += [f"## {section}", " ".join((schema.SECTIONS[section].__doc__ or "").split())]
        else:
            parts.append(f"## {rows[0][0].strip('`')}")
        parts.append(table(RECIPE_HEAD, rows))
    each = [
        [f"`{key}`", kind_of(field), default_of(field), help_of(field)]
        for key, field in schema.Ingredient.model_fields.items()
    ]
    parts += ["## A mixture's parts", "Each of the list that `data.source` may be.", table(RECIPE_HEAD, each)]
    return "\n\n".join(parts) + "\n"


def help_of(field: Any) -> str:
    return " ".join((field.description or "").split())


def default_of(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`[{', '.join(map(str, value))}]`" if isinstance(value, tuple) else f"`{value}`"


def kind_of(field: Any) -> str:
    """Type and limits in words: `whole number, 1 to 1024`."""
    low = next((f"from {m.ge:g}" for m in field.metadata if hasattr(m, "ge")), "")
    low = next((f"above {m.gt:g}" for m in field.metadata if hasattr(m, "gt")), low)
    high = next((f"to {m.le:,}" for m in field.metadata if hasattr(m, "le")), "")
    limits = " ".join(filter(None, (low, high)))
    return ", ".join(filter(None, (type_in_words(field.annotation), limits)))


def type_in_words(annotation: Any) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inside)
    if origin in (Union, UnionType):
        return " or ".join(type_in_words(one) for one in inside)
    if origin is tuple:
        return f"list of {type_in_words(inside[0])}"
    words = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text", type(None): "`null`"}
    if origin is dict:
        return "names and values"
    return words.get(annotation, "[sources](#a-mixtures-parts)")


def schema_table() -> str:
    """The keys of retrofit.json that every artifact has, and those that one may have."""
    rows = [[f"`{key}`", wanted] for key, (_, wanted) in SCHEMA.items()]
    rows += [[f"`{key}`", f"{wanted}; not in every artifact"] for key, (_, wanted) in OPTIONAL.items()]
    return table(["key", "value"], rows)


if __name__ == "__main__":
    main()
