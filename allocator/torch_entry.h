// What PyTorch's pluggable allocator calls, by address: torch.cuda.memory.CUDAPluggableAllocator
// takes the first two, the setters of its `_allocator` the others. The signatures are those of
// torch/csrc/cuda/CUDAPluggableAllocator.h, with the same C++ types for pools of graphs, so that
// no header of PyTorch is needed.
//
// Any thread calls them, with the GIL or without; nothing here takes it. Errors are PyTorch's own:
// c10::OutOfMemoryError for a lack of memory, c10::Error for all else.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>

#include "scope.h"

struct CUstream_st;  // cudaStream_t and CUstream are pointers to it

namespace vattn {

using TorchStream = CUstream_st*;

// Frees that were refused. PyTorch frees in destructors, which must not throw: the first of a kind
// is written to stderr, all are counted.
enum class BadFree : std::uint8_t {
  kUnknown,      // no live block: freed before, or never allocated here
  kWrongSize,    // a live block of another size
  kWrongDevice,  // a live block of another device
  kFailed,       // the driver failed, or a pool of a graph that is not there was released
  kCount
};
inline constexpr std::size_t kBadFrees = static_cast<std::size_t>(BadFree::kCount);
// The tag of the segments that torch.cuda.MemPool asks of `device` on this thread from now on,
// which has pools of several devices open at a time. Returns the one before.
TagId set_segment_tag(int device, TagId tag);

const char* bad_free_name(BadFree kind) noexcept;
std::array<std::uint64_t, kBadFrees> bad_frees() noexcept;

}  // namespace vattn

#define VATTN_TORCH_ENTRY __attribute__((visibility("default")))

extern "C" {

// Memory of `device` for work of `stream`; null for 0 bytes.
VATTN_TORCH_ENTRY void* vattn_torch_alloc(std::size_t bytes, int device, vattn::TorchStream stream);
// The same for torch.cuda.MemPool, of which PyTorch's own allocator asks whole segments: it takes a
// null for a lack of memory, gives up what it has cached, and asks again.
VATTN_TORCH_ENTRY void* vattn_torch_try_alloc(std::size_t bytes, int device,
                                              vattn::TorchStream stream);
// Never throws. In a child process after fork() it does nothing: the memory is the parent's.
VATTN_TORCH_ENTRY void vattn_torch_free(void* address, std::size_t bytes, int device,
                                        vattn::TorchStream stream) noexcept;
// PyTorch has found so many devices.
VATTN_TORCH_ENTRY void vattn_torch_init(int device_count);
// torch.cuda.empty_cache()
VATTN_TORCH_ENTRY void vattn_torch_reset();
// torch.cuda.set_per_process_memory_fraction(): of the device's memory.
VATTN_TORCH_ENTRY void vattn_torch_memory_fraction(double fraction, int device);
// The block that an address lies in, and its size; `bytes` may be null.
VATTN_TORCH_ENTRY void* vattn_torch_base_alloc(void* address, std::size_t* bytes);
// Memory that is not ours is left alone, as PyTorch's own allocator does.
VATTN_TORCH_ENTRY void vattn_torch_record_stream(void* address, vattn::TorchStream stream);
// Requests for streams that `filter` accepts come from the pool from now on, until its end.
VATTN_TORCH_ENTRY void vattn_torch_begin_pool(int device, vattn::GraphPoolId id,
                                              std::function<bool(vattn::TorchStream)> filter);
VATTN_TORCH_ENTRY void vattn_torch_end_pool(int device, vattn::GraphPoolId id);
// Never throws: PyTorch calls it where graphs end.
VATTN_TORCH_ENTRY void vattn_torch_release_pool(int device, vattn::GraphPoolId id) noexcept;

}  // extern "C"
