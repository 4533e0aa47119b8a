"""The fault of CPU builds in sampled speculation, found by what it does, and mended where it is.

vLLM 0.32 for CPUs gives each draft token its request's temperature, top-k and top-p through a kernel that writes into a
converted copy, so that what is sampled with is uninitialised memory (vllm-project/vllm#55005).  Greedy requests are not
concerned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from retrofit.errors import UnsupportedModelError

Expand = Callable[..., Tensor]
"""`expand_batch_to_tokens` of vLLM's rejection sampler; see `expanded`."""


def expanded(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: float = 0, replace_to: float = 0
) -> Tensor:
    """x [N] repeated for each draft token of its request, [num_tokens]; where it is replace_from, replace_to stands.

    cu_num_tokens: [N] how many draft tokens there are up to each request's last.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    found = x.repeat_interleave(counts.long(), output_size=num_tokens)
    return found.masked_fill(found == replace_from, replace_to)


def is_right(expand: Expand, device: torch.device) -> bool:
    """Whether it gives each draft token what its request has, in the types that are asked for."""
    for dtype in (torch.float32, torch.int32):
        x = torch.tensor([0, 7, 3], dtype=dtype, device=device)
        ends = torch.tensor([2, 2, 5], dtype=torch.int32, device=device)
        if expand(x, ends, 5, replace_from=0, replace_to=1).tolist() != [1, 1, 3, 3, 3]:
            return False
    return True


def mend(rejection_sampler: Any, device: torch.device) -> bool:
    """Put `expanded` in the place of a kernel that is wrong here.  Returns whether it was.

    rejection_sampler: the module `vllm.v1.sample.rejection_sampler`.  Raises UnsupportedModelError where that does not
    help.
    """
    if is_right(rejection_sampler.expand_batch_to_tokens, device):
        return False
    rejection_sampler.expand_batch_to_tokens = expanded
    if not is_right(rejection_sampler.expand_batch_to_tokens, device):
        raise UnsupportedModelError(
            "this build of vLLM samples drafts with wrong temperatures (vllm-project/vllm#55005)",
            "take a build with vllm-project/vllm#55006",
        )
    return True
