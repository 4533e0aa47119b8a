"""A model's own modules, written down once as the calls they make and then run without themselves."""
