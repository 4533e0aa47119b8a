"""`key.path=value`: single keys of a recipe, set from outside of its file.

Not here: whether the values may be what they are (`schema.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retrofit.recipes import yaml_text
from retrofit.recipes.problems import is_section, unknown_key


def apply(
    content: dict[Any, Any], overrides: Sequence[str | tuple[str, Any]] | Mapping[str, Any], fields: Mapping[str, Any]
) -> list[str]:
    """Write the overrides into `content`, in place; returns the problems met on the way.

    fields: every key's dotted path, with its type as `annotation`; a mapping's own keys are set one by one.
    """
    if isinstance(overrides, str):
        overrides = [overrides]
    sections = {path.partition(".")[0] for path in fields if "." in path}
    problems = []
    for item in overrides.items() if isinstance(overrides, Mapping) else overrides:
        if isinstance(item, str):
            path, equals, text = item.partition("=")
            try:
                value = yaml_text.parse(text)
            except ValueError:
                problems.append(f"{path}: `{text}` is not valid YAML; quote it")
                continue
            if not (path and equals):
                problems.append(f"`{item}` is no override; write key.path=value")
                continue
        else:
            path, value = item
        *parents, key = path.split(".")
        inside = fields.get(".".join(parents))
        if path in sections:
            problems.append(is_section(path, fields))
        elif path not in fields and not (key and getattr(inside, "annotation", None) == dict[str, Any]):
            problems.append(unknown_key(path, fields))
        else:
            _set(content, parents, key, value)
    return problems


def _set(content: dict[Any, Any], parents: Sequence[str], key: str, value: Any) -> None:
    """Where a parent is no mapping nothing is set: the validation refuses it."""
    for parent in parents:
        inner = content.get(parent)
        if inner is not None and not isinstance(inner, dict):
            return
        content[parent] = content = dict(inner or {})  # a copy: the caller's own is not written to
    content[key] = value
