"""A compiled model computes what the model computes, calls every layer once, and compiles twice."""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from transformers import LlamaConfig

from tests.models import (
    _COMMON,
    ENGINE_CONFIGS,
    PAGE,
    VOCABULARY,
    engine_model,
    make_model,
    one_thread,
)
from vattn import KVCache, PagePool
from vattn.attention.select import choose
from vattn.engine.batch import StepBatch
from vattn.engine.runner import ModelRunner
from vattn.hf.attention import StepMissing, answered_by
from vattn.hf.compiled import COMPILE_DECIDED_BY, COMPILE_DEFAULT, CompiledModel, compile_model
from vattn.hf.model import LoadedModel, load_model

# Tokens of a step, and how many of them get logits: none, one, some, all.
STEPS = ((1, 1), (2, 2), (5, 0), (64, 1), (7, 7), (1, 0), (32, 2), (33, 32))


@pytest.fixture(autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def without_traces() -> Iterator[None]:
    """Pytest formats what loggers say, and torch's tracer says much that nobody reads."""
    trace = logging.getLogger("torch.__trace")
    before, trace.disabled = trace.disabled, True
    yield
    trace.disabled = before


class Graphs:
    """A backend that keeps what it is given, and runs it on another one."""

    def __init__(self, backend: str = "eager") -> None:
        self.seen: list[torch.fx.GraphModule] = []
        self._backend = lookup_backend(backend)

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.seen.append(graph)
        run: Any = self._backend
        return run(graph, inputs)

    def layers(self) -> list[list[int]]:
        """The layers whose attention each graph calls, in order."""
        ours = (torch.ops.vattn.attend, torch.ops.vattn.attend.default)
        return [[n.args[4] for n in g.graph.nodes if n.target in ours] for g in self.seen]


class Made(NamedTuple):
    loaded: LoadedModel
    graphs: Graphs
    compiled: CompiledModel


# AOTAutograd takes as long again as tracing, and what it sees are operators, not families. These
# have windows, sinks and experts among them.
AFTER_AUTOGRAD = ("llama", "gemma3", "gpt_oss")


@pytest.fixture(scope="module")
def made() -> Callable[[str], Made]:
    """The compiled model of a family, for tests that leave it as it is."""

    @functools.cache
    def make(family: str) -> Made:
        loaded = load_model(engine_model(family))
        graphs = Graphs("aot_eager" if family in AFTER_AUTOGRAD else "eager")
        return Made(loaded, graphs, compile_model(loaded, backend=graphs))

    return make


class Own:
    """Answers with attention of every token to itself, and notes the layers."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        self.layers.append(layer_idx)
        share = torch.sigmoid(query.mean(-1) if sinks is None else sinks[None, :, None])
        wide = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return (wide * share[..., None]).transpose(1, 2)  # not contiguous


def packed(tokens: int, rows: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed + 100 * tokens)
    ids = torch.randint(2, VOCABULARY, (1, tokens), generator=generator)
    positions = torch.randint(0, 200, (1, tokens), generator=generator)
    return ids, positions, torch.arange(tokens - rows, tokens)


def call(forward: Callable[..., Any], step: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Logits of a step, each layer of three called once."""
    own = Own()
    ids, positions, rows = step
    with torch.no_grad(), answered_by(own):
        out = forward(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=rows)
    assert own.layers == [0, 1, 2]
    logits: torch.Tensor = out.logits
    return logits


def compare(loaded: LoadedModel, compiled: CompiledModel) -> None:
    """All STEPS, of tensors made in inference mode and of others."""
    for inference in (True, False):
        for tokens, rows in STEPS:
            with torch.inference_mode(inference):
                step = packed(tokens, rows)
                wanted = call(loaded.model, step)
                got = call(compiled, step)
            assert got.shape == wanted.shape == (1, rows, VOCABULARY)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ENGINE_CONFIGS)
def test_two_graphs_serve_every_step(family: str, made: Callable[[str], Made]) -> None:
    loaded, graphs, compiled = made(family)
    assert compiled.refusal is None
    compare(loaded, compiled)
    assert graphs.layers() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_inductor(family: str) -> None:
    """Needs a C++ compiler and the headers of Python, as building this package does."""
    loaded = load_model(engine_model(family))
    compiled = compile_model(loaded)
    assert compiled.refusal is None
    compare(loaded, compiled)


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_the_runner_is_exact_over_the_cache(family: str, made: Callable[[str], Made]) -> None:
    """Windows and sinks: two sequences, one decoding while the other is prefilled in chunks."""
    loaded, _, compiled = made(family)
    plain, other = (run_two(loaded, forward) for forward in (None, compiled))
    assert compiled.refusal is None
    assert len(plain) == 43
    torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-4)


def run_two(loaded: LoadedModel, forward: Any) -> torch.Tensor:
    pool = PagePool(page_bytes=PAGE, strict=True)
    cache = KVCache(loaded.layer_specs(), max_seqs=2, max_tokens=64, pool=pool)
    backend = choose(loaded.specs, loaded.device)
    runner = ModelRunner(loaded, cache, backend, forward=forward)
    slots = np.array([cache.open(slot=0), cache.open(slot=1)], np.int32)
    ids = np.random.default_rng(3).integers(2, VOCABULARY, (2, 64))
    logits = []
    # New tokens of each: a prompt, decodes beside chunks without logits, decodes, one alone.
    done = np.zeros(2, np.int32)
    for news in [(30, 0), *[(1, 9)] * 3, *[(1, 1)] * 4, *[(1, 0)] * 2]:
        counts = np.array(news, np.int32)
        run = counts > 0
        done += counts
        cache.ensure_many(slots[run], done[run])
        parts = [ids[i, done[i] - n : done[i]] for i, n in enumerate(news)]
        decodes = int((counts == 1).sum())
        rows = np.arange(30) if news[0] == 30 else np.arange(max(decodes, 1))
        logits.append(
            runner.run(
                StepBatch(
                    slots[run],
                    counts[run],
                    done[run].copy(),
                    decodes,
                    np.concatenate(parts),
                    rows,
                    slots[run][: len(rows)].astype(np.int64)
                    if len(rows) < 3
                    else np.zeros(len(rows), np.int64),
                )
            )
        )
    cache.check()
    return torch.cat(logits)


# What an operator does beside its result ----------------------------------------------------------


def attend(query: torch.Tensor, layer: int) -> torch.Tensor:
    out: torch.Tensor = torch.ops.vattn.attend(query, query, query, None, layer)
    return out


def unread(query: torch.Tensor) -> torch.Tensor:
    attend(query, 0)
    attend(query + 1, 1)
    return query * 2


def twice(query: torch.Tensor) -> torch.Tensor:
    return attend(query, 0) + attend(query, 0)


def backwards(query: torch.Tensor) -> torch.Tensor:
    late = attend(query, 2)
    return attend(query * 3, 1) @ attend(query, 0).transpose(2, 3) + late.sum()


def reread(query: torch.Tensor) -> torch.Tensor:
    out = attend(query.sin(), 0)
    return out.cos() + out.sum(-1, keepdim=True) + attend(out.transpose(1, 2), 1).mean()


def empty(query: torch.Tensor) -> torch.Tensor:
    return attend(query, 0)[:, :0] + 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    ("function", "layers"),
    [(unread, [0, 1]), (twice, [0, 0]), (backwards, [2, 1, 0]), (reread, [0, 1]), (empty, [0])],
)
def test_no_call_is_dropped_merged_moved_or_repeated(
    function: Callable[[torch.Tensor], torch.Tensor], layers: list[int], backend: str
) -> None:
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    query = torch.randn(1, 2, 3, 4)
    plain, own = Own(), Own()
    with torch.inference_mode():
        with answered_by(plain):
            wanted = function(query)
        with answered_by(own):
            got = compiled(query)
    assert plain.layers == own.layers == layers
    torch.testing.assert_close(got, wanted)


def test_no_answer_outside_an_engine(made: Callable[[str], Made]) -> None:
    compiled = made("llama").compiled
    for tokens in (1, 5):
        ids, positions, rows = packed(tokens, 1)
        with pytest.raises(StepMissing, match="set_attn_implementation"):
            compiled(input_ids=ids, position_ids=positions, logits_to_keep=rows)
    assert compiled.refusal is None  # an error of the step is not one of the compiler


# Several models, and their end --------------------------------------------------------------------


def test_models_do_not_mix() -> None:
    """Three of one class make more graphs than torch is let make of one function."""
    made = []
    for seed in range(3):
        loaded = load_model(engine_model("multi_query"))
        with torch.no_grad():
            loaded.model.lm_head.weight.mul_(1 + seed)
        graphs = Graphs()
        with torch._dynamo.config.patch(recompile_limit=2):
            made.append((loaded, graphs, compile_model(loaded, backend=graphs)))
    step = packed(5, 2)
    first = call(made[0][0].model, step)
    for seed, (loaded, graphs, compiled) in enumerate(made):
        got = call(compiled, step)
        torch.testing.assert_close(got, call(loaded.model, step), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got, (1 + seed) * first, rtol=1e-3, atol=1e-3)
        assert compiled.refusal is None
        assert len(graphs.seen) == 2


def test_a_model_ends_with_its_owner() -> None:
    loaded = load_model(engine_model("llama"))
    compiled = compile_model(loaded, backend="eager")
    call(compiled, packed(5, 2))
    weight = weakref.ref(loaded.model.lm_head.weight)
    del loaded, compiled
    gc.collect()
    assert weight() is None


def test_a_changed_model_is_compiled_again() -> None:
    loaded = load_model(engine_model("llama"))
    graphs = Graphs()
    compiled = compile_model(loaded, backend=graphs)
    loaded.model.model.norm.variance_epsilon = 0.5
    step = packed(5, 2)
    torch.testing.assert_close(call(compiled, step), call(loaded.model, step))
    assert len(graphs.seen) == 3


# What does not compile ----------------------------------------------------------------------------


def test_without_a_compiler_it_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        raise OSError("no g++")

    loaded = load_model(engine_model("llama"))
    with caplog.at_level(logging.WARNING):
        compiled = compile_model(loaded, backend=broken)
    assert "LlamaForCausalLM runs without torch.compile, which failed" in caplog.text
    assert compiled.refusal is not None
    assert "no g++" in compiled.refusal
    compare(loaded, compiled)


def test_a_model_that_looks_at_its_data(caplog: pytest.LogCaptureFixture) -> None:
    """Its positions are scaled if the largest of them is large, so no one graph computes it."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = LlamaConfig(**_COMMON, rope_parameters=rope)
    loaded = load_model(make_model(config, attention="eager"))
    compiled = compile_model(loaded, backend="eager")
    assert compiled.refusal is not None
    assert "Data-dependent" in compiled.refusal
    assert "Data-dependent" in caplog.text
    compare(loaded, compiled)


def test_too_many_compilations_end_in_none(caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_model(engine_model("llama"))
    compiled = compile_model(loaded, backend="eager")
    step = packed(5, 2)
    loaded.model.model.norm.variance_epsilon = 0.5
    with torch._dynamo.config.patch(recompile_limit=1):
        torch.testing.assert_close(call(compiled, step), call(loaded.model, step))
    assert compiled.refusal is not None
    assert "changed more often than torch compiles" in compiled.refusal
    assert "runs without torch.compile" in caplog.text
    compare(loaded, compiled)


def test_running_out_of_memory_is_the_callers() -> None:
    def full(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*_: Any) -> Any:
            raise torch.OutOfMemoryError("out of memory")

        return run

    with pytest.raises(torch.OutOfMemoryError):
        compile_model(load_model(engine_model("llama")), backend=full)


# Arguments ----------------------------------------------------------------------------------------


def test_a_model_that_computes_all_logits() -> None:
    loaded = dataclasses.replace(load_model(engine_model("llama")), keeps_logits=False)
    compiled = compile_model(loaded, backend="eager")
    assert compiled.refusal is None
    for tokens in (1, 2, 9):
        ids, positions, rows = packed(tokens, 1)
        with answered_by(Own()):
            got = compiled(input_ids=ids, position_ids=positions).logits
        assert got.shape == (1, tokens, VOCABULARY)
        torch.testing.assert_close(got[:, rows], call(loaded.model, (ids, positions, rows)))
    with pytest.raises(ValueError, match="does not know logits_to_keep"):
        compiled(input_ids=ids, position_ids=positions, logits_to_keep=rows)


def test_bad_arguments(made: Callable[[str], Made]) -> None:
    compiled = made("llama").compiled
    ids, positions, rows = packed(4, 2)
    good = {"input_ids": ids, "position_ids": positions, "logits_to_keep": rows}
    bad: list[tuple[dict[str, Any], str]] = [
        ({"input_ids": ids[0]}, r"shape \(4,\)"),
        ({"input_ids": ids[:, :0]}, r"shape \(1, 0\)"),
        ({"input_ids": ids.repeat(2, 1)}, r"shape \(2, 4\)"),
        ({"position_ids": positions[:, :3]}, r"shape \(1, 3\), not \(1, 4\)"),
        ({"position_ids": positions.int()}, "int64"),
        ({"logits_to_keep": rows[None]}, r"shape \(1, 2\), not \[R\]"),
        ({"logits_to_keep": rows.bool()}, "int64"),
        ({"logits_to_keep": None}, "needs logits_to_keep"),
        ({"use_cache": True}, "use_cache=True"),
    ]
    for change, message in bad:
        with pytest.raises(ValueError, match=message):
            compiled(**{**good, **change})
    call(compiled, (ids, positions, rows))


def test_nothing_to_tune_on_a_cpu() -> None:
    loaded = load_model(engine_model("llama"))
    with pytest.raises(ValueError, match="tune=True is for inductor on a GPU, not for 'inductor'"):
        compile_model(loaded, tune=True)


def test_defaults_name_what_decided_them() -> None:
    assert COMPILE_DEFAULT.keys() == COMPILE_DECIDED_BY.keys() == {"cpu", "cuda"}
    for device, default in COMPILE_DEFAULT.items():
        assert not default or COMPILE_DECIDED_BY[device].endswith("/compile.json")
