// Ordinary device and host allocations, memory information and pointer attributes.
#include <iterator>

#include "entry.h"

namespace fake {
namespace {

std::size_t whole_host_pages(std::size_t size) {
  return (size + kHostPage - 1) / kHostPage * kHostPage;
}

// Built from the same parts as mappings, so that kernels and copies are checked in one way.
CUresult allocate(World& world, std::size_t size, CUdeviceptr* out) {
  const int device = world.current_device();
  CUmemGenericAllocationHandle handle = 0;
  CUresult code = world.create_handle(device, size, &handle);
  if (code != CUDA_SUCCESS) return code;
  code = world.reserve(size, kHostPage, 0, false, out);
  if (code == CUDA_SUCCESS) {
    code = world.map(*out, size, handle);
    if (code != CUDA_SUCCESS) world.unreserve(*out);
  }
  world.handles.at(handle).references = 0;  // the mapping keeps it
  world.collect(handle);
  if (code == CUDA_SUCCESS) {
    const auto first = world.mappings.find(*out);
    code = world.set_access(first, std::next(first), device, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
  }
  return code;
}

struct PointerInfo {
  int device;  // -1: host
  CUdeviceptr base;
  std::size_t size;
};

bool find_pointer(World& world, CUdeviceptr address, PointerInfo* out) {
  const auto it = world.mapping_at(address);
  if (it != world.mappings.end() && it->first <= address) {
    *out = {world.handles.at(it->second.handle).device, it->first, it->second.size};
    return true;
  }
  auto host = world.host_allocations.upper_bound(address);
  if (host == world.host_allocations.begin()) return false;
  --host;
  *out = {-1, host->first, host->second};
  return address - host->first < host->second;
}

}  // namespace
}  // namespace fake

using fake::Api, fake::enter, fake::kContext, fake::kUnsafe, fake::Lock, fake::World;

CUresult CUDAAPI cuMemGetInfo(size_t* free, size_t* total) {
  return enter(Api::kMemGetInfo, kContext, [&](World& world, Lock&) {
    if (!free || !total) return CUDA_ERROR_INVALID_VALUE;
    const std::size_t used =
        world.devices[static_cast<std::size_t>(world.current_device())].used_bytes;
    *total = world.config.device_bytes;
    *free = used < *total ? *total - used : 0;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuMemAlloc(CUdeviceptr* out, size_t size) {
  return enter(Api::kMemAlloc, kContext | kUnsafe, [&](World& world, Lock&) {
    if (!out || size == 0) return CUDA_ERROR_INVALID_VALUE;
    if (size > world.config.device_bytes) return CUDA_ERROR_OUT_OF_MEMORY;
    return fake::allocate(world, fake::whole_host_pages(size), out);
  });
}

CUresult CUDAAPI cuMemFree(CUdeviceptr start) {
  return enter(Api::kMemFree, kContext | kUnsafe, [&](World& world, Lock&) {
    if (start == 0) return CUDA_SUCCESS;
    const auto found = world.reservations.find(start);
    if (found == world.reservations.end() || found->second.vmm) return CUDA_ERROR_INVALID_VALUE;
    world.check_unused("cuMemFree", start, found->second.size);
    const auto mapping = world.mappings.find(start);
    const CUresult code = world.unmap(mapping, std::next(mapping));
    if (code == CUDA_SUCCESS) world.unreserve(start);
    return code;
  });
}

CUresult CUDAAPI cuMemHostAlloc(void** out, size_t size, unsigned int flags) {
  return enter(Api::kMemHostAlloc, kContext | kUnsafe, [&](World& world, Lock&) {
    constexpr unsigned kKnown =
        CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP | CU_MEMHOSTALLOC_WRITECOMBINED;
    if (!out || size == 0 || (flags & ~kKnown) != 0) return CUDA_ERROR_INVALID_VALUE;
    const std::size_t rounded = fake::whole_host_pages(size);
    void* base = rounded < size ? nullptr : fake::Backing::allocate_host(rounded);
    if (!base) return CUDA_ERROR_OUT_OF_MEMORY;
    world.host_allocations[reinterpret_cast<std::uintptr_t>(base)] = rounded;
    *out = base;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuMemFreeHost(void* base) {
  return enter(Api::kMemFreeHost, kContext | kUnsafe, [&](World& world, Lock&) {
    const auto found = world.host_allocations.find(reinterpret_cast<std::uintptr_t>(base));
    if (found == world.host_allocations.end()) return CUDA_ERROR_INVALID_VALUE;
    world.check_unused("cuMemFreeHost", found->first, found->second);
    fake::Backing::release(base, found->second);
    world.host_allocations.erase(found);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuPointerGetAttribute(void* data, CUpointer_attribute which, CUdeviceptr address) {
  return enter(Api::kPointerGetAttribute, kContext, [&](World& world, Lock&) {
    fake::PointerInfo info = {};
    if (!data || !fake::find_pointer(world, address, &info)) return CUDA_ERROR_INVALID_VALUE;
    const bool on_host = info.device < 0;
    switch (which) {
      case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        *static_cast<unsigned*>(data) = on_host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
        return CUDA_SUCCESS;
      case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
        *static_cast<CUdeviceptr*>(data) = address;
        return CUDA_SUCCESS;
      case CU_POINTER_ATTRIBUTE_HOST_POINTER:
        if (!on_host) return CUDA_ERROR_INVALID_VALUE;
        *static_cast<CUdeviceptr*>(data) = address;
        return CUDA_SUCCESS;
      case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
        *static_cast<int*>(data) = on_host ? world.current_device() : info.device;
        return CUDA_SUCCESS;
      case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
        *static_cast<CUdeviceptr*>(data) = info.base;
        return CUDA_SUCCESS;
      case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
        *static_cast<std::size_t*>(data) = info.size;
        return CUDA_SUCCESS;
      case CU_POINTER_ATTRIBUTE_IS_MANAGED:
        *static_cast<int*>(data) = 0;
        return CUDA_SUCCESS;
      default:
        return CUDA_ERROR_NOT_SUPPORTED;
    }
  });
}

// Of memory that was mapped, this is the mapping, as it is of cuMemAlloc the allocation.
CUresult CUDAAPI cuMemGetAddressRange(CUdeviceptr* base, size_t* size, CUdeviceptr address) {
  return enter(Api::kMemGetAddressRange, kContext, [&](World& world, Lock&) {
    fake::PointerInfo info = {};
    if (!fake::find_pointer(world, address, &info)) return CUDA_ERROR_NOT_FOUND;
    if (base) *base = info.base;
    if (size) *size = info.size;
    return CUDA_SUCCESS;
  });
}
