"""The profile `joint`: the base's own weights are trained along."""
