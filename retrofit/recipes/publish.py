"""The artifact of a finished conversion, or of an adapter that was imported: what it says of itself.

Not here: training and measuring (`convert.py`), the folder and its card (`retrofit.artifact`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from retrofit import __version__
from retrofit.adapters.attach import Attached, count
from retrofit.artifact import folder as artifact
from retrofit.artifact.card import card
from retrofit.hub import Base
from retrofit.named_bases import is_named
from retrofit.recipes.naming import local_places, published_base, published_recipe
from retrofit.recipes.schema import Recipe, dump_recipe
from retrofit.recipes.training.blocks import gap_layout
from retrofit.recipes.training.measure import HeldOut
from retrofit.runtime.chat_template import identity
from retrofit.weight_files import dtype_name

if TYPE_CHECKING:
    from retrofit.recipes.own_model import OwnModel
    from retrofit.recipes.training.session import Session


def publish(
    out: Path,
    plan: Recipe,
    base: Base,
    attached: Attached,
    measured: HeldOut | None,
    training: Mapping[str, Any],
    *,
    estimated: Mapping[str, Any] | None = None,
    metrics: bytes | None = None,
    imported: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
    own: OwnModel | None = None,
    overwrite: bool,
) -> None:
    """Write the artifact, whole.  Raises what `artifact.write` raises.

    measured: None, or of no block, where there was no text; estimated: acceptance by slot for that case.  training,
    imported: as `retrofit.json` has them; origin: its `from` or `averaged`.  own: the model of the profile `joint`.
    metrics: what metrics.jsonl holds, if it
    is to be there.
    """
    held = getattr(torch, plan.adapter.dtype)
    acceptance: dict[str, Any] = {} if estimated is None else {"conditional": estimated}
    conditional: dict[str, Any] = {}
    if measured is not None and len(measured.eligible):
        conditional = measured.conditional()
        acceptance = {"conditional": conditional, "ranks": measured.rank_chances()}
        if by_context := measured.by_context():
            acceptance["by_context"] = by_context
    named = published_base(base)
    text = card(
        named["model"],
        local=named["local"],
        on_hub=not (named["local"] or is_named(base.name)),
        greedy=conditional.get("greedy"),
        sampled=conditional.get("sampled"),
        by_context=acceptance.get("by_context", ()),
        block=attached.layout.block,
        added=count(attached.parameters()),
        share=attached.share,
        imported=imported,
        origin=origin,
        drift=None if own is None else own.drift,
    )
    parts = {"acceptance": acceptance, "training": dict(training)}
    artifact.write(
        out,
        adapter_config=attached.adapter_config(None if named["local"] or own is not None else named["model"]),
        adapter_state=attached.adapter_state(held),
        heads=attached.heads_state(held),
        config={**_config(plan, base, named, attached, imported), **(origin or {}), **_own(own, base, named), **parts},
        recipe_yaml=dump_recipe(published_recipe(plan, named)),
        card=text,
        added=None if metrics is None else {"metrics.jsonl": metrics},
        local=local_places(plan, base, named),
        model=None if own is None else (own.write, own.size),
        overwrite=overwrite,
    )


def recorded(session: Session) -> dict[str, Any]:
    """What an artifact says of its training."""
    history, published = session.history, session.published
    return {
        "steps": len(history),
        "published_step": published["step"],
        "epochs": session.order.epochs,
        "stopped_early": session.stopped_early,
        "seconds": round(session.seconds, 1),
        "clean_rows": sum(r["rows"]["clean"] for r in history),
        "draft_rows": sum(r["rows"]["draft"] for r in history),
        "loss": published["loss"],
        **({"probe": published["probe"]} if "probe" in published else {}),
        **next(({"before": r["before"]} for r in reversed(history) if "before" in r), {}),
        **({} if session.skipped is None else {"skipped": session.skipped.counts()}),
    }


def _own(own: OwnModel | None, base: Base, named: Mapping[str, Any]) -> dict[str, Any]:
    """What `retrofit.json` says of the model that a model of its own was trained from."""
    return {} if own is None else {"original": {**named, "fingerprint": base.fingerprint}, "drift": own.recorded()}


def _config(
    plan: Recipe, base: Base, named: dict[str, Any], attached: Attached, imported: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What `retrofit.json` says of base, adapter and layout.  With which template others trained is not known."""
    template = identity(base.tokenizer, plan.data.template) if imported is None else None
    return {
        "format": artifact.FORMATS[plan.profile],
        "retrofit": __version__,
        "base": {
            **(named if plan.profile == "frozen" else {}),
            "dtype": dtype_name(attached.model.dtype),
            **({} if base.precision is None or plan.profile == "joint" else {"quantization": base.precision}),
            "fingerprint": base.fingerprint,
            "architecture": type(attached.model).__name__,
        },
        **({} if template is None else {"template": template}),
        **({} if imported is None else {"imported": dict(imported)}),
        "profile": plan.profile,
        "draft": attached.layout.to_dict(),
        **({"infill": {"rows": gap_layout(attached.layout).block}} if plan.objective.infill_share else {}),
        "adapter": {
            "rank": plan.adapter.rank,
            "alpha": plan.adapter.alpha,
            "targets": list(plan.adapter.targets),
            "modules": sorted(attached.adapter_config()["target_modules"]),
            "markov_rank": plan.adapter.markov_rank,
            "confidence": plan.adapter.confidence,
        },
        "parameters": {
            "adapter": count(attached.lora_parameters()),
            "heads": count(attached.heads.parameters()),
            "base": count(attached.base_parameters()),
        },
    }
