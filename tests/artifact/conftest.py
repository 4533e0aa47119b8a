"""An artifact folder of each test's own; a model that was loaded before is loaded in no time."""

import pytest
from artifact_folders import write


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "artifact")


@pytest.fixture(autouse=True)
def loads_quickly(self_test_once: None) -> None:
    """A model that was loaded before is loaded in no time."""
