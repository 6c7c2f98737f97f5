"""The baseline: a KV cache of blocks and block tables, behind the engine's memory protocol.

``LLM(model, storage=bench.paged.storage.paged_storage())`` serves a model from it; scheduler,
model, sampler and requests are the same as ever. Bottom up: ``blocks`` (who holds which, and what a
free one contains), ``tables`` (persistent, changes only), ``sequences`` (slots), ``cache`` (the
bytes), ``prefix`` (names of blocks), ``admission`` and ``memory`` (the engine's memory protocol),
``kernels`` and ``backends`` (attention over blocks), ``select`` and ``storage`` (which of them, and
the whole).
"""
