"""Where a conversion begins, if not with an untrained adapter.

    artifact      its adapter and heads: a new run, with a schedule, an optimizer and text of its own
    checkpoint    OUT.checkpoints/step-N: the run goes on as it would have there, with the optimizer's moments and its
                  place in the text

Both are read and checked here, and their tensors have the names that checkpoints give them.
Not here: training (`convert.py`), means of several (`average.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from retrofit.adapters.attach import NAME, Attached
from retrofit.artifact import folder as artifact
from retrofit.artifact.files import sha256
from retrofit.artifact.own import MODEL
from retrofit.artifact.safety import load_json
from retrofit.errors import ArtifactError, UsageError
from retrofit.hub import Base, load_base
from retrofit.recipes.naming import placed_source
from retrofit.recipes.processes import Processes
from retrofit.recipes.schema import FIELDS, Recipe, load_recipe
from retrofit.recipes.training import checkpoint
from retrofit.recipes.training.joint.trainer import JointTrainer, trainer_for
from retrofit.recipes.training.session import ORIGIN
from retrofit.recipes.training.step import Trainer
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.sharing.pulling import local_folder
from retrofit.weight_files import same_base

ADAPTER_KEYS = ("rank", "alpha", "targets", "markov_rank", "confidence")
"""Keys of `adapter` that the tensors are of no use without."""
TEMPERATURE = "confidence_temperature"
"""Of the heads; calibrated after training, and of a shape that `draft.block` gives it."""
FACTOR = re.compile(r"(\.lora_[AB])\.weight$")


@dataclass(frozen=True)
class Origin:
    """An artifact or a checkpoint, one of the two, checked.  base: what its base was called."""

    folder: Path
    sha256: str
    """Of its manifest."""
    artifact: artifact.Artifact | None
    checkpoint: checkpoint.Checkpoint | None
    base: str
    fingerprint: dict[str, str | None]
    adapter: dict[str, Any]
    draft: dict[str, Any]
    steps: int
    """Optimizer steps behind its weights, those of what it began with too."""
    epochs: int
    """Epochs of the text that were begun for it."""

    @property
    def kind(self) -> str:
        return "checkpoint" if self.artifact is None else "artifact"

    @property
    def profile(self) -> str:
        if self.artifact is not None:
            return str(self.artifact.config["profile"])
        assert self.checkpoint is not None
        return str(self.checkpoint.state["settings"]["profile"])

    @property
    def original(self) -> dict[str, str | None]:
        """Fingerprint of the model that was converted: its base's, unless that was trained along."""
        if self.artifact is None:
            return self.fingerprint
        config = self.artifact.config
        found: dict[str, str | None] = config.get("original", config["base"])["fingerprint"]
        return found

    @property
    def precision(self) -> str | None:
        """What its base's linear layers were held in."""
        if self.artifact is not None:
            held: str | None = self.artifact.config["base"].get("quantization")
            return held
        assert self.checkpoint is not None
        kind: str | None = self.checkpoint.state["settings"].get("base.quantization")
        return kind

    def tensors(self) -> dict[str, Tensor]:
        """What was trained, as it was saved."""
        if self.checkpoint is not None:
            return self.checkpoint.tensors("weights.safetensors")
        assert self.artifact is not None
        adapter = {FACTOR.sub(rf"\1.{NAME}.weight", name): t for name, t in self.artifact.adapter_state.items()}
        return adapter | {f"heads.{name}": t for name, t in self.artifact.heads.items() if name != TEMPERATURE}

    def own_state(self) -> dict[str, Tensor]:
        """The weights of the model that an artifact has of its own, by their names in it."""
        state: dict[str, Tensor] = load_base(str(self.folder / MODEL), offline=True).model.state_dict()
        return state

    def temperature(self) -> Tensor | None:
        """[2, drafts] of the confidence head; a checkpoint has none yet."""
        return None if self.artifact is None else self.artifact.heads.get(TEMPERATURE)

    def recorded(self) -> dict[str, Any]:
        """As `retrofit.json` has it.  A checkpoint's base is the one it goes on with, and may be named by a path."""
        named = {"base": self.base} if self.artifact is not None else {}
        return {"kind": self.kind, "sha256": self.sha256, "steps": self.steps, **named}


def is_checkpoint(name: str | Path) -> bool:
    """Whether a conversion would begin with a checkpoint there, not with an artifact."""
    return (Path(name) / checkpoint.STATE).is_file()


def read(name: str | Path, offline: bool = False) -> Origin:
    """An artifact by its folder, its base's name or its repository on the Hub, or a checkpoint by its folder.

    Raises UsageError, ArtifactError, and what `pull` raises.
    """
    place = Path(name)
    if is_checkpoint(place):
        return _of_checkpoint(checkpoint.read(place))
    if found := sorted(place.glob("step-*")):
        raise UsageError(f"{place} holds {len(found)} checkpoints", f"name one: {found[-1]}")
    if place.name.startswith("step-") and place.parent.is_dir() and not place.exists():
        kept = ", ".join(sorted(one.name for one in place.parent.glob("step-*")))
        raise UsageError(f"{place}: there is no such checkpoint", f"{place.parent} holds {kept or 'none'}")
    return _of_artifact(artifact.read(local_folder(name, offline)))


def _of_artifact(found: artifact.Artifact) -> Origin:
    config = found.config
    training, before = config["training"], config.get("from", {})
    earlier = before.get("steps", 0) if before.get("kind") == "artifact" else 0  # those of a checkpoint are in `steps`
    return Origin(
        folder=found.folder,
        sha256=sha256(found.folder / artifact.MANIFEST),
        artifact=found,
        checkpoint=None,
        base=artifact.published_name(config["base"]),
        fingerprint=config["base"]["fingerprint"],
        adapter={key: config["adapter"][key] for key in ADAPTER_KEYS},
        draft=config["draft"],
        steps=earlier + training.get("published_step", 0),
        epochs=training.get("epochs", 1),
    )


def _of_checkpoint(found: checkpoint.Checkpoint) -> Origin:
    settings = found.state["settings"]
    whole = settings["profile"] == "frozen" or (settings["joint.weights"] == "full" and settings["joint.gated"])
    if ORIGIN in settings and not whole:
        raise UsageError(
            f"{found.folder} is of a conversion that began with another artifact, and holds what changed since alone",
            "run its own `retrofit convert` again, which goes on from it; or name the artifact that comes of it",
        )

    def section(name: str) -> dict[str, Any]:
        return {key.removeprefix(f"{name}."): settings[key] for key in settings if key.startswith(f"{name}.")}

    return Origin(
        folder=found.folder,
        sha256=sha256(found.folder / checkpoint.MANIFEST),
        artifact=None,
        checkpoint=found,
        base=settings["base.model"],
        fingerprint=section("base.fingerprint"),
        adapter={key: section("adapter")[key] for key in ADAPTER_KEYS},
        draft=section("draft"),
        steps=found.step,
        epochs=found.state["place"]["epoch"] + 1,
    )


def plan_of(
    origin: Origin, model: str | PreTrainedModel | None, overrides: Mapping[str, Any] | Sequence[str] = ()
) -> Recipe:
    """The recipe that it was trained with, on its own base where `model` names no other, with overrides.

    Raises UsageError, also where its base lies on another machine.
    """
    given = overrides.items() if isinstance(overrides, Mapping) else overrides
    given = [overrides] if isinstance(overrides, str) else given
    own = _settings(origin)
    name = "default" if origin.artifact is None else origin.folder / artifact.RECIPE
    if isinstance(model, str):
        own |= {"base.model": model, "base.revision": None}
    elif model is None and origin.artifact is not None:
        own["base.model"] = _base_here(origin, load_recipe(name, [*own.items(), *given]).profile)
    return load_recipe(name, [*own.items(), *given])


def _settings(origin: Origin) -> dict[str, Any]:
    """Keys that its recipe has otherwise here: a checkpoint's all, an artifact's text by its place on this machine."""
    if origin.checkpoint is not None:
        settings = origin.checkpoint.state["settings"]
        return {key: value for key, value in settings.items() if key in FIELDS}
    path = origin.folder / artifact.LOCAL
    places = load_json(path).get("data") if path.is_file() else None
    source = load_recipe(origin.folder / artifact.RECIPE).data.model_dump(mode="json")["source"]
    return {"data.source": placed_source(source, places if isinstance(places, list) else [])}


def _base_here(origin: Origin, profile: str) -> str:
    """What is trained on: its base, or to train that along the model it was trained from."""
    assert origin.artifact is not None
    place = artifact.original_of if profile == "joint" else artifact.base_of
    try:
        return place(origin.folder, origin.artifact.config)
    except UsageError as error:
        raise UsageError(str(error), f"name the base: retrofit convert BASE --from {origin.folder}") from None


def check_recipe(origin: Origin, plan: Recipe) -> None:
    """Raises UsageError for a recipe whose adapter is another one, naming every key, and for a checkpoint of another
    profile."""
    if origin.artifact is None and plan.profile != origin.profile:
        raise UsageError(
            f"{origin.folder} is a checkpoint of the profile {origin.profile}, which goes on as it was begun",
            f"leave profile={plan.profile} out, or name the artifact that comes of it",
        )
    wanted = plan.adapter.model_dump(mode="json")
    other = other_keys(origin.adapter, wanted)
    if other:
        told = "; ".join(f"adapter.{key} is {_text(wanted[key])}, there {_text(origin.adapter[key])}" for key in other)
        keys = " ".join(f"adapter.{key}={_text(origin.adapter[key])}" for key in other)
        raise UsageError(f"{origin.folder} has another adapter than the recipe: {told}", f"add {keys}")


def other_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys of the first that the second has otherwise; a list is the same in any order."""

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, list | tuple) else value

    return [key for key in one if plain(one[key]) != plain(other.get(key))]


def _text(value: Any) -> str:
    """As it is written behind `key=`."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def differences(origin: Origin, plan: Recipe, base: Base) -> list[str]:
    """What is otherwise here than where it was trained, and may be: the base, and the layout of drafts."""
    told = []
    if (field := is_another_base(origin, plan, base)) is not None:
        told.append(f"it was trained on {origin.base}, from which {base.name} differs in its {field}")
    trained = origin.precision
    if trained != base.precision:
        now, then = (one or "plain weights" for one in (base.precision, trained))
        told.append(f"it was trained on {then}, and goes on on {now}")
    wanted = plan.draft.model_dump(mode="json")
    other = other_keys(wanted, origin.draft)
    return [*told, *(f"draft.{key} was {origin.draft.get(key)}, now {wanted[key]}" for key in other)]


def is_another_base(origin: Origin, plan: Recipe, base: Base) -> str | None:
    """In what a base differs from the one that was trained on, None where it does not."""
    return same_base(origin.original if plan.profile == "joint" else origin.fingerprint, base.fingerprint)


def begin(attached: Attached, origin: Origin, plan: Recipe, base: Base) -> None:
    """`fill`; a checkpoint of the profile `joint` is read whole when its run is gone on with.

    Raises UsageError too, where a model that was trained along is to be trained on beside another original.
    """
    if plan.profile == "joint" and origin.profile == "joint":
        refuse_another_original(origin, base)
    if origin.artifact is not None or origin.profile == "frozen":
        fill(attached, origin)


def refuse_another_original(origin: Origin, base: Base) -> None:
    """Raises UsageError where a base is not the one that an artifact's own model was trained from.

    The hashes of that model may be the same: a LoRA changes neither configuration nor norms.
    """
    its_own = base.place is not None and base.place.resolve() == (origin.folder / MODEL).resolve()
    field = same_base(origin.original, base.fingerprint)
    if its_own or field is not None:
        found = "its own model" if its_own else f"another one, which differs in its {field}"
        raise UsageError(
            f"{origin.folder} was trained along with an original, from which its drift is measured; {base.name} is "
            f"{found}",
            "name that original, or leave the base out; profile=frozen trains drafts for its own model",
        )


def trainer_from(
    origin: Origin | None, attached: Attached, backend: HFBackend, plan: Recipe, processes: Processes | None
) -> Trainer:
    """The recipe's trainer, on the base as an artifact has trained it along, where the conversion begins with one."""
    trainer = trainer_for(attached, backend, plan, processes)
    along = origin is not None and origin.artifact is not None and origin.profile == "joint"
    if along and isinstance(trainer, JointTrainer):  # else the base is that model
        assert origin is not None
        trainer.weights.begin_with(origin.own_state())
    return trainer


def fill(attached: Attached, origin: Origin) -> None:
    """Put its weights into a new adapter.

    Raises ArtifactError, with nothing changed, for tensors that this base and recipe lack or it does not hold, and for
    shapes that differ, all of them in one.
    """
    tensors, own = origin.tensors(), attached.named()
    refuse_unfit(own, tensors, str(origin.folder), f"this base and recipe; it was trained on {origin.base}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
        held, kept = origin.temperature(), getattr(attached.heads, TEMPERATURE, None)
        if held is not None and kept is not None and held.shape == kept.shape:
            kept.copy_(held)


def refuse_unfit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], what: str, where: str) -> None:
    """Raises ArtifactError unless both hold tensors of the same names and shapes."""
    told = (
        ([name for name in own if name not in tensors], "it does not hold"),
        ([name for name in tensors if name not in own], "without a place"),
        (
            [f"{n} {list(tensors[n].shape)} for {list(own[n].shape)}" for n in own
             if n in tensors and tensors[n].shape != own[n].shape],
            "of another shape",
        ),
    )  # fmt: skip
    problems = [
        f"{len(names)} tensor{'s' if len(names) > 1 else ''} {why} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for names, why in told
        if names
    ]
    if problems:
        raise ArtifactError(f"{what} does not fit {where}: {'; '.join(problems)}", "take a base of the same shapes")
