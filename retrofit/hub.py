"""Find and load base models: the embedded one, a local folder, or a Hugging Face Hub id.

Every failure is one clear error with the fix in it.  Not here: adapters, artifacts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.errors import ResourceError, RetrofitError, UnsupportedModelError, UsageError, out_of_memory
from retrofit.progress import downloading
from retrofit.weight_files import INDEX, config_hash, file_fingerprint, indexed, weight_source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "tiny"
"""Name of the base model shipped inside the package."""
UNQUANTISED = "take the original weights, in bfloat16"
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
    """A base model.  folder: the local files it came from, None for a live model; model: None where a backend reads
    the files itself."""

    live: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    revision: str | None
    folder: Path | None
    fingerprint: dict[str, str | None]

    @property
    def model(self) -> PreTrainedModel:
        if self.live is None:
            raise RuntimeError(f"{self.name} was opened without its transformers model")
        return self.live


def embedded_folder() -> Path:
    return Path(__file__).parent / "recipes" / "tiny"


def locate(
    name: str, revision: str | None = None, offline: bool = False, *, weights: bool = True, code: bool = False
) -> Path:
    """The local folder of a model: the embedded one, an existing folder, or a Hub id's snapshot, downloaded if need be.

    Raises UsageError for a name that is neither, ResourceError for missing network or credentials.
    """
    if name == EMBEDDED:
        return embedded_folder()
    if Path(name).is_dir():
        return Path(name)
    if Path(name).exists():
        raise UsageError(f"{name} is a file; a model is a folder or a Hub id")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise UsageError(f"no folder {name}", "give an existing folder or a Hub id such as Qwen/Qwen3-0.6B")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.model", "*.txt", "*.jinja"] + (["*.py"] if code else [])
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True")

    def fetch(wanted: list[str], other: list[str] | None = None) -> Path:
        with downloading(f"downloading {name}") as bar:
            return Path(
                snapshot_download(
                    name,
                    revision=revision,
                    local_files_only=offline,
                    tqdm_class=bar,
                    allow_patterns=wanted,
                    ignore_patterns=other,
                )
            )

    with _hub_errors(name, revision):
        folder = fetch(patterns)
        if not weights:
            return folder
        # Of weights that lie there twice, as for other programs, only the ones that are loaded.
        index = folder / INDEX
        more = indexed(index) if index.is_file() else ["*.safetensors"]
        return fetch([*patterns, *more], ["consolidated*", "original/*", "*/*.safetensors"])


@contextmanager
def _hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turns what the Hub's library raises into one clear error."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise ResourceError(
            f"{name} is gated on the Hub",
            f"accept its licence at https://huggingface.co/{name}, then `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise UsageError(f"{name} has no revision {revision!r} on the Hub", "check base.revision") from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"no model {name!r}: not a local folder, and not a Hub id you can see",
            "check the spelling; for a private model `hf auth login` first",
        ) from error
    except HFValidationError as error:
        raise UsageError(f"{name!r} is neither a local folder nor a valid Hub id") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ResourceError(
            f"{name}: not in the local cache and the Hub cannot be reached",
            "give a local folder, or go online once to download it",
        ) from error


def _model_folder(name: str, revision: str | None, offline: bool, *, weights: bool = True, code: bool) -> Path:
    """`locate` of what holds a model's configuration.  Raises what that raises, and UsageError."""
    folder = locate(name, revision, offline, weights=weights, code=code)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{name} holds no config.json, so it is no transformers model")
    return folder


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
) -> Base:
    """Load model and tokenizer.  Raises UsageError, ResourceError or UnsupportedModelError; never half-loads.

    with_model False: files, configuration and tokenizer only, for a backend that reads the weights itself.
    """
    from transformers import AutoConfig, AutoTokenizer

    check_device(device)
    folder = _model_folder(name, revision, offline, code=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _not_loaded(name, device, error) from error
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(f"{name} is quantised, which retrofit does not support yet", UNQUANTISED)
    fingerprint = file_fingerprint(folder, config.to_dict())
    model = _load_model(name, folder, config, dtype, device, trust_remote_code) if with_model else None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        if need_tokenizer or out_of_memory(error) is not None:
            raise _no_tokenizer(name, error) from error
        tokenizer = None
    return Base(model, tokenizer, name, revision, folder, fingerprint)


def _load_model(
    name: str, folder: Path, config: PreTrainedConfig, dtype: str, device: str, trust_remote_code: bool
) -> PreTrainedModel:
    """The model with exactly the tensors of `weight_files`, each in its place."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    declared = getattr(config, "transformers_weights", None)
    config.transformers_weights = weight_source(folder)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
        refuse_unloaded(name, type(model).__name__, loaded)
        model.config.transformers_weights = declared
        if declared is None:
            del model.config.transformers_weights
        return model.to(device).eval()
    except RetrofitError:
        raise
    except Exception as error:
        raise _not_loaded(name, device, error) from error
    finally:
        if bars:
            logging.enable_progress_bar()


def _not_loaded(name: str, device: str, error: Exception) -> RetrofitError:
    memory = out_of_memory(error, f"{name} does not fit into the memory of {device}")
    return memory or UnsupportedModelError(f"{name} cannot be loaded: {_first_line(error)}")


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
    """A model's tokenizer, and how many token ids the model knows; its weights are not downloaded.

    Raises UsageError, ResourceError.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = _model_folder(name, revision, offline, weights=False, code=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise _no_tokenizer(name, error) from error
    return tokenizer, int(config.vocab_size)


def load_config(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False, offline: bool = False
) -> tuple[PreTrainedConfig, Path]:
    """A model's configuration, and the folder of its files; weights are not downloaded.

    Raises UsageError, ResourceError or UnsupportedModelError.
    """
    from transformers import AutoConfig

    folder = _model_folder(name, revision, offline, weights=False, code=trust_remote_code)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code), folder
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
