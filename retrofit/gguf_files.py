"""GGUF files: what one holds, and its tensors as transformers dequantises them.

transformers loads such a file as a plain model, whose weights nothing tells from those of a folder; configuration and
tokenizer are in the file, and what lies beside it is none of the model's.
Not here: finding one (`locating.py`), loading the model (`hub.py`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, NamedTuple

from retrofit.errors import ResourceError, UnsupportedModelError
from retrofit.weight_files import AGAIN, config_hash

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

SUFFIX = ".gguf"
TAKE_SAFETENSORS = "take the model's safetensors instead"
NEUTRAL = "rope_freqs.weight"
"""Factors of the rotation's frequencies, which transformers does not read: without effect where all are 1."""
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""Types of values in the header by their numbers, as the GGUF specification has them."""
TEXT, ARRAY = 8, 9
_PATCHING = RLock()


class Stored(NamedTuple):
    """A tensor in the file."""

    name: str
    shape: tuple[int, ...]
    """As torch has it."""
    kind: str
    """Such as Q4_1 or F32."""
    data: slice
    """Its bytes in the file."""


class Header(NamedTuple):
    """What a file says of itself.  metadata: single values; lists are left out."""

    metadata: dict[str, Any]
    tensors: tuple[Stored, ...]


def is_gguf(place: Path) -> bool:
    return place.suffix.lower() == SUFFIX


def pretrained(place: Path) -> dict[str, Any]:
    """How `from_pretrained` is told of a model's place: a folder, or a GGUF file."""
    if not is_gguf(place):
        return {"pretrained_model_name_or_path": place}
    # The whole path: of a mere name transformers would take a file in the working folder first.
    return {"pretrained_model_name_or_path": place.parent, "gguf_file": str(place.absolute())}


def check_readable(place: Path) -> Header:
    """The header of a file that transformers can be given.

    Raises ResourceError where the package that reads GGUF is missing, UnsupportedModelError for a file that is cut
    short, damaged, or one of several parts.
    """
    if find_spec("gguf") is None:
        raise ResourceError(
            f"{place} is a GGUF file, and the package gguf is not installed", "`pip install gguf`, or the extra [gguf]"
        )
    header = read_header(place)
    parts = header.metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise UnsupportedModelError(
            f"{place} is one of {parts} parts of a model", "join them with `llama-gguf-split --merge`"
        )
    return header


def read_header(place: Path) -> Header:
    """The header of a GGUF file.  Raises UnsupportedModelError for one that is cut short or damaged."""
    try:
        with place.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as blob:
            header = _Reader(blob).header()
            missing = max((one.data.stop for one in header.tensors), default=0) - len(blob)
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError, struct.error) as error:
        raise _broken(place, str(error)) from error
    if missing > 0:
        raise _broken(place, f"{missing:,} bytes are missing at its end")
    return header


def _broken(place: Path, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{place}: no intact GGUF file: {why}", f"a download cut short? {AGAIN}")


class _Reader:
    """Values of a file, one after the other."""

    def __init__(self, blob: mmap) -> None:
        self.blob, self.at = blob, 0

    def take(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.blob, self.at)
        self.at += struct.calcsize(form)
        return value

    def skip(self, size: int) -> None:
        self.at += size
        if self.at > len(self.blob):
            raise ValueError("its header ends early")

    def text(self) -> str:
        size = self.take("<Q")
        self.skip(size)
        return self.blob[self.at - size : self.at].decode()

    def value(self, kind: int) -> Any:
        """A value, or None for a list, which is passed over: only the tokenizer has long ones."""
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.take(SCALARS[kind])
        inner, count = self.take("<I"), self.take("<Q")
        if inner in SCALARS:
            self.skip(struct.calcsize(SCALARS[inner]) * count)
        else:
            for _ in range(count):
                if inner == TEXT:
                    self.skip(self.take("<Q"))
                else:
                    self.value(inner)
        return None

    def header(self) -> Header:
        if self.blob[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        version, tensors, values = self.take("<I"), self.take("<Q"), self.take("<Q")
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format")
        metadata = {self.text(): self.value(self.take("<I")) for _ in range(values)}
        entries = [self._entry() for _ in range(tensors)]
        step = metadata.get("general.alignment", 32)
        start = -(-self.at // step) * step
        return Header(metadata, tuple(_stored(start, *entry) for entry in entries))

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.text(), self.take("<I")
        shape = tuple(self.take("<Q") for _ in range(dimensions))[::-1]  # the fastest comes first in the file
        return name, shape, self.take("<I"), self.take("<Q")


def _stored(start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Stored:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    known = GGMLQuantizationType(kind)
    numbers, size = GGML_QUANT_SIZES[known]
    begin = start + offset
    return Stored(name, shape, known.name, slice(begin, begin + prod(shape) // numbers * size))


def stored_kind(header: Header) -> str:
    """The type that most of the weights are stored in, such as Q4_1."""
    sizes: Counter[str] = Counter()
    for one in header.tensors:
        sizes[one.kind] += prod(one.shape)
    return sizes.most_common(1)[0][0]


def gguf_fingerprint(place: Path, header: Header, config: dict[str, Any]) -> dict[str, str | None]:
    """As `weight_files.file_fingerprint`: hashes of the configuration, of the header's tensors, of 1-D tensors."""
    norms = hashlib.sha256()
    with place.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as blob:
        for one in sorted(header.tensors):
            if len(one.shape) == 1:
                norms.update(one.name.encode() + blob[one.data])
    named = sorted((one.name, one.kind, one.shape) for one in header.tensors)
    return {
        "config": config_hash(config),
        "headers": hashlib.sha256(json.dumps(named).encode()).hexdigest(),
        "norms": norms.hexdigest(),
    }


def dequantised(place: Path, model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of a file in a type, by its name in the model, dequantised anew.  It takes the memory of the model.

    model: loaded from such a file; its own tensors are not looked at.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with read_once():
        read = load_gguf_checkpoint(str(place), return_tensors=True, model_to_load=_bare(model), torch_dtype=dtype)
    tensors: dict[str, Tensor] = read["tensors"]
    return tensors


def refuse_unread(name: str, place: Path, header: Header, model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError where a file says or holds what transformers leaves out: another model would run."""
    problem = _unread(place, header, model)
    if problem is not None:
        raise UnsupportedModelError(f"{name}: {problem}, so it would load another model", TAKE_SAFETENSORS)


def _unread(place: Path, header: Header, model: PreTrainedModel) -> str | None:
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    architecture = header.metadata["general.architecture"]
    scaling = header.metadata.get(f"{architecture}.rope.scaling.type", "none")
    config = model.config.get_text_config()
    if scaling != "none" and scaling not in _rope_types(config):
        return f"the file scales its rotation ({scaling}), which transformers does not read"
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    known = get_gguf_hf_weights_map(_bare(model), processor(config=config.to_dict()))
    # Experts of a layer are one tensor in the file, and stand in the map without their suffix.
    over = [one for one in header.tensors if not {one.name, one.name.removesuffix(".weight")} & known.keys()]
    over = [one for one in over if not (one.name == NEUTRAL and _all_ones(place, one))]
    if not over:
        return None
    names = over[0].name + (", ..." if len(over) > 1 else "")
    return f"transformers has no place in {type(model).__name__} for {len(over)} of the file's tensors ({names})"


def _rope_types(config: PreTrainedConfig) -> set[str]:
    """Types of rotation of a configuration, which may have one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    return {part.get("rope_type", "default") for part in parts}


def _all_ones(place: Path, one: Stored) -> bool:
    with place.open("rb") as file:
        file.seek(one.data.start)
        return one.kind == "F32" and file.read(one.data.stop - one.data.start) == struct.pack("<f", 1) * prod(one.shape)


def _bare(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and configuration, without an adapter and without values."""
    import torch

    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


@contextmanager
def read_once() -> Iterator[None]:
    """Inside, transformers parses the header of a GGUF file once, and shows no progress bar of its own.

    It would parse it anew for the configuration, the weights and the tokenizer, and draw up the table of names once for
    every module of the model: more than half of the time that loading takes.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    with _PATCHING:
        bar, reader, names = reading.tqdm, gguf.GGUFReader, gguf.get_tensor_name_map
        reading.tqdm = partial(bar, disable=True)
        gguf.GGUFReader, gguf.get_tensor_name_map = cache(reader), cache(names)
        try:
            yield
        finally:
            reading.tqdm, gguf.GGUFReader, gguf.get_tensor_name_map = bar, reader, names
