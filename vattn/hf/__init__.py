"""Transformers models on virtual memory: :class:`~vattn.hf.cache.VirtualCache` for ``generate``."""
