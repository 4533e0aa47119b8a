"""What the demo and the bars share: the embedded base with an artifact, held-out prompts, tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from retrofit.artifact import folder as artifact
from retrofit.hub import load_base
from retrofit.machine import hardware
from retrofit.named_bases import EMBEDDED
from retrofit.recipes.text.library import held_out_prompts
from retrofit.runtime.engine import Engine

ROOT = Path(__file__).resolve().parent.parent
PROMPT_TOKENS = 64
NEW_TOKENS = 128


@dataclass(frozen=True)
class Setting:
    """The engine of an artifact, the original model apart from it, both fp32 on the CPU, and prompts."""

    folder: Path
    engine: Engine
    reference: PreTrainedModel
    prompts: list[list[int]]


@dataclass(frozen=True)
class Bar:
    """A figure beside what it has to be.  met is None for a figure that is only stated."""

    what: str
    bar: str
    figure: str
    met: bool | None


def load(folder: Path, prompts: int) -> Setting:
    """Raises ArtifactError and UsageError as `Engine.load` does."""
    logging.set_verbosity_error()
    engine = Engine.load(folder, dtype="float32", offline=True)
    base = load_base(EMBEDDED, dtype="float32", offline=True)
    return Setting(folder, engine, base.model, held_out_prompts(base.tokenizer, prompts, PROMPT_TOKENS))


def convert_default(folder: Path) -> None:
    """Convert the embedded base with its own recipe, replacing an artifact that stands there."""
    from retrofit.recipes.convert import convert

    logging.set_verbosity_error()
    convert(out=folder, overwrite=True, offline=True)


def conversion_seconds(folder: Path) -> float | None:
    """How long making the artifact took, by its own record."""
    seconds = artifact.read_config(folder)["training"].get("seconds")
    return None if seconds is None else float(seconds)


def say(message: str) -> None:
    """Progress goes to stderr."""
    print(message, file=sys.stderr, flush=True)


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells in columns two spaces apart; the first `left` columns flush left, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
    return "\n".join(f"  {line}" for line in lines)


def section(command: str, seconds: float, bars: Sequence[Bar], figures: Mapping[str, Any]) -> dict[str, Any]:
    """What a results file holds of one measurement."""
    return {
        "command": command,
        "hardware": hardware(),
        "seconds": round(seconds, 1),
        "bars": [asdict(bar) for bar in bars],
        "figures": figures,
    }


def write(path: Path, measured: Mapping[str, Any], order: Sequence[str] | None = None) -> None:
    """Put measured sections into a results file, beside older ones; the file appears whole or not at all."""
    old = json.loads(path.read_text())["sections"] if path.is_file() else {}
    merged = {**old, **measured}
    names = merged if order is None else [name for name in order if name in merged]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps({"sections": {name: merged[name] for name in names}}, indent=2) + "\n")
    temporary.replace(path)


def number(value: float | None, places: int = 2) -> str:
    return "-" if value is None else f"{value:.{places}f}"
