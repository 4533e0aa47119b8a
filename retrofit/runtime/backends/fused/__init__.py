"""Our kernels over the weights themselves, for decoders of the Llama kind on a GPU."""
