"""One interface, `forward(plan) -> logits`, and what implements it."""
