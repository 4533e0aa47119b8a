"""Fixtures of the dry run."""

import pytest

from retrofit.recipes.dry_run import estimate


@pytest.fixture
def bare_heap(monkeypatch):
    """Count what is alive, and not what the C library keeps, which is not the same twice."""
    monkeypatch.setattr(estimate, "c_library", lambda: None)
    monkeypatch.setattr(estimate, "STEPS", 1)
