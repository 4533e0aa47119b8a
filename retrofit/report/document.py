"""`report.json`: what a report may hold (`schema.json`), and how it is written and read.

A report is checked before it is written, holds no NaN, and comes whole or not at all.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

from retrofit.artifact import folder as artifacts
from retrofit.artifact.files import disk, replace_file
from retrofit.errors import ArtifactError, UsageError
from retrofit.sharing.pulling import findings_folder, local_folder

REPORT = "report.json"
FOLDER = "eval"
"""Where it lies inside an artifact."""
FORMAT = 1
SCHEMA = Path(__file__).with_name("schema.json")


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of reports, 2020-12."""
    loaded: dict[str, Any] = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return loaded


def problem(data: Any) -> str | None:
    """What is wrong with a report, and where; None of a valid one."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    wrong = best_match(Draft202012Validator(schema()).iter_errors(data))
    return None if wrong is None else f"{wrong.json_path}: {wrong.message.splitlines()[0][:200]}"


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for what has no value.  Keys become text, tuples lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def place(folder: str | Path) -> Path:
    """Where a report lies that is written to a folder: inside an artifact in a folder of its own."""
    folder = Path(folder)
    return folder / FOLDER / REPORT if (folder / artifacts.CONFIG).is_file() else folder / REPORT


def write(folder: str | Path, data: dict[str, Any], others: dict[str, str]) -> Path:
    """Write the report into an artifact, beside its hash, or into another folder; others: text by file name.

    Raises ResourceError where there is no room for it or the folder cannot be written to.
    """
    if wrong := problem(data):
        raise AssertionError(f"the report does not keep to its schema: {wrong}")
    texts = {REPORT: json.dumps(data, indent=1, allow_nan=False) + "\n", **others}
    path, root = place(folder), Path(folder)
    for name, text in texts.items():
        content = text.encode(errors="replace")  # a prompt's name may hold half a character
        if path.parent != root:
            artifacts.add(root, f"{FOLDER}/{name}", content)
        else:
            beside = path.with_name(name)
            with disk(beside, len(content)):
                replace_file(beside, content)
    return path


def read(path: str | Path) -> dict[str, Any]:
    """A report from its file, or from the folder that holds it, or the artifact, named as for `Engine.load`.

    Raises UsageError where there is none, ArtifactError for what is no report of this format.
    """
    folder = local_folder(path, offline=True).expanduser()
    found = [place(one) for one in (findings_folder(path, folder), folder)] if folder.is_dir() else [folder]
    path = next((one for one in found if one.is_file()), found[0])
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read: {error.strerror or error}", "make one with `retrofit eval ARTIFACT`"
        ) from None
    except ValueError as error:
        raise ArtifactError(f"{path}: not valid JSON: {error}", "run `retrofit eval` again") from None
    if wrong := problem(data):
        raise ArtifactError(f"{path}: no report of format {FORMAT}: {wrong}", "run `retrofit eval` again")
    return data
