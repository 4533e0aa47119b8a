"""Steps planned on the device, a whole step in one CUDA graph."""
