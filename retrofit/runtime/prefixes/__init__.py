"""Base K/V of texts that are through, for texts that begin alike."""
