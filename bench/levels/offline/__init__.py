"""Requests per minute through the engine."""
