"""Every test of a command."""

import pytest


@pytest.fixture(autouse=True)
def runs_somewhere(somewhere: None, self_test_once: None) -> None:
    """A command reads and writes in a folder of the test's own, and loads what was loaded before in no time."""
