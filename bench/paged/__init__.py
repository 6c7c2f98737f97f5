"""The baseline: a KV cache of blocks and block tables, behind the engine's memory protocol."""
