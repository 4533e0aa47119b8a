"""Which step pays: prices measured on this machine, acceptance learnt on the way."""
