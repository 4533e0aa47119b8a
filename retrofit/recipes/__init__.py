"""Load a model, attach the adapter and train it; the YAML recipes and the embedded base in `tiny/`."""
