"""An artifact with a `custom_generate` of transformers, which decodes with it where retrofit is not installed.

custom_generate/generate.py                                        `custom_generate.py`, as it is
retrofit.json, adapter/adapter_model.safetensors, heads.safetensors   what it reads, as in the artifact
README.md                                                          how it is called, for people
"""

from __future__ import annotations

import inspect
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from retrofit.artifact import folder as artifacts
from retrofit.artifact.files import json_bytes
from retrofit.artifact.folder import Artifact
from retrofit.errors import GateError, UnsupportedModelError
from retrofit.exporting import custom_generate
from retrofit.exporting.peft_folder import Content, fields
from retrofit.exporting.states import refuse_state
from retrofit.hub import Base
from retrofit.runtime.engine import Engine

CODE = "custom_generate/generate.py"
PROBE = 16
"""Tokens of the prompt that is tried out."""
NEW = 32
"""Tokens that follow it."""
WAYS: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 0.8}}
SEED = 1

README = """---
library_name: transformers
{known}tags: [retrofit, custom_generate, speculative-decoding]
---
# {model}, decoding with drafts of its own

Made with retrofit {version}, which need not be installed: with this folder transformers decodes `{model}` by drafts.

```python
model = AutoModelForCausalLM.from_pretrained("{place}")
folder = "PATH-OF-THIS-FOLDER"
ids = model.generate(**inputs, custom_generate=folder, trust_remote_code=True, adapter=folder, max_new_tokens=64)
```

`trust_remote_code=True` runs `custom_generate/generate.py`: read it first, it is short.  The output is that of
`generate` without it, but for near-ties of rounding; with `do_sample=True` it follows the same distribution, and
`seed=` says which sample.  Prompts of a batch are decoded one after another; beams and streamers are refused.
Attention has to be `sdpa` or `eager`.  It is the plain loop of two forwards a cycle: retrofit itself is faster.
"""


def files(artifact: Artifact, model: str) -> dict[str, Content]:
    """Name -> content of the files of the folder.  model: what the base is called."""
    return {
        CODE: inspect.getsource(custom_generate).encode(),
        artifacts.CONFIG: json_bytes(artifact.config),
        artifacts.ADAPTER: artifact.adapter_state,
        artifacts.HEADS: artifact.heads,
        artifacts.CARD: README.format(**fields(artifact, model)).encode(),
    }


def compare(folder: Path, base: Base, artifact: Artifact) -> str:
    """Decode with the folder's code and files, and with ours in mode `ar`, and compare tokens, greedy and sampled.

    Returns what was found.  Raises GateError where they differ, UnsupportedModelError for a base that the code refuses,
    and what `Engine.from_model` raises.
    """
    model = base.model
    refuse_state(artifact, model, "transformers")
    vocab = int(model.get_input_embeddings().weight.shape[0])
    prompt = [n * 97 % vocab for n in range(PROBE)]
    common: dict[str, Any] = {"max_new_tokens": NEW, "ignore_eos": True, "original_settings": False, "seed": SEED}
    with Engine.from_model(model, adapter=artifact.folder) as engine:
        ours = {way: engine.generate([prompt], "ar", **common, **options)[0].tokens for way, options in WAYS.items()}
    for way, options in WAYS.items():
        if _decoded(folder, model, prompt, **options) != ours[way]:
            raise GateError(
                f"{folder.name}: with transformers alone {way} output differs from that of retrofit's mode ar",
                "near-ties part in half precision: leave --dtype at float32",
            )
    return f"transformers decodes with it: {NEW} tokens {' and '.join(WAYS)}, each as retrofit's mode ar"


def _decoded(folder: Path, model: PreTrainedModel, prompt: list[int], temperature: float) -> list[int]:
    """What the folder's code makes of a prompt, whatever the model's own settings are."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    settings = GenerationConfig(max_new_tokens=NEW, pad_token_id=0, **sampling)
    ids = torch.tensor([prompt], device=model.device)
    options = {"attention_mask": torch.ones_like(ids), "adapter": str(folder), "seed": SEED}
    kept, model.generation_config = model.generation_config, settings
    try:
        found = _loaded(folder / CODE).generate(model, ids, generation_config=settings, **options)
    except ValueError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be decoded by transformers alone: {error}"
        ) from error
    finally:
        model.generation_config = kept
    return found[0, PROBE:].tolist()


def _loaded(path: Path) -> ModuleType:
    """A file of code as a module, as written."""
    spec = spec_from_file_location("exported_generate", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
