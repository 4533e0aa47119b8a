"""A conversion that nothing interrupted, to be compared with."""

from pathlib import Path

import pytest
from tiny_conversion import run


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """Its artifact: a run of `tiny_conversion` from beginning to end."""
    out = tmp_path_factory.mktemp("straight") / "out"
    run(out, texts)
    return out
