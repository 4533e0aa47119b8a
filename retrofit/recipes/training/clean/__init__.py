"""The base rows of a training batch."""
