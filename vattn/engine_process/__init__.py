"""The engine as a process of its own, and what its owner and it say to each other."""
