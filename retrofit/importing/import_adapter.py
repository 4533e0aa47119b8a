"""`retrofit import`: an adapter that another program drafts with, as an artifact.

    uno        SGLang's `--uno-lora-path` (arXiv 2609.04010)
    nemotron   the `linear_spec_lora` of Nemotron-Labs-Diffusion (arXiv 2607.05722)

Such an adapter is a plain PEFT folder: rank, scale and targets come over from it.  How drafts are laid out, it does not
say: the style does, which is the recipe of that name, and single keys of `draft` may be set otherwise.
Not here: whether the adapter fits (`fit.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from retrofit.adapters.attach import Attached
from retrofit.artifact import folder as artifact
from retrofit.artifact.files import sha256
from retrofit.artifact.safety import load_json
from retrofit.errors import ArtifactError, DataError, UsageError
from retrofit.hub import Base, empty_model, load_base, resolved_device
from retrofit.importing.fit import Fitted, fit, shown
from retrofit.recipes.publish import publish
from retrofit.recipes.schema import Recipe, load_recipe
from retrofit.recipes.text.documents import documents
from retrofit.recipes.text.windows import first_windows
from retrofit.recipes.training.measure import MEASURED, HeldOut, held_out_acceptance
from retrofit.recipes.training.prepare import attached_to
from retrofit.runtime.backends.context import context_length, rope_boundary
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.sharing.adapters import CONFIG, WEIGHTS, Adapter, adapter_folder

STYLES = ("uno", "nemotron")
SOURCE = "data.source"
MEASURING = (
    *("data.split", "data.field", "data.template", "data.max_length", "data.held_out"),
    *("train.anchors", "train.seed"),
)
"""Keys of a recipe that say how acceptance is measured on `data.source`."""
FREE = ("base.revision", SOURCE, *MEASURING)
"""Keys that may be set beside those of `draft`; what the others say is in the adapter, or of training."""


class _Read(NamedTuple):
    """The adapter's files, read."""

    place: Adapter
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def import_adapter(
    adapter: str | Path,
    base: str,
    out: str | Path,
    style: str,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    mask_token: int | str | None = None,
    subfolder: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
) -> artifact.Artifact:
    """Write an adapter of another program as an artifact, and return it.

    adapter: its PEFT folder, or OWNER/NAME on the Hub; subfolder: where in there it is.  base: Hub id, folder or GGUF
    file of the model it is for.  style: one of STYLES; overrides: keys of `draft` that are otherwise, and a
    `data.source` of text to measure acceptance on, without which nothing is measured.
    mask_token: id or text of the token that draft rows read where `draft.input` is mask; its embedding becomes the mask
    vector.  None takes the `mask_token_id` of the base's configuration.
    Raises UsageError, ArtifactError that names all of the adapter that no recipe can express, DataError for text
    without a block to measure, and what `load_base` raises; no artifact is written then.
    """
    out = Path(out)
    plan, measure = _plan(style, overrides)
    if mask_token is not None and plan.draft.input != "mask":
        raise UsageError("a mask token is given, and draft rows read noise", "leave it out, or add draft.input=mask")
    artifact.check_writable(out, overwrite)
    place = adapter_folder(adapter, subfolder, offline)
    read = _Read(place, load_json(place.folder / CONFIG), load_file(place.folder / WEIGHTS))
    empty = empty_model(base, plan.base.revision, offline=offline, trust_remote_code=trust_remote_code)
    plan, fitted = _fitted(plan, style, str(adapter), read, empty, base)
    loaded = load_base(
        base,
        plan.base.revision,
        dtype=dtype,
        device=resolved_device(device),
        offline=offline,
        trust_remote_code=trust_remote_code,
        quantization=plan.base.quantization,
        need_tokenizer=measure or (isinstance(mask_token, str) and not mask_token.isdecimal()),
    )
    masked = _mask(loaded, mask_token) if plan.draft.input == "mask" else None
    imported = {
        "style": style,
        "repository": place.repository,
        "commit": place.commit,
        "sha256": sha256(place.folder / WEIGHTS),
    }
    attached, backend = attached_to(loaded, plan)
    try:
        _fill(attached, fitted, masked)
        measured = _measured(plan, loaded, attached, backend, offline) if measure else None
        publish(out, plan, loaded, attached, measured, {}, imported=imported, overwrite=overwrite)
    finally:
        backend.close()
    return artifact.read(out)


def _plan(style: str, overrides: Mapping[str, Any] | Sequence[str]) -> tuple[Recipe, bool]:
    """The recipe of a style with keys set otherwise, and whether there is text to measure on.  Raises UsageError."""
    if style not in STYLES:
        raise UsageError(f"style {style!r} does not exist", f"it is one of {', '.join(STYLES)}")
    overrides = [overrides] if isinstance(overrides, str) else overrides
    keys = [one.partition("=")[0] for one in overrides]
    plan = load_recipe(style, overrides)
    fixed = [key for key in keys if not key.startswith(("draft.", "data.template.")) and key not in FREE]
    if fixed:
        hint = f"beside draft.* these can be set: {', '.join(FREE)}"
        raise UsageError(f"{', '.join(fixed)}: cannot be set of an adapter that is imported", hint)
    unused = [key for key in keys if key.startswith(MEASURING)]
    if unused and SOURCE not in keys:
        raise UsageError(f"{unused[0]}: nothing is measured without {SOURCE}", f"add {SOURCE}=TEXTS")
    return plan, SOURCE in keys


def _fitted(
    plan: Recipe, style: str, name: str, read: _Read, model: PreTrainedModel, base: str
) -> tuple[Recipe, Fitted]:
    """The plan with what the adapter says, and its tensors.  Raises ArtifactError with all that is in the way.

    model: that of the base, of which names and shapes are looked at and no weights.
    """
    fitted, problems = fit(model, read.config, read.tensors)
    told = {"rank": fitted.rank, "alpha": fitted.alpha, "targets": fitted.targets, "dtype": fitted.dtype}
    adapter = plan.adapter
    try:
        adapter = load_recipe(style, {f"adapter.{key}": value for key, value in told.items() if value}).adapter
    except UsageError as error:
        problems += [line.strip() for line in str(error).splitlines() if "adapter." in line]
    if problems:
        made_for = read.config.get("base_model_name_or_path")
        hint = f"it says that it is for {shown(str(made_for))}" if made_for else "is it for another base?"
        raise ArtifactError(f"{name} cannot be imported for {base}: {'; '.join(problems)}", hint)
    data = plan.data
    if data.max_length == load_recipe(style).data.max_length:  # nobody asked for windows of that length
        text = model.config.get_text_config()
        longest = rope_boundary(text) or context_length(text)
        data = data.model_copy(update={"max_length": min(data.max_length, longest)})
    named = plan.base.model_copy(update={"model": base})
    return plan.model_copy(update={"base": named, "adapter": adapter, "data": data}), fitted


def _mask(base: Base, token: int | str | None) -> Tensor:
    """[H] the embedding of the mask token, as the table has it.  Raises UsageError."""
    hint = "name the token that its drafts were trained with: --mask-token, mask_token= in Python"
    table = base.model.get_input_embeddings().weight
    if token is None:
        token = getattr(base.model.config, "mask_token_id", None)
        if token is None:
            raise UsageError(f"draft rows read a mask token, and {base.name} names none", hint)
    if isinstance(token, str) and not token.isdecimal():
        known = base.tokenizer.get_vocab() if base.tokenizer is not None else {}
        if token not in known:
            raise UsageError(f"{token!r} is no token of {base.name}", hint)
        token = known[token]
    if not 0 <= int(token) < len(table):
        raise UsageError(f"mask token {token} is none of the {len(table):,} that {base.name} has", hint)
    return table[int(token)].detach()


def _fill(attached: Attached, fitted: Fitted, mask: Tensor | None) -> None:
    """Put the tensors in place of the new adapter's.  A mask vector that no row reads stays as it is."""
    heads = attached.heads_state()
    if mask is not None:
        heads["mask_vector"] = mask.float()
    attached.load(fitted.state, heads)


def _measured(plan: Recipe, base: Base, attached: Attached, backend: HFBackend, offline: bool) -> HeldOut:
    """Acceptance on held-out text.  Raises what `documents` raises, and DataError where no block stands in it."""
    seed, data = plan.train.seed, plan.data
    read = documents(data, base.tokenizer, part="held_out", seed=seed, vocab=attached.heads.vocab, offline=offline)
    windows = list(first_windows(read, data.max_length, MEASURED))
    found = held_out_acceptance(backend, attached, windows, plan.train.anchors, seed)
    if not len(found.eligible):
        raise DataError(
            f"data.source {data.source}: no draft block of {plan.draft.block} fits into its held-out text",
            "give longer documents with responses, or leave data.source out",
        )
    return found
