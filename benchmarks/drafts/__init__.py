"""Recipes on equal terms: the same base, data, steps, draft rows, drafts in a block and held-out prompts."""
