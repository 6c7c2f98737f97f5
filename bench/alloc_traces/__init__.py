"""Traces of allocations recorded from real runs, and the programs that they are recorded from."""
