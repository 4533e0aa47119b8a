"""Adapters that other programs draft with, as artifacts."""
