"""`retrofit average`: one artifact whose weights are the mean of several trained on one base.

In the profile `joint` the base is part of each, and its weights are averaged too; how far that drifted is measured.

Each trained tensor is the weighted mean of theirs, in float64: LoRA factors too, as checkpoints of one run are averaged
(Izmailov et al. 2018, arXiv 1803.05407).  The mean of factors is not the factor of the mean product, so this is for
weights that lie near each other: checkpoints of a run, or runs that began with the same artifact.  Whether it pays is
measured on held-out text, beside each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrofit.adapters.attach import Attached
from retrofit.artifact import folder as artifact
from retrofit.artifact.files import check_parent
from retrofit.artifact.own import told
from retrofit.errors import ArtifactError, UsageError
from retrofit.hub import Base, resolved_device
from retrofit.recipes.origin import Origin, fill, other_keys, plan_of, read, refuse_another_original
from retrofit.recipes.own_model import OwnModel, measured_model
from retrofit.recipes.publish import publish
from retrofit.recipes.schema import Recipe
from retrofit.recipes.text.reading import text_of
from retrofit.recipes.training.joint.weights import BaseWeights
from retrofit.recipes.training.measure import MEASURED, HeldOut, calibrate_confidence, held_out_acceptance, in_line
from retrofit.recipes.training.prepare import attached_to, open_base, resolve
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.weight_files import same_base

Say = Callable[[str], None]


def average(
    sources: Sequence[str | Path],
    out: str | Path,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    weights: Sequence[float] | None = None,
    base: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
    say: Say = lambda message: None,
) -> artifact.Artifact:
    """Write the mean of several artifacts or checkpoints of one base as an artifact, and return it.

    sources: folders, or OWNER/NAME on the Hub.  weights: one for each, all above 0; None: all count alike.
    overrides: keys of the recipe, which is the first one's, such as another data.source to measure on; with
    data.held_out=0 nothing is measured.  base: where the base is, if it has moved.  say: is told the figures.
    Raises UsageError for fewer than two and for weights that are not such, ArtifactError where bases, adapters or
    drafts differ, and what `convert` raises of the base and the text; no artifact is written then.
    """
    out = Path(out).resolve() if Path(out).name in ("", "..") else Path(out)
    shares = _shares(sources, weights)
    artifact.check_writable(out, overwrite)
    check_parent(out)
    origins = [read(source, offline) for source in sources]
    for other in origins[1:]:
        _refuse_another(origins[0], other)
    plan = resolve(base, plan_of(origins[0], base, overrides))
    _refuse_checkpoints(origins, plan)
    loaded = open_base(None, plan, resolved_device(device), offline, trust_remote_code)
    plan = plan.model_copy(update={"base": plan.base.model_copy(update={"model": loaded.name})})
    _refuse_another_base(origins[0], loaded)
    attached, backend = attached_to(loaded, plan)
    try:
        measured, taus, own = _filled(plan, loaded, attached, backend, origins, shares, offline, say)
        averaged = [_recorded(*one) for one in zip(origins, shares, taus, strict=True)]
        publish(out, plan, loaded, attached, measured, {}, origin={"averaged": averaged}, own=own, overwrite=overwrite)
    finally:
        backend.close()
    return artifact.read(out)


def _shares(sources: Sequence[str | Path], weights: Sequence[float] | None) -> list[float]:
    """How much each counts; their sum is 1.  Raises UsageError."""
    if isinstance(sources, str | Path) or len(sources) < 2:
        raise UsageError("there is nothing to average", "name two artifacts or checkpoints, or more")
    if weights is None:
        return [1 / len(sources)] * len(sources)
    if len(weights) != len(sources):
        raise UsageError(f"{len(weights)} weights for {len(sources)} to average", "give one weight for each, in order")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UsageError(f"weights {', '.join(f'{w:g}' for w in weights)}: each has to be a number above 0")
    return [weight / sum(weights) for weight in weights]


def _refuse_another(first: Origin, other: Origin) -> None:
    """Raises ArtifactError for one of another base, profile, adapter or layout, naming all that is otherwise."""
    told = [] if first.profile == other.profile else [f"profile ({other.profile}, there {first.profile})"]
    if (field := same_base(first.original, other.original)) is not None:
        told.append(f"the {field} of its base {other.base}")
    for section, one, two in (("adapter", first.adapter, other.adapter), ("draft", first.draft, other.draft)):
        told += [f"{section}.{key} ({two.get(key)}, there {one[key]})" for key in other_keys(one, two)]
    if first.precision != other.precision:
        told.append(f"base.quantization ({other.precision or 'none'}, there {first.precision or 'none'})")
    if told:
        problem = f"{other.folder} cannot be averaged with {first.folder}: it has another {', '.join(told)}"
        raise ArtifactError(problem, "average what was trained on one base with one adapter and layout")


def _refuse_checkpoints(origins: Sequence[Origin], plan: Recipe) -> None:
    """Raises UsageError for checkpoints of the profile `joint`, and where the recipe is to have another profile."""
    for origin in origins:
        if origin.profile == "joint" and origin.artifact is None:
            raise UsageError(
                f"{origin.folder} is a checkpoint of the profile joint, which has no model of its own yet",
                "name the artifact that comes of it",
            )
    if plan.profile != origins[0].profile:
        raise UsageError(
            f"profile is {plan.profile}, and what is averaged is of the profile {origins[0].profile}", "leave it out"
        )


def _refuse_another_base(first: Origin, base: Base) -> None:
    """Raises ArtifactError, and for the profile `joint` UsageError."""
    if first.profile == "joint":
        refuse_another_original(first, base)
    field = same_base(first.original, base.fingerprint)
    if field is not None:
        problem = f"{base.name} differs in its {field} from {first.base}, which {first.folder} was trained on"
        raise ArtifactError(problem, "name that with --base; another one is for `retrofit convert BASE --from`")


def _filled(
    plan: Recipe,
    base: Base,
    attached: Attached,
    backend: HFBackend,
    origins: Sequence[Origin],
    shares: Sequence[float],
    offline: bool,
    say: Say,
) -> tuple[HeldOut | None, list[float | None], OwnModel | None]:
    """Put the mean into the adapter, and into the base where that was trained along.

    Returns what was measured of it, the tau of each one, None where not, and the model that the base then is.
    """
    held_out = text_of(plan, base, attached, backend, offline=offline).held_out(MEASURED)

    def measured(name: str) -> tuple[HeldOut | None, float | None]:
        if not held_out:
            return None, None
        found = held_out_acceptance(backend, attached, held_out, plan.train.anchors, plan.train.seed)
        figures = found.figures()
        say(f"{name}: {'not measured' if figures is None else in_line(figures)}")
        return found, None if figures is None else figures["tau"]

    along = _base_weights(plan, attached, backend)
    parts = [*attached.parameters(), *(() if along is None else along.trained.values())]
    taus, mean = [], [torch.zeros_like(p, dtype=torch.float64) for p in parts]
    for origin, share in zip(origins, shares, strict=True):
        fill(attached, origin)
        if along is not None:
            along.begin_with(origin.own_state())
        taus.append(measured(str(origin.folder))[1])
        for total, parameter in zip(mean, parts, strict=True):
            total += share * parameter.detach().double()
    _put(parts, mean)
    own = None
    if along is not None:
        along.follow()
        own = measured_model(backend, along, base, plan, held_out, None)
        say(f"drift from {base.name}: {told(own.drift)}")
    attached.round_to(getattr(torch, plan.adapter.dtype))
    found, tau = measured("their mean")
    if found is not None:
        calibrate_confidence(attached, found)
    best = max((one for one in taus if one is not None), default=None)
    if tau is not None and best is not None and round(tau, 3) < round(best, 3):
        say(f"note: the mean drafts worse than the best of them alone (tau {tau:.3f} and {best:.3f})")
    return found, taus, own


def _base_weights(plan: Recipe, attached: Attached, backend: HFBackend) -> BaseWeights | None:
    """All weights of the base, to be moved beside the original's; None in the profile `frozen`."""
    if plan.profile == "frozen":
        return None
    every = plan.joint.model_copy(update={"weights": "full", "gated": True})
    return BaseWeights(attached, backend, plan.model_copy(update={"joint": every}))


@torch.no_grad()
def _put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _recorded(origin: Origin, share: float, tau: float | None) -> dict[str, Any]:
    """As `retrofit.json` has it, and no path."""
    told = {key: value for key, value in origin.recorded().items() if key != "base"}
    return {**told, "weight": share, **({} if tau is None else {"tau": tau})}
