"""The figures in README and the docs: `python -m benchmarks.readme_numbers` draws them."""
