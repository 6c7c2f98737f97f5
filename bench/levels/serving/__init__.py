"""Arrivals in time: latencies and goodput."""
