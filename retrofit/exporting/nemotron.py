"""An artifact with its base as a checkpoint of Nemotron-Labs-Diffusion (arXiv 2607.05722), for what reads those.

    config.json                 its class, its fields, and the base's shapes and RoPE
    model.safetensors           the base's tensors as they are stored: `model.` is `encoder.`, and `lm_head.`, which is
                                never tied there, `diffusion_head.`
    linear_spec_lora/           the adapter, a plain LoRA that acts when its program turns it on
    tokenizer and settings      copied
    README.md                   what it is, and how it is read

The container has no mask vector: draft rows read the embedding of a token.  So one that no text has gets the vector
for its embedding; the output matrix, a tensor of its own, stays as it is.  It has no heads, and one layout of drafts.
What of this is public was read: vLLM, mlx-lm, Megatron Bridge.  Not here: their code, which a released checkpoint has,
and a model of the container to try this out with (`nemotron_model.py`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from retrofit.artifact.engines import unfit
from retrofit.artifact.files import json_bytes
from retrofit.artifact.folder import Artifact
from retrofit.errors import UnsupportedModelError, UsageError
from retrofit.exporting import peft_folder
from retrofit.exporting.nemotron_model import compared
from retrofit.exporting.peft_folder import Content
from retrofit.gguf_files import is_gguf
from retrofit.hub import Base
from retrofit.weight_files import COMPUTED, opened, stored_dtype, weight_files

ADAPTER = "linear_spec_lora"
BASES = ("LlamaForCausalLM", "MistralForCausalLM", "Ministral3ForCausalLM")
"""Whose layers are the container's; of these some have settings that it cannot say."""
SHAPES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "initializer_range"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Fields that it has by the names they have in transformers."""
FIXED: dict[str, Any] = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None, "attention_dropout": 0.0,
}  # fmt: skip
"""Fields that are the same in every checkpoint of it; a base without one has it so."""
ROPES = ("default", "linear", "yarn", "llama3")
"""Rotations that do not go by how long the text is."""
OWN = {
    "architectures": ["NemotronLabsDiffusionModel"],
    "model_type": "nemotron_labs_diffusion",
    "auto_map": {
        "AutoConfig": "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig",
        "AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel",
    },
    "attn_implementation": "sdpa",
    "dlm_paradigm": "bidirectional",
    "ar_loss_weight": 1.0,
    "dlm_loss_weight": None,
    "dp_varying_mask_ratio": False,
    "tie_word_embeddings": False,
}
ACTING = {"alora_invocation_tokens": None, "task_type": None}
"""In its configuration: that it acts when it is turned on, and that its model is none with transformers' `generate`."""
COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)
LAYER = re.compile(
    r"model\.(layers\.\d+\.((input|post_attention)_layernorm|self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)|norm)\.weight"
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

README = """---
library_name: transformers
{known}tags: [retrofit, diffusion, speculative-decoding]
---
# `{model}` as a checkpoint of Nemotron-Labs-Diffusion

Made with retrofit {version}: the weights of `{model}`, the drafts of a retrofit adapter in `{adapter}/` (rank {rank},
alpha {alpha:g}, blocks of {block}), in the container that Nemotron-Labs-Diffusion is published in.

Its Python code is not in here.  Copy `configuration_nemotron_labs_diffusion.py`,
`modeling_nemotron_labs_diffusion.py` and `modeling_ministral.py` from a published checkpoint into this folder, after
reading them; then

```python
model = AutoModel.from_pretrained("PATH-OF-THIS-FOLDER", trust_remote_code=True)
model = PeftModel.from_pretrained(model, "PATH-OF-THIS-FOLDER", subfolder="{adapter}").model
ids, forwards = model.linear_spec_generate(prompt_ids, max_new_tokens=128, block_length={block})
```

vLLM and mlx-lm read it with code of their own.

- Token {mask} is the mask: its embedding is the vector that draft rows were trained with, so no prompt may hold it.
- `linear_spec_generate` gives the output of `ar_generate`, but for near-ties of rounding.  `generate`, which fills
  masks, runs without the adapter there: of use only where the base's own weights were trained for it.
- mlx-lm takes a LoRA on q, k, v and o alone.  A fork of SGLang takes token 100 for the mask, whatever stands here.

None of these programs has been run on it: it was read back by a model of that container, and compared.
"""


def refuse_unfit(artifact: Artifact) -> None:
    """Raise UsageError, with all that is to be changed, for an artifact whose drafts the container cannot say."""
    differing = unfit(artifact.config, "nemotron")
    if differing:
        wrong = "; ".join(f"{key} is {found}, not {want}" for key, (found, want) in differing.items())
        change = " ".join(f"{key}={want}" for key, (_, want) in differing.items())
        raise UsageError(
            f"{artifact.folder} cannot be exported as nemotron: {wrong}",
            f"train one: `retrofit convert MODEL --recipe nemotron -o OUT`, or your recipe with {change}",
        )


def files(artifact: Artifact, base: Base, model: str, mask_token: int | str | None) -> dict[str, Content]:
    """Name -> content of the files of the folder.

    model: what the base is called; mask_token: id or text of the token that becomes the mask, None for one that the
    tokenizer does not have.  Raises UsageError, and UnsupportedModelError for a base that the container cannot say.
    """
    folder = base.place
    assert folder is not None
    _refuse_base(artifact, base, folder)
    mask = _mask(base, mask_token)
    weights = _rekeyed(artifact, folder)
    vector = artifact.heads["mask_vector"]
    embedding = weights["encoder.embed_tokens.weight"]
    weights["encoder.embed_tokens.weight"] = embedding.index_copy(
        0, embedding.new_tensor([mask]).long(), vector[None].to(embedding.dtype)
    )
    block = artifact.config["draft"]["block"]
    told = {**peft_folder.fields(artifact, model), "adapter": ADAPTER, "mask": mask, "block": block}
    told["known"] = told["known"].replace("relation: adapter", "relation: finetune")
    copied = {name: (folder / name).read_bytes() for name in COPIED if (folder / name).is_file()}
    return {
        "config.json": json_bytes(_config(base, folder) | {"block_size": block, "mask_token_id": mask}),
        "model.safetensors": weights,
        f"{ADAPTER}/{peft_folder.CONFIG}": json_bytes(artifact.adapter_config | ACTING),
        f"{ADAPTER}/{peft_folder.WEIGHTS}": {
            name.replace("base_model.model.model.", "base_model.model.encoder."): tensor
            for name, tensor in artifact.adapter_state.items()
        },
        **copied,
        "README.md": README.format(**told).encode(),
    }


def compare(folder: Path, base: Base, artifact: Artifact) -> str:
    """Read the folder by a model of the container; returns what was found.  Raises GateError where it differs."""
    return compared(folder, folder / ADAPTER, base, artifact)


def _refuse_base(artifact: Artifact, base: Base, folder: Path) -> None:
    """Raise UnsupportedModelError, with all that stands in the way."""
    text, wrong = base.model.config.get_text_config(), []
    kind = type(base.model).__name__
    if kind not in BASES:
        wrong.append(f"it is a {kind}, and the container holds {', '.join(BASES)}")
    wrong += [f"{key} is {getattr(text, key)}" for key, want in FIXED.items() if getattr(text, key, want) != want]
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ROPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        wrong.append(f"its RoPE is {rope.get('rope_type', 'another one in each layer')}")
    if is_gguf(folder) or base.precision is not None:
        wrong.append("its weights are a GGUF file, or quantised")
    if wrong:
        raise UnsupportedModelError(
            f"{artifact.folder} cannot be exported as nemotron: of its base {base.name}, {'; '.join(wrong)}",
            "export it as transformers, or decode it with retrofit",
        )


def _mask(base: Base, token: int | str | None) -> int:
    """The id that becomes the mask.  Raises UsageError where there is none that no text has."""
    size = int(base.model.config.get_text_config().vocab_size)
    hint = "name a token that no text of yours has, a reserved one say: --mask-token, mask_token= in Python"
    known = {} if base.tokenizer is None else base.tokenizer.get_vocab()
    if token is None:
        beyond = 1 + max(known.values(), default=size)
        if beyond >= size:
            raise UsageError(f"every token of {base.name} may stand in a text, and one has to become the mask", hint)
        return beyond
    if isinstance(token, str) and not token.isdecimal():
        if token not in known:
            raise UsageError(f"{token!r} is no token of {base.name}", hint)
        token = known[token]
    config = base.model.config.get_text_config()
    ends = [
        config.bos_token_id,
        *(config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]),
    ]
    if int(token) in ends:
        raise UsageError(f"mask token {token} begins or ends the texts of {base.name}", hint)
    if not 0 <= int(token) < size:
        raise UsageError(f"mask token {token} is none of the {size:,} that {base.name} has", hint)
    return int(token)


def _config(base: Base, folder: Path) -> dict[str, Any]:
    """All of config.json but what is of the drafts."""
    text = base.model.config.get_text_config()
    rope = {"llama_4_scaling_beta": 0.0, "original_max_position_embeddings": text.max_position_embeddings}
    heads = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dtype = stored_dtype(weight_files(folder))
    return {
        **OWN,
        **{key: getattr(text, key) for key in SHAPES},
        "head_dim": heads,
        **FIXED,
        "rope_parameters": rope | {key: value for key, value in text.rope_parameters.items() if value is not None},
        "dtype": dtype,
        "torch_dtype": dtype,  # what transformers before 5 calls it
    }


def _rekeyed(artifact: Artifact, folder: Path) -> dict[str, Tensor]:
    """The base's tensors by the container's names.  Raises UnsupportedModelError for one without a place in it."""
    found: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with opened(path) as tensors:
            names = [name for name in tensors.keys() if not re.search(COMPUTED, name)]  # noqa: SIM118
            found |= {name: tensors.get_tensor(name) for name in names}
    other = [name for name in found if name not in (EMBEDDING, HEAD) and not LAYER.fullmatch(name)]
    if other or EMBEDDING not in found:
        raise UnsupportedModelError(
            f"{artifact.folder} cannot be exported as nemotron: the container has no place for "
            f"{min(other, default='a base without embeddings')}",
            "save the base once more with transformers' `save_pretrained`, or export it as transformers",
        )
    head = found.pop(HEAD, found[EMBEDDING])
    return {f"encoder.{name.removeprefix('model.')}": tensor for name, tensor in found.items()} | {
        "diffusion_head.weight": head
    }
