"""One mutated file in an artifact or an adapter, and everything that reads it: what `pull`, `inspect`, `push`, `import`
and `Engine.load` do with what a stranger wrote.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

from safetensors.torch import load_file
from transformers import PreTrainedModel

from benchmarks.hostile.mutations import flipped, mutated
from retrofit.artifact import folder as artifact
from retrofit.artifact.files import json_bytes
from retrofit.artifact.inspection import describe
from retrofit.artifact.safety import load_json
from retrofit.cli.inspect import facts_of
from retrofit.errors import ArtifactError, RetrofitError
from retrofit.importing.fit import fit
from retrofit.runtime.engine import Engine
from retrofit.sharing.adapters import CONFIG, WEIGHTS, adapter_folder
from retrofit.sharing.card import published_card
from retrofit.sharing.measured import reported

MUTATED = (
    *artifact.LOAD_BEARING[:-1],
    *artifact.LOAD_BEARING[:-1],
    artifact.MANIFEST,
    "certificate.json",
    artifact.LOCAL,
)
"""Files that are read; the recipe is not, once its hash is right."""
FLIPS, FOREIGN = 0.1, 0.2
"""Of the cases, those with one flipped bit that the manifest does not know of, and those of an adapter to import."""
PROMPT, NEW = [5, 9, 2, 33, 7], 6


def case(number: int, files: Mapping[str, bytes], model: PreTrainedModel, place: Path) -> str:
    """`refused`, `harmless` or `missed`, for a file that does something else.  number: the seed.

    files: of a whole artifact of the model; place: a folder that is written over.  What raises anything but a
    RetrofitError is a crash.
    """
    chance = Random(number)
    kind = chance.random()
    if kind < FLIPS:
        name = chance.choice((artifact.ADAPTER, artifact.HEADS))
        return outcome(put(place, {**files, name: flipped(files[name], chance)}), model, allowed=False)
    if kind < FLIPS + FOREIGN:
        return _foreign(files, chance, model, place)
    name = chance.choice(MUTATED)
    changed = {**files, name: mutated(name, files[name], chance)}
    return outcome(put(place, changed if name == artifact.MANIFEST else sealed(changed)), model, allowed=True)


def sealed(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """With hashes that are true: whoever does harm writes them too."""
    told = {name: _entry(files[name]) for name in artifact.LOAD_BEARING}
    made = {**files, artifact.MANIFEST: json_bytes({"files": told, "format": artifact.FORMAT})}
    beside = {name for name in made if f"{name}.sha256" in made}
    return made | {f"{name}.sha256": f"{_entry(made[name])['sha256']}  {Path(name).name}\n".encode() for name in beside}


def _entry(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def put(place: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    return place


def outcome(folder: Path, model: PreTrainedModel, allowed: bool) -> str:
    """allowed: whether it may be taken for an artifact at all."""
    try:
        described = describe(folder)
        facts_of(described)
        published_card("# card\n", "a/b", described, described["certificate"], reported(folder))
        _base(folder, described)
        with Engine.from_model(model, adapter=folder) as engine:
            options: dict[str, Any] = {"max_new_tokens": NEW, "ignore_eos": True, "original_settings": False}
            plain, drafted = (engine.generate([PROMPT], mode, **options)[0].tokens for mode in ("ar", "self_spec"))
    except RetrofitError:
        return "refused"
    return "harmless" if allowed and plain == drafted else "missed"


def _base(folder: Path, config: Mapping[str, Any]) -> None:
    """What the base is called; that there is none here is no fault of the artifact's."""
    try:
        artifact.base_of(folder, config)
    except ArtifactError:
        raise
    except RetrofitError:
        pass


def _foreign(files: Mapping[str, bytes], chance: Random, model: PreTrainedModel, place: Path) -> str:
    """The two files of a PEFT adapter, one of them mutated, as `retrofit import` reads them."""
    own = {CONFIG: files[artifact.ADAPTER_CONFIG], WEIGHTS: files[artifact.ADAPTER]}
    name = chance.choice((CONFIG, WEIGHTS))
    folder = put(place / "foreign", {**own, name: mutated(name, own[name], chance)})
    try:
        adapter_folder(folder)
        _, problems = fit(model, load_json(folder / CONFIG), load_file(folder / WEIGHTS))
        json.dumps(problems)
    except RetrofitError:
        return "refused"
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    return "refused" if problems else "harmless"
