"""The artifact of a finished conversion: what it says of itself, and its card.

Not here: training and measuring (`convert.py`), the folder (`retrofit.artifact.folder`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retrofit import __version__
from retrofit.adapters.attach import Attached, count
from retrofit.artifact import folder as artifact
from retrofit.hub import EMBEDDED, Base
from retrofit.recipes.naming import local_places, published_base, published_recipe
from retrofit.recipes.schema import Recipe, dump_recipe
from retrofit.recipes.training.measure import HeldOut
from retrofit.recipes.training.session import Session
from retrofit.weight_files import dtype_name

CARD = """---
library_name: retrofit
{known}tags: [retrofit, speculative-decoding, diffusion]
---
# {model}, retrofitted

Adapter for self-speculative decoding of `{model}`, made with retrofit {version} (`pip install retrofit-lm`).
The base weights are untouched: mode `ar` is the original model, mode `self_spec` gives its output with fewer forwards.

```python
import retrofit
engine = retrofit.Engine.load("PATH-OF-THIS-FOLDER"{base})
print(engine.generate(["Once upon a time"], mode="self_spec")[0].text)
```

`adapter/` is for retrofit alone, which applies it to draft rows only. To other programs it says that it is an Activated
LoRA whose invocation tokens never occur: plain PEFT leaves the original model as it is, and vLLM refuses the folder.

| measured on held-out text, teacher-forced | by slot |
| --- | --- |
| greedy acceptance | {greedy} |
| sampled acceptance, 1 - TV | {sampled} |

Draft block {block}; adapter and heads {added:,} parameters, {share:.2%} of the base.
"""


def publish(
    out: Path, plan: Recipe, base: Base, attached: Attached, session: Session, measured: HeldOut, overwrite: bool
) -> None:
    """Write the artifact, whole.  Raises what `artifact.write` raises."""
    conditional = measured.conditional()
    acceptance: dict[str, Any] = {"conditional": session.published["accept"]}
    if len(measured.eligible):
        acceptance = {"conditional": conditional, "ranks": measured.rank_chances()}
    named = published_base(base)
    embedded = base.name == EMBEDDED
    card = CARD.format(
        model=named["model"],
        known="" if named["local"] or embedded else f"base_model: {named['model']}\nbase_model_relation: adapter\n",
        base=', base="PATH-OF-THE-BASE"' if named["local"] else "",
        version=__version__,
        greedy=conditional["greedy"] if len(measured.eligible) else "not measured",
        sampled=conditional["sampled"] if len(measured.eligible) else "not measured",
        block=attached.layout.block,
        added=count(session.trainer.trained),
        share=attached.share,
    )
    artifact.write(
        out,
        adapter_config=attached.adapter_config(None if named["local"] else named["model"]),
        adapter_state=attached.adapter_state(),
        heads=attached.heads_state(),
        config=_config(plan, base, attached, acceptance, session),
        recipe_yaml=dump_recipe(published_recipe(plan, named)),
        card=card,
        added={"metrics.jsonl": session.metrics()},
        local=local_places(plan, base, named),
        overwrite=overwrite,
    )


def _config(
    plan: Recipe,
    base: Base,
    attached: Attached,
    acceptance: dict[str, Any],
    session: Session,
) -> dict[str, Any]:
    history, published = session.history, session.published
    lora = count(attached.lora_parameters())
    return {
        "format": artifact.FORMAT,
        "retrofit": __version__,
        "base": {
            **published_base(base),
            "dtype": dtype_name(attached.model.dtype),
            "fingerprint": base.fingerprint,
            "architecture": type(attached.model).__name__,
        },
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
