"""The model's own modules of transformers, with our attention between them."""
