"""`vllm serve` of an artifact, with everything set.  vLLM itself is not imported."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from retrofit.errors import UsageError
from retrofit.serving.vllm.plugin import KEY

PACKAGE = "retrofit.serving.vllm"
OURS = {
    "--model": "ARTIFACT says which; --base names it where it has moved",
    "--revision": "the artifact says which",
    "--worker-cls": "retrofit sets it",
    "--speculative-config": "retrofit sets it",
    "-sc": "retrofit sets it",
    "--additional-config": "retrofit sets it",
    "--async-scheduling": "vLLM cannot with drafts of this kind",
    "--enable-lora": "drafts are made for the base alone",
    "--lora-modules": "drafts are made for the base alone",
    "--kv-transfer-config": "draft rows need K/V of this server",
}
"""Options of vLLM that are not the user's to give, and why."""


def command(artifact: Path, model: str, named: str, block: int, options: Sequence[str]) -> list[str]:
    """The words that start the server.

    model: folder of the base; named: what requests call it, unless the options say so; block: `draft.block`;
    options: of vLLM, as they were given.  Raises UsageError for one that is OURS.
    """
    given = [_option(word) for word in options]
    for option in given:
        if option in OURS:
            raise UsageError(f"{option} cannot be given to `retrofit serve`: {OURS[option]}", f"leave {option} out")
    drafter = {"method": "custom_class", "model": f"{PACKAGE}.proposer.Proposer", "num_speculative_tokens": block + 1}
    return [
        *(sys.executable, "-m", f"{PACKAGE}.start", "serve", model),
        *("--worker-cls", f"{PACKAGE}.worker.Worker", "--no-async-scheduling"),
        *("--speculative-config", json.dumps(drafter)),
        *("--additional-config", json.dumps({KEY: str(artifact)})),
        *([] if "--attention-config" in given else ["--attention-config", json.dumps({"use_non_causal": True})]),
        *([] if "--served-model-name" in given else ["--served-model-name", named]),
        *options,
    ]


def _option(word: str) -> str:
    """The name of an option as vLLM understands it: `--a_b.c=d` is `--a-b`.  Other words as they are."""
    name = word.split("=")[0].split(".")[0]
    return name.replace("_", "-") if name.startswith("--") else name
