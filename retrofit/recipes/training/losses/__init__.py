"""What a draft row is trained by, and how the rows of a block share it."""
