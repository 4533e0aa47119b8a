"""Find and load base models: the embedded one, a local folder, or a Hugging Face Hub id.

Every failure is one clear error with the fix in it.  Not here: adapters, artifacts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit.errors import ResourceError, UnsupportedModelError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "tiny"
"""Name of the base model shipped inside the package."""


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
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = (
        ["*.json", "*.model", "*.txt", "*.jinja"] + (["*.safetensors"] if weights else []) + (["*.py"] if code else [])
    )
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=offline))
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
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    check_device(device)
    folder = _model_folder(name, revision, offline, code=trust_remote_code)
    if not any(folder.glob("*.safetensors")):
        raise UsageError(f"{name} holds no safetensors weights", "retrofit reads safetensors only")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model = None
        if with_model:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                trust_remote_code=trust_remote_code,
            ).to(device)
            model.eval()
    except torch.cuda.OutOfMemoryError as error:
        raise ResourceError(
            f"{name} does not fit into the memory of {device}", "use --dtype bfloat16 or a larger GPU"
        ) from error
    except Exception as error:
        raise UnsupportedModelError(f"{name} cannot be loaded: {_first_line(error)}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        if need_tokenizer:
            raise UsageError(
                f"{name} has no tokenizer that loads: {_first_line(error)}",
                "add its tokenizer files to the folder",
            ) from error
        tokenizer = None
    return Base(model, tokenizer, name, revision, folder, file_fingerprint(folder, config.to_dict()))


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
        raise UsageError(
            f"{name} has no tokenizer that loads: {_first_line(error)}", "add its tokenizer files to the folder"
        ) from error
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
        raise UnsupportedModelError(f"{name} cannot be loaded: {_first_line(error)}") from error


def weight_files(folder: Path) -> list[Path]:
    """A model's safetensors files; none where some of them are not here."""
    index = folder / "model.safetensors.index.json"
    found = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return found if names <= {path.name for path in found} else []
    return found


def stored_dtype(files: list[Path]) -> str | None:
    """The type most of the weights are stored in, as torch names it; None where there are none."""
    from safetensors import safe_open

    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
    sizes: Counter[str] = Counter()
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                sizes[part.get_dtype()] += prod(part.get_shape())
    return names.get(sizes.most_common(1)[0][0]) if sizes else None


def check_device(device: str) -> None:
    """Raises UsageError for a device that does not exist by name, ResourceError for one this machine lacks."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}", "use cpu, cuda or cuda:N") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ResourceError("no CUDA GPU is available here", "use --device cpu")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ResourceError(f"no device {device} here, only {torch.cuda.device_count()} GPU(s)", "use cuda:0")


def file_fingerprint(folder: Path, config: dict[str, Any]) -> dict[str, str | None]:
    """What tells one base from another at load, cheaply: hashes of config, safetensors headers and 1-D tensors.

    Fine-tunes of one architecture share config and headers, but not their norm weights.
    """
    from safetensors import safe_open

    headers, norms = [], hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                part = tensors.get_slice(name)
                headers.append((name, str(part.get_dtype()), tuple(part.get_shape())))
                if len(part.get_shape()) == 1:
                    norms.update(name.encode() + tensors.get_tensor(name).float().numpy().tobytes())
    return {
        "config": config_hash(config),
        "headers": hashlib.sha256(json.dumps(sorted(headers)).encode()).hexdigest(),
        "norms": norms.hexdigest(),
    }


def live_fingerprint(model: PreTrainedModel) -> dict[str, str | None]:
    """Fingerprint of a model that came from no known files: its config only."""
    return {"config": config_hash(model.config.to_dict()), "headers": None, "norms": None}


def config_hash(config: dict[str, Any]) -> str:
    """Shape-giving keys only: what every loader and version writes differently is left out."""
    keys = (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "tie_word_embeddings", "max_position_embeddings",
    )  # fmt: skip
    text = config.get("text_config") or config
    return hashlib.sha256(json.dumps({k: text.get(k) for k in keys}, sort_keys=True).encode()).hexdigest()


def same_base(a: dict[str, str | None], b: dict[str, str | None]) -> str | None:
    """The first field in which two fingerprints differ, None when they agree wherever both know."""
    return next((k for k in ("config", "headers", "norms") if a.get(k) and b.get(k) and a[k] != b[k]), None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
