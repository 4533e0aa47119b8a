"""Help: every command has an example, options are the same everywhere, the README lists all commands."""

import dataclasses
import inspect

import click
import pytest
from commands import done

import retrofit
from benchmarks.common import ROOT
from retrofit.cli import main as cli
from retrofit.cli import options as cli_options
from retrofit.runtime import engine, loading
from retrofit.runtime import options as engine_options
from retrofit.runtime.backends.levels import EXACT
from retrofit.runtime.params import SamplingParams


def walk(command=cli.main, path=()):
    yield path, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from walk(inner, (*path, name))


COMMANDS = dict(walk())


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_help_has_an_example(path):
    text = done(*path, "--help")
    assert "Example" in text
    assert "retrofit" in text.split("Example", 1)[1]


def test_a_terminal_of_80_columns_cuts_no_line_about_a_command():
    for path, command in COMMANDS.items():
        if isinstance(command, click.Group):
            context = click.Context(command, info_name=" ".join(("retrofit", *path)), terminal_width=78)  # and a margin
            text = command.get_help(context)
            assert "..." not in text.split("Commands:", 1)[1], text


@pytest.mark.parametrize("path", [("generate",), ("chat",)], ids=" ".join)
def test_defaults_and_choices_are_the_engines(path):
    given = COMMANDS[path].make_context(path[0], ["ARTIFACT"]).params
    wanted = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    wanted |= {name: p.default for name, p in inspect.signature(engine.Engine.stream).parameters.items()}
    options = {name: value for name, value in given.items() if name in wanted and value != ()}
    assert options == {name: wanted[name] for name in options}
    assert {"mode", "strategy", "prepare", "max_new_tokens", "temperature", "threshold", "seed"} <= set(options)
    assert tuple(cli_options.MODES) == engine_options.MODES
    assert tuple(cli_options.STRATEGIES) == engine_options.STRATEGIES
    assert tuple(cli_options.BACKENDS) == loading.BACKENDS
    assert tuple(cli_options.EXACT) == ("auto", *EXACT)


def test_common_options_are_the_same_everywhere():
    seen = {}
    for path, command in COMMANDS.items():
        if isinstance(command, click.Group):
            continue
        options = {o.name: (o.opts, str(o.type), o.help) for o in command.params if isinstance(o, click.Option)}
        assert {"as_json", "quiet", "verbose"} <= set(options), path
        common = {"as_json", "quiet", "verbose", "device", "dtype", "offline", "trust_remote_code", "backend", "exact"}
        assert ("backend" in options) == (path[0] in ("generate", "chat", "certify", "doctor", "eval"))
        for name in common & set(options):
            assert seen.setdefault(name, options[name]) == options[name]


def test_the_documentation_lists_every_command():
    page = (ROOT / "docs" / "cli.md").read_text()
    commands = [" ".join(path) for path, command in COMMANDS.items() if not isinstance(command, click.Group)]
    assert [name for name in commands if f"\n## retrofit {name}\n" not in page] == []


def test_version():
    assert done("--version") == f"retrofit {retrofit.__version__}\n"
