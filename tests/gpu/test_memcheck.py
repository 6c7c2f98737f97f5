"""The engine run of bench.gpu.memcheck, without the tool.

Under compute-sanitizer it takes minutes: that is the stage ``memcheck`` of bench.gpu.check, not a
test. What finds and reads the tool needs no GPU: tests/test_memcheck_tool.py.
"""

from __future__ import annotations

from bench.gpu import memcheck


def test_the_run_does_what_it_is_there_for(device: str) -> None:
    did = memcheck.run(device)
    assert (did["by_graph"] > 0) == (device == "cuda")
    assert min(did[name] for name in ("prefix_hit_tokens", "forked", "preempted")) > 0
