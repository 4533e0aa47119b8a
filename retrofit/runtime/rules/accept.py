"""Decide which drafted tokens survive: the one acceptance rule of every strategy, batch and temperature.

In: drafted tokens, the targets of the base rows over them, and how many slots of each request are real.
Out: how many drafts each request keeps.  The request then emits targets[: kept + 1]: the kept drafts, which
equal their targets, and the bonus of the row after them.

The rule: base row j yields the target y_j = argmax(log p_j + g_j), where p_j is the base's processed
distribution after the row's own path (prompt, emitted, d_1..d_j) and g_j is Gumbel noise keyed by request
seed, output index and token (`sampling.gumbel_noise`; g = 0 at temperature 0).  Draft d_{j+1} is kept while
d_1..d_{j+1} equal y_0..y_j; what is emitted is always y.

Promise: exact for ANY draft.  argmax(log p + g) is a sample of p (the Gumbel-max trick; E. J. Gumbel,
"Statistical theory of extreme values and some practical applications", 1954), y_j never looks at d_{j+1}, and
up to the first disagreement the path of row j is the emitted text.  So the output equals token-by-token
decoding at equal seed, token for token.  The draft decides only how many tokens one forward yields: drafts
drawn with the SAME noise, d = argmax(log q + g), agree with probability between (1 - TV)/(1 + TV) and 1 - TV,
TV being the total variation distance of p and q (M. Daliri, C. Musco, A. T. Suresh, "Coupling without
communication and drafter-invariant speculative decoding", 2024, arXiv 2408.07978; 1 - TV bounds every
coupling).

Not here: running the model, noise, processors (sampling.py), EOS and stop strings, touching the K/V cache.
"""

import torch
from torch import Tensor

# Shapes: B requests, K drafted tokens per request (the longest of the batch; shorter ones are padded)


def accepted_length(draft_BK: Tensor, target_BK1: Tensor, lengths_B: Tensor) -> Tensor:
    """Length of the longest prefix of each draft that equals its targets.

    draft_BK: drafted tokens d_1..d_K, int64 [B, K]; whatever stands in padded slots is never counted.
    target_BK1: targets y_0..y_K, int64 [B, K + 1]; y_j comes from the base row that has read d_1..d_j, so
        slot j of the draft (counted from 0) is held against column j, and the bonus of a request is its
        column `accepted`.
    lengths_B: number of real drafts of each request, int64 [B], 0..K.

    Returns int64 [B], 0..lengths.
    """
    slots = draft_BK.shape[1]
    real_BK = torch.arange(slots, device=draft_BK.device) < lengths_B[:, None]
    agrees_BK = (draft_BK == target_BK1[:, :slots]) & real_BK
    return agrees_BK.long().cumprod(dim=1).sum(dim=1)
