"""One interface, `forward(row_plan) -> logits`, and what implements it."""
