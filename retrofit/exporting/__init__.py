"""Artifacts as folders that other programs read."""
