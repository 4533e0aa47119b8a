"""Training: from documents to blocks, the joint objective, steps, checkpoints."""
