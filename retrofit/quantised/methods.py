"""Which quantised bases run, by name: those that are loaded so, and checkpoints that come so.

    base.quantization   package        held as
    nf4                 bitsandbytes   4 bits with double quantisation: Dettmers et al. 2023, arXiv 2305.14314
    int8                bitsandbytes   a scale a row, as LLM.int8() has it: Dettmers et al. 2022, arXiv 2208.07339
    int8wo              torchao        a scale a row
    int4wo              torchao        a scale for every 32 numbers; a byte holds one, so only the numbers are 4 bits

Rows are never quantised: see `linear.py`.  Not here: doing it (`loading.py`).  This file imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from retrofit.errors import ResourceError, UnsupportedModelError, UsageError

KINDS = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int8wo": "torchao", "int4wo": "torchao"}
"""What `base.quantization` may say, and the package that it needs."""
BITS = {"nf4": 4.127, "int8": 8, "int8wo": 8, "int4wo": 9}
"""Of a weight, scales of groups included."""
AUTO, NONE = "auto", "none"
ASKED = (AUTO, NONE, *KINDS)
"""What an engine may be asked for: as the adapter was trained, as the files are, or one of KINDS."""
KEPT = {"bitsandbytes": "bitsandbytes", "torchao": "torchao"}
"""Methods of checkpoints whose weights stay as they are stored, and their packages."""
UNPACKED = {"compressed-tensors": "compressed_tensors", "fp8": None}
"""Methods of checkpoints whose weights are unpacked when they are loaded."""
KERNELS = {"gptq": "GPTQ's kernels", "awq": "AWQ's kernels"}
ORIGINAL = "take the original weights; base.quantization=nf4 (or int8, int8wo, int4wo) holds them in as few bits"


def check_kind(kind: str) -> None:
    """Raises UsageError for a name that does not exist, ResourceError where its package is missing."""
    if kind not in KINDS:
        raise UsageError(f"quantization={kind!r} does not exist", f"it is one of {', '.join(KINDS)}")
    require(KINDS[kind], f"quantization={kind}")


def require(package: str, what: str) -> None:
    """Raises ResourceError where a package is missing."""
    if find_spec(package) is None:
        extra = package.replace("_", "-")
        raise ResourceError(
            f"{what} needs the package {extra}, which is not installed", f"`pip install 'retrofit-lm[{extra}]'`"
        )


def settings_of(config: Any) -> dict[str, Any] | None:
    """What a configuration says of quantised weights.  config: a transformers configuration."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        found = getattr(config.get_text_config(), "quantization_config", None)
    return found if found is None or isinstance(found, dict) else dict(found.to_dict())


def stored_method(name: str, config: Any) -> str | None:
    """The method by which a checkpoint is quantised, None for a plain one.

    Raises UnsupportedModelError for a method that does not run, ResourceError where the package that reads it is
    missing.
    """
    settings = settings_of(config)
    if settings is None:
        return None
    method = str(settings.get("quant_method", "an unnamed method")).removesuffix("_4bit").removesuffix("_8bit")
    if method in KERNELS:
        raise UnsupportedModelError(
            f"{name} is quantised ({method}), and {KERNELS[method]} form no gradients and promise nothing of a row "
            "beside others, so retrofit does not run them",
            ORIGINAL,
        )
    if method not in KEPT and method not in UNPACKED:
        raise UnsupportedModelError(f"{name} is quantised ({method}), which retrofit does not run", ORIGINAL)
    if method == "fp8" and not settings.get("weight_block_size"):
        raise UnsupportedModelError(f"{name} is quantised (fp8) without blocks, which retrofit does not run", ORIGINAL)
    package = KEPT.get(method) or UNPACKED.get(method)
    if package is not None:
        require(package, f"{name} is quantised ({method}): it")
    return method


def precision_of(config: Any, kind: str | None) -> str | None:
    """What an artifact remembers: one of KINDS, or how the checkpoint came; None for plain weights.

    kind: what the weights were quantised to while they were loaded.
    """
    settings = settings_of(config)
    if kind is not None or settings is None:
        return kind
    method = str(settings.get("quant_method"))
    if method == "bitsandbytes":
        bits = settings.get("bnb_4bit_quant_type", "fp4") if settings.get("load_in_4bit") else "int8"
        return f"stored: {method} {bits}"
    return f"stored: {method}" + (", unpacked" if method in UNPACKED else "")


def other_precision(trained: str | None, held: str | None) -> str | None:
    """What is to be said where a base is held in another precision than its adapter was trained on, if it is.

    Both as `precision_of` has them.
    """
    if trained == held:
        return None
    told = [one or "plain weights" for one in (trained, held)]
    return f"trained on {told[0]}, running on {told[1]}: texts are this base's own, and drafts may come true less often"


def resolved(asked: str, trained: Mapping[str, Any]) -> str | None:
    """What the linear layers are to be held in.  trained: `base` of `retrofit.json`.  Raises UsageError."""
    if asked not in ASKED:
        raise UsageError(f"quantization={asked!r} does not exist", f"it is one of {', '.join(ASKED)}")
    if asked == AUTO:
        known = trained.get("quantization")
        return known if known in KINDS else None
    return None if asked == NONE else asked
