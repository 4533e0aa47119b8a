"""Models that do not simply take the positions they are given."""
