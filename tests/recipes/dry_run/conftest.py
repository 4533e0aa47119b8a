"""Fixtures of the dry run."""

import pytest

from retrofit.recipes.dry_run import estimate


@pytest.fixture
def bare_heap(monkeypatch):
    """Count what is alive, and not the share more that the C library keeps."""
    monkeypatch.setattr(estimate, "FREED", 0.0)
    monkeypatch.setattr(estimate, "STEPS", 1)
