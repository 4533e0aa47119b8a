"""Every test of what is imported."""

import pytest


@pytest.fixture(autouse=True)
def loads_quickly(self_test_once: None) -> None:
    """A model that was loaded before is loaded in no time."""
