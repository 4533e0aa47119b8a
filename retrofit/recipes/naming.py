"""What an artifact calls its base and its text: names that mean the same everywhere, and no path of this machine.

A path tells who works where, and leads nowhere on another machine.  What this one needs to find its files again is
kept apart (`retrofit.artifact.folder.LOCAL`), in a file that is not published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retrofit.hub import EMBEDDED, Base
from retrofit.recipes.schema import Recipe

CACHED = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")
"""A folder of the Hub's cache; below it, `snapshots/REVISION` is a model."""


def resolved_name(base: Base) -> str:
    """The base's name as it will be understood from any folder of this machine."""
    if base.name == EMBEDDED or not Path(base.name).is_dir():
        return base.name
    return str(Path(base.name).resolve())


def published_base(base: Base) -> dict[str, Any]:
    """`model`, `revision` and `local` of `retrofit.json`: a Hub id, or with `local` a folder's or class's mere name."""
    nameless = base.live is not None and base.name == type(base.live).__name__
    if base.name == EMBEDDED or not (_is_place(base.name) or nameless):
        return {"model": base.name, "revision": base.revision, "local": False}
    place = Path(base.name).absolute()
    known = CACHED.fullmatch(place.parent.parent.name)
    if known and place.parent.name == "snapshots":
        return {"model": f"{known['owner']}/{known['name']}", "revision": place.name, "local": False}
    return {"model": _last(base.name), "revision": None, "local": True}


def published_recipe(plan: Recipe, named: Mapping[str, Any]) -> Recipe:
    """The recipe with `./NAME` for what lies on this machine.  named: `published_base`."""
    model = f"./{named['model']}" if named["local"] else named["model"]
    base = plan.base.model_copy(update={"model": model, "revision": named["revision"]})
    source = plan.data.source
    if isinstance(source, str):
        shown: Any = _shown(source)
    else:
        shown = tuple(one.model_copy(update={"source": _shown(one.source)}) for one in source)
    return plan.model_copy(update={"base": base, "data": plan.data.model_copy(update={"source": shown})})


def local_places(plan: Recipe, base: Base, named: Mapping[str, Any]) -> dict[str, Any]:
    """What the published names leave out: `base`, the folder of the base, and `data`, the places of the text."""
    sources = [plan.data.source] if isinstance(plan.data.source, str) else [one.source for one in plan.data.source]
    places = [str(Path(one).expanduser().resolve()) for one in sources if _shown(one) != one]
    folder = resolved_name(base)
    return {
        **({"base": folder} if named["local"] and Path(folder).is_dir() else {}),
        **({"data": places} if places else {}),
    }


def _shown(source: str) -> str:
    is_here = source != "stdlib" and (_is_place(source) or Path(source).expanduser().exists())
    return f"./{_last(source)}" if is_here else source


def _is_place(name: str) -> bool:
    """Whether it is a path, here or elsewhere; a Hub id has one slash at most."""
    return Path(name).is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name


def _last(name: str) -> str:
    """The last part of a path, of another system's too; a home's name is its user's, so that is left out."""
    place = Path(name.replace("\\", "/"))
    whole = Path.home() if place == Path("~") else place.resolve()
    return "model" if whole == Path.home() or not whole.name else whole.name
