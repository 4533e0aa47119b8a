"""Sparse attention: an indexer picks the keys that a base row sees; draft rows see all."""
