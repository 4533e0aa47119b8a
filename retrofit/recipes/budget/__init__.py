"""How much a conversion may cost: presets, and the one that fits into a time."""
