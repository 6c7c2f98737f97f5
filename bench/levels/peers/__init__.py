"""Other programs that serve the same requests."""
