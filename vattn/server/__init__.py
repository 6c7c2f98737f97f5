"""The OpenAI-compatible server: ``vattn serve``."""
