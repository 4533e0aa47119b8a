"""Every test of a base."""

import pytest


@pytest.fixture(autouse=True)
def loads_quickly(self_test_once: None) -> None:
    """A model that was loaded before is loaded in no time."""
