"""The levels of the comparison of contiguous with paged memory: ``python -m bench <level>``."""
