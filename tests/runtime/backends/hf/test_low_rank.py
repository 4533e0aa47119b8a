"""The adapter's update of several layers at once: what its products are made of."""

from types import SimpleNamespace

import torch

from retrofit.runtime.backends.hf.linear.low_rank import LowRank

SCALING = 1.1
"""No power of two, so that scaling rounds."""


def test_an_adapter_of_16_bits_is_scaled_in_float32():
    torch.manual_seed(0)
    down, up = torch.randn(4, 16, dtype=torch.bfloat16), torch.randn(8, 4, dtype=torch.bfloat16)
    x, out = torch.randn(1, 3, 16), torch.zeros(1, 3, 8)
    LowRank([SimpleNamespace(factors=lambda: (down, up, SCALING))]).add_to(out, x, 1)
    want = x[:, 1:] @ down.float().T @ up.float().T * SCALING
    assert torch.equal(out[:, 0], torch.zeros(1, 8))
    torch.testing.assert_close(out[:, 1:], want, rtol=1e-5, atol=1e-5)
