"""`model/` of an artifact: the base as it was trained along, as transformers writes it.

Any tool loads it as an ordinary causal model; nothing of the adapter or the heads is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from retrofit.artifact.own import MODEL
from retrofit.errors import GateError, UnsupportedModelError
from retrofit.progress import without_bar
from retrofit.quantised.linear import quantised_layers
from retrofit.recipes.training.joint.weights import plain_name
from retrofit.weight_files import file_fingerprint, opened, weight_files


def refuse_unwritable(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError for a model that a folder of weights and configuration does not make again, and for
    one whose weights are held in few bits: those cannot be moved."""
    if type(model).__module__.startswith("transformers_modules"):
        raise UnsupportedModelError(
            f"{type(model).__name__} comes with code of its own, which profile joint would have to copy",
            "use profile=frozen",
        )
    if quantised_layers(model):
        raise UnsupportedModelError(
            "profile joint trains the base's own weights, and this base holds them quantised",
            "use profile=frozen, or the original weights without base.quantization",
        )


def own_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a model with an adapter on it, by the names they have without."""
    return {plain_name(name): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}


def write_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Mapping[str, Any]:
    """Write a model and its tokenizer; returns what `base` of retrofit.json says of them.

    What was written is read again and compared.  Raises OSError, and GateError where a tensor is another one.
    """
    state = {name: tensor.contiguous() for name, tensor in own_state(model).items()}
    try:
        with without_bar():
            model.save_pretrained(folder, state_dict=dict(state))  # which it empties
    except SafetensorError as error:
        raise OSError(f"{folder.name}: {error}") from error
    tokenizer.save_pretrained(folder)
    _compare(folder, model, state)
    fingerprint = file_fingerprint(folder, model.config.to_dict())
    return {"model": MODEL, "revision": None, "local": False, "fingerprint": fingerprint}


def _compare(folder: Path, model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    wanted = revert_weight_conversion(model, dict(state))
    written = {}
    for file in weight_files(folder):
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                found = tensors.get_tensor(name)
                if name not in wanted or not torch.equal(found, wanted[name].detach().cpu()):
                    raise GateError(f"{MODEL}/{file.name}: {name} is not what was trained", "please report it")
                written[name] = wanted[name].data_ptr()
    tied = set(written.values())
    missing = [name for name, tensor in wanted.items() if name not in written and tensor.data_ptr() not in tied]
    if missing:
        raise GateError(f"{MODEL}: {missing[0]} was not written", "please report it")
