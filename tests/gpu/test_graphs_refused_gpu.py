"""Models that cannot be captured: served without graphs, and nothing is left behind by the try."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.gpu import engine_runs
from tests.gpu.engine_runs import assert_close_to_model, assert_graphed, cases, engine, generate


def asks_for_a_number(output: torch.Tensor) -> None:
    output.sum().item()


def waits_for_the_stream(output: torch.Tensor) -> None:
    if output.is_cuda:  # torch does not see this one coming, and CUDA gives the capture up
        torch.cuda.current_stream().synchronize()


@pytest.mark.parametrize("wait", [asks_for_a_number, waits_for_the_stream])
def test_a_model_that_waits_is_served_without_graphs(
    wait: Callable[[torch.Tensor], None],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    requests = cases(4, new=8)
    plain = engine_runs.wide_model

    def waiting_model() -> Any:
        model = plain()
        model.model.layers[1].mlp.register_forward_hook(lambda _, __, output: wait(output))
        return model

    with monkeypatch.context() as patched:
        patched.setattr(engine_runs, "wide_model", waiting_model)
        with caplog.at_level(logging.WARNING), engine(device) as llm:
            assert llm.stats().graphs_captured == 0
            assert_close_to_model(generate(llm, requests), requests, device)
    told = [record.getMessage() for record in caplog.records]
    assert any("enforce_eager" in message for message in told) == (device == "cuda"), told
    # Torch's random numbers and its allocator are out of the capture, and the next one works.
    assert torch.randn(1000, device=device).std().item() == pytest.approx(1, abs=0.2)
    with engine(device) as llm:
        assert_close_to_model(generate(llm, requests), requests, device)
        assert_graphed(llm, device)
