"""How an artifact on the Hub is used, by retrofit and by other programs, as lines to be copied.

Only what works with this artifact is there: a base that is a GGUF file is no model of PEFT's or of an engine's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from retrofit.artifact.engines import fits
from retrofit.artifact.folder import published_name

BASE = "PATH-OF-THE-BASE"
"""Stands for a base that lay on the machine where the artifact was made."""

RETROFIT = """```sh
retrofit generate {repository} "Once upon a time"{base}
```"""

PEFT = """PEFT takes the adapter for an Activated LoRA that never acts, and leaves the base as it is, bit for bit.
Loaded like this it acts on every row, as it does on draft rows in retrofit; mask vector and heads are unknown to PEFT.

```python
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({model}{revision})
config = PeftConfig.from_pretrained("{repository}", subfolder="adapter")
config.alora_invocation_tokens = None
model = PeftModel.from_pretrained(base, "{repository}", subfolder="adapter", config=config)
```"""

TRANSFORMERS = """Its model is an ordinary one to any other program, without the drafts:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repository}", subfolder="model")
```"""

VLLM = """vLLM drafts with it (`pip install "retrofit-lm[vllm]"`):

```sh
retrofit serve {repository} --engine vllm --port 8000{base}
```"""

SGLANG = """SGLang's UNO drafts with an export of it; `serve` prints the command that starts it, which needs a CUDA GPU:

```sh
retrofit export {repository} --format uno -o uno-folder{base}
retrofit serve {repository} --engine sglang --uno-lora-path uno-folder{base}
```"""


def usage(repository: str, config: Mapping[str, Any]) -> str:
    """Markdown.  repository: OWNER/NAME; config: `retrofit.json`."""
    named = config["base"]
    local = named.get("local") is True
    model, revision = BASE if local else published_name(named), named.get("revision")
    fields = {
        "repository": repository,
        "base": f" --base {BASE}" if local else "",
        "model": json.dumps(model),
        "revision": f", revision={json.dumps(revision)}" if revision and not local else "",
    }
    parts = [RETROFIT]
    if config["profile"] == "joint":
        parts.append(TRANSFORMERS)
    elif local or ("/" in named["model"] and "gguf" not in named):
        parts.append(PEFT)
    parts += [text for engine, text in (("vllm", VLLM), ("sglang", SGLANG)) if fits(config, engine)]
    return "\n\n".join(part.format(**fields) for part in parts)
