"""The rules of decoding on tensors alone: sampling, acceptance, trees, processors."""
