"""Measurements that compare vattn with something else. Nothing in vattn imports this package."""
