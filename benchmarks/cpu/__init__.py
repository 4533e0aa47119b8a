"""What decoding costs on a CPU, where a step's time goes, whether output is exact: `python -m benchmarks.cpu`."""
