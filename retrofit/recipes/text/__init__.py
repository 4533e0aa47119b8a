"""Text to train on: where it comes from, its formats, its faults, and the documents made of it."""
