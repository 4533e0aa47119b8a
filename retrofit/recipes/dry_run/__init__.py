"""What a conversion would take, found out before it starts."""
