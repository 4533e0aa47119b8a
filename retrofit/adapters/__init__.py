"""What is added to a model: the rows of a draft block, the gated LoRA, the mask vector and the heads."""
