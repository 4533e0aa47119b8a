"""`retrofit recipes`: the recipes that ship with retrofit."""

from __future__ import annotations

import click

from retrofit.cli.options import CONTEXT, output_options
from retrofit.cli.output import emit_json
from retrofit.cli.tables import print_table


@click.group(context_settings=CONTEXT)
def recipes() -> None:
    """List the recipes that ship with retrofit, or print one in full.

    \b
    Example:
      retrofit recipes show qwen3-8b train.steps=8000 > mine.yaml
    """


@recipes.command("ls", context_settings=CONTEXT)
@output_options
def recipes_ls(as_json: bool) -> None:
    """List the recipes: name, base model.

    \b
    Example:
      retrofit recipes ls
    """
    from retrofit.recipes import yaml_text
    from retrofit.recipes.schema import FOLDER, recipe_names

    written = {name: yaml_text.parse((FOLDER / f"{name}.yaml").read_text(encoding="utf-8")) for name in recipe_names()}
    bases = {name: content.get("base", {}).get("model") for name, content in written.items()}
    if as_json:
        emit_json([{"name": name, "base": base} for name, base in bases.items()])
        return
    print_table([(name, base or "any model") for name, base in bases.items()])


@recipes.command("show", context_settings=CONTEXT)
@click.argument("name", metavar="NAME|FILE")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@output_options
def recipes_show(name: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print a recipe with every key, as `convert` would use it.

    \b
    Examples:
      retrofit recipes show tiny
      retrofit recipes show qwen3-8b draft.block=16 train.lr=1e-4
    """
    from retrofit.recipes.schema import dump_recipe, load_recipe

    recipe = load_recipe(name, overrides)
    if as_json:
        emit_json(recipe.model_dump(mode="json"), indent=2)
    else:
        click.echo(dump_recipe(recipe), nl=False)
