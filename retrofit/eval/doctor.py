"""What this machine has, and whether the levels of exactness hold on it: `retrofit doctor`.

    environment     versions, processor, GPU, the Hub's cache
    self-test       for one model: the table of `runtime/exact.py` where our kernels can run, else that of
                    `runtime/exact_rows.py`, with what each level costs `ar`
    verdict         in words: what holds here

Nothing is written and nothing is downloaded but a base that is not here yet.  Not here: the checks themselves.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit import __version__
from retrofit.artifact import folder as artifacts
from retrofit.errors import GateError, ResourceError, RetrofitError, UnsupportedModelError
from retrofit.gguf_files import is_gguf
from retrofit.hub import check_device, load_base, resolved_device
from retrofit.named_bases import EMBEDDED
from retrofit.progress import progress as shown
from retrofit.quantised.methods import NONE, resolved
from retrofit.sharing.pulling import local_folder

if TYPE_CHECKING:
    from retrofit.runtime.backends.fused.backend import FusedGQA
    from retrofit.runtime.backends.hf.backend import HFBackend
    from retrofit.runtime.backends.hf.exact_rows import Priced
    from retrofit.runtime.backends.levels import Check

PACKAGES = ("torch", "triton", "transformers", "peft")
INTERPRETED = "This was Triton's interpreter on the CPU: it says nothing about a GPU."


@dataclass
class Diagnosis:
    """What the self-test found, or why it did not run."""

    backend: str
    """The one that decodes here."""
    device: str
    verdict: str
    exact: str = "off"
    model: str | None = None
    dtype: str | None = None
    bucket: int | None = None
    """Rows of every decoding forward, at the level `bucket`."""
    packed: bool | None = None
    """On the hf backend: whether products read packed weights."""
    checks: list[Check] = field(default_factory=list)
    levels: list[Priced] = field(default_factory=list)
    """On the hf backend: every level, and its price."""
    problem: RetrofitError | None = None
    """What was asked for and is not to be had."""

    @property
    def holds(self) -> bool | None:
        """Whether all checks are equal; None: nothing was checked."""
        return all(check.equal for check in self.checks) if self.checks else None

    def to_dict(self) -> dict[str, Any]:
        names = ("backend", "model", "device", "dtype", "exact", "bucket", "packed")
        facts = {name: getattr(self, name) for name in names}
        checks = [asdict(check) for check in self.checks]
        levels = [asdict(level) for level in self.levels]
        return {**facts, "levels": levels, "checks": checks, "holds": self.holds, "verdict": self.verdict}


def environment() -> dict[str, Any]:
    """Versions, processor, GPUs and the Hub's cache, as plain data.  Imports torch."""
    import torch
    from huggingface_hub.constants import HF_HUB_CACHE
    from torch.utils import collect_env

    from retrofit.machine import cores, cpu_name, driver, installed, memory, physical_cores
    from retrofit.runtime.backends.threads import most_threads

    processor = {
        "name": cpu_name(),
        "cores": cores(),
        "physical_cores": physical_cores(),
        "threads": most_threads(),
        "memory": memory(),
    }
    return {
        "retrofit": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "os": collect_env.get_os(collect_env.run),
        "libc": collect_env.get_libc_version(),
        **{name: installed(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "cpu": processor,
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "driver": driver(),
        "hub_cache": {"folder": HF_HUB_CACHE, "exists": Path(HF_HUB_CACHE).is_dir()},
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE"),
        "TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET"),
    }


@dataclass(frozen=True)
class _Asked:
    """How the model is to be loaded and decoded."""

    device: str
    dtype: str
    backend: str
    exact: str
    packed: bool | str
    quantization: str | None
    offline: bool
    trust_remote_code: bool
    stage: Callable[[str], None]
    """Says what begins now."""


def diagnose(
    folder: str | None = None,
    base: str | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    backend: str = "auto",
    exact: str = "auto",
    packed: bool | str = "auto",
    quantization: str = "auto",
    offline: bool = False,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> Diagnosis:
    """Run the self-test for an artifact's model; without an artifact, for a base alone, the embedded one by default.

    progress: on stderr, as `retrofit.progress` shows it.  The other options are those of `Engine.load`.  What this
    machine lacks is part of the result.  Raises ArtifactError, UsageError, ResourceError or UnsupportedModelError for
    an artifact, a base or the name of a device that is no good.
    """
    artifact, device = artifacts.read(local_folder(folder, offline)) if folder else None, resolved_device(device)
    try:
        check_device(device)
    except ResourceError as error:
        return _untested(device, error)
    with shown("testing", "stage", quiet=not progress, brief=True) as work:

        def stage(name: str) -> None:
            work.advance(1 if work.text else 0, name)

        held = resolved(quantization, artifact.config["base"] if artifact else {})
        asked = _Asked(device, dtype, backend, exact, packed, held, offline, trust_remote_code, stage)
        return _tested(asked, artifact, base)


def _tested(asked: _Asked, artifact: artifacts.Artifact | None, base: str | None) -> Diagnosis:
    lacking = _lacking(asked)
    if lacking is not None:
        if asked.backend == "fused":
            return _untested(asked.device, lacking)
        return _own_modules(asked, artifact, base, lacking)
    from retrofit.runtime.backends import interface
    from retrofit.runtime.backends.fused.self_test import self_test
    from retrofit.runtime.backends.fused.weights import unsupported
    from retrofit.runtime.loading import fused_backend, text_config

    asked.stage("looking at the base's files")
    named = artifact.config["base"] if artifact else {}
    files = load_base(
        base or (artifacts.base_of(artifact.folder, artifact.config) if artifact else EMBEDDED),
        None if base else named.get("revision"),
        device=asked.device,
        trust_remote_code=asked.trust_remote_code,
        offline=asked.offline,
        need_tokenizer=False,
        with_model=False,
    )
    assert files.place is not None
    reason = "it is a GGUF file" if is_gguf(files.place) else unsupported(text_config(files.place))
    if reason is not None:
        unfit = UnsupportedModelError(f"our kernels cannot run {files.name}: {reason}")
        if asked.backend == "fused":
            return _untested(asked.device, unfit)
        return _own_modules(asked, artifact, base, unfit)
    kind = named.get("dtype", "auto") if asked.dtype == "auto" else asked.dtype
    level = "bucket" if asked.exact == "auto" else asked.exact
    asked.stage("loading the base")
    fused = fused_backend(files, artifact, asked.device, kind, level, interface.BUCKET_ROWS)
    asked.stage("comparing rows")
    return _diagnosed(fused, files.name, self_test(fused, fused.layout.drafts))


def _lacking(asked: _Asked) -> RetrofitError | None:
    """What keeps our kernels from running, whatever the model."""
    if asked.backend == "hf":
        return ResourceError("the hf backend was asked for")
    if asked.quantization is not None:
        return UnsupportedModelError(f"our kernels hold plain weights, not {asked.quantization}")
    try:
        from retrofit.runtime.kernels.interpreter import interpreted

        if not interpreted() and not asked.device.startswith("cuda"):
            return ResourceError(
                "our kernels need a CUDA GPU",
                "TRITON_INTERPRET=1 in the environment runs them in Triton's interpreter: slow, and no proof for a GPU",
            )
        import retrofit.runtime.backends.fused.backend  # noqa: F401
    except ImportError as error:
        return ResourceError(f"our kernels need Triton: {error}", "pip install triton (Linux)")
    return None


def _untested(device: str, why: RetrofitError) -> Diagnosis:
    """What was asked for is not to be had."""
    return Diagnosis("hf", device, f"No self-test: {why}.", problem=why)


def _own_modules(asked: _Asked, artifact: artifacts.Artifact | None, base: str | None, why: RetrofitError) -> Diagnosis:
    """The hf backend: every level with its price, and the one that is kept.  why: why our kernels cannot run."""
    from retrofit.runtime.backends.hf.exact_rows import settle, survey
    from retrofit.runtime.backends.hf.linear.packing import refused
    from retrofit.runtime.engine import Engine
    from retrofit.runtime.loading import prepare

    options: dict[str, Any] = {"offline": asked.offline, "trust_remote_code": asked.trust_remote_code}
    dtype = asked.dtype
    asked.stage("loading the base")
    if artifact is not None:
        options |= {"exact": "off", "backend": "hf", "packed": asked.packed}
        held = asked.quantization or NONE
        engine = Engine.load(artifact.folder, asked.device, dtype, base=base, quantization=held, **options)
        name = base or str(artifact.folder)
    else:
        name = base or EMBEDDED
        options |= {"need_tokenizer": False, "quantization": asked.quantization}
        loaded = load_base(name, dtype=dtype, device=asked.device, **options)
        engine = Engine.from_model(loaded.model, exact="off")
    with engine:
        backend: HFBackend = engine.backend  # type: ignore[assignment]
        drafts = engine.layout.drafts
        if artifact is None:
            prepare(backend, "off", drafts, None, asked.packed, alone=True)
        asked.stage("comparing rows, timing levels")
        levels = survey(backend, drafts)
        asked.stage("choosing a level")
        problem = None
        try:
            settled = settle(backend, asked.exact, drafts)
            verdict, checks = f"{settled.level} is kept: {settled.why}.", settled.checks
        except GateError as error:
            problem, checks = error, []
            verdict = f"{asked.exact} does NOT hold on this machine."
        kind = str(backend.dtype).removeprefix("torch.")
        verdict += f" The model's own modules decode, on the hf backend: {why}."
        packed = (
            "Weights are packed."
            if backend.packed
            else f"Weights are plain: {refused(backend) or backend.why_plain or 'as asked'}."
        )
        place, level, bucket = str(backend.device), backend.exact, backend.most_rows
    verdict = f"{verdict} {packed}"
    return Diagnosis("hf", place, verdict, level, name, kind, bucket, backend.packed, checks, levels, problem)


def _diagnosed(backend: FusedGQA, model: str, checks: list[Check]) -> Diagnosis:
    from retrofit.runtime.backends.fused.self_test import demand
    from retrofit.runtime.kernels.interpreter import interpreted

    level, problem = backend.exact, None
    differ = sum(not check.equal for check in checks)
    whose = {
        "bucket": f"every row of a forward of {backend.most_rows} rows keeps its bits, whatever the other rows hold",
        "invariant": "every row keeps its bits, however many rows there are and whatever they hold",
    }
    if level == "off":
        verdict = f"off: nothing is promised; of {len(checks)} checks {differ} differ with as many rows as there are."
    elif differ:
        verdict = f"{level} does NOT hold on this machine: of {len(checks)} checks {differ} differ."
        try:
            demand(checks)
        except GateError as error:
            problem = error
    else:
        verdict = f"{level} holds on this machine: {whose[level]}; so self_spec emits exactly ar's tokens."
        ours = [f"{c.what} {c.shape}" for c in checks if c.kernel == "ours" and c.shape.startswith("[")]
        if level == "bucket" and ours:
            verdict += f" Our kernel stands in for the library's at {'; '.join(ours)}."
    if interpreted():
        verdict += f" {INTERPRETED}"
    dtype = str(backend.dtype).removeprefix("torch.")
    device = str(backend.device)
    return Diagnosis("fused", device, verdict, level, model, dtype, backend.most_rows, checks=checks, problem=problem)


def _gpu(index: int) -> dict[str, Any]:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    name = torch.cuda.get_device_name(index)
    return {"name": name, "total": total, "free": free, "capability": f"{major}.{minor}"}
