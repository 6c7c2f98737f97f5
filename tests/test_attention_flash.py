"""FlashAttention backends: the exact arguments that they pass, offsets and strides included."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.attention_kernels import (
    BACKENDS,
    Recorder,
    flash2_package,
    flash3_package,
    operators,
)
from tests.attention_reference import World, make_world, spec_of, variants
from vattn.attention import flash_attn, flash_attn_3, torch_flash
from vattn.attention.base import AttentionSpec
from vattn.attention.flash import FlashBackend
from vattn.attention.flash_attn import FlashAttention2Backend
from vattn.attention.flash_attn_3 import FlashAttention3Backend, VllmFlashAttention3Backend
from vattn.attention.operators import (
    Kernel,
    Unavailable,
    bind,
    library_operator,
    python_function,
    takes,
)
from vattn.attention.torch_flash import TorchFlashBackend

VARIANTS = variants(spec_of())
# Which kernel, and whether it writes decodes' K and V itself.
APPENDS = [
    (kind, in_kernel)
    for kind in BACKENDS
    for in_kernel in (True, False)
    if not in_kernel or kind is not TorchFlashBackend
]
NAMES = {True: "appends", False: "launch"}


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def installed(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every kernel is there, with its real signature, and records."""
    decode, chunks = flash2_package(recorder)
    functions = {
        ("flash_attn.flash_attn_interface", "flash_attn_with_kvcache"): decode,
        ("flash_attn.flash_attn_interface", "_flash_attn_varlen_forward"): chunks,
        ("flash_attn_interface", "flash_attn_with_kvcache"): flash3_package(recorder),
    }
    with operators(recorder) as found:
        aten = types.SimpleNamespace(
            default=found["_flash_attention_forward"],
        )
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", aten)

        def of_library(package: str, file: str, namespace: str, name: str) -> Kernel:
            assert (package, Path(file).parts[0]) == ("vllm", "vllm_flash_attn")
            assert namespace == ("_vllm_fa3_C" if name == "fwd" else "_vllm_fa2_C")
            assert namespace in file
            kernel: Kernel = found[name]
            return kernel

        for module in (flash_attn, flash_attn_3):
            monkeypatch.setattr(module, "library_operator", of_library)
            monkeypatch.setattr(
                module, "python_function", lambda module, name: functions[module, name]
            )
        yield


def world_of(
    kind: type[FlashBackend],
    specs: list[AttentionSpec],
    recorder: Recorder,
    append_in_kernel: bool | None = None,
    **options: Any,
) -> World:
    backend = kind.create(specs, torch.device("cpu"), append_in_kernel=append_in_kernel)
    recorder.calls.clear()
    recorder.appended = 0
    recorder.tiles = backend.kv_tile_tokens
    return make_world(backend, specs, order="token", max_tokens=600, **options)


def assert_stored(world: World) -> None:
    """Every K and V that a window reaches is in the cache as it was given."""
    for slot, layers in world.history.items():
        for layer, (spec, history) in enumerate(zip(world.specs, layers, strict=True)):
            tokens = len(history[0])
            since = 0 if spec.window is None else max(0, tokens - spec.window)
            for own, wanted in zip(world.cache.layer(layer), history, strict=True):
                same = torch.equal(own[slot, since:tokens], wanted[since:])
                assert same, (slot, layer)


def assert_views(world: World, recorder: Recorder) -> None:
    """What the kernels were given are the cache's own bytes, where they always are."""
    memory = {own.data_ptr() for i in range(len(world.specs)) for own in world.cache.layer(i)}
    assert recorder.calls
    for _, arguments in recorder.calls:
        assert {tensor.data_ptr() for tensor in arguments.values()} <= memory


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("kind", "in_kernel", "variant"),
    [
        pytest.param(kind, in_kernel, name, id=f"{kind.name}-{NAMES[in_kernel]}-{name}")
        for kind, in_kernel in APPENDS
        for name, spec in VARIANTS.items()
        if spec.softcap is None or kind.has_softcap
    ],
)
def test_outputs_are_the_references(
    kind: type[FlashBackend], in_kernel: bool, variant: str, recorder: Recorder
) -> None:
    world = world_of(kind, [VARIANTS[variant]], recorder, in_kernel)
    a, b, c, d = (world.open(slot) for slot in (5, 1, 6, 2))
    world.step((), [(a, 300), (b, 7)])  # slots in no order
    world.step((), [(c, 130)])
    for _ in range(3):
        world.step([a, b, c])
    recorder.calls.clear()
    world.step([a, c], [(d, 50), (b, 20)])
    assert [name for name, _ in recorder.calls] == ["decode", "chunks"]
    assert_views(world, recorder)
    world.step([a], [(b, 60)])
    world.step([a, b], [(c, 70)])
    assert recorder.appended == (14 if in_kernel else 0)
    assert_stored(world)
    world.end()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("kind", "in_kernel"), APPENDS)
def test_layers_that_differ(kind: type[FlashBackend], in_kernel: bool, recorder: Recorder) -> None:
    """Regions have slots of different sizes, and so other offsets."""
    full = spec_of(head_dim=24, dtype=torch.bfloat16)
    specs = [full, replace(full, window=40, kv_heads=1), full, replace(full, window=40, kv_heads=1)]
    world = world_of(kind, specs, recorder, in_kernel, layers_per_region=1, page_bytes=16384)
    assert len({region.slot_tokens for region in world.cache.layout.regions}) > 1
    a, b, c = (world.open() for _ in range(3))
    world.step((), [(a, 200), (b, 90)])
    world.step([b], [(a, 64), (c, 3)])
    for _ in range(5):
        world.step([a, b, c])
    assert_views(world, recorder)
    assert_stored(world)
    world.end()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("kind", "in_kernel"), APPENDS)
def test_sequences_shorter_than_a_group(
    kind: type[FlashBackend], in_kernel: bool, recorder: Recorder
) -> None:
    """Eight query heads per KV head, and two tokens: one kernel takes the heads for queries."""
    world = world_of(kind, [spec_of(heads=8, kv_heads=1)], recorder, in_kernel)
    a, b = world.open(), world.open()
    world.step((), [(a, 1), (b, 1)])
    for _ in range(12):
        world.step([a, b])
    assert_stored(world)
    world.end()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("kind", "in_kernel"), APPENDS)
def test_new_rows_that_are_slices(
    kind: type[FlashBackend], in_kernel: bool, recorder: Recorder
) -> None:
    """K and V as models give them: transposed, packed in one tensor, or apart by more than 1."""
    spec = spec_of(head_dim=8, dtype=torch.bfloat16)
    world = world_of(kind, [spec], recorder, in_kernel)
    slots = [world.open() for _ in range(3)]
    world.step((), [(slot, 20) for slot in slots])
    for layout in ("packed", "transposed", "spread"):
        step = world.prepare(slots)
        world.backend.prepare(step, world.specs)
        query, key, value = world.inputs(step, spec)
        if layout == "packed":
            packed, ends = torch.cat([query, key, value], 1), (spec.heads, -spec.kv_heads)
            query, key, value = packed.tensor_split(ends, 1)
        elif layout == "transposed":
            key, value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (key, value))
        else:
            key, value = (x.repeat_interleave(2, -1)[..., ::2] for x in (key, value))
            assert key.stride(-1) == 2
        wanted = world.expected(step, 0, query, key, value)
        world.compare(world.backend.forward(0, spec, query, key, value, step), wanted, spec)
    assert recorder.appended == (9 if in_kernel else 0)
    assert_stored(world)
    world.end()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("kind", "in_kernel"), APPENDS)
def test_append_modes(kind: type[FlashBackend], in_kernel: bool) -> None:
    specs, cpu = [spec_of()], torch.device("cpu")
    backend = kind.create(specs, cpu, append_in_kernel=in_kernel)
    assert backend.append_mode == ("kernel" if in_kernel else "index_put")
    assert kind.create(specs, cpu).appends == (kind is not TorchFlashBackend)


@pytest.mark.usefixtures("installed")
def test_a_kernel_that_cannot_append() -> None:
    with pytest.raises(ValueError, match=r"append_in_kernel=True, .* torch cannot append; leave"):
        TorchFlashBackend([spec_of()], append_in_kernel=True)
    # A slot might hold fewer tokens than heads that one KV head serves: see attend().
    wide = spec_of(heads=65, kv_heads=1, head_dim=256)
    assert not FlashAttention2Backend([wide]).appends
    assert FlashAttention2Backend([replace(wide, heads=64)]).appends


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kind", [FlashAttention3Backend, VllmFlashAttention3Backend])
def test_a_build_that_left_appending_out(
    kind: type[FlashAttention3Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its arguments do not tell; a call does, and other errors are not taken for that."""
    message = "This flash attention build does not support appending KV."

    def attend(self: FlashBackend, *arguments: Any) -> torch.Tensor:
        raise RuntimeError(message)

    monkeypatch.setattr(kind, "attend", attend)
    cpu = torch.device("cpu")
    assert not kind.create([spec_of()], cpu).appends
    assert not kind.create([spec_of()], cpu, append_in_kernel=False).appends
    with pytest.raises(ValueError, match="cannot append"):
        kind.create([spec_of()], cpu, append_in_kernel=True)
    message = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        kind.create([spec_of()], cpu)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kind", BACKENDS, ids=lambda kind: kind.name)
def test_calls_per_step(kind: type[FlashBackend], recorder: Recorder) -> None:
    world = world_of(kind, [spec_of()], recorder)
    a, b = world.open(), world.open()
    for decodes, chunks, expected in (
        ((), [(a, 5), (b, 9)], ["chunks"]),
        ([a, b], [], ["decode"]),
        ([a], [(b, 4)], ["decode", "chunks"]),
    ):
        recorder.calls.clear()
        world.step(decodes, chunks)
        assert [name for name, _ in recorder.calls] == expected
    world.end()


def test_the_stand_ins_notice_what_tiles_notice(recorder: Recorder) -> None:
    """NaN within the tile reaches the output; so the tests above can fail."""
    k = torch.zeros(1, 64, 1, 8)
    k[0, 20] = torch.nan
    lens, index = torch.tensor([20], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    common: dict[str, Any] = {"scale": 1.0, "causal": True, "left": -1, "right": 0, "softcap": 0.0}
    for tile, spoiled in ((1, False), (20, False), (32, True)):
        recorder.tiles = (tile,)
        out, _ = recorder.kvcache(
            torch.ones(1, 1, 1, 8), k[:, :20], k[:, :20], lens, index, **common
        )
        assert bool(out.isnan().any()) == spoiled


@pytest.mark.parametrize("kind", BACKENDS, ids=lambda kind: kind.name)
def test_what_they_refuse(kind: type[FlashBackend], monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, spec = torch.device("cuda"), spec_of(dtype=torch.bfloat16, head_dim=64)
    assert "CUDA" in str(kind.refusal(spec, torch.device("cpu")))
    major = 9
    monkeypatch.setattr("vattn.attention.flash.capability", lambda device: (major, 0))
    assert kind.refusal(spec, cuda) is None
    assert kind.refusal(replace(spec, window=5, sinks=True, head_dim=256), cuda) is None
    assert "float32" in str(kind.refusal(replace(spec, dtype=torch.float32), cuda))
    assert "head_dim=264" in str(kind.refusal(replace(spec, head_dim=264), cuda))
    assert "5 heads" in str(kind.refusal(replace(spec, heads=5), cuda))
    softcap = kind.refusal(replace(spec, softcap=30.0), cuda)
    assert softcap is None if kind.has_softcap else "soft-capping" in str(softcap)
    major = 7
    assert "not 7.0" in str(kind.refusal(spec, cuda))
    major = 10
    reason = kind.refusal(spec, cuda)
    assert reason is None if kind.architectures is None else "9.x, not 10.0" in str(reason)


@pytest.mark.usefixtures("installed")
def test_tiles_follow_the_head_sizes() -> None:
    backend = FlashAttention3Backend([spec_of(head_dim=128), spec_of(head_dim=64)])
    assert backend.kv_tile_tokens == (128, 160, 176, 192)


# Loading ------------------------------------------------------------------------------------------


def test_missing_packages_are_named() -> None:
    with pytest.raises(Unavailable, match="no_such_package"):
        python_function("no_such_package", "f")
    with pytest.raises(Unavailable, match="no_such_function"):
        python_function("math", "no_such_function")
    with pytest.raises(Unavailable, match="no_such_package is not installed"):
        library_operator("no_such_package", "*.so", "space", "op")
    with pytest.raises(Unavailable, match="torch has no"):
        library_operator("torch", "no_such_file*.so", "space", "op")


def test_a_library_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "broken_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / "kernel.so").write_text("not a library")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Unavailable, match=r"kernel\.so does not load"):
        library_operator("broken_package", "kernel*.so", "space", "op")


def test_an_operator_is_found_in_a_library() -> None:
    found: Any = library_operator(
        "torch", "lib/libtorch_cpu.so", "aten", "_flash_attention_forward"
    )
    assert found is torch.ops.aten._flash_attention_forward
    with pytest.raises(Unavailable, match="no_such_operator"):
        library_operator("torch", "lib/libtorch_cpu.so", "aten", "no_such_operator")


def test_this_torch_has_the_operator_we_know() -> None:
    assert callable(torch_flash.load())


def test_a_signature_that_lacks_an_argument_is_refused() -> None:
    def kernel(q: int, k: int = 0) -> tuple[int, int]:
        return q, k

    assert bind("kernel", kernel, "q")(q=1) == (1, 0)
    assert bind("kernel", kernel, "q", {"k": 5, "other": 1})(q=1) == (1, 5)
    with pytest.raises(Unavailable, match="kernel has no argument v"):
        bind("kernel", kernel, "q v")
    with pytest.raises(Unavailable, match="kernel demands q"):
        bind("kernel", kernel, "k")
    for form in (kernel, bind("kernel", kernel, "q", {"k": 5})):
        assert takes(form, "k q")
        assert not takes(form, "q v")


def test_an_operator_that_demands_more_is_refused() -> None:
    with operators(Recorder()) as found:
        operator = found["fwd_kvcache"]
        names = "q kcache vcache softmax_scale is_causal window_size_left window_size_right softcap"
        with pytest.raises(Unavailable, match="demands num_splits"):
            bind("fwd_kvcache", operator, names, {"is_rotary_interleaved": True})
        bound: Any = bind(
            "fwd_kvcache", operator, names + " num_splits", {"is_rotary_interleaved": True}
        )
        assert bound.keywords["block_table"] is None  # optional, and without a default
