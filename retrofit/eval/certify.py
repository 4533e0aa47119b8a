"""The certificate: does this artifact leave its base alone, and is `self_spec` the base's own decoding?

    artifact       the artifact holds no tensor but the adapter's and the heads'
    base-weights   every tensor of the loaded base is the original checkpoint's, by sha256
    gate           with NaN for an adapter every base row stays as it was, bit for bit
    audit          in the run type, every way of decoding: targets recomputed from stored logits; differences from
                   `ar` are rounding
    bitwise        in the run type, every way of decoding: `self_spec` equals `ar`, token for token
    greedy-fp32    `self_spec` equals transformers `generate`, token for token
    sampled-fp32   `self_spec` equals `ar` at equal seed, token for token
    distribution   `ar` draws from the model's distribution

Of an artifact of the profile `joint` the base is the model that was trained along, in its model/: the certificate is of
kind `own`, proves `self_spec` lossless against that model's `ar`, and says how far both are from the original, `drift`.

The certificate is `ok` when every check passed; one that could not run, or had no promise to hold the engine to, is
`skipped`, and then it is not.  It holds for the backend and the level of exactness that it names.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from retrofit import __version__
from retrofit.artifact import folder as artifacts
from retrofit.artifact.files import disk, replace_file
from retrofit.artifact.own import MODEL
from retrofit.errors import GateError, ResourceError, UsageError
from retrofit.eval import exactness, weights
from retrofit.eval.audit import audit
from retrofit.eval.bitwise import bitwise
from retrofit.eval.distribution import distribution
from retrofit.eval.exactness import Verdict
from retrofit.eval.subject import Subject, token_prompts, trained_on_stdlib
from retrofit.hub import resolved_device
from retrofit.locating import locate
from retrofit.machine import cpu_name
from retrofit.progress import progress as shown
from retrofit.runtime.engine import Engine
from retrofit.sharing.pulling import local_folder
from retrofit.weight_files import dtype_name

CERTIFICATE = "certificate.json"
VERSION = 1


@dataclass(frozen=True)
class Size:
    """How much one level runs."""

    prompts: int
    tokens: int
    samples: int
    """Continuations drawn for each case of the distribution check."""


CHECKS = (
    *("artifact", "base-weights", "gate", "audit"),
    *("bitwise", "greedy-fp32", "sampled-fp32", "distribution"),
)
LEVELS = {"quick": Size(8, 64, 2000), "full": Size(64, 128, 20000)}


@dataclass(frozen=True)
class Check:
    """One check: `detail` is a line for people, `details` the figures behind it."""

    name: str
    status: Literal["passed", "failed", "skipped"]
    detail: str
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Certificate:
    """What was checked, on what, and how it went."""

    subject: dict[str, Any]
    environment: dict[str, Any]
    level: str
    checks: list[Check]
    date: str

    @property
    def what(self) -> str:
        """What ran: `the fused backend, exact=bucket, in bfloat16 on cuda`."""
        where = self.environment
        if where.get("backend") is None:
            return "nothing could be run"
        return f"the {where['backend']} backend, exact={where['exact']}, in {where['dtype']} on {where['device']}"

    @property
    def kind(self) -> str:
        """`original`: `ar` is the original model's own decoding; `own`: that of a model that was trained along."""
        return "own" if self.subject.get("drift") is not None else "original"

    @property
    def ok(self) -> bool:
        """Every check passed; a skipped one is not passed."""
        return bool(self.checks) and all(check.status == "passed" for check in self.checks)

    def check(self, name: str) -> Check:
        """The check of that name.  Raises KeyError when there is none."""
        return {check.name: check for check in self.checks}[name]

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "ok": self.ok,
            "kind": self.kind,
            "level": self.level,
            "date": self.date,
            **self.subject,
            **self.environment,
            "checks": [asdict(check) for check in self.checks],
        }

    def save(self, path: str | Path) -> Path:
        """Write it: into an artifact, beside its hash; into another folder; or to a file name.

        Raises ResourceError where it cannot be written.
        """
        path = Path(path)
        text = json.dumps(_finite(self.to_dict()), indent=1, allow_nan=False) + "\n"
        if (path / artifacts.CONFIG).is_file():
            return artifacts.add(path, CERTIFICATE, text)
        path = path / CERTIFICATE if path.is_dir() else path
        with disk(path, len(text)):
            replace_file(path, text.encode())
        return path

    def require(self) -> None:
        """Raises GateError naming the checks that did not pass."""
        if not self.ok:
            names = ", ".join(f"{c.name} {c.status}" for c in self.checks if c.status != "passed")
            raise GateError(f"not certified: {names or 'nothing was checked'}")


def certify(
    target: str | Path | Engine,
    level: Literal["quick", "full"] = "quick",
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    exact: str = "auto",
    packed: bool | str = "auto",
    quantization: str = "auto",
    base: str | Path | None = None,
    prompts: Sequence[str | Sequence[int]] | None = None,
    offline: bool = False,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Certificate:
    """Check an artifact, named as `Engine.load` takes it, or a live engine, against its base.

    Writes nothing; see `Certificate.save`.

    level: quick = 8 prompts of 64 new tokens, full = 64 of 128.  device, dtype, backend, exact, packed, quantization:
    as `Engine.load`, by which a folder is loaded (an engine stays as it is): what is certified is what runs.  base:
    folder, GGUF file or Hub id of the original checkpoint; a folder knows its own, a live engine needs it for the base
    weights.  prompts: texts or token ids in place of held-out text of the recipe's source.  progress: on stderr.

    A check that fails is part of the answer; raises only what loading raises (UsageError, ArtifactError,
    ResourceError, UnsupportedModelError, and GateError for a level that does not hold here).
    """
    if level not in LEVELS:
        raise UsageError(f"level {level!r} does not exist", f"levels are {', '.join(LEVELS)}")
    size, device = LEVELS[level], resolved_device(device)
    folder = None if isinstance(target, Engine) else local_folder(target, offline)
    if folder is not None:
        artifacts.check(folder)
    checks: list[Check] = []
    with shown("certifying", "check", len(CHECKS), quiet=not progress, brief=True) as bar:

        def run(name: str, function: Callable[[], Verdict]) -> Check:
            bar.about(name)
            checks.append(_run(name, function))
            bar.advance()
            return checks[-1]

        kept = run("artifact", lambda: _artifact(target))
        if kept.status == "failed" and folder is not None:
            # Its tensors do not fit, so there is no engine to check.
            checks += [Check(name, "skipped", "the artifact holds foreign tensors") for name in CHECKS[1:]]
            return Certificate(_subject(folder, None), _environment(device, dtype), level, checks, _now())
        if isinstance(target, Engine):
            engine = target
        else:
            options: dict[str, Any] = {"offline": offline, "trust_remote_code": trust_remote_code, "packed": packed}
            options |= {"base": None if base is None else str(base), "quantization": quantization}
            engine = Engine.load(target, device, dtype, exact, backend, **options)
        subject = Subject(engine, _checkpoint(engine, base, offline), trust_remote_code, folder)
        room = max(1, engine.limits.context - size.tokens)
        texts = token_prompts(engine, prompts, size.prompts, room, trained_on_stdlib(folder, engine))
        for name, function in _checks(subject, texts, size).items():
            run(name, function)
    return Certificate(_subject(folder, engine), _environment_of(subject), level, checks, _now())


def _checks(subject: Subject, texts: Sequence[Sequence[int]], size: Size) -> dict[str, Callable[[], Verdict]]:
    """Those that need an engine, in the order of CHECKS."""
    return {
        "base-weights": lambda: _base_weights(subject),
        "gate": lambda: exactness.gate(subject, texts),
        "audit": lambda: audit(subject, texts, size.tokens),
        "bitwise": lambda: bitwise(subject, texts, size.tokens),
        "greedy-fp32": lambda: exactness.greedy(subject, texts, size.tokens),
        "sampled-fp32": lambda: exactness.sampled(subject, texts, size.tokens),
        "distribution": lambda: distribution(size.samples, subject.run.backend),
    }


def _run(name: str, function: Callable[[], Verdict]) -> Check:
    begin = time.perf_counter()
    try:
        ok, detail, details = function()
        status: Literal["passed", "failed", "skipped"] = "skipped" if ok is None else "passed" if ok else "failed"
    except (ResourceError, torch.cuda.OutOfMemoryError) as error:
        status, detail, details = "skipped", str(error).splitlines()[0], {}
    return Check(name, status, detail, details, round(time.perf_counter() - begin, 3))


def _artifact(target: str | Path | Engine) -> Verdict:
    if isinstance(target, Engine):
        if target.backend.name == "fused":
            raise UsageError("an engine of the fused backend is certified by its artifact", "give the folder")
        files = weights.engine_shapes(target)
        markov = target.attached.heads.markov_w1
        rank = target.attached.peft_model.peft_config["default"].r
        markov_rank = 0 if markov is None else int(markov.shape[1])
    else:
        config = artifacts.read_config(target)
        adapter, files = config["adapter"], weights.artifact_shapes(Path(target))
        if config["profile"] == "joint":  # its own model is compared as the base
            files = {name: shapes for name, shapes in files.items() if not name.startswith(f"{MODEL}/")}
        rank, markov_rank = adapter["rank"], adapter["markov_rank"]
    foreign = weights.foreign_tensors(files, rank, markov_rank)
    count = sum(map(len, files.values()))
    details = {"tensors": count, "foreign": len(foreign), "foreign_names": foreign[: weights.LISTED]}
    detail = f"{count} tensors, none of the base" if not foreign else f"{len(foreign)} foreign: {foreign[0]}"
    return Verdict(count > 0 and not foreign, detail, details)


def _base_weights(subject: Subject) -> Verdict:
    if subject.checkpoint is None:
        raise ResourceError("the original checkpoint is unknown; give its folder or Hub id as base")
    backend: Any = subject.run.backend
    if backend.name == "fused":
        found = weights.compare_fused(backend, subject.checkpoint)
    else:
        precision = None if subject.run.base is None else subject.run.base.precision
        found = weights.compare_base(subject.run.attached.model, subject.checkpoint, precision)
    bad = {kind: found[kind] for kind in ("changed", "not_loaded", "not_in_checkpoint") if found[kind]}
    recorded = subject.run.config.get("base", {}).get("gguf", {}).get("sha256")
    other = "file_sha256" in found and recorded not in (None, found["file_sha256"])
    same = found["compared"] - found["changed"]
    detail = f"{same} of {found['tensors']} tensors identical to the checkpoint's"
    detail += "".join(f", {count} {kind.replace('_', ' ')}" for kind, count in bad.items())
    detail += ", in another file than the artifact was made of" if other else ""
    return Verdict(found["compared"] > 0 and not bad and not other, detail, found)


def _checkpoint(engine: Engine, base: str | Path | None, offline: bool) -> Path | None:
    if base is not None:
        return locate(str(base), offline=offline)
    return engine.base.place if engine.base is not None else None


def _subject(folder: Path | None, engine: Engine | None) -> dict[str, Any]:
    base: dict[str, Any] | None = None
    manifest = None
    own: dict[str, Any] = {}
    if folder is not None:
        config = artifacts.read_config(folder)
        base, own = config["base"], {key: config[key] for key in ("original", "drift") if key in config}
        manifest = hashlib.sha256((folder / artifacts.MANIFEST).read_bytes()).hexdigest()
    elif engine is not None and engine.base is not None:
        own = {key: engine.config[key] for key in ("original", "drift") if key in engine.config}
        base = {
            "model": engine.base.name,
            "revision": engine.base.revision,
            "fingerprint": engine.base.fingerprint,
        }
    return {"base": base, **own, "manifest_sha256": manifest}


def _environment_of(subject: Subject) -> dict[str, Any]:
    backend = subject.run.backend
    level = backend.exact
    dtype = dtype_name(subject.dtype)
    return _environment(str(subject.device), dtype, backend.name, level, getattr(backend, "packed", False))


def _environment(
    device: str, dtype: str, backend: str | None = None, exact: str | None = None, packed: bool | None = None
) -> dict[str, Any]:
    cuda = device.startswith("cuda") and torch.cuda.is_available()
    return {
        "retrofit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device,
        "dtype": dtype,
        "backend": backend,
        "exact": exact,
        "packed": packed,
        "hardware": {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(device) if cuda else None,
        },
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
