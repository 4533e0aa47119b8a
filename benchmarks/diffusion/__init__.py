"""Mode `diffusion` on the embedded base: speed against agreement, gaps filled against `ar`."""
