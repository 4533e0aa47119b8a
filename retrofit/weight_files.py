"""Which files of a model's folder hold its weights, and what can be told from them without loading the model.

    what config.json names as `transformers_weights`, as transformers does
    else model.safetensors.index.json   its shards, and no other file; one left over from earlier, whose shards are
                                        gone while model.safetensors is there, does not count
    else model.safetensors              alone
    else                                the only *.safetensors there is; several without an index are refused

Whatever else lies beside them (a `consolidated.safetensors`, an adapter) is none of the model's.
Not here: finding or loading a model (`hub.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from retrofit.errors import UnsupportedModelError, UsageError, out_of_memory

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COMPUTED = r"rotary_emb\.inv_freq$"
"""Tensors that old checkpoints hold and transformers computes anew, whatever the model."""
SCALES = r"\.(SCB|weight_format|weight_\w+|_weight_\w+|input_scale|weight\.\w+(\.\w+)?)$"
"""Names of what quantised weights have beside them, as bitsandbytes, torchao and compressed-tensors give them."""
AGAIN = "download or copy the model again"


def weight_source(folder: Path) -> str:
    """The name of the file that names or holds all weights: an index, or the only file.

    Raises UsageError where there are no safetensors, UnsupportedModelError where nothing says which are the weights.
    """
    for name in (_declared(folder), INDEX, SINGLE):
        if name is not None and (folder / name).is_file() and not (name == INDEX and _left_over(folder)):
            return name
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if not found:
        raise UsageError(f"{folder} holds no safetensors weights", "retrofit reads safetensors only")
    if len(found) > 1:
        raise UnsupportedModelError(
            f"{folder} holds {len(found)} safetensors files, and no {INDEX} that says which are its weights",
            f"copy its {INDEX}, or leave {SINGLE} alone there",
        )
    return found[0]


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights, sorted.  Raises what `weight_source` raises, also for a shard that is missing."""
    files = [folder / name for name in _names(folder)]
    for path in files:
        if not path.is_file():
            raise UnsupportedModelError(
                f"{path}: missing, though {weight_source(folder)} names it", f"a download cut short? {AGAIN}"
            )
    return files


def weights_here(folder: Path) -> list[Path]:
    """`weight_files`, or none where some of them are not here; of a GGUF file itself."""
    if folder.is_file():
        return [folder]
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.safetensors.index.json")):
        return []
    files = [folder / name for name in _names(folder)]
    return files if all(path.is_file() for path in files) else []


def _declared(folder: Path) -> str | None:
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return None  # whoever loads the configuration says what is wrong with it
    ends = (".safetensors", ".safetensors.index.json")
    return name if isinstance(name, str) and Path(name).name == name and name.endswith(ends) else None


def _left_over(folder: Path) -> bool:
    """Whether the index is of earlier weights: `save_pretrained` removes old shards, but leaves their index there."""
    if not (folder / SINGLE).is_file():
        return False
    return not any((folder / name).is_file() for name in indexed(folder / INDEX))


def _names(folder: Path) -> list[str]:
    source = weight_source(folder)
    return indexed(folder / source) if source.endswith(".index.json") else [source]


def indexed(index: Path) -> list[str]:
    """The shards that an index names, sorted.  Raises UnsupportedModelError."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        good = bool(names) and all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise UnsupportedModelError(f"{index}: does not say which file holds which tensor", AGAIN)
    return sorted(names)


def opened(path: Path, device: str = "cpu") -> Any:
    """A safetensors file, open for reading.

    Raises UnsupportedModelError for one that is cut short or damaged, ResourceError where memory does not do.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device=device)
    except (SafetensorError, OSError) as error:
        message = f"{path}: no intact safetensors file: {error}"
        broken = UnsupportedModelError(message, f"a download cut short? {AGAIN}")
        raise out_of_memory(error, f"{path}: no memory to read it") or broken from error


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a model, from the headers.  Raises what `weight_files` raises."""
    found = {}
    for path in weight_files(folder):
        with opened(path) as tensors:
            found.update({name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()})  # noqa: SIM118
    return found


def stored_dtype(files: Sequence[Path]) -> str | None:
    """The type most of the weights are stored in, as torch names it; None where there are none."""
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
    sizes: Counter[str] = Counter()
    for path in files:
        with opened(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                sizes[part.get_dtype()] += prod(part.get_shape())
    return names.get(sizes.most_common(1)[0][0]) if sizes else None


def file_fingerprint(
    folder: Path, config: dict[str, Any], files: Sequence[Path] | None = None
) -> dict[str, str | None]:
    """What tells one base from another at load, cheaply: hashes of config, safetensors headers and 1-D tensors.

    Fine-tunes of one architecture share config and headers, but not their norm weights.  files: other than
    `weight_files`.  Raises what that raises.  What quantised weights have beside them does not count among 1-D tensors,
    so that two precisions of one model have the same there.
    """
    headers, norms = [], hashlib.sha256()
    for path in sorted(weight_files(folder) if files is None else files):
        with opened(path) as tensors:
            for name in sorted(tensors.keys()):
                part = tensors.get_slice(name)
                headers.append((name, str(part.get_dtype()), tuple(part.get_shape())))
                if len(part.get_shape()) == 1 and not re.search(SCALES, name):
                    norms.update(name.encode() + tensors.get_tensor(name).float().numpy().tobytes())
    return {
        "config": config_hash(config),
        "headers": hashlib.sha256(json.dumps(sorted(headers)).encode()).hexdigest(),
        "norms": norms.hexdigest(),
    }


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


def dtype_name(dtype: Any) -> str:
    """`bfloat16` of `torch.bfloat16`, as configurations and options call it."""
    return str(dtype).removeprefix("torch.")
