"""Continuous batching: scheduler, memory manager, runner, sampler, and the loop over them."""
