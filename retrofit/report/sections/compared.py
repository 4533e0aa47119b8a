"""What was compared, on what: enough to know whether two reports speak of the same thing."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from retrofit.artifact import folder as artifacts
from retrofit.artifact.files import sha256
from retrofit.machine import hardware
from retrofit.report.asked import called
from retrofit.report.prompts import digest
from retrofit.report.setting import Data, Earlier, Setting
from retrofit.runtime.chat_template import differences, identity
from retrofit.weight_files import dtype_name


def compared(setting: Setting, earlier: Earlier) -> Data:
    """Hashes of artifact, base, prompts and template; how the engine runs; hardware, versions, seed, sizes.

    Of the profile `joint`, whose base is the model it has of its own, also the one it was trained from and the drift.
    """
    engine, backend = setting.engine, setting.engine.backend
    prompts = setting.prompts
    trained = engine.config.get("template")
    now = None if engine.tokenizer is None else identity(engine.tokenizer, {})
    return {
        "artifact": identity_of(setting.subject.artifact),
        "base": _base(setting),
        **{name: engine.config[name] for name in ("original", "drift") if name in engine.config},
        "engine": {
            "backend": backend.name,
            "exact": backend.exact,
            "dtype": dtype_name(setting.subject.dtype),
            "device": str(setting.subject.device),
            "packed": bool(getattr(backend, "packed", False)),
            "context_tokens": engine.limits.context,
        },
        "hardware": hardware(),
        "prompts": {
            "count": len(prompts),
            "given": setting.given,
            "left_out": setting.left_out,
            "sha256": digest(prompts),
            "turns_left_out": sum(prompt.left_out for prompt in prompts),
            "categories": dict(Counter(prompt.category for prompt in prompts)),
        },
        "template": {"trained": trained, "now": now, "differences": differences(trained, engine.tokenizer)},
        "seed": setting.seed,
        "modes": list(setting.modes),
        "suite": asdict(setting.suite),
    }


def identity_of(folder: Path | None) -> Data | None:
    """The sha256 of an artifact's manifest, which holds those of its files; None for a live engine."""
    if folder is None:
        return None
    return {"name": called(folder), "manifest_sha256": sha256(folder / artifacts.MANIFEST)}


def _base(setting: Setting) -> dict[str, Any] | None:
    base = setting.engine.base
    if base is None:
        return None
    recorded = setting.engine.config.get("base", {})
    name = artifacts.published_name(recorded) if recorded else base.name
    if setting.engine.config.get("profile") == "joint" and setting.subject.artifact is not None:
        name = f"{called(setting.subject.artifact)}/{name}"
    return {"model": Path(name).name if Path(name).is_absolute() else name, "revision": base.revision,
            "fingerprint": base.fingerprint}  # fmt: skip
