"""Quality, held against the original: tasks of our own and of others, their scoring, paired statistics."""
