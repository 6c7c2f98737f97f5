"""The KV cache: layout, pool, slots."""
