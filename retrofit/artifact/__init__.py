"""The artifact: its folder written whole, checked and read; its files, tensors and card."""
