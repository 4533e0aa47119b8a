"""Settings every test runs under: one thread (the models are tiny) and a fixed random state."""

import pytest
import torch

torch.set_num_threads(1)  # hand-over between threads costs more than a tiny model's matrix products


@pytest.fixture(autouse=True)
def fixed_random_state() -> None:
    torch.manual_seed(0)
