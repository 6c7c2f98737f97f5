"""Attention alone, contiguous and paged."""
