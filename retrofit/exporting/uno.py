"""An artifact's adapter as SGLang serves it: UNO (arXiv 2609.04010), whose two forwards are our strategy `two_forward`.

    draft     [seed, n_1 .. n_K] in one causal forward, the seed's row without the adapter: it yields a true token, the
              root; each n_i is a random token id, and its row predicts the position after it
    verify    [root, d_1 .. d_K] as base rows; the run of drafts that equal the targets before them is kept

Source: sgl-project/sglang#37667 and `srt/arg_groups/speculative_hook.py` of the wheel of 0.5.23.  The folder is a PEFT
folder (`peft_folder.py`).  Not here: starting that engine.
"""

from __future__ import annotations

from pathlib import Path

from retrofit.artifact.engines import unfit
from retrofit.artifact.folder import Artifact
from retrofit.errors import UsageError
from retrofit.exporting import peft_folder
from retrofit.exporting.states import refuse_state
from retrofit.hub import Base

README = """---
library_name: peft
{known}tags: [retrofit, lora, uno, speculative-decoding]
---
# UNO adapter of `{model}`

A LoRA of rank {rank}, alpha {alpha:g}, made with retrofit {version}, for SGLang's speculative algorithm UNO:

```sh
python -m sglang.launch_server --model-path {place}{revision} --attention-backend fa3 \\
  --speculative-algorithm UNO --uno-lora-path PATH-OF-THIS-FOLDER --speculative-num-draft-tokens {width}
```

What that engine asks for (SGLang 0.5.23, read in its source and not run):

- one CUDA GPU on which FlashAttention 3 runs, for prefill and decode: tensor and pipeline parallelism of 1;
- no `--enable-deterministic-inference`, no `--enable-lora`, no `--enable-strict-thinking`, no DP attention;
- requests without grammar, log-probabilities, penalties or min-p.

Drafts are random token ids put through the adapter, causally, and verified by the base's own weights.  Greedy output
is the base's, but for near-ties.  Sampled output follows its distribution, and differs from retrofit's at equal seed.
{width} is the root and as many drafts as the adapter was trained for.  To PEFT it is an Activated LoRA that never acts.
"""


def refuse_unfit(artifact: Artifact) -> None:
    """Raise UsageError, with all that is to be changed, for an artifact that UNO cannot draft with."""
    differing = unfit(artifact.config, "sglang")
    wrong = [f"{key} is {found}, not {want}" for key, (found, want) in differing.items()]
    if "gguf" in artifact.config["base"]:
        wrong.append("base.model is a GGUF file, not safetensors")
    if wrong:
        change = " ".join(f"{key}={want}" for key, (_, want) in differing.items())
        raise UsageError(
            f"{artifact.folder} cannot be exported as uno: {'; '.join(wrong)}",
            f"train one: `retrofit convert MODEL --recipe uno -o OUT`, or your recipe with {change or 'another base'}",
        )


def files(artifact: Artifact, model: str) -> dict[str, peft_folder.Content]:
    """As `peft_folder.files`."""
    return peft_folder.files(artifact, model, README)


def compare(folder: Path, base: Base, artifact: Artifact) -> str:
    """As `peft_folder.compare`.  Raises UnsupportedModelError too, for a base with a recurrent state."""
    refuse_state(artifact, base.model, "uno")
    return peft_folder.compare(folder, base, artifact)
