"""What an artifact calls its base and its text: names that mean the same everywhere, and no path of this machine.

A path tells who works where, and leads nowhere on another machine.  What this one needs to find its files again is
kept apart (`retrofit.artifact.folder.LOCAL`), in a file that is not published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from retrofit.artifact.files import sha256
from retrofit.artifact.folder import published_name
from retrofit.gguf_files import is_gguf, read_header, stored_kind
from retrofit.hub import Base
from retrofit.locating import expanded, hub_file, is_path
from retrofit.named_bases import is_named
from retrofit.recipes.schema import Recipe

CACHED = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")
"""A folder of the Hub's cache; below it, `snapshots/REVISION` is a model."""


def resolved_name(base: Base) -> str:
    """The base's name as it will be understood from any folder of this machine."""
    place = expanded(base.name)
    return base.name if is_named(base.name) or not place.exists() else str(place.resolve())


def published_base(base: Base) -> dict[str, Any]:
    """`model`, `revision` and `local` of `retrofit.json`: a Hub id, or with `local` a folder's or class's mere name.

    Of a GGUF file `gguf` too: its name, its sha256, and the type most of its weights are stored in.
    """
    return {**_published(base), **_published_gguf(base)}


def _published(base: Base) -> dict[str, Any]:
    nameless = base.live is not None and base.name == type(base.live).__name__
    if is_named(base.name):
        return {"model": base.name, "revision": None, "local": False}
    if (file := hub_file(base.name)) is not None:
        return {"model": file[0], "revision": base.revision, "local": False}
    if not (_is_place(base.name) or nameless):
        return {"model": base.name, "revision": base.revision, "local": False}
    place = expanded(base.name).absolute()
    snapshot = place.parent if is_gguf(place) else place
    known = CACHED.fullmatch(snapshot.parent.parent.name)
    if known and snapshot.parent.name == "snapshots":
        return {"model": f"{known['owner']}/{known['name']}", "revision": snapshot.name, "local": False}
    return {"model": _last(base.name), "revision": None, "local": True}


def _published_gguf(base: Base) -> dict[str, Any]:
    if base.place is None or not is_gguf(base.place):
        return {}
    file = hub_file(base.name)
    return {
        "gguf": {
            "file": base.place.name if file is None else file[1],
            "sha256": sha256(base.place),
            "kind": stored_kind(read_header(base.place)),
        }
    }


def published_recipe(plan: Recipe, named: Mapping[str, Any]) -> Recipe:
    """The recipe with `./NAME` for what lies on this machine.  named: `published_base`."""
    model = f"./{named['model']}" if named["local"] else published_name(named)
    base = plan.base.model_copy(update={"model": model, "revision": named["revision"]})
    source = plan.data.source
    if isinstance(source, str):
        shown: Any = _shown(source)
    else:
        shown = tuple(one.model_copy(update={"source": _shown(one.source)}) for one in source)
    return plan.model_copy(update={"base": base, "data": plan.data.model_copy(update={"source": shown})})


def placed_source(source: Any, places: Sequence[str]) -> Any:
    """`data.source` of a published recipe with the place on this machine of every `./NAME` that is among `places`."""
    if not isinstance(source, str):
        return [{**one, "source": placed_source(one["source"], places)} for one in source]
    known = [place for place in places if source == f"./{_last(place)}"]
    return known[0] if known else source


def local_places(plan: Recipe, base: Base, named: Mapping[str, Any]) -> dict[str, Any]:
    """What the published names leave out: `base`, the place of the base, and `data`, the places of the text."""
    sources = [plan.data.source] if isinstance(plan.data.source, str) else [one.source for one in plan.data.source]
    places = [str(expanded(one).resolve()) for one in sources if _shown(one) != one]
    place = resolved_name(base)
    return {
        **({"base": place} if named["local"] and Path(place).exists() else {}),
        **({"data": places} if places else {}),
    }


def _shown(source: str) -> str:
    is_here = source != "stdlib" and (_is_place(source) or expanded(source).exists())
    return f"./{_last(source)}" if is_here else source


def _is_place(name: str) -> bool:
    """Whether it is a path, here or elsewhere."""
    return Path(name).exists() or is_path(name)


def _last(name: str) -> str:
    """The last part of a path, of another system's too; a home's name is its user's, so that is left out."""
    place = Path(name.replace("\\", "/"))
    home = expanded("~")
    whole = home if place == Path("~") else place.resolve()
    return "model" if whole == home or not whole.name else whole.name
