"""What vLLM loads in each of its processes, by the entry point `vllm.general_plugins`, where retrofit is installed.

It has the scheduler reserve slots for draft rows, which vLLM does for its own drafters by name; servers of anything but
our artifacts are left as they are.
"""

from __future__ import annotations

from typing import Any

KEY = "retrofit"
"""Under this name the artifact's folder stands in vLLM's `additional_config`."""


def artifact_of(config: Any) -> str | None:
    """The folder of the artifact that a server serves, from its `VllmConfig`; None for other servers."""
    more = config.additional_config
    return more.get(KEY) if isinstance(more, dict) else None


def register() -> None:
    """Reserve one slot for the seed and one for each draft row.  May be called again; imports vLLM's configuration."""
    from vllm.config import VllmConfig

    if not isinstance(VllmConfig.num_lookahead_tokens, _Lookahead):
        VllmConfig.num_lookahead_tokens = _Lookahead(VllmConfig.num_lookahead_tokens)


class _Lookahead(property):
    """`VllmConfig.num_lookahead_tokens`, and what ours is of servers of an artifact."""

    def __init__(self, theirs: property) -> None:
        def slots(config: Any) -> Any:
            return config.num_speculative_tokens if artifact_of(config) else theirs.__get__(config)

        super().__init__(slots)
