"""What `python -m benchmarks.joint` runs."""
