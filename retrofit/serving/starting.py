"""From an artifact to the command that serves it: everything that can be refused is, before an engine starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retrofit.artifact import folder as artifacts
from retrofit.artifact.engines import refuse_unfit
from retrofit.gguf_files import is_gguf
from retrofit.hub import load_base
from retrofit.named_bases import EMBEDDED, embedded_folder
from retrofit.quantised.methods import KINDS, other_precision
from retrofit.runtime.loading import check_same_base
from retrofit.serving import sglang
from retrofit.serving.unpacking import unpacked
from retrofit.serving.vllm import command as vllm
from retrofit.serving.vllm.versions import check, installed


def words(
    kept: Path, name: str, engine: str, options: Sequence[str], *, base: str | None, offline: bool
) -> tuple[list[str], str | None]:
    """The command that serves an artifact, as a list of words, and what is to be said of the base's precision.

    kept: the artifact's folder.  name: what it is called.  engine: vllm or sglang.  options: of the engine.  base: in
    place of the one the artifact names.
    Raises UsageError or UnsupportedModelError for an artifact or an option that the engine cannot draft with,
    ResourceError where vLLM is not here or another one is, and what `Engine.load` raises of artifact and base.
    """
    artifact = artifacts.read(kept)
    refuse_unfit(name, artifact.config, engine)
    named, block = artifact.config["base"], artifact.config["draft"]["block"]
    place = base or artifacts.base_of(artifact.folder, artifact.config)
    revision, trained = None if base else named["revision"], named.get("quantization")
    if engine == "sglang":
        model = str(embedded_folder()) if place == EMBEDDED else place  # a name that only retrofit has
        held = None if trained in KINDS else trained  # what its files are, which nobody opens here
        return sglang.command(model, revision, block, options), other_precision(trained, held)
    check(installed())
    loaded = load_base(place, revision, offline=offline, with_model=False)
    check_same_base(loaded, artifact)
    folder = unpacked(loaded, offline) if loaded.place is not None and is_gguf(loaded.place) else loaded.place
    called = artifacts.published_name(named)
    if artifact.config["profile"] == "joint":  # served is its own model, and requests name the artifact
        called = artifact.folder.resolve().name
    command = vllm.command(artifact.folder.absolute(), str(folder), called, block, options)
    return command, other_precision(trained, loaded.precision)
