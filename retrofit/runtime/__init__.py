"""Run a model in its three modes: engine, scheduler, modes, the acceptance rule, sampling, cache, cost."""
