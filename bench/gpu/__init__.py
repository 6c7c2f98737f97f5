"""What a machine with a GPU can show; see check.py."""
