// Copies and memsets: checked when submitted, checked again and done in stream order.
#include <cstring>
#include <utility>
#include <vector>

#include "submit.h"
#include "text.h"

namespace fake {
namespace {

struct Copy {
  const char* call;
  CUdeviceptr dst;
  CUdeviceptr src;
  std::size_t size;
  bool dst_on_device;
  bool src_on_device;
  bool synchronous = false;

  Range dst_range() const { return {dst, size}; }
  Range src_range() const { return {src, size}; }
};

std::byte* bytes_at(CUdeviceptr address) { return reinterpret_cast<std::byte*>(address); }

bool on_device(const World& world, CUdeviceptr start, std::size_t size) {
  return world.reservation_of(start, size) != nullptr;
}

bool pinned(const World& world, CUdeviceptr start, std::size_t size) {
  auto it = world.host_allocations.upper_bound(start);
  if (it == world.host_allocations.begin()) return false;
  --it;
  return start - it->first < it->second && size <= it->second - (start - it->first);
}

// A capturing stream takes kernels only; CUDA would take copies, the project's captured steps must
// not contain any (pages change beneath the graph).
bool check_not_captured(World& world, const Stream& stream, const char* call) {
  if (!stream.capturing) return true;
  world.violate(text("%s on a capturing stream", call));
  return false;
}

// Checks the device sides for `device` (-1: any) and logs what is wrong.
bool check_sides(World& world, const char* name, const Copy& copy, int device) {
  bool good = true;
  if (copy.dst_on_device) good &= check_accessible(world, name, {copy.dst_range()}, device);
  if (copy.src_on_device) good &= check_accessible(world, name, {copy.src_range()}, device, false);
  return good;
}

CUresult check_copy(World& world, const Stream& stream, const Copy& copy) {
  // Device memory given as a host pointer.
  if (!copy.dst_on_device && on_device(world, copy.dst, copy.size)) return CUDA_ERROR_INVALID_VALUE;
  if (!copy.src_on_device && on_device(world, copy.src, copy.size)) return CUDA_ERROR_INVALID_VALUE;
  if (!check_not_captured(world, stream, copy.call)) return CUDA_ERROR_INVALID_VALUE;
  if (!check_sides(world, copy.call, copy, stream.device)) return CUDA_ERROR_INVALID_VALUE;
  if (copy.dst_range().overlaps(copy.src_range())) {
    world.violate(text("%s: source and destination overlap", copy.call));
  }
  return CUDA_SUCCESS;
}

void run_copy(World& world, const Copy& copy, const std::vector<std::byte>& staged) {
  ++world.counters.copies;
  world.counters.copied_bytes += copy.size;
  // Unmapped meanwhile is a violation already, but the fake must not crash on it.
  if (!check_sides(world, text("queued %s", copy.call).c_str(), copy, -1)) return;
  if (world.backing.elide()) return;
  const std::byte* source = staged.empty() ? bytes_at(copy.src) : staged.data();
  std::memmove(bytes_at(copy.dst), source, copy.size);
}

CUresult submit_copy(World& world, Lock& lock, const Copy& copy, CUstream handle) {
  const StreamPtr stream = find_stream(world, handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (copy.size == 0) return CUDA_SUCCESS;
  const CUresult code = check_copy(world, *stream, copy);
  if (code != CUDA_SUCCESS) return code;
  // The driver stages pageable memory before it returns, and waits for copies into it.
  const bool stage = !copy.src_on_device && !pinned(world, copy.src, copy.size);
  const bool wait =
      copy.synchronous || (!copy.dst_on_device && !pinned(world, copy.dst, copy.size));
  std::vector<std::byte> staged;
  if (stage && !world.backing.elide()) {
    staged.assign(bytes_at(copy.src), bytes_at(copy.src) + copy.size);
  }
  // Pinned memory is in use until the copy is done, like device memory; pageable memory is not.
  Work work{.name = copy.call, .ranges = {}, .after = {}, .run = {}, .done = {}};
  if (copy.dst_on_device || !wait) work.ranges.push_back(copy.dst_range());
  if (!stage) work.ranges.push_back(copy.src_range());
  work.run = [&world, copy, staged = std::move(staged)] { run_copy(world, copy, staged); };
  const MarkPtr done = world.streams.submit(stream, std::move(work));
  return wait ? block(world, lock, {done}, copy.call) : CUDA_SUCCESS;
}

CUresult submit_memset(World& world, const char* call, CUdeviceptr start, unsigned char value,
                       std::size_t size, CUstream handle) {
  const StreamPtr stream = find_stream(world, handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  if (size == 0) return CUDA_SUCCESS;
  const Range range{start, size};
  if (!check_not_captured(world, *stream, call)) return CUDA_ERROR_INVALID_VALUE;
  if (!check_accessible(world, call, {range}, stream->device)) return CUDA_ERROR_INVALID_VALUE;
  auto run = [&world, call, range, value] {
    ++world.counters.memsets;
    world.counters.memset_bytes += range.size;
    if (!check_accessible(world, text("queued %s", call), {range}, -1)) return;
    if (!world.backing.elide()) std::memset(bytes_at(range.start), value, range.size);
  };
  world.streams.submit(
      stream,
      Work{.name = call, .ranges = {range}, .after = {}, .run = std::move(run), .done = {}});
  return CUDA_SUCCESS;
}

}  // namespace
}  // namespace fake

using fake::Api, fake::Copy, fake::enter, fake::kContext, fake::Lock, fake::World;

CUresult CUDAAPI cuMemcpyDtoDAsync(CUdeviceptr dst, CUdeviceptr src, size_t size, CUstream stream) {
  return enter(Api::kMemcpyDtoDAsync, kContext, [&](World& world, Lock& lock) {
    return submit_copy(world, lock, Copy{"cuMemcpyDtoDAsync", dst, src, size, true, true}, stream);
  });
}

CUresult CUDAAPI cuMemcpyHtoDAsync(CUdeviceptr dst, const void* src, size_t size, CUstream stream) {
  return enter(Api::kMemcpyHtoDAsync, kContext, [&](World& world, Lock& lock) {
    const auto from = reinterpret_cast<CUdeviceptr>(src);
    return submit_copy(world, lock, Copy{"cuMemcpyHtoDAsync", dst, from, size, true, false},
                       stream);
  });
}

CUresult CUDAAPI cuMemcpyDtoHAsync(void* dst, CUdeviceptr src, size_t size, CUstream stream) {
  return enter(Api::kMemcpyDtoHAsync, kContext, [&](World& world, Lock& lock) {
    const auto to = reinterpret_cast<CUdeviceptr>(dst);
    return submit_copy(world, lock, Copy{"cuMemcpyDtoHAsync", to, src, size, false, true}, stream);
  });
}

CUresult CUDAAPI cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t size, CUstream stream) {
  return enter(Api::kMemcpyAsync, kContext, [&](World& world, Lock& lock) {
    const bool to_device = fake::on_device(world, dst, size);
    const bool from_device = fake::on_device(world, src, size);
    const Copy copy{"cuMemcpyAsync", dst, src, size, to_device, from_device};
    return submit_copy(world, lock, copy, stream);
  });
}

CUresult CUDAAPI cuMemsetD8Async(CUdeviceptr start, unsigned char value, size_t size,
                                 CUstream stream) {
  return enter(Api::kMemsetD8Async, kContext, [&](World& world, Lock&) {
    return fake::submit_memset(world, "cuMemsetD8Async", start, value, size, stream);
  });
}

// The calls without a stream: in the order of the default stream, and done when they return. A
// memset is not waited for, on a GPU neither.

CUresult CUDAAPI cuMemcpyHtoD(CUdeviceptr dst, const void* src, size_t size) {
  return enter(Api::kMemcpyHtoD, kContext, [&](World& world, Lock& lock) {
    const auto from = reinterpret_cast<CUdeviceptr>(src);
    const Copy copy{"cuMemcpyHtoD", dst, from, size, true, false, true};
    return submit_copy(world, lock, copy, nullptr);
  });
}

CUresult CUDAAPI cuMemcpyDtoH(void* dst, CUdeviceptr src, size_t size) {
  return enter(Api::kMemcpyDtoH, kContext, [&](World& world, Lock& lock) {
    const auto to = reinterpret_cast<CUdeviceptr>(dst);
    const Copy copy{"cuMemcpyDtoH", to, src, size, false, true, true};
    return submit_copy(world, lock, copy, nullptr);
  });
}

CUresult CUDAAPI cuMemsetD8(CUdeviceptr start, unsigned char value, size_t size) {
  return enter(Api::kMemsetD8, kContext, [&](World& world, Lock&) {
    return fake::submit_memset(world, "cuMemsetD8", start, value, size, nullptr);
  });
}
