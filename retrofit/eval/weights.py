"""Is the base untouched?  Its tensors against the original checkpoint, and what the artifact holds.

Not here: whether the adapter can reach a base row when it runs (`exactness.py`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from retrofit.artifact.files import sha256
from retrofit.artifact.folder import ADAPTER, HEADS
from retrofit.gguf_files import dequantised, is_gguf
from retrofit.hub import load_base
from retrofit.quantised.methods import KINDS
from retrofit.weight_files import COMPUTED, dtype_name, opened, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from retrofit.runtime.backends.fused.backend import FusedGQA
    from retrofit.runtime.engine import Engine

AS_STORED = tuple(f"stored: bitsandbytes {kind}" for kind in ("nf4", "fp4", "int8"))
"""Precisions whose tensors have in the file the names that they have in the model."""
Shapes = Mapping[str, tuple[int, ...]]
LISTED = 8
"""So many names of a kind are written into a certificate; the count is always whole."""


def base_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The base's own tensors under the names they have without an adapter; packed weights are unpacked, others are no
    copies."""
    return {
        name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name
    }


def compare_base(model: PreTrainedModel, checkpoint: Path, precision: str | None = None) -> dict[str, Any]:
    """Every tensor of the loaded base against the checkpoint's; see `compare`.

    Tensors that transformers splits or fuses while loading (routed experts) are turned back first.  A GGUF file is
    dequantised anew, into the model's type.  precision: of `Base`; what a layer holds that was quantised or unpacked
    while it was loaded is compared with what loading the checkpoint anew makes.
    """
    if precision is not None and precision not in AS_STORED:
        fresh = load_base(
            str(checkpoint),
            dtype=dtype_name(model.dtype),
            need_tokenizer=False,
            quantization=precision if precision in KINDS else None,
        ).model
        found = compare_tensors(base_state(model), fresh.state_dict().items(), "", ())
        return found | ({"file_sha256": sha256(checkpoint)} if is_gguf(checkpoint) else {})
    if is_gguf(checkpoint):
        fresh = dequantised(checkpoint, model, model.dtype)
        return compare_tensors(base_state(model), fresh.items(), "", ()) | {"file_sha256": sha256(checkpoint)}
    loaded = base_state(model)
    if precision is None:
        loaded = revert_weight_conversion(model, loaded)
    return compare(loaded, checkpoint, f"{model.base_model_prefix}.", model._keys_to_ignore_on_load_unexpected or ())


def compare_fused(backend: FusedGQA, checkpoint: Path) -> dict[str, Any]:
    """Likewise every weight that the fused backend's products read, taken out of their stacks."""
    return compare(fused_state(backend), checkpoint, "model.", ())


def fused_state(backend: FusedGQA) -> dict[str, Tensor]:
    """The base's tensors in the fused backend under the checkpoint's names; no copies."""
    w, config, width = backend.weights, backend.config, backend.width
    q, kv = config.num_attention_heads * width, config.num_key_value_heads * width
    hidden, inner = config.hidden_size, config.intermediate_size
    state = {
        "model.embed_tokens.weight": w.embedding,
        "model.norm.weight": w.norm,
        "lm_head.weight": w.head.weight,
    }
    for number, layer in enumerate(w.layers):
        at = f"model.layers.{number}"
        parts = (
            (layer.qkv, {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}),
            (layer.o, {"self_attn.o_proj": hidden}),
            (layer.gate_up, {"mlp.gate_proj": inner, "mlp.up_proj": inner}),
            (layer.down, {"mlp.down_proj": hidden}),
        )
        for linear, sizes in parts:
            first = 0
            for name, size in sizes.items():
                state[f"{at}.{name}.weight"] = linear.weight[first : first + size]
                if linear.bias is not None:
                    state[f"{at}.{name}.bias"] = linear.bias[first : first + size]
                first += size
        norms = {
            "input_layernorm": layer.input_norm,
            "post_attention_layernorm": layer.post_norm,
            "self_attn.q_norm": layer.q_norm,
            "self_attn.k_norm": layer.k_norm,
        }
        state |= {f"{at}.{name}.weight": norm for name, norm in norms.items() if norm is not None}
    return state


def compare(
    loaded: Mapping[str, Tensor], checkpoint: Path, prefix: str, ignored_names: Iterable[str]
) -> dict[str, Any]:
    """`compare_tensors` with a folder's safetensors.  Raises UnsupportedModelError for files that are not whole."""
    return compare_tensors(loaded, _stored(checkpoint), prefix, ignored_names)


def _stored(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    for file in weight_files(checkpoint):
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                yield name, tensors.get_tensor(name)


def compare_tensors(
    loaded: Mapping[str, Tensor], originals: Iterable[tuple[str, Tensor]], prefix: str, ignored_names: Iterable[str]
) -> dict[str, Any]:
    """Tensors that run against the checkpoint's, by sha256.

    A base that runs in another type than its file is held against the file's tensor converted to that type,
    so a changed bit of either shows.  `sha256` in the answer is the hash of all tensor hashes of the
    checkpoint, in its own type: lines `name sha256`, sorted.  prefix: what names in the file may lack.
    ignored_names: patterns of names in the file that the model has no use for.
    """
    ignored = [re.compile(one) for one in (*ignored_names, COMPUTED)]
    lines, changed, unknown, found = [], [], [], set()
    for name, original in originals:
        lines.append(f"{name} {digest(original)}\n")
        own = next((n for n in (name, prefix + name) if n in loaded), None)
        if own is None:
            if not any(pattern.search(name) for pattern in ignored):
                unknown.append(name)
            continue
        found.add(own)
        if digest(loaded[own]) != digest(original.to(loaded[own].dtype)):
            changed.append(name)
    places = {loaded[name].data_ptr() for name in found}  # a tied head lies where the embedding lies
    extra = [name for name in loaded if name not in found and loaded[name].data_ptr() not in places]
    return {
        "tensors": len(lines),
        "compared": len(found),
        "sha256": hashlib.sha256("".join(sorted(lines)).encode()).hexdigest(),
        "dtype": dtype_name(next(iter(loaded.values())).dtype),
        **_named("changed", changed),
        **_named("not_loaded", unknown),
        **_named("not_in_checkpoint", extra),
    }


def digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes and shape."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(str(tuple(tensor.shape)).encode() + raw.tobytes()).hexdigest()


def artifact_shapes(folder: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """File -> tensor name -> shape, of all safetensors in an artifact folder; headers only are read."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            shapes[file.relative_to(folder).as_posix()] = {
                name: tuple(tensors.get_slice(name).get_shape())
                for name in tensors.keys()  # noqa: SIM118
            }
    return shapes


def engine_shapes(engine: Engine) -> dict[str, dict[str, tuple[int, ...]]]:
    """As `artifact_shapes`, of what would be saved of a live engine."""
    parts = {ADAPTER: engine.attached.adapter_state(), HEADS: engine.attached.heads_state()}
    return {file: {name: tuple(tensor.shape) for name, tensor in state.items()} for file, state in parts.items()}


def foreign_tensors(files: Mapping[str, Shapes], rank: int, markov_rank: int) -> list[str]:
    """`file: tensor` of everything that is neither a LoRA factor of this rank nor a tensor of the heads."""
    return [
        f"{file}: {name}"
        for file, shapes in files.items()
        for name, shape in shapes.items()
        if not (
            (file == ADAPTER and _is_lora(name, shape, rank)) or (file == HEADS and _is_head(name, shape, markov_rank))
        )
    ]


def _is_lora(name: str, shape: tuple[int, ...], rank: int) -> bool:
    factor = re.search(r"\.lora_(A|B)\.weight$", name)
    return factor is not None and len(shape) == 2 and shape[0 if factor[1] == "A" else 1] == rank


def _is_head(name: str, shape: tuple[int, ...], markov_rank: int) -> bool:
    if name in ("markov_w1", "markov_w2"):
        return len(shape) == 2 and shape[1] == markov_rank
    if name in ("mask_vector", "confidence_bias"):
        return len(shape) == 1
    return name in ("confidence_weight", "confidence_temperature") and len(shape) == 2 and shape[0] == 2


def _named(kind: str, names: list[str]) -> dict[str, Any]:
    return {kind: len(names), f"{kind}_names": names[:LISTED]} if names else {kind: 0}
