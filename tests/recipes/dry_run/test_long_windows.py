"""Memory of a conversion by the length of its windows: linear, up to the longest context."""

import pytest
from small_recipe import SMALL
from tiny_models import CONFIGS

from retrofit.recipes.dry_run import estimate
from retrofit.recipes.schema import load_recipe

LENGTHS = (1 << 11, 1 << 12, 1 << 13)
WINDOW = 256


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_memory_is_linear_in_the_length(name, bare_heap):
    """The second half of the longest windows takes what the first did.

    Masks and scores could be rows times rows: half of gemma2's layers have a window, and its scores are soft-capped,
    which the fast kernels do not do.
    """
    config = CONFIGS[name]()
    config.max_position_embeddings = max(LENGTHS)
    if getattr(config, "sliding_window", None):
        config.sliding_window = WINDOW
    peaks = []
    for length in LENGTHS:
        plan = load_recipe("default", [*SMALL, f"data.max_length={length}", "train.batch_size=1"])
        peaks.append(estimate.estimate(plan, config).peak)
    first, second = peaks[1] - peaks[0], peaks[2] - peaks[1]
    assert 0 < second < 2.2 * first
