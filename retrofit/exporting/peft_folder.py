"""An artifact's adapter as a plain PEFT folder: what is in it, and whether PEFT reads it as we do.

    adapter_config.json, adapter_model.safetensors     as PEFT writes them, scale alpha / rank
    README.md                                          what it is, for people

It is an Activated LoRA whose invocation tokens never occur: loaded as it is, it leaves the base alone bit for bit, as a
plain LoRA would not.  Not here: mask vector and heads, of which PEFT knows nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from retrofit.adapters.attach import NEVER
from retrofit.artifact.files import json_bytes
from retrofit.artifact.folder import Artifact
from retrofit.errors import GateError
from retrofit.hub import Base
from retrofit.runtime.loading import attach_artifact

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""What may stand in a command that people copy: an artifact may be a stranger's."""
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far logits may be apart, in parts of the largest: PEFT rounds in another order."""
PROBE = 32
"""Tokens of the text whose logits are compared."""

Content = bytes | Mapping[str, Tensor]
"""What a file holds: bytes, or the tensors of a safetensors file."""

README = """---
library_name: peft
{known}tags: [retrofit, lora]
---
# Draft adapter of `{model}`

A LoRA of rank {rank}, alpha {alpha:g}, made with retrofit {version} to be added to draft rows only.  To PEFT it is an
Activated LoRA whose invocation tokens never occur, so this changes nothing:

```python
model = PeftModel.from_pretrained(base, "PATH-OF-THIS-FOLDER")
```

To have it act on every row, as retrofit has it on draft rows, take the tokens away:

```python
config = PeftConfig.from_pretrained("PATH-OF-THIS-FOLDER")
config.alora_invocation_tokens = None
model = PeftModel.from_pretrained(base, "PATH-OF-THIS-FOLDER", config=config)
```

Draft rows read {rows}; mask vector and heads are not in this folder.
"""


def files(artifact: Artifact, model: str, readme: str = README) -> dict[str, Content]:
    """Name -> content of the files of the folder.  model: what the base is called; readme: a text with fields."""
    text = readme.format(**fields(artifact, model))
    plain = {**artifact.adapter_config, "alora_invocation_tokens": list(NEVER)}
    return {CONFIG: json_bytes(plain), WEIGHTS: artifact.adapter_state, "README.md": text.encode()}


def fields(artifact: Artifact, model: str) -> dict[str, Any]:
    """What the README.md of an export may say: known is what its header says of the base, place how that is loaded."""
    config, adapter, draft = artifact.config, artifact.config["adapter"], artifact.config["draft"]
    named = config["base"]
    on_hub = named.get("local") is not True and HUB_ID.fullmatch(model) is not None
    return {
        "model": model if model.isprintable() else "a base without a name",
        "known": f"base_model: {model}\nbase_model_relation: adapter\n" if on_hub else "",
        "place": model if on_hub else "PATH-OF-THE-BASE",
        "revision": f" --revision {quote(named['revision'])}" if named["revision"] else "",
        "version": config["retrofit"],
        "rank": adapter["rank"],
        "alpha": adapter["alpha"],
        "rows": "random token ids" if draft["input"] == "noise" else "a learned mask vector",
        "width": draft["block"] + 1,
    }


def compare(folder: Path, base: Base, artifact: Artifact) -> str:
    """Reload the folder with PEFT and compare logits: of base rows with the base's, of draft rows with ours.

    Returns what was found.  Raises GateError where they differ; the base is afterwards as it was.
    """
    model = base.model
    ids = torch.arange(PROBE, device=model.device)[None] * 97 % model.get_input_embeddings().weight.shape[0]
    with torch.inference_mode():
        plain = _logits(model, ids)
        ours = _draft_logits(model, artifact, ids)
        as_it_is = _with_peft(model, folder, artifact, ids, acting=False)
        acting = _with_peft(model, folder, artifact, ids, acting=True)
    if not torch.equal(as_it_is, plain):
        raise GateError(f"{folder.name}: loaded with PEFT, it changes the logits of {base.name}")
    apart = float((acting - ours).abs().max() / ours.abs().max())
    if not apart <= CLOSE[model.dtype]:
        raise GateError(f"{folder.name}: PEFT's logits are {apart:.1e} of the largest away from retrofit's draft rows")
    draft_rows = f"within {apart:.0e} of the largest" if apart else "too"
    return f"PEFT reads it: the base's logits bit for bit, those of draft rows {draft_rows}"


def _logits(model: Any, ids: Tensor) -> Tensor:
    """[T, V] in fp64."""
    return model(input_ids=ids, use_cache=False).logits[0].double()


def _draft_logits(model: PreTrainedModel, artifact: Artifact, ids: Tensor) -> Tensor:
    """As `_logits`, all rows with our adapter."""
    attached = attach_artifact(model, artifact)
    try:
        attached.gate.base_rows = 0
        return _logits(model, ids)
    finally:
        attached.gate.base_rows = None
        attached.detach()


def _with_peft(model: PreTrainedModel, folder: Path, artifact: Artifact, ids: Tensor, acting: bool) -> Tensor:
    """As `_logits`, with what PEFT loads from the folder.  acting: without the invocation tokens.

    Raises GateError where that is not the artifact's adapter.
    """
    config = PeftConfig.from_pretrained(str(folder))
    if acting:
        config.alora_invocation_tokens = None
    loaded = PeftModel.from_pretrained(model, str(folder), config=config)
    try:
        state = get_peft_model_state_dict(loaded)
        want = artifact.adapter_state
        if state.keys() != want.keys() or not all(torch.equal(state[n].cpu(), want[n].to(state[n])) for n in want):
            raise GateError(f"{folder.name}: PEFT loads other tensors than the artifact holds")
        return _logits(loaded, ids)
    finally:
        loaded.unload()
