"""Triton kernels and, in `reference.py`, what each of them has to compute.  Nothing here knows the rest of retrofit."""
