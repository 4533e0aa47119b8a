"""Which backend an artifact runs on, and both made: the fused one from files, the `hf` one around a live model.

Not here: decoding.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from retrofit.adapters.attach import Attached, attach
from retrofit.adapters.heads import Heads, load_heads
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.roles import ROLES
from retrofit.artifact.folder import Artifact, base_of
from retrofit.artifact.own import MODEL
from retrofit.errors import ArtifactError, ResourceError, UnsupportedModelError, UsageError, out_of_memory
from retrofit.gguf_files import is_gguf
from retrofit.hub import Base, check_device, refuse_unloaded
from retrofit.locating import locate
from retrofit.quantised.methods import resolved
from retrofit.runtime.backends.hf.backend import HFBackend, wrap
from retrofit.runtime.backends.hf.exact_rows import Settled, settle
from retrofit.runtime.backends.hf.linear.packing import PACKED, own_memory, pack
from retrofit.runtime.backends.interface import BUCKET_ROWS, eos_set
from retrofit.runtime.backends.levels import EXACT, HALF
from retrofit.runtime.settings import folder_settings, stored
from retrofit.weight_files import COMPUTED, file_fingerprint, same_base, shapes

if TYPE_CHECKING:
    # Needs Triton, which exists on Linux only.
    from retrofit.runtime.backends.fused.backend import FusedGQA

BACKENDS = ("auto", "hf", "fused")
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def check_options(backend: str, exact: str, dtype: str, packed: bool | str = "auto") -> None:
    """Raises UsageError for a name that does not exist, and where packed weights are asked of our own kernels."""
    for what, given, known in (
        ("backend", backend, BACKENDS),
        ("exact", exact, ("auto", *EXACT)),
        ("dtype", dtype, DTYPES),
    ):
        if given not in known:
            raise UsageError(f"{what}={given!r} does not exist", f"it is one of {', '.join(known)}")
    if not (isinstance(packed, bool) or packed == "auto"):
        raise UsageError(f"packed={packed!r} does not exist", f"it is one of {', '.join(map(str, PACKED))}")
    if packed is True and backend == "fused":
        raise UsageError("packed=True is of the hf backend, on a CPU", "give backend='hf', or leave packed at 'auto'")


def asked_base(
    artifact: Artifact, base: str | None, dtype: str, quantization: str, backend: str
) -> tuple[str, str | None, str, str | None]:
    """Name, revision and type of the base that an artifact is to run on, and what its linear layers are held in.

    Raises UsageError for a quantisation that does not exist, or beside our own kernels.
    """
    named = artifact.config["base"]
    held = resolved(quantization, named)
    if held is not None and backend == "fused":
        raise UsageError(
            f"the fused backend holds plain weights, not {held}", "use backend='hf', or quantization='none'"
        )
    name = base or base_of(artifact.folder, artifact.config)
    revision = None if base else named.get("revision")
    return name, revision, named.get("dtype", "auto") if dtype == "auto" else dtype, held


def check_same_base(base: Base, artifact: Artifact) -> None:
    """Raises ArtifactError when the artifact was made for another base."""
    named = artifact.config["base"]
    if artifact.config["profile"] == "joint" and base.place is not None:
        _refuse_other_model(base, artifact)
    differs = same_base(named["fingerprint"], base.fingerprint)
    stored = [str(one).startswith("stored:") for one in (named.get("quantization"), base.precision)]
    if differs == "headers" and any(stored):  # of another precision; norms tell fine-tunes apart
        theirs, ours = (one.get("norms") for one in (named["fingerprint"], base.fingerprint))
        differs = None if theirs == ours else "norms"
    if differs and base.place is not None and not is_gguf(base.place):
        # Older artifacts took every safetensors file for the model's, such as a second copy of its weights.
        every = file_fingerprint(base.place, {}, list(base.place.glob("*.safetensors")))
        differs = same_base(named["fingerprint"], {**every, "config": base.fingerprint["config"]}) and differs
    if differs:
        file = named.get("gguf", {}).get("file")
        made_for = f"{file}, the GGUF file it was made of," if file else "the base it was made for"
        raise ArtifactError(
            f"{artifact.folder} belongs to another base: {base.name} differs from {named['model']} in its {differs}",
            f"give {made_for} with --base, or convert this one",
        )


def _refuse_other_model(base: Base, artifact: Artifact) -> None:
    """Raises ArtifactError unless the base is the model that an artifact has of its own.

    Hashes of configuration and norms would not do: a LoRA changes neither.
    """
    own = artifact.folder / MODEL
    assert base.place is not None
    if base.place.resolve() != own.resolve():
        raise ArtifactError(
            f"{artifact.folder} has a model of its own, {own}, and drafts for no other; {base.name} is another",
            "leave --base out",
        )


def fits_fused(name: str, revision: str | None, device: str, dtype: str, offline: bool) -> bool:
    """Whether the fused backend can run this base on this device, and fast.  Raises what `locate` raises."""
    check_device(device)
    index = torch.device(device).index
    if not device.startswith("cuda") or (index is not None and index != torch.cuda.current_device()):
        return False
    try:
        from retrofit.runtime.backends.fused.weights import unsupported

        place = locate(name, revision, offline)
        if is_gguf(place):
            return False
        config = AutoConfig.from_pretrained(place)
    except (ImportError, OSError, ValueError, KeyError):
        return False  # no Triton, or a model that needs code of its own: hf says what is wrong, if anything is
    held = str(config.dtype).removeprefix("torch.") if dtype == "auto" else dtype
    # Models of several parts, such as vision and text, name their tensors otherwise.
    return getattr(torch, held, None) in HALF and config.get_text_config() is config and unsupported(config) is None


def fused_backend(
    base: Base,
    artifact: Artifact | None,
    device: str,
    dtype: str = "auto",
    exact: str = "bucket",
    rows: int = BUCKET_ROWS,
) -> FusedGQA:
    """The fused backend over a base's files, with an artifact's adapter or with none.

    Raises ArtifactError (another base), UnsupportedModelError (a GGUF file too), and ResourceError: no Triton, no GPU,
    no memory.
    """
    try:
        from retrofit.runtime.backends.fused.backend import FusedGQA
        from retrofit.runtime.backends.fused.weights import from_folder, unsupported
    except ImportError as error:
        raise ResourceError(f"the fused backend needs Triton: {error}", "pip install triton (Linux)") from error
    assert base.place is not None
    refuse_gguf(base)
    config = text_config(base.place)
    held = str(config.dtype or "float32").removeprefix("torch.") if dtype == "auto" else dtype
    layout, heads, adapter, scale = DraftLayout(), None, None, 1.0
    if artifact is not None:
        check_same_base(base, artifact)
        settings = artifact.config["adapter"]
        layout = DraftLayout(**artifact.config["draft"])
        heads = _heads(config, layout, artifact)
        adapter, scale = artifact.adapter_state, settings["alpha"] / settings["rank"]
    if unsupported(config) is None:  # else the loading says so
        _check_tensors(base.name, base.place, config)
    try:
        backend = FusedGQA(
            config,
            from_folder(base.place, device),
            layout,
            heads,
            adapter,
            scale,
            device=device,
            dtype=getattr(torch, held),
            exact=exact,
            rows=rows,
            settings=folder_settings(base.place, config, eos_set(config.eos_token_id)),
        )
    except Exception as error:
        memory = out_of_memory(error, f"{base.name} does not fit into the memory of {device}")
        if memory is None:
            raise
        raise memory from error
    if backend.device.type == "cuda" and backend.exact != "off":
        from retrofit.runtime.backends.fused.self_test import demand, self_test

        # Before any step is recorded: a shape may be switched to our own product.
        demand(self_test(backend, backend.layout.drafts))
    return backend


def refuse_gguf(base: Base) -> None:
    """Raise UnsupportedModelError for a base that the fused backend cannot read."""
    if base.place is not None and is_gguf(base.place):
        raise UnsupportedModelError(
            f"the fused backend reads safetensors, and {base.name} is a GGUF file",
            "use backend='hf', or save the model once as safetensors (docs/bases.md)",
        )


def with_adapter(base: Base, artifact: Artifact, alone: bool = False) -> tuple[Attached, HFBackend]:
    """The hf backend over a live model, with an artifact's adapter.

    alone: the model was loaded for this, and is given back to no one.

    Raises ArtifactError (another base), UnsupportedModelError, UsageError.
    """
    check_same_base(base, artifact)
    attached, backend = wrap(base.model, lambda: attach_artifact(base.model, artifact))
    if alone:
        attached.trainable.clear()  # it would keep the whole weights alive
    return attached, backend


def attach_artifact(model: PreTrainedModel, artifact: Artifact) -> Attached:
    """An artifact's adapter and heads on a model, to be run and not trained.

    Raises ArtifactError where they do not fit, and what `attach` raises; the model is then as it was.
    """
    adapter = artifact.config["adapter"]
    attached = attach(
        model,
        DraftLayout(**artifact.config["draft"]),
        rank=adapter["rank"],
        alpha=adapter["alpha"],
        targets=adapter["targets"],
        markov_rank=adapter["markov_rank"],
        confidence=adapter["confidence"],
        modules=adapter["modules"],
    )
    try:
        attached.load(artifact.adapter_state, artifact.heads)
    except BaseException:
        attached.detach()
        raise
    for parameter in attached.parameters():
        parameter.requires_grad_(False)
    return attached


def prepare(backend: HFBackend, exact: str, drafts: int, rows: int | None, packed: bool | str, alone: bool) -> Settled:
    """Pack the weights if that is wanted, then let the backend keep a level of exactness.

    alone: the model was loaded for this, so that packed weights stand in for the plain ones; packed auto is False
    otherwise.  Raises what `pack` and `settle` raise.
    """
    if packed is True:
        undo = pack(backend, alone)
        if not alone:
            backend.until_closed(undo)
    elif packed == "auto" and alone:
        try:
            pack(backend, alone)
        except ResourceError as error:  # then they stay as they are
            backend.why_plain = str(error)
    if alone and backend.packed:
        own_memory(backend.model)
    return settle(backend, exact, drafts, rows)


def untrained(model: PreTrainedModel, layout: DraftLayout) -> tuple[Attached, HFBackend]:
    """The hf backend over a live model, with an adapter that has learned nothing."""
    options: dict[str, Any] = {"rank": 8, "alpha": 8.0, "targets": ROLES, "markov_rank": 8, "confidence": True}
    return wrap(model, lambda: attach(model, layout, **options))


def _check_tensors(name: str, folder: Path, config: PretrainedConfig) -> None:
    """Raise UnsupportedModelError unless the files hold the tensors of this model, all of them and no other."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    wanted, found = {n: tuple(t.shape) for n, t in model.state_dict().items()}, shapes(folder)
    loaded = {
        "missing_keys": wanted.keys() - found.keys() - set(model.all_tied_weights_keys),
        "unexpected_keys": {n for n in found.keys() - wanted.keys() if not re.search(COMPUTED, n)},
        "mismatched_keys": [(n,) for n in wanted.keys() & found.keys() if wanted[n] != found[n]],
    }
    refuse_unloaded(name, type(model).__name__, loaded)


def text_config(folder: Path) -> PretrainedConfig:
    """The configuration of a model folder, with the EOS that `generate` would use."""
    config = AutoConfig.from_pretrained(folder).get_text_config()
    eos = stored(folder, config).eos_token_id
    config.eos_token_id = config.eos_token_id if eos is None else eos
    return config


def _heads(config: PretrainedConfig, layout: DraftLayout, artifact: Artifact) -> Heads:
    settings = artifact.config["adapter"]
    with torch.random.fork_rng(devices=[]):  # what a new head draws is overwritten at once
        heads = Heads(
            config.hidden_size, config.vocab_size, layout.drafts, settings["markov_rank"], settings["confidence"]
        )
    load_heads(heads, artifact.heads)
    for parameter in heads.parameters():
        parameter.requires_grad_(False)
    return heads
