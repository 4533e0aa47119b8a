"""Prompts with images: what a model's own code makes of them, and how they run as rows."""
