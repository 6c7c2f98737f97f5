"""Bytes, batches and driver calls, without a model."""
