"""What a conversion would take, and what it would see of its text, found out before it starts."""
