"""From a recipe and a model to a base with an untrained adapter on it.

Not here: training it (`convert.py`), weighing what that takes (`dry_run/estimate.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retrofit.adapters.attach import Attached, attach
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.live import refuse_live
from retrofit.errors import UsageError
from retrofit.hub import Base, live_fingerprint, load_base
from retrofit.recipes.schema import Recipe, load_recipe
from retrofit.recipes.training.joint.model_folder import refuse_unwritable
from retrofit.recipes.training.recompute import recompute_layers
from retrofit.runtime.backends.context import context_length
from retrofit.runtime.backends.hf.backend import HFBackend, wrap
from retrofit.runtime.backends.hf.refused import refuse_unsupported


def resolve(
    model: str | PreTrainedModel | None,
    recipe: str | Path | Recipe | None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
) -> Recipe:
    """The recipe of a conversion with everything filled in.

    Raises UsageError; also for a live model that `refuse_live` refuses, and UnsupportedModelError.
    """
    if model is not None and not isinstance(model, str):
        refuse_live(model)
    if isinstance(recipe, Recipe):
        if overrides:
            raise UsageError("a Recipe and overrides were both given", "put the values into the Recipe")
        plan = recipe
    else:
        name = str(recipe) if recipe is not None else (None if model is None else "default")
        plan = load_recipe(name, overrides)
    if isinstance(model, str):
        plan = plan.model_copy(update={"base": plan.base.model_copy(update={"model": model})})
    return plan


def open_base(
    model: str | PreTrainedModel | None,
    plan: Recipe,
    device: str,
    offline: bool,
    trust_remote_code: bool,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    need_tokenizer: bool = True,
) -> Base:
    """The base of a resolved recipe, or the live model.  Raises UsageError, ResourceError, UnsupportedModelError."""
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise UsageError("a live model needs tokenizer=")
        name = model.config._name_or_path or type(model).__name__
        return Base(model, tokenizer, name, None, None, live_fingerprint(model))
    return load_base(
        plan.base.model,
        plan.base.revision,
        dtype=plan.dtype,
        device=device,
        offline=offline,
        trust_remote_code=trust_remote_code,
        need_tokenizer=need_tokenizer,
        quantization=plan.base.quantization,
    )


def attached_to(base: Base, plan: Recipe) -> tuple[Attached, HFBackend]:
    """The base with an untrained adapter on it, set up as the recipe trains it; closing the backend undoes that.

    Raises UsageError where the recipe does not fit the model, UnsupportedModelError.
    """
    layout = DraftLayout(**plan.draft.model_dump())
    refuse_unsupported(base.model)
    if plan.profile == "joint":
        refuse_unwritable(base.model)
    context = context_length(base.model.config.get_text_config())
    if layout.block >= context:
        raise UsageError(f"draft.block is {layout.block}, the context of {base.name} is {context}", "lower draft.block")
    if plan.data.max_length > context:
        raise UsageError(
            f"data.max_length is {plan.data.max_length}, the context of {base.name} is {context}",
            f"add data.max_length={context}",
        )
    attached, backend = wrap(
        base.model,
        lambda: attach(
            base.model,
            layout,
            rank=plan.adapter.rank,
            alpha=plan.adapter.alpha,
            targets=plan.adapter.targets,
            markov_rank=plan.adapter.markov_rank,
            confidence=plan.adapter.confidence,
            seed=plan.train.seed,
        ),
    )
    try:
        longest = backend.rope_boundary or backend.context_length
        if plan.data.max_length > longest:
            raise UsageError(
                f"data.max_length is {plan.data.max_length}, beyond the position where {base.name} changes its RoPE",
                f"add data.max_length={longest}",
            )
        if plan.train.checkpointing:
            backend.until_closed(recompute_layers(backend))
    except BaseException:
        backend.close()
        attached.detach()
        raise
    return attached, backend
