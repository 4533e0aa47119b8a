"""Artifacts in serving engines that exist: what each of them can draft with, and how it is started."""
