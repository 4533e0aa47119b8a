"""A model of the container of Nemotron-Labs-Diffusion, to read back what is exported for it.

`encoder`, which is transformers' own Ministral-3 decoder, and `diffusion_head`; one forward of base rows, causal, and
one of a block that sees all of itself, over the K/V of what is before it.  It knows the folder alone: config.json, the
tensors by the names the container has, and the LoRA as PEFT loads it from its folder.
Not here: their code; what a folder holds (`nemotron.py`).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache, Ministral3Config, Ministral3Model, PreTrainedModel

from retrofit.artifact.folder import Artifact
from retrofit.errors import GateError
from retrofit.exporting.peft_folder import CLOSE, PROBE
from retrofit.hub import Base
from retrofit.runtime.loading import attach_artifact


class Container(nn.Module):
    """What the folder holds, in a type and on a device."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.mask, self.block = int(told["mask_token_id"]), int(told["block_size"])
        names = ("architectures", "auto_map", "model_type", "dtype", "torch_dtype", "attn_implementation")
        config = Ministral3Config(**{key: value for key, value in told.items() if key not in names})
        self.encoder = Ministral3Model(config)
        self.diffusion_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        tensors = load_file(folder / "model.safetensors")
        self.stored = tensors["encoder.embed_tokens.weight"].dtype
        missing, unknown = self.load_state_dict(tensors, strict=False, assign=True)
        if missing or unknown:
            raise GateError(f"{folder.name}: the container lacks or has no place for {[*missing, *unknown][0]}")
        self.to(device, dtype).eval()

    def rows(self, ids: Tensor, cache: DynamicCache, whole: bool = False) -> Tensor:
        """Logits [N, V] of rows behind what is cached.  whole: each sees all of them, not only those to its left."""
        N, start = len(ids), cache.get_seq_length()
        weight = self.diffusion_head.weight
        mask = torch.zeros(N, start + N, dtype=weight.dtype, device=weight.device)
        if not whole:
            mask.masked_fill_(torch.ones_like(mask, dtype=torch.bool).triu(start + 1), float("-inf"))
        out = self.encoder(ids[None], attention_mask=mask[None, None], past_key_values=cache, use_cache=True)
        logits: Tensor = self.diffusion_head(out.last_hidden_state)[0].double()
        return logits


@torch.inference_mode()
def compared(folder: Path, lora: Path, base: Base, artifact: Artifact) -> str:
    """Logits of the container's rows against the base's and of its block against our draft rows: what was found.

    Raises GateError where they differ.
    """
    model = base.model
    held = Container(folder, model.dtype, model.device)
    ids = torch.arange(PROBE, device=model.device) * 97 % model.get_input_embeddings().weight.shape[0]
    ids = ids[ids != held.mask]
    causal = held.rows(ids, DynamicCache())
    plain = model(input_ids=ids[None], use_cache=False).logits[0].double()
    apart = {"rows": _apart(causal, plain)}
    cache, adapted = DynamicCache(), PeftModel.from_pretrained(held, str(lora))
    with adapted.disable_adapter():
        held.rows(ids[:-1], cache)
    masks = ids.new_full((held.block - 1,), held.mask)
    block = held.rows(torch.cat([ids[-1:], masks]), cache, whole=True)
    apart["drafts"] = _apart(block, _draft_rows(model, artifact, ids, held.stored))
    for what, share in apart.items():
        if not share <= CLOSE[model.dtype]:
            raise GateError(
                f"{folder.name}: {what} of the container are {share:.1e} of the largest logit away from ours"
            )
    return (
        f"a model of that container reads it: logits of base rows within {apart['rows']:.0e} of the largest, "
        f"those of drafts within {apart['drafts']:.0e}"
    )


def _draft_rows(model: PreTrainedModel, artifact: Artifact, ids: Tensor, stored: torch.dtype) -> Tensor:
    """Logits of a block of ours behind a text, whose last token is its first row.

    stored: the type that the mask vector is rounded to where it is the embedding of a token.
    """
    attached = attach_artifact(model, artifact)
    try:
        embeds = model.get_input_embeddings()(ids)
        first, count = len(ids) - 1, attached.layout.block - 1
        vector = attached.heads.mask_vector.to(stored).to(embeds)
        embeds = torch.cat([embeds, vector.expand(count, -1)])
        seen = torch.ones(len(embeds), len(embeds), dtype=torch.bool, device=ids.device).tril()
        seen[first:] = True
        mask = torch.zeros(seen.shape, dtype=embeds.dtype, device=ids.device).masked_fill(~seen, float("-inf"))
        attached.gate.base_rows = first
        out = model(inputs_embeds=embeds[None], attention_mask=mask[None, None], use_cache=False)
        logits: Tensor = out.logits[0, first:].double()
        return logits
    finally:
        attached.gate.base_rows = None
        attached.detach()


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, in parts of the largest value."""
    return float((one - other).abs().max() / other.abs().max())
