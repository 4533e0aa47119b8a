"""The loop over training steps, and all it takes to stop and go on: on one machine with one number of threads the
weights come out as if it had never stopped.

Between two steps the state is: trained weights and the optimizer's moments, the place in the order of documents, the
bad rows left out so far, and the lines of metrics.jsonl.  Anchors, masks and noise are keyed by the document, and
nothing draws from a global generator, so there is no other.  When to stop early and which step to publish follow from
those lines alone.
Not here: a single step (`step.py`), a probe (`probe.py`), files (`checkpoint.py`), signals (`interrupts.py`).
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from retrofit.artifact.files import json_line
from retrofit.errors import TrainingError, UsageError
from retrofit.recipes.text.faults import Skipped
from retrofit.recipes.training.checkpoint import RESTART, Checkpoint, Checkpoints, differences
from retrofit.recipes.training.interrupts import Interrupts
from retrofit.recipes.training.order import Batch, Order, Place, describe
from retrofit.recipes.training.probe import best_step, exhausted
from retrofit.recipes.training.schedule import KEYS, learning_rate, same_rates
from retrofit.recipes.training.step import StepResult, Trainer, expected_tau, slot_report
from retrofit.recipes.training.tracking import new_run

ORIGIN = "from"
"""Among the settings: the hash of what a conversion began with, where that was no untrained adapter."""
EXPLODED = 10.0
"""A trained loss of this many times its running median, and above that of step 1, has exploded."""
MEDIAN_OF = 100
MEDIAN_LEAST = 20
"""Steps that the median is taken of: the last ones since the warm-up, and how many there have to be."""


class Session:
    """One conversion's training, from where its newest checkpoint left it, or from the beginning.

    settings: everything that decides what is trained, by dotted key; a checkpoint made with others is refused.
    started: `time.perf_counter()` when this run began.  skipped: bad rows that were left out, where those are.
    probe: what measures the weights as they are, where the recipe wants that.
    """

    def __init__(
        self,
        trainer: Trainer,
        order: Order,
        checkpoints: Checkpoints,
        interrupts: Interrupts,
        settings: Mapping[str, Any],
        started: float,
        skipped: Skipped | None = None,
        probe: Callable[[], dict[str, Any]] | None = None,
    ):
        self.trainer, self.order, self.checkpoints, self.interrupts = trainer, order, checkpoints, interrupts
        self.settings, self.skipped, self.probe = dict(settings), skipped, probe
        self.history: list[dict[str, Any]] = []
        """The records of all steps, those of earlier runs too."""
        self.run_id = new_run()
        """What the tracker calls this conversion, over all interruptions."""
        self.before: dict[str, Any] | None = None
        """Acceptance before the next step, to be written down with it."""
        self._place: Place | None = None
        self._saved = 0
        self._earlier = 0.0
        self._started = started

    @property
    def seconds(self) -> float:
        """Seconds of all runs."""
        return self._earlier + time.perf_counter() - self._started

    def resume(self, checkpoint: Checkpoint, *, forced: bool = False, branch: bool = False) -> None:
        """Go on from a checkpoint; branch: of another conversion, which this one follows up to there.

        Raises UsageError, before anything is changed, when it was made with other settings or another text, unless
        `forced`; also when its tensors do not fit.  A schedule that gives the steps done their learning rates is no
        other: what comes out is what it would have trained from the beginning.
        """
        if not forced:
            self._refuse_another_recipe(checkpoint, branch)
        history = [json.loads(line) for line in checkpoint.metrics().splitlines()]
        for step in self._needed(history):
            self.checkpoints.at(step)
        place = Place.unpack(checkpoint.state["place"], checkpoint.tensors("documents.safetensors"))
        self.order.go_to(place, forced=forced)
        state = {kind: checkpoint.tensors(f"{kind}.safetensors") for kind in ("weights", "optimizer")}
        self.trainer.load_state(state, checkpoint.step)
        if self.skipped is not None:
            self.skipped.restore(checkpoint.state["skipped"])
        self.history, self._place, self._earlier = history, place, float(checkpoint.state["seconds"])
        if not branch:
            self.run_id, self._saved = checkpoint.state.get("run", self.run_id), checkpoint.step

    def _refuse_another_recipe(self, checkpoint: Checkpoint, branch: bool) -> None:
        """Raises UsageError where the steps that a checkpoint has done are not those that this recipe would do."""
        then, steps = checkpoint.state["settings"], self.trainer.recipe.train.steps
        same = same_rates(then, self.trainer.recipe, checkpoint.step)
        free = (*(KEYS if same else ()), *((ORIGIN,) if branch else ()))
        old, new = ({key: one[key] for key in one if key not in free} for one in (then, self.settings))
        if changed := differences(old, new):
            rates = "" if same else "; train.steps may be raised where train.schedule is constant or wsd"
            raise UsageError(
                "\n  ".join([f"{checkpoint.folder} was made with another recipe (old -> new)", *changed]),
                f"go on in spite of it with --force-resume, or {RESTART}{rates}",
            )
        if checkpoint.step > steps:
            raise UsageError(
                f"train.steps is {steps}, and {checkpoint.folder} has done {checkpoint.step}",
                f"set train.steps={checkpoint.step} or more, or {RESTART}",
            )

    def run(self, on_step: Callable[[int, dict[str, Any]], None]) -> None:
        """Train the steps that are left, or until probes get no better; one JSON line a step goes to metrics.jsonl,
        and to `on_step`.

        Raises TrainingError for a loss that is not finite or explodes, before the weights take it up; the batch is
        saved then.  Raises ResourceError when a checkpoint cannot be written.
        """
        train = self.trainer.recipe.train
        self.checkpoints.begin_metrics(self.metrics(self.steps_reported))
        if self._probe_due():
            self._measure(on_step)
        while self.trainer.steps_done < train.steps and not self.stopped_early:
            self.interrupts.check()
            begin = time.perf_counter()
            batches = [self.order.batch() for _ in range(train.accumulation)]
            result = self.trainer.gradients(batches)
            self._check_loss(result, batches)
            with self.interrupts.held():
                self._place = None  # until all parts of the state are those of one step again
                self.trainer.update()
                record = self._record(result, time.perf_counter() - begin)
                self.history.append(record)
                self._place = self.order.place()
                if not self._probe_due():
                    self._report(on_step)
            if self._probe_due():
                self._measure(on_step)

    def _probe_due(self) -> bool:
        """Whether the last step is to be probed and is not yet: a signal may have come in between."""
        if self.probe is None or not self.history or "probe" in self.history[-1]:
            return False
        train, step = self.trainer.recipe.train, self.trainer.steps_done
        return step % train.probe_every == 0 or step == train.steps

    def _measure(self, on_step: Callable[[int, dict[str, Any]], None]) -> None:
        """Probe the step just done; a signal cuts that short, and who goes on from it begins the probe anew."""
        assert self.probe is not None
        begin = time.perf_counter()
        found = self.probe()
        with self.interrupts.held():
            self.history[-1]["probe"] = {**found, "seconds": round(time.perf_counter() - begin, 4)}
            self._report(on_step)

    def _report(self, on_step: Callable[[int, dict[str, Any]], None]) -> None:
        """Write down and show the step just done, and save it where that is due."""
        train, step, record = self.trainer.recipe.train, self.trainer.steps_done, self.history[-1]
        self.checkpoints.add_metrics(json_line(record))
        on_step(step, record)
        if (train.save_every and step % train.save_every == 0) or step in self._needed(self.history):
            self.save()

    @property
    def steps_reported(self) -> int:
        """Steps done, but for one that still has to be probed."""
        return len(self.history) - self._probe_due()

    @property
    def stopped_early(self) -> bool:
        return exhausted(self.history, self.trainer.recipe.train.patience)

    @property
    def published(self) -> dict[str, Any]:
        """The record of the step whose weights the artifact is to hold."""
        step = next(iter(self._needed(self.history)), self.trainer.steps_done)
        return self.history[step - 1]

    def take_published(self) -> None:
        """Put the weights that the artifact is to hold into the model; nothing can be trained or saved after that.

        Raises UsageError where their checkpoint is damaged.
        """
        step = self.published["step"]
        if step == self.trainer.steps_done:
            return
        weights = self.checkpoints.at(step).tensors("weights.safetensors")
        self._place = self._place if self._saved == self.trainer.steps_done else None
        with torch.no_grad():
            for name, parameter in zip(self.trainer.names, self.trainer.trained, strict=True):
                parameter.copy_(weights[name])
        self.trainer.follow()

    def _needed(self, history: Sequence[Mapping[str, Any]]) -> list[int]:
        """The step to publish, if it is not simply the last one."""
        best = best_step(history) if self.trainer.recipe.train.publish == "best" else None
        return [] if best is None else [best]

    def save(self) -> str | None:
        """Checkpoint what the last finished step left, unless that has been done; returns how to go on from it."""
        step = self.trainer.steps_done
        if self._place is None:
            return None
        folder = self.checkpoints.folder / f"step-{step:06d}"
        if self._saved != step:
            place, documents = self._place.pack()
            state = {
                "step": step,
                "settings": self.settings,
                "seconds": round(self.seconds, 1),
                "skipped": self.skipped.pack() if self.skipped is not None else [],
                "place": place,
                "needs": self._needed(self.history),
                "run": self.run_id,
            }
            tensors = self.trainer.state()
            contents: dict[str, Any] = {f"{kind}.safetensors": tensors[kind] for kind in ("weights", "optimizer")}
            contents["documents.safetensors"] = documents
            contents["state.json"] = json_line(state).encode()
            contents["metrics.jsonl"] = self.metrics()
            folder = self.checkpoints.save(step, contents)
            self._saved = step
        steps = self.trainer.recipe.train.steps
        return f"saved step {step} of {steps} in {folder}; the same command goes on from there"

    def metrics(self, steps: int | None = None) -> bytes:
        """metrics.jsonl as it has to be, of the first so many steps or of all."""
        return "".join(json_line(record) for record in self.history[:steps]).encode()

    def _record(self, result: StepResult, seconds: float) -> dict[str, Any]:
        slots, before = slot_report(result.sums), self.before
        self.before = None
        return {
            "step": self.trainer.steps_done,
            "loss": {k: round(v, 6) for k, v in result.loss.items()},
            "accept": slots,
            "tau": round(expected_tau(slots["sampled"]), 4),
            "lr": learning_rate(self.trainer.recipe, self.trainer.steps_done - 1),
            "gradient_norm": round(result.gradient_norm, 6),
            "rows": {"clean": result.clean_rows, "draft": result.draft_rows},
            "seconds": round(seconds, 4),
            **({} if result.seconds_clean is None else {"seconds_clean": round(result.seconds_clean, 4)}),
            **({} if before is None else {"before": before}),
        }

    def _check_loss(self, result: StepResult, batches: Sequence[Batch]) -> None:
        """Raises TrainingError for a step that must not be taken."""
        recent = self.history[max(self.trainer.recipe.train.warmup, len(self.history) - MEDIAN_OF) :]
        untrained = self.history[0]["loss"] if self.history else result.loss
        problem = fault(result.loss, result.gradient_norm, untrained, [record["loss"] for record in recent])
        if problem is None:
            return
        step = self.trainer.steps_done + 1
        content = {
            "step": step,
            "problem": problem,
            "loss": {key: str(value) for key, value in result.loss.items()},  # NaN is no JSON
            "gradient_norm": str(result.gradient_norm),
            "settings": self.settings,
            "documents": describe(batches, result.anchors),
        }
        path = self.checkpoints.record(step, content)
        names = ", ".join(sorted({document.id for batch in batches for document, _ in batch})[:4])
        lower = "lower train.lr, raise train.warmup, or look at the documents"
        hint = f"{lower}; then go on from the last checkpoint with --force-resume, or {RESTART}"
        raise TrainingError(f"{problem} at step {step} (documents {names}); the batch is in {path}", hint)


def fault(
    loss: Mapping[str, float],
    gradient_norm: float,
    untrained: Mapping[str, float],
    recent: Sequence[Mapping[str, float]],
) -> str | None:
    """What is wrong with the loss of a step; None when it is sound.

    untrained: the loss of step 1; recent: of the last steps after the warm-up.  The AR loss, which nothing trains,
    does not count.
    """
    if not math.isfinite(loss["total"]):
        return "the loss is not finite"
    if not math.isfinite(gradient_norm):
        return "the gradient is not finite"
    if len(recent) < MEDIAN_LEAST:
        return None
    median = statistics.median(_trained(one) for one in recent)
    if _trained(loss) > max(EXPLODED * median, _trained(untrained)):
        return f"the loss exploded: {_trained(loss):.4g}, its median was {median:.4g},"
    return None


def _trained(loss: Mapping[str, float]) -> float:
    return loss["total"] - loss["ar"]
