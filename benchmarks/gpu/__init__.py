"""The benchmark of one GPU session: `python -m benchmarks.gpu`."""
