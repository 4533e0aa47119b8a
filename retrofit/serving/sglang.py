"""SGLang's command for an artifact that was exported as `uno`.  Not here: running it; that needs a CUDA GPU."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from retrofit.errors import UsageError

FOLDER = "--uno-lora-path"


def command(model: str, revision: str | None, block: int, options: Sequence[str]) -> list[str]:
    """The words that start the server, SGLang 0.5.23.

    model: folder or Hub id of the base; block: `draft.block`, to which UNO adds the root; options: of SGLang, as they
    were given, the exported folder among them.  Raises UsageError without that.
    """
    if not any(word.split("=")[0] == FOLDER for word in options):
        raise UsageError(
            f"SGLang reads the folder that `retrofit export --format uno` writes; {FOLDER} is missing",
            f"export the artifact, then add {FOLDER} FOLDER",
        )
    return [
        *(sys.executable, "-m", "sglang.launch_server", "--model-path", model),
        *(("--revision", revision) if revision else ()),
        *("--attention-backend", "fa3", "--speculative-algorithm", "UNO"),
        *("--speculative-num-draft-tokens", str(block + 1)),
        *options,
    ]
