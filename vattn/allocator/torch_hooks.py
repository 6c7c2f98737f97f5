"""What PyTorch offers to a memory allocator that is not its own, and what it leaves out.

``torch.cuda.memory.CUDAPluggableAllocator`` takes functions by address; all of ours are C++ and
take no GIL. It has no place for statistics, so the functions of ``torch._C`` that ask for them are
replaced: every call of ``torch.cuda.memory`` and ``torch.accelerator.memory`` comes down to those,
whoever imported it when.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vattn import _core
from vattn.allocator import torch_settings, torch_stats

# Setters of `CUDAPluggableAllocator(...)._allocator`, and whose address each gets.
SETTERS = {
    "set_init_fn": "init",
    "set_reset_fn": "reset",
    "set_memory_fraction_fn": "memory_fraction",
    "set_base_alloc_fn": "base_alloc",
    "set_record_stream_fn": "record_stream",
    "set_begin_allocate_to_pool": "begin_allocate_to_pool",
    "set_end_allocate_to_pool_fn": "end_allocate_to_pool",
    "set_release_pool": "release_pool",
}
# torch's current allocator, a C++ variable: PyTorch has no call that goes back to its own.
_CURRENT = "_ZN3c104cuda20CUDACachingAllocator9allocatorE"

# Where PyTorch has its exceptions; which has which differs between its versions.
_ERROR_LIBRARIES = ("libc10.so", "libc10_cuda.so", "libtorch_python.so")
_SUPPORTED = "use one that vattn supports, 2.11 to 2.13"
_MEM_POOL = (
    "torch.cuda.MemPool does not work while vattn.allocator is enabled: PyTorch has no hook for it "
    "in allocators that are not its own; use `with vattn.allocator.pool(tag=...)`"
)
_TREES = (
    "CUDA graph trees, as in torch.compile(mode='reduce-overhead' or 'max-autotune'), do not work "
    "while vattn.allocator is enabled: PyTorch has no hook for checkpoints in allocators that are "
    "not its own; use mode='default' or 'max-autotune-no-cudagraphs', or capture torch.cuda.graph()"
)


def require_cuda_build() -> None:
    """Raises RuntimeError if this torch cannot use CUDA, whatever the machine."""
    if torch.version.cuda is None or not hasattr(torch._C, "_cuda_customAllocator"):
        raise RuntimeError(
            f"this PyTorch ({torch.__version__}) is built without CUDA, so there is no CUDA memory "
            "to allocate; install a CUDA build of torch"
        )


def cuda_in_use() -> bool:
    """Whether PyTorch has initialized CUDA, after which its allocator stays.

    In a child of fork() whose parent had, CUDA cannot be used at all.
    """
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return started or torch.cuda._is_in_bad_fork()


def require_errors() -> None:
    """Makes sure that torch.OutOfMemoryError can be raised from C++.

    Raises:
        RuntimeError: this torch lacks what that takes; the message names it.
    """
    library = Path(torch.__file__).parent / "lib"
    missing = _core.find_torch_errors([str(library / name) for name in _ERROR_LIBRARIES])
    if missing:
        raise RuntimeError(
            f"this PyTorch ({torch.__version__}) has no {', '.join(missing)}, without which there "
            f"is no way to report that memory has run out; {_SUPPORTED}"
        )


def pluggable_allocator(alloc: str = "vattn_torch_alloc") -> Any:
    """Our functions as PyTorch takes them, with every setter used.

    Raises:
        RuntimeError: this torch lacks one of them.
    """
    allocator = torch.cuda.memory.CUDAPluggableAllocator(_core.__file__, alloc, "vattn_torch_free")
    inner = allocator._allocator
    missing = [name for name in SETTERS if not hasattr(inner, name)]
    if missing:
        raise RuntimeError(
            f"CUDAPluggableAllocator of this PyTorch ({torch.__version__}) has no "
            f"{', '.join(missing)}; {_SUPPORTED}"
        )
    points = _core.torch_entry_points()
    for setter, entry in SETTERS.items():
        getattr(inner, setter)(points[entry])
    return allocator


def current_allocator_address() -> int | None:
    """Where PyTorch's current allocator is, to come back to it; None where it cannot be told."""
    pointer = _current_pointer()
    return None if pointer is None else pointer.value


def put_back(address: int) -> None:
    """Makes that one the current allocator again."""
    pointer = _current_pointer()
    assert pointer is not None
    pointer.value = address


def _current_pointer() -> ctypes.c_void_p | None:
    library = Path(torch.__file__).parent / "lib" / "libc10_cuda.so"
    try:
        return ctypes.c_void_p.in_dll(ctypes.CDLL(str(library)), _CURRENT)
    except (OSError, ValueError):
        return None


class Patches:
    """Replacements of attributes, until they are undone."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Replaces an attribute that is there."""
        self._before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Puts back what was there."""
        while self._before:
            setattr(*self._before.pop())


def require_statistics() -> None:
    """Raises RuntimeError if this torch asks for its statistics by other names."""
    names = (*torch_stats.ANSWERS, "_cuda_setMemoryFraction")
    missing = [name for name in names if not hasattr(torch._C, name)]
    if missing:
        raise RuntimeError(
            f"torch._C of this PyTorch ({torch.__version__}) has no {', '.join(missing)}; "
            f"{_SUPPORTED}"
        )


def patch_torch() -> Patches:
    """Answers torch's statistics from ours, and makes errors clear where nothing can be done."""
    patches = Patches()
    try:
        _answer_statistics(patches)
        _refuse_the_rest(patches)
    except BaseException:
        patches.undo()
        raise
    return patches


def _answer_statistics(patches: Patches) -> None:
    for name, answer in torch_stats.ANSWERS.items():
        patches.set(torch._C, name, answer)
    for name, answer in torch_stats.ACCELERATOR_ANSWERS.items():
        if hasattr(torch._C, name):
            patches.set(torch._C, name, answer)
    set_fraction = torch_stats.set_memory_fraction(torch._C._cuda_setMemoryFraction)
    patches.set(torch._C, "_cuda_setMemoryFraction", set_fraction)
    for name, telling in torch_settings.warning_of_calls().items():
        if hasattr(torch._C, name):
            patches.set(torch._C, name, telling(getattr(torch._C, name)))


def _refuse_the_rest(patches: Patches) -> None:
    trees = ("_cuda_checkPoolLiveAllocations", "_cuda_getCheckpointState")
    for name in (*trees, "_cuda_setCheckpointPoolState"):
        if hasattr(torch._C, name):
            patches.set(torch._C, name, _refusal(_TREES))
    mem_pool = _refused_class(torch.cuda.memory.MemPool)
    for module in (torch.cuda, torch.cuda.memory):
        patches.set(module, "MemPool", mem_pool)
        patches.set(module, "use_mem_pool", _refusal(_MEM_POOL))


def _refusal(message: str) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> Any:
        raise RuntimeError(message)

    return refuse


def _refused_class(original: Any) -> Any:
    """A class that cannot be made, of which what was made before is an instance."""

    class MemPool(original):  # type: ignore[misc]
        def __init__(self, *_: object, **__: object) -> None:
            raise RuntimeError(_MEM_POOL)

    return MemPool
