"""Files that were changed to do harm, and what is made of them.  `python -m benchmarks.hostile`."""
