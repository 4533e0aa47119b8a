"""Load base models, whatever files they come from.

Every failure is one clear error with the fix in it.  Not here: where a name leads (`locating.py`), adapters, artifacts.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.errors import ResourceError, RetrofitError, UnsupportedModelError, UsageError, out_of_memory
from retrofit.gguf_files import (
    TAKE_SAFETENSORS,
    Header,
    check_readable,
    gguf_fingerprint,
    is_gguf,
    pretrained,
    read_once,
    refuse_unread,
)
from retrofit.locating import locate
from retrofit.progress import without_bar
from retrofit.quantised.methods import KEPT, check_kind, precision_of, stored_method
from retrofit.weight_files import config_hash, file_fingerprint, weight_source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FOREIGN = (
    ("_orig_mod.", "saved from a compiled model; save `model._orig_mod`, or take `_orig_mod.` out of the names"),
    ("base_model.model.", "saved from a PEFT model; merge its adapter first (`merge_and_unload`), then save it"),
    (".base_layer.", "saved with an adapter on it; merge it first (`merge_and_unload`), then save the model"),
    ("_fsdp_wrapped_module.", "saved from within FSDP; save a full state dict"),
    ("module.", "saved from DistributedDataParallel; save `model.module`"),
)
"""What names of tensors tell of how they came to be saved."""


@dataclass(frozen=True)
class Base:
    """A base model.  place: the folder or the GGUF file it came from, None for a live model; live: None where a
    backend reads the files itself."""

    live: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    revision: str | None
    place: Path | None
    fingerprint: dict[str, str | None]
    precision: str | None = None
    """What its linear layers are held in, as `precision_of` has it; None where they are plain."""

    @property
    def model(self) -> PreTrainedModel:
        if self.live is None:
            raise RuntimeError(f"{self.name} was opened without its transformers model")
        return self.live


def _model_place(
    name: str, revision: str | None, offline: bool, *, weights: bool = True, code: bool
) -> tuple[Path, Header | None]:
    """`locate` of what holds a model's configuration, and the header where that is a GGUF file.

    Raises what `locate` and `check_readable` raise, and UsageError.
    """
    place = locate(name, revision, offline, weights=weights, code=code)
    if is_gguf(place):
        return place, check_readable(place)
    if not (place / "config.json").is_file():
        raise UsageError(
            f"{name} holds no config.json, so it is no transformers model",
            f"of a folder or Hub id of GGUF files name one: {name}/FILE.gguf",
        )
    return place, None


def load_base(
    name: str,
    revision: str | None = None,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    offline: bool = False,
    need_tokenizer: bool = True,
    with_model: bool = True,
    quantization: str | None = None,
) -> Base:
    """Load model and tokenizer.  Raises UsageError, ResourceError or UnsupportedModelError; never half-loads.

    with_model False: files, configuration and tokenizer only, for a backend that reads the weights itself.
    quantization: what linear layers are quantised to while they are loaded, one of `quantised.methods.KINDS`.
    """
    check_device(device)
    if quantization is not None:
        check_kind(quantization)
    place, header = _model_place(name, revision, offline, code=trust_remote_code)
    with nullcontext() if header is None else read_once():
        wanted = _Wanted(dtype, device, trust_remote_code, quantization)
        return _opened(name, revision, place, header, wanted, need_tokenizer, with_model)


@dataclass(frozen=True)
class _Wanted:
    """How a model is to be loaded; see `load_base`."""

    dtype: str
    device: str
    trust_remote_code: bool
    quantization: str | None


def _opened(
    name: str,
    revision: str | None,
    place: Path,
    header: Header | None,
    wanted: _Wanted,
    need_tokenizer: bool,
    with_model: bool,
) -> Base:
    from transformers import AutoConfig, AutoTokenizer

    options = {**pretrained(place), "trust_remote_code": wanted.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(**options)
    except Exception as error:
        raise _not_loaded(name, wanted.device, error) from error
    method = stored_method(name, config)
    if method is not None and wanted.quantization is not None:
        raise UsageError(
            f"{name} is quantised already ({method})",
            "leave the quantisation out: base.quantization of a recipe, --quantization of a command",
        )
    precision, described = precision_of(config, wanted.quantization), config.to_dict()
    fingerprint = gguf_fingerprint(place, header, described) if header else file_fingerprint(place, described)
    model = _load_model(name, place, header, config, wanted, method) if with_model else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(**options)
    except Exception as error:
        if need_tokenizer or out_of_memory(error) is not None:
            raise _no_tokenizer(name, error) from error
        tokenizer = None
    return Base(model, tokenizer, name, revision, place, fingerprint, precision)


@without_bar()
def _load_model(
    name: str, place: Path, header: Header | None, config: PreTrainedConfig, wanted: _Wanted, method: str | None
) -> PreTrainedModel:
    """The model with exactly the tensors of its files, each in its place.

    header: that of a GGUF file.  method: how the files are quantised, None where they are not.
    """
    import torch
    from transformers import AutoModelForCausalLM

    kind = AutoModelForCausalLM if header else model_class(config)

    declared = getattr(config, "transformers_weights", None)
    options: dict[str, Any] = {}
    if header is None:
        config.transformers_weights = weight_source(place)
        options |= _unpacking(method)
    else:
        options |= _dequantising()
    dtype, device = wanted.dtype, wanted.device
    if wanted.quantization is not None:  # from the type of the file, whatever the rest is to run in
        dtype = "auto" if header is None else "bfloat16"
    try:
        model, loaded = kind.from_pretrained(
            **pretrained(place),
            **options,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=wanted.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
        refuse_unloaded(name, type(model).__name__, loaded)
        if header is None:
            model.config.transformers_weights = declared
            if declared is None:
                del model.config.transformers_weights
        else:
            refuse_unread(name, place, header, model)
        if method is not None or wanted.quantization is not None:
            _hold_quantised(model, wanted, method)
        if method is not None or header is not None:
            _forget_quantisation(model)
        return model.to(device).eval()
    except RetrofitError:
        raise
    except Exception as error:
        raise _not_loaded(name, device, error) from error


def model_class(config: PreTrainedConfig) -> Any:
    """What of transformers makes this configuration's model, with its image towers where its files hold them."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    text = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    # Where there is a class for the text alone, the files say which of the two they were saved from.
    if whole is None or own_code or (text is not None and whole not in (config.architectures or ())):
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def _hold_quantised(model: PreTrainedModel, wanted: _Wanted, method: str | None) -> None:
    """Linear layers of ours, with the bits that were asked for or that the files hold."""
    import torch

    from retrofit.quantised import loading

    dtype = model.dtype if wanted.dtype == "auto" else getattr(torch, wanted.dtype)
    if wanted.quantization is not None:
        loading.quantise(model, wanted.quantization, dtype)
    elif method in KEPT:
        loading.take_over(model, dtype)


def _unpacking(method: str | None) -> dict[str, Any]:
    """How `from_pretrained` is told to unpack the weights of a method that is unpacked."""
    import transformers

    kinds = {
        "fp8": lambda: transformers.FineGrainedFP8Config(dequantize=True),
        "compressed-tensors": lambda: transformers.CompressedTensorsConfig(dequantize=True),
    }
    return {"quantization_config": kinds[method]()} if method in kinds else {}


def _dequantising() -> dict[str, Any]:
    """Of a GGUF file every weight is unpacked.  Versions of transformers that know nothing else have no option."""
    import transformers

    known = getattr(transformers, "GgufConfig", None)
    return {} if known is None else {"quantization_config": known(dequantize=True)}


def _forget_quantisation(model: PreTrainedModel) -> None:
    """Let a dequantised model be what it is: a plain one, to be trained beside, wrapped and saved."""
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


def _not_loaded(name: str, device: str, error: Exception) -> RetrofitError:
    memory = out_of_memory(error, f"{name} does not fit into the memory of {device}")
    hint = TAKE_SAFETENSORS if str(error).startswith("GGUF model with architecture") else None
    return memory or UnsupportedModelError(f"{name} cannot be loaded: {_first_line(error)}", hint)


def _no_tokenizer(name: str, error: Exception) -> RetrofitError:
    problem = f"{name} has no tokenizer that loads: {_first_line(error)}"
    return out_of_memory(error) or UsageError(problem, "add its tokenizer files to the folder")


def refuse_unloaded(name: str, kind: str, loaded: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError where a model holds tensors that no file gave it, or a file some it has no place for.

    loaded: transformers' loading info; tied weights, and what the model's class leaves out, are not in it.
    """
    missing, unknown = sorted(loaded["missing_keys"]), sorted(loaded["unexpected_keys"])
    other = sorted(one[0] for one in loaded["mismatched_keys"])
    parts = [
        f"{len(names)} {what} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for what, names in (("missing", missing), ("of another shape", other), ("without a place in it", unknown))
        if names
    ]
    if not parts:
        return
    prefixes = [why for prefix, why in FOREIGN if any(prefix in one for one in unknown)]
    if prefixes:
        hint = prefixes[0]
    elif missing and not unknown and not other:
        hint = "a download cut short, or files left out? download or copy the model again"
    else:
        hint = "its config.json and its weights do not belong together; take both from one place"
    raise UnsupportedModelError(f"the weights of {name} are not those of {kind}: {', '.join(parts)}", hint)


def load_tokenizer(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False, offline: bool = False
) -> tuple[PreTrainedTokenizerBase, int]:
    """A model's tokenizer, and how many token ids the model knows; weights are not downloaded, but a GGUF file.

    Raises UsageError, ResourceError.
    """
    from transformers import AutoConfig, AutoTokenizer

    place, _ = _model_place(name, revision, offline, weights=False, code=trust_remote_code)
    try:
        options = {**pretrained(place), "trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(**options).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(**options)
    except Exception as error:
        raise _no_tokenizer(name, error) from error
    return tokenizer, int(config.vocab_size)


def load_config(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False, offline: bool = False
) -> tuple[PreTrainedConfig, Path]:
    """A model's configuration, and the folder or GGUF file it is in; weights are not downloaded, but a GGUF file.

    Raises UsageError, ResourceError or UnsupportedModelError.
    """
    from transformers import AutoConfig

    place, _ = _model_place(name, revision, offline, weights=False, code=trust_remote_code)
    try:
        return AutoConfig.from_pretrained(**pretrained(place), trust_remote_code=trust_remote_code), place
    except Exception as error:
        raise _not_loaded(name, "cpu", error) from error


def empty_model(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False, offline: bool = False
) -> PreTrainedModel:
    """A model as its configuration makes it, without weights: on the device `meta`.  They are not downloaded either.

    Raises what `load_config` raises, and UnsupportedModelError.
    """
    import torch

    config, _ = load_config(name, revision, trust_remote_code=trust_remote_code, offline=offline)
    stored_method(name, config)
    try:
        with torch.device("meta"):
            return model_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _not_loaded(name, "cpu", error) from error


def resolved_device(device: str) -> str:
    """The device by name: `auto` is a GPU where there is one.  Imports torch."""
    return default_device() if device == "auto" else device


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raises UsageError for a device that does not exist by name, ResourceError for one this machine lacks."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}", "use cpu, cuda, cuda:N or auto") from error
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"retrofit does not run on {kind} devices", "use --device cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ResourceError("no CUDA GPU is available here", "use --device cpu")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ResourceError(f"no device {device} here, only {torch.cuda.device_count()} GPU(s)", "use cuda:0")


def live_fingerprint(model: PreTrainedModel) -> dict[str, str | None]:
    """Fingerprint of a model that came from no known files: its config only."""
    return {"config": config_hash(model.config.to_dict()), "headers": None, "norms": None}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
