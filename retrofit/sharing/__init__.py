"""Artifacts on the Hub: pushed, and fetched."""
