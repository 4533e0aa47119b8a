"""`retrofit convert --dry-run`: what a conversion would take, before anything is downloaded or written.

Parameters and memory come from a rehearsal (`estimate.py`), time from a few steps on this machine where the weights
are here.  Nothing is written.
Not here: how it is printed (`table.py`), reading all the text, which `retrofit data validate` does, and probes while
training, whose K/V cache of a few prompts is far less than a step takes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig

from retrofit.errors import ResourceError, out_of_memory
from retrofit.gguf_files import is_gguf, pretrained
from retrofit.hub import check_device, load_config, resolved_device
from retrofit.locating import expanded
from retrofit.machine import cache_folder, free_memory, resident
from retrofit.quantised.methods import stored_method
from retrofit.recipes.dry_run.estimate import PACKED_TOKEN, Estimate, Surroundings, estimate
from retrofit.recipes.dry_run.fit import changed, short, suggestions
from retrofit.recipes.dry_run.timing import PROBE_STEPS, timed
from retrofit.recipes.schema import Data, Recipe
from retrofit.recipes.text.documents import FILE_SUFFIXES, HUB_ID, documents
from retrofit.recipes.text.faults import Skipped
from retrofit.recipes.text.prompts import PREFIX
from retrofit.recipes.training.checkpoint import KEPT
from retrofit.recipes.training.order import SHUFFLE_BUFFER
from retrofit.recipes.training.prepare import resolve
from retrofit.weight_files import dtype_name, stored_dtype, weights_here

RESPONSE_BYTES = 8
"""Of a token in the file of regenerated responses, about."""

Say = Callable[[str], None]


def dry_run(
    plan: Recipe,
    out: Path,
    *,
    device: str = "auto",
    limit: int | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    skip_bad: bool = False,
    say: Say = lambda message: None,
) -> dict[str, Any]:
    """What a conversion would take, as plain data; sizes in bytes, times in seconds.

    limit: bytes it has to fit into.  Raises what `convert` would raise of the model, the recipe and text that is here;
    a GPU that is not here is planned for all the same.
    """
    plan, device = resolve(None, plan), resolved_device(device)
    missing = _missing(device)
    python = resident()
    name, revision = plan.base.model, plan.base.revision
    config, place = load_config(name, revision, trust_remote_code=trust_remote_code, offline=offline)
    stored_method(name, config)
    files = weights_here(place)
    around = surroundings(config, place, trust_remote_code)
    say("looking at the text")
    text = _text(plan, config, place, trust_remote_code, skip_bad)
    say("estimating memory")
    found = estimate(plan, config, device, around)
    report = {
        "model": name,
        "device": device,
        "weights_here": bool(files),
        "text": text,
        "parameters": _parameters(found),
        "memory": _memory(found, python),
        "disk": _disk(plan, found, config, out, files, place),
    }
    if limit is not None:
        say(f"looking for what fits into {short(limit)}")
        report["fit"] = _fit(plan, config, device, around, found, limit, python)
    if missing or not files:
        report["time"] = {"not_measured": missing or "the weights are not here"}
    else:
        report["time"] = _time(plan, config, device, around, found, offline, trust_remote_code, say)
    return report


def _missing(device: str) -> str | None:
    """Why nothing can be measured on this device here.  Raises UsageError for one that does not exist by name."""
    try:
        check_device(device)
    except ResourceError:
        return "no GPU here" if not torch.cuda.is_available() else f"no {device} here"
    return None


def _text(
    plan: Recipe, config: PreTrainedConfig, place: Path, trust_remote_code: bool, skip_bad: bool
) -> dict[str, str]:
    """By source `ok`, or why it was not looked at.  Raises what `convert` raises of rows and the first document."""
    data, found = plan.data, {}
    parts = [data] if isinstance(data.source, str) else [_single_source(data, one) for one in data.source]
    tokenizer = None
    with suppress(Exception):  # a folder with a configuration only
        tokenizer = AutoTokenizer.from_pretrained(**pretrained(place), trust_remote_code=trust_remote_code)
    for part in parts:
        name = str(part.source)
        path = expanded(name)
        is_hub = not (path.exists() or name.endswith(FILE_SUFFIXES) or name.startswith(PREFIX)) and HUB_ID.fullmatch(
            name
        )
        tables = path.suffix == ".parquet" or (path.is_dir() and any(path.rglob("*.parquet")))
        if name != "stdlib" and (is_hub or (tables and path.exists())):
            found[name] = "not checked: " + ("on the Hub" if is_hub else "Parquet is read through a cache")
        elif tokenizer is None:
            found[name] = "not checked: no tokenizer here"
        else:
            skipped, vocab = Skipped() if skip_bad else None, int(config.get_text_config().vocab_size)
            next(documents(part, tokenizer, part="train", seed=plan.train.seed, skipped=skipped, vocab=vocab), None)
            found[name] = "ok"
    return found


def _single_source(data: Data, one: Any) -> Data:
    """A source of a mixture by itself."""
    return data.model_copy(
        update={"source": one.source, "split": one.split or data.split, "field": one.field or data.field}
    )


def surroundings(config: PreTrainedConfig, place: Path, trust_remote_code: bool = False) -> Surroundings:
    """What a model's files tell beside its configuration, with weights or without; loads the tokenizer."""
    stored = (None if is_gguf(place) else stored_dtype(weights_here(place))) or _declared_dtype(config)
    return Surroundings(stored, _tokenizer(place, trust_remote_code))


def _tokenizer(place: Path, trust_remote_code: bool) -> int:
    """Bytes the process grows by when it loads the tokenizer; 0 where there is none."""
    before = resident()
    try:
        kept = AutoTokenizer.from_pretrained(**pretrained(place), trust_remote_code=trust_remote_code)
    except Exception:  # a folder with a configuration only
        return 0
    grown = max(0, resident() - before)
    del kept
    return grown


def _declared_dtype(config: PreTrainedConfig) -> str | None:
    declared = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    return None if declared is None else dtype_name(declared)


def _parameters(found: Estimate) -> dict[str, Any]:
    counted = found.parameters
    return {**asdict(counted), "trained": counted.trained, "share": round(counted.trained / counted.base, 6)}


def _memory(found: Estimate, python: int) -> dict[str, Any]:
    return {
        "python": python,
        "phases": {name: {"bytes": moment.total, "holds": moment.holds} for name, moment in found.phases.items()},
        "peak": {"phase": found.fullest, "bytes": found.peak},
    }


def _disk(
    plan: Recipe, found: Estimate, config: PreTrainedConfig, out: Path, files: list[Path], folder: Path
) -> dict[str, Any]:
    checkpoint = found.weights + found.moments + SHUFFLE_BUFFER * plan.data.max_length * PACKED_TOKEN
    kept = KEPT if plan.train.save_every else 1
    place = out.resolve()
    while not place.exists() and place != place.parent:
        place = place.parent
    disk: dict[str, Any] = {
        "checkpoint": checkpoint,
        "checkpoints_kept": kept,
        "checkpoints": (kept + 1) * checkpoint,
        "artifact": found.weights + (found.base if plan.profile == "joint" else 0),
        "download": 0 if files else _download(found, config, folder),
        "free": shutil.disk_usage(place).free,
    }
    if plan.data.responses == "regenerate":
        responses = plan.train.steps * plan.train.batch_size * plan.train.accumulation
        disk["responses_at_most"] = responses * plan.data.max_length * RESPONSE_BYTES
        disk["responses_folder"] = str(cache_folder())
    return disk


def _download(found: Estimate, config: PreTrainedConfig, folder: Path) -> int:
    """Bytes of the weights: as their index says, else by their number and type."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        total = json.loads(index.read_text(encoding="utf-8")).get("metadata", {}).get("total_size")
        if isinstance(total, int | float):
            return int(total)
    dtype = getattr(torch, _declared_dtype(config) or "float32")
    return found.parameters.base * int(dtype.itemsize)


def _fit(
    plan: Recipe,
    config: PreTrainedConfig,
    device: str,
    around: Surroundings,
    found: Estimate,
    limit: int,
    python: int,
) -> dict[str, Any]:
    """On the CPU the process's own Python has to fit, too."""
    beside = python if torch.device(device).type == "cpu" else 0
    fit: dict[str, Any] = {"limit": limit, "needs": found.peak + beside, "fits": found.peak + beside <= limit}
    if not fit["fits"]:
        fitting, least = suggestions(plan, limit, lambda other: estimate(other, config, device, around).peak + beside)
        fit["suggestions"] = [{"overrides": list(one.overrides), "needs": one.peak} for one in fitting]
        fit["least"] = {"overrides": list(least.overrides), "needs": least.peak}
        fit["base"] = found.base
    return fit


def _time(
    plan: Recipe,
    config: PreTrainedConfig,
    device: str,
    around: Surroundings,
    found: Estimate,
    offline: bool,
    trust_remote_code: bool,
    say: Say,
) -> dict[str, Any]:
    free, batch = free_memory(device), plan.train.batch_size
    if 0 < free < found.peak:
        one = changed(plan, {"train.batch_size": 1})
        if batch == 1 or estimate(one, config, device, around).peak > free:
            return {"not_measured": f"it does not fit: {short(free)} are free"}
        batch = 1
    say("measuring a few steps")
    try:
        took = timed(plan, device, offline, trust_remote_code, most=batch)
    except Exception as error:
        if out_of_memory(error) is None:
            raise
        return {"not_measured": "it does not fit into the memory that is free"}
    training = took.step * plan.train.steps
    return {
        "step": round(took.step, 4),
        "draft_rows_per_second": round(took.draft_rows_per_second, 1),
        "training": round(training, 1),
        "measuring": round(took.measuring, 1),
        "total": round(training + took.measuring, 1),
        "probe": {"steps": PROBE_STEPS, "windows": took.windows, "of": plan.train.batch_size},
    }
