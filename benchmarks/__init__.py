"""One command each; figures go to `results/` as JSON with hardware and commit."""
