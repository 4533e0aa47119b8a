"""What decoding costs on a CPU, where a step's time goes, and whether its output is exact: `python -m benchmarks.cpu`."""
