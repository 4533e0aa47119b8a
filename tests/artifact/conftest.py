"""An artifact folder of each test's own."""

import pytest
from artifact_folders import write


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "artifact")
