"""The artifact of a finished conversion: what it says of itself.

Not here: training and measuring (`convert.py`), the folder and its card (`retrofit.artifact`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from retrofit import __version__
from retrofit.adapters.attach import Attached, count
from retrofit.artifact import folder as artifact
from retrofit.artifact.card import card
from retrofit.hub import Base
from retrofit.named_bases import is_named
from retrofit.recipes.naming import local_places, published_base, published_recipe
from retrofit.recipes.schema import Recipe, dump_recipe
from retrofit.recipes.training.measure import HeldOut
from retrofit.recipes.training.session import Session
from retrofit.runtime.chat_template import identity
from retrofit.weight_files import dtype_name


def publish(
    out: Path, plan: Recipe, base: Base, attached: Attached, session: Session, measured: HeldOut, overwrite: bool
) -> None:
    """Write the artifact, whole.  Raises what `artifact.write` raises."""
    conditional, held = measured.conditional(), getattr(torch, plan.adapter.dtype)
    acceptance: dict[str, Any] = {"conditional": session.published["accept"]}
    if len(measured.eligible):
        acceptance = {"conditional": conditional, "ranks": measured.rank_chances()}
        if by_context := measured.by_context():
            acceptance["by_context"] = by_context
    named = published_base(base)
    text = card(
        named["model"],
        local=named["local"],
        on_hub=not (named["local"] or is_named(base.name)),
        greedy=conditional["greedy"] if len(measured.eligible) else None,
        sampled=conditional["sampled"] if len(measured.eligible) else None,
        by_context=acceptance.get("by_context", ()),
        block=attached.layout.block,
        added=count(session.trainer.trained),
        share=attached.share,
    )
    artifact.write(
        out,
        adapter_config=attached.adapter_config(None if named["local"] else named["model"]),
        adapter_state=attached.adapter_state(held),
        heads=attached.heads_state(held),
        config=_config(plan, base, named, attached, acceptance, session),
        recipe_yaml=dump_recipe(published_recipe(plan, named)),
        card=text,
        added={"metrics.jsonl": session.metrics()},
        local=local_places(plan, base, named),
        overwrite=overwrite,
    )


def _config(
    plan: Recipe,
    base: Base,
    named: dict[str, Any],
    attached: Attached,
    acceptance: dict[str, Any],
    session: Session,
) -> dict[str, Any]:
    history, published = session.history, session.published
    template = identity(base.tokenizer, plan.data.template)
    lora = count(attached.lora_parameters())
    return {
        "format": artifact.FORMAT,
        "retrofit": __version__,
        "base": {
            **named,
            "dtype": dtype_name(attached.model.dtype),
            "fingerprint": base.fingerprint,
            "architecture": type(attached.model).__name__,
        },
        **({} if template is None else {"template": template}),
        "profile": plan.profile,
        "draft": attached.layout.to_dict(),
        "adapter": {
            "rank": plan.adapter.rank,
            "alpha": plan.adapter.alpha,
            "targets": list(plan.adapter.targets),
            "modules": sorted(attached.adapter_config()["target_modules"]),
            "markov_rank": plan.adapter.markov_rank,
            "confidence": plan.adapter.confidence,
        },
        "parameters": {
            "adapter": lora,
            "heads": count(attached.heads.parameters()),
            "base": count(attached.base_parameters()),
        },
        "acceptance": acceptance,
        "training": {
            "steps": len(history),
            "published_step": published["step"],
            "stopped_early": session.stopped_early,
            "seconds": round(session.seconds, 1),
            "clean_rows": sum(r["rows"]["clean"] for r in history),
            "draft_rows": sum(r["rows"]["draft"] for r in history),
            "loss": published["loss"],
            **({"probe": published["probe"]} if "probe" in published else {}),
            **({} if session.skipped is None else {"skipped": session.skipped.counts()}),
        },
    }
