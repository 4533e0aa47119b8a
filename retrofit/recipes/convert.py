"""`retrofit convert`: load the base, attach the adapter, train it, measure it, write the artifact.

The base is only read.  The artifact appears whole at the end, or not at all.  Until then checkpoints lie beside it,
in OUT.checkpoints, and the same call goes on from the newest.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retrofit.adapters.attach import Attached, count
from retrofit.artifact import folder as artifact
from retrofit.artifact.files import ELSEWHERE, check_parent
from retrofit.artifact.own import told
from retrofit.errors import GateError, TrainingError, UsageError
from retrofit.hub import Base, resolved_device
from retrofit.progress import progress as shown
from retrofit.recipes import origin as origins
from retrofit.recipes.beginning import looked
from retrofit.recipes.naming import resolved_name
from retrofit.recipes.origin import Origin
from retrofit.recipes.own_model import own_model
from retrofit.recipes.processes import Processes, joined
from retrofit.recipes.publish import publish, recorded
from retrofit.recipes.schema import Recipe, by_key
from retrofit.recipes.text.documents import Document
from retrofit.recipes.text.faults import Skipped
from retrofit.recipes.text.reading import Text, text_of
from retrofit.recipes.text.regenerate import check_cache
from retrofit.recipes.training import tracking
from retrofit.recipes.training.checkpoint import RESTART, Checkpoint, Checkpoints, folder_of
from retrofit.recipes.training.clean.forward import clean_forward
from retrofit.recipes.training.clean.pairs import TOKENS, begin_with_pairs
from retrofit.recipes.training.interrupts import Interrupts
from retrofit.recipes.training.joint.drift import with_drift
from retrofit.recipes.training.joint.trainer import JointTrainer
from retrofit.recipes.training.measure import MEASURED, HeldOut, calibrate_confidence, held_out_acceptance
from retrofit.recipes.training.order import Order
from retrofit.recipes.training.prepare import attached_to, open_base, resolve
from retrofit.recipes.training.probe import line as probed
from retrofit.recipes.training.probe import live_probe
from retrofit.recipes.training.progress import progress
from retrofit.recipes.training.session import ORIGIN, Session
from retrofit.recipes.training.shards import shard
from retrofit.recipes.training.shares import check_processes, loading_device, same_start, shared_checkpoints
from retrofit.runtime.backends.hf.backend import HFBackend

PROBES = ("train.probe_every", "train.probe_prompts", "train.probe_tokens")
"""Keys of a recipe that change no weights, unless probes decide when to stop or what to publish."""
NOT_TRAINING = ("adapter.dtype", "joint.max_drift", "train.save_every", "train.checkpointing", *PROBES)
"""Keys of a recipe that may change between two runs of one conversion."""

Resume = Literal["auto", "force", "never"]


def convert(
    model: str | Path | PreTrainedModel | None = None,
    recipe: str | Path | Recipe | None = None,
    out: str | Path = "retrofit-artifact",
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    device: str = "auto",
    overwrite: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quiet: bool = False,
    resume: Resume = "auto",
    keep_checkpoints: bool = False,
    skip_bad: bool = False,
    track: tracking.Name | None = None,
    start_from: str | Path | None = None,
) -> artifact.Artifact:
    """Convert a model into an artifact folder and return it.

    model: Hub id, folder, GGUF file, name of a base, or live model, which has no adapter of its own; None takes the
    recipe's.  recipe: name, YAML file or `Recipe`; None is the embedded base's for no model, else the defaults.
    resume: `auto` goes on from the newest checkpoint of `out` and refuses one of another recipe, `force` goes on in
    spite of that, `never` removes them.  They are removed when the artifact is complete, or kept if asked for.
    skip_bad: leave out rows of text that cannot be used, and count them in `config["training"]["skipped"]`.
    start_from: an artifact whose adapter and heads are trained further, or a checkpoint, OUT.checkpoints/step-N of
    another conversion, which is gone on with as that one would have; model and recipe are its own where none is given.
    track: `trackio`, `wandb` or `tensorboard`, which then gets the figures of every step too.
    Raises UsageError, DataError, ResourceError, UnsupportedModelError, TrainingError; no artifact is written then.
    GateError if the base's own loss moved, which would mean that training touched it; in the profile `joint`,
    which trains it along, if it drifted further than `joint.max_drift`, or merging moved it.  Ctrl-C, SIGTERM and other
    errors leave a checkpoint, the first two as KeyboardInterrupt and SystemExit(143), with a note how to go on.

    Started by `torchrun` or `accelerate launch`, every process calls this with the same arguments and gets the same
    artifact; device `cuda` is each one's own GPU.  They divide each batch and the responses to regenerate; results are
    one process's within rounding.  Only the main one writes, talks and raises; then the others end with SystemExit.
    """
    model = str(model) if isinstance(model, Path) else model
    device = resolved_device(device)
    with joined(device) as processes:
        origin = None if start_from is None else origins.read(start_from, offline)
        plan, out = _checked(model, recipe, overrides, Path(out), origin, overwrite, track, processes)
        started = time.perf_counter()
        quiet = quiet or not (processes is None or processes.is_main)
        skipped = Skipped() if skip_bad else None
        with shared_checkpoints(out, processes) as saved:
            base = open_base(model, plan, loading_device(device, processes), offline, trust_remote_code, tokenizer)
            plan = plan.model_copy(update={"base": plan.base.model_copy(update={"model": base.name})})
            live = isinstance(model, PreTrainedModel)
            with _attached_for(plan, base, live, origin, processes) as (attached, backend), Interrupts() as interrupts:
                job = _Job(
                    plan, base, attached, backend, out, origin, overwrite, quiet, resume, keep_checkpoints,
                    skipped, saved, started, offline, track, processes,
                )  # fmt: skip
                _run(job, interrupts)
        return _finished(job)


def _checked(
    model: str | PreTrainedModel | None,
    recipe: str | Path | Recipe | None,
    overrides: Mapping[str, Any] | Sequence[str],
    out: Path,
    origin: Origin | None,
    overwrite: bool,
    track: tracking.Name | None,
    processes: Processes | None,
) -> tuple[Recipe, Path]:
    """The recipe with everything filled in and the artifact's place; finds out before hours of training, not after."""
    if origin is not None and recipe is None:
        recipe, overrides = origins.plan_of(origin, model, overrides), ()
    plan = resolve(model, recipe, overrides)
    if origin is not None:
        origins.check_recipe(origin, plan)
        if origin.folder.resolve().parent == folder_of(out.resolve()):
            raise UsageError(f"{origin.folder} is a checkpoint of {out} itself", ELSEWHERE)
    check_processes(plan, isinstance(model, PreTrainedModel), processes)
    out = out.resolve() if out.name in ("", "..") else out
    artifact.check_writable(out, overwrite, artifact.INSTEAD.format(out))
    check_parent(out)
    tracking.check_installed(track)
    if plan.data.responses == "regenerate" and (processes is None or processes.is_main):
        check_cache()
    return plan, out


@contextmanager
def _attached_for(
    plan: Recipe, base: Base, live: bool, origin: Origin | None, processes: Processes | None
) -> Iterator[tuple[Attached, HFBackend]]:
    """The base with an untrained adapter on it, or one to go on from, split over the processes by FSDP; taken off again
    if it was live."""
    attached, backend = attached_to(base, plan)
    try:
        if origin is not None:
            origins.begin(attached, origin, plan, base)
        if processes is not None and processes.sharded:
            shard(attached, backend, processes)
        yield attached, backend
    finally:
        backend.close()
        if live:
            attached.detach()


@dataclass(frozen=True)
class _Job:
    """A conversion that is ready to begin."""

    plan: Recipe
    base: Base
    attached: Attached
    backend: HFBackend
    out: Path
    origin: Origin | None
    overwrite: bool
    quiet: bool
    resume: Resume
    keep: bool
    skipped: Skipped | None
    saved: Checkpoints
    started: float
    offline: bool
    track: tracking.Name | None
    processes: Processes | None

    @property
    def is_main(self) -> bool:
        return self.processes is None or self.processes.is_main

    def wait_for_all(self, what: str) -> None:
        """Wait until all processes are here."""
        if self.processes is not None:
            self.processes.exchange(what)


def _run(job: _Job, interrupts: Interrupts) -> None:
    """Train, measure, write the artifact; on Ctrl-C, SIGTERM and errors leave a checkpoint."""
    text = text_of(
        job.plan, job.base, job.attached, job.backend,
        offline=job.offline, quiet=job.quiet, skipped=job.skipped, processes=job.processes,
    )  # fmt: skip
    held_out = text.held_out(max(MEASURED, job.plan.train.probe_prompts if job.plan.train.probe_every else 0))
    session = _session(job, interrupts, held_out, text)
    settings = by_key(job.plan) | {"base.model": job.base.name}
    track = job.track if job.is_main else None
    tracker = tracking.Tracker.open(track, job.out, session.run_id, settings, session.steps_reported, _say(job.quiet))
    written = False
    try:
        size = 1 if job.processes is None else job.processes.size
        first = session.order.upcoming()[: -(-job.plan.train.batch_size // size)]  # as many as a process runs at once
        _announce(job, session)
        if job.plan.adapter.markov_init == "base" and job.origin is None and not session.trainer.steps_done:
            begin_with_pairs(job.attached.heads, job.backend, session.order.upcoming(TOKENS))
        _look(job, session, held_out)
        before = _logits_hash(job.backend, first)
        _train(job, session, tracker, interrupts)
        step = session.published["step"]
        own = own_model(session.trainer, job.base, job.plan, first, held_out[:MEASURED], step)
        if own is not None:
            _say(job.quiet)(f"drift from {job.base.name}: {told(own.drift)}")
        elif _logits_hash(job.backend, first) != before:
            raise GateError("the base model's own logits moved during training", "this is a bug; please report it")
        measured = _measured(job, held_out)
        with interrupts.held():
            if job.is_main:
                publish(
                    job.out, job.plan, job.base, job.attached, measured, recorded(session),
                    estimated=session.published["accept"], metrics=session.metrics(), overwrite=job.overwrite,
                    origin=None if job.origin is None else {"from": job.origin.recorded()}, own=own,
                )  # fmt: skip
            written = True
            if job.keep:
                session.save()
            else:
                job.saved.clear()
        job.wait_for_all("published")
    except BaseException as error:
        if written:
            error.add_note(f"{job.out} is complete")
        elif job.is_main and not interrupts.second_signal and not isinstance(error, TrainingError):
            _save_after(error, session, interrupts, job.resume)
        raise
    finally:
        tracker.close()


def _session(job: _Job, interrupts: Interrupts, held_out: list[Document], text: Text) -> Session:
    """The training, from where its newest checkpoint left it or from the beginning."""
    plan, attached = job.plan, job.attached
    order = Order(
        text.epoch,
        plan.train.batch_size,
        plan.train.seed,
        layout=attached.layout,
        whole=plan.data.responses == "keep",
        first=0 if job.origin is None else job.origin.epochs,
    )
    trainer = origins.trainer_from(job.origin, attached, job.backend, plan, job.processes)
    probe = live_probe(plan, held_out, job.backend, attached, job.base.tokenizer, job.processes)
    if isinstance(trainer, JointTrainer) and probe is not None:
        most = plan.joint.max_drift
        probe = with_drift(probe, job.backend, trainer.weights, held_out[:MEASURED], most, lambda: trainer.steps_done)
    settings = _settings(job)
    session = Session(trainer, order, job.saved, interrupts, settings, job.started, job.skipped, probe)
    newest = job.saved.newest(_say(job.quiet)) if job.resume != "never" else None
    branch = job.origin.checkpoint if newest is None and job.origin is not None else None
    if job.processes is not None:
        same_start(job.processes, settings, newest or branch)
    if job.resume == "never":
        job.saved.clear()
    if newest is not None:
        session.resume(newest, forced=job.resume == "force")
    elif branch is not None:
        _branch(session, branch, job.resume == "force")
    job.wait_for_all("resume")  # from here on the main process removes checkpoints
    return session


def _branch(session: Session, checkpoint: Checkpoint, forced: bool) -> None:
    """Go on from a checkpoint of another conversion.  Raises what `Session.resume` raises."""
    try:
        session.resume(checkpoint, forced=forced, branch=True)
    except UsageError as error:  # starting anew would begin there again
        raise UsageError(str(error), str(error.hint).replace(RESTART, "leave --from out")) from None


def _announce(job: _Job, session: Session) -> None:
    trainer, say = session.trainer, _say(job.quiet)
    say(
        f"base {job.base.name} ({count(job.attached.base_parameters()):,} parameters), "
        f"training {count(trainer.trained):,} ({count(trainer.trained) / count(job.attached.base_parameters()):.2%})"
    )
    if _begins(job, session):
        assert job.origin is not None
        say(f"beginning with the {job.origin.kind} {job.origin.folder}, trained for {job.origin.steps:,} steps")
        for difference in origins.differences(job.origin, job.plan, job.base):
            say(f"note: {difference}")
    elif trainer.steps_done:
        say(f"going on from step {trainer.steps_done} of {job.plan.train.steps}, saved in {job.saved.folder}")


def _begins(job: _Job, session: Session) -> bool:
    """Whether this is to train what it began with, and has not yet."""
    origin = job.origin
    first = 0 if origin is None or origin.checkpoint is None else origin.steps
    return origin is not None and session.trainer.steps_done == first


def _look(job: _Job, session: Session, held_out: list[Document]) -> None:
    """Say, and let the next step record, how what the conversion begins with drafts before it is trained further."""
    if not _begins(job, session):
        return
    session.before = looked(
        job.origin, job.plan, job.base, job.attached, job.backend, held_out[:MEASURED], session.order, _say(job.quiet)
    )
    job.wait_for_all("looked")


def _train(job: _Job, session: Session, tracker: tracking.Tracker, interrupts: Interrupts) -> None:
    """Train the steps that are left, and put the weights that are to be published into the model."""
    train, say = job.plan.train, _say(job.quiet)
    with shown("training", "step", train.steps, done=session.steps_reported, quiet=job.quiet) as bar:
        session.run(progress(bar, tracker))
    done = session.trainer.steps_done
    if train.save_every or session.published["step"] != done:
        with interrupts.held():
            session.save()  # whatever goes wrong from here on, training does not have to be done again
    if session.stopped_early:
        say(f"stopped early at step {done}: {train.patience} probes were no better")
    job.wait_for_all("trained")  # the main process has saved what the others read now
    with interrupts.held():
        session.take_published()
        job.attached.round_to(getattr(torch, job.plan.adapter.dtype))  # what is measured is what is published
    if "probe" in session.published:
        say(f"publishing step {session.published['step']}; probe: {probed(session.published)}")


def _measured(job: _Job, held_out: list[Document]) -> HeldOut:
    """Acceptance on held-out text, by which the confidence head is calibrated, too."""
    train = job.plan.train
    found = held_out_acceptance(job.backend, job.attached, held_out[:MEASURED], train.anchors, train.seed)
    calibrate_confidence(job.attached, found)
    job.wait_for_all("measured")
    return found


def _finished(job: _Job) -> artifact.Artifact:
    say = _say(job.quiet)
    if job.skipped is not None:
        say(job.skipped.line())
    say(f"wrote {job.out} in {time.perf_counter() - job.started:.0f} s")
    written = artifact.read(job.out)
    job.wait_for_all("end")
    return written


def _save_after(error: BaseException, session: Session, interrupts: Interrupts, resume: Resume) -> None:
    """Save what the last finished step left, and let the error say how to go on from it."""
    by_signal = isinstance(error, (KeyboardInterrupt, SystemExit))
    try:
        with nullcontext() if by_signal else interrupts.held():
            saved = session.save()
    except Exception as second:  # what stopped the training may well stop this: a full disk, a lost GPU
        saved = f"step {session.trainer.steps_done} could not be saved: {second}"
    if saved is None and by_signal and not session.trainer.steps_done:
        saved = "nothing was trained yet; the same command begins again"
    if saved is not None:
        error.add_note(f"{saved}, without --restart" if resume == "never" else saved)


def _settings(job: _Job) -> dict[str, Any]:
    """What decides the outcome of training, by dotted key."""
    train = job.plan.train
    free = set(NOT_TRAINING) - set(PROBES if train.patience or train.publish == "best" else ())
    kept = {key: value for key, value in by_key(job.plan).items() if key not in free}
    along = job.plan.profile == "joint"
    settings = {key: value for key, value in kept.items() if along or not key.startswith("joint.")}
    fingerprint = {f"base.fingerprint.{key}": value for key, value in job.base.fingerprint.items()}
    skip_bad = job.skipped is not None
    began = {} if job.origin is None else {ORIGIN: job.origin.sha256}
    return {**settings, "skip_bad": skip_bad, "base.model": resolved_name(job.base), **fingerprint, **began}


def _logits_hash(backend: HFBackend, documents: list[Document]) -> str:
    """Hash of the base rows' logits on a fixed batch: L_AR must not move in the frozen profile, not by a bit."""
    _, hidden = clean_forward(backend, documents)
    with torch.no_grad():
        logits = backend.head(hidden[:64]).float().cpu().contiguous()
    return hashlib.sha256(logits.numpy().tobytes()).hexdigest()


def _say(quiet: bool) -> Callable[[str], None]:
    return (lambda message: None) if quiet else (lambda message: print(message, file=sys.stderr))
