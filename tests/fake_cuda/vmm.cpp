// Virtual memory management: reserve, create, map, set access, unmap.
//
// Every wrong argument is CUDA_ERROR_INVALID_VALUE, as the driver answers, except for a device that
// does not exist. None of these calls needs a current context: devices are named in the arguments.
#include <tuple>

#include "entry.h"

namespace fake {
namespace {

bool whole_granules(const World& world, std::uint64_t value) {
  return value % world.config.granularity == 0;
}

bool valid_range(const World& world, CUdeviceptr start, std::size_t size) {
  return size > 0 && whole_granules(world, start) && whole_granules(world, size) &&
         start + size > start;
}

CUresult check_location(const World& world, const CUmemLocation& location) {
  if (location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_INVALID_VALUE;
  return world.valid_device(location.id) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

// Only pinned device memory exists here; exporting it is not implemented, so a request for an
// exportable handle is refused instead of being forgotten.
CUresult check_properties(const World& world, const CUmemAllocationProp* prop) {
  if (!prop || prop->type != CU_MEM_ALLOCATION_TYPE_PINNED) return CUDA_ERROR_INVALID_VALUE;
  if (prop->win32HandleMetaData) return CUDA_ERROR_INVALID_VALUE;
  if (prop->requestedHandleTypes != CU_MEM_HANDLE_TYPE_NONE) return CUDA_ERROR_NOT_SUPPORTED;
  if (prop->allocFlags.compressionType != 0 || prop->allocFlags.usage != 0) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  return check_location(world, prop->location);
}

bool is_vmm(const World& world, CUdeviceptr start, std::size_t size) {
  const Reservation* reservation = world.reservation_of(start, size);
  return reservation && reservation->vmm;
}

bool overlaps_mapping(World& world, CUdeviceptr start, std::size_t size) {
  const auto it = world.mapping_at(start);
  return it != world.mappings.end() && it->first < start + size;
}

// The mapping calls of a range work on whole mappings of one or more adjacent reservations.
bool whole_vmm_mappings(World& world, CUdeviceptr start, std::size_t size,
                        World::Mappings::iterator* first, World::Mappings::iterator* last) {
  if (!valid_range(world, start, size)) return false;
  std::tie(*first, *last) = world.whole_mappings(start, size);
  if (*first == *last) return false;
  for (auto it = *first; it != *last; ++it) {
    if (!is_vmm(world, it->first, it->second.size)) return false;
  }
  return true;
}

}  // namespace
}  // namespace fake

using fake::Api, fake::enter, fake::kInit, fake::kUnsafe, fake::Lock, fake::World;

CUresult CUDAAPI cuMemGetAllocationGranularity(size_t* granularity, const CUmemAllocationProp* prop,
                                               CUmemAllocationGranularity_flags option) {
  return enter(Api::kMemGetAllocationGranularity, kInit, [&](World& world, Lock&) {
    if (!granularity || (option != CU_MEM_ALLOC_GRANULARITY_MINIMUM &&
                         option != CU_MEM_ALLOC_GRANULARITY_RECOMMENDED)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    const CUresult code = fake::check_properties(world, prop);
    if (code == CUDA_SUCCESS) *granularity = world.config.granularity;
    return code;
  });
}

CUresult CUDAAPI cuMemAddressReserve(CUdeviceptr* out, size_t size, size_t alignment,
                                     CUdeviceptr hint, unsigned long long flags) {
  return enter(Api::kMemAddressReserve, kInit | kUnsafe, [&](World& world, Lock&) {
    const bool power_of_two = (alignment & (alignment - 1)) == 0;
    if (!out || flags != 0 || size == 0 || !power_of_two) return CUDA_ERROR_INVALID_VALUE;
    if (!fake::whole_granules(world, size) || !fake::whole_granules(world, alignment) ||
        hint % fake::kHostPage != 0) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    const std::size_t unit = alignment == 0 ? world.config.granularity : alignment;
    // A hint that is not aligned as asked is only a hint: it is ignored.
    return world.reserve(size, unit, hint % unit == 0 ? hint : 0, true, out);
  });
}

CUresult CUDAAPI cuMemAddressFree(CUdeviceptr start, size_t size) {
  return enter(Api::kMemAddressFree, kInit | kUnsafe, [&](World& world, Lock&) {
    const auto found = world.reservations.find(start);
    if (found == world.reservations.end() || !found->second.vmm || found->second.size != size ||
        fake::overlaps_mapping(world, start, size)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    world.unreserve(start);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuMemCreate(CUmemGenericAllocationHandle* handle, size_t size,
                             const CUmemAllocationProp* prop, unsigned long long flags) {
  return enter(Api::kMemCreate, kInit | kUnsafe, [&](World& world, Lock&) {
    if (!handle || flags != 0 || size == 0 || !fake::whole_granules(world, size)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    const CUresult code = fake::check_properties(world, prop);
    return code != CUDA_SUCCESS ? code : world.create_handle(prop->location.id, size, handle);
  });
}

CUresult CUDAAPI cuMemRelease(CUmemGenericAllocationHandle handle) {
  return enter(Api::kMemRelease, kInit | kUnsafe, [&](World& world, Lock&) {
    const auto found = world.handles.find(handle);
    if (found == world.handles.end() || found->second.references == 0) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    --found->second.references;
    world.collect(handle);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuMemRetainAllocationHandle(CUmemGenericAllocationHandle* handle, void* address) {
  return enter(Api::kMemRetainAllocationHandle, kInit, [&](World& world, Lock&) {
    const auto at = reinterpret_cast<CUdeviceptr>(address);
    const auto it = world.mapping_at(at);
    if (!handle || it == world.mappings.end() || it->first > at || !fake::is_vmm(world, at, 1)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    // Also brings back a handle that was released while mapped.
    ++world.handles.at(it->second.handle).references;
    *handle = it->second.handle;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuMemGetAllocationPropertiesFromHandle(CUmemAllocationProp* prop,
                                                        CUmemGenericAllocationHandle handle) {
  return enter(Api::kMemGetAllocationPropertiesFromHandle, kInit, [&](World& world, Lock&) {
    const auto found = world.handles.find(handle);
    if (!prop || found == world.handles.end() || found->second.references == 0) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    *prop = {};  // check_properties lets nothing else through
    prop->type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop->location = {CU_MEM_LOCATION_TYPE_DEVICE, found->second.device};
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuMemMap(CUdeviceptr start, size_t size, size_t offset,
                          CUmemGenericAllocationHandle handle, unsigned long long flags) {
  return enter(Api::kMemMap, kInit | kUnsafe, [&](World& world, Lock&) {
    const auto found = world.handles.find(handle);
    if (flags != 0 || offset != 0 || !fake::valid_range(world, start, size) ||
        found == world.handles.end() || found->second.references == 0 ||
        size > found->second.size || !fake::is_vmm(world, start, size) ||
        fake::overlaps_mapping(world, start, size)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    world.check_unused("cuMemMap", start, size);
    return world.map(start, size, handle);
  });
}

CUresult CUDAAPI cuMemUnmap(CUdeviceptr start, size_t size) {
  return enter(Api::kMemUnmap, kInit | kUnsafe, [&](World& world, Lock&) {
    World::Mappings::iterator first, last;
    if (!fake::whole_vmm_mappings(world, start, size, &first, &last)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    world.check_unused("cuMemUnmap", start, size);
    return world.unmap(first, last);
  });
}

CUresult CUDAAPI cuMemSetAccess(CUdeviceptr start, size_t size, const CUmemAccessDesc* descriptors,
                                size_t count) {
  return enter(Api::kMemSetAccess, kInit | kUnsafe, [&](World& world, Lock&) {
    World::Mappings::iterator first, last;
    if (!descriptors || count == 0 ||
        !fake::whole_vmm_mappings(world, start, size, &first, &last)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    for (std::size_t i = 0; i < count; ++i) {
      const CUmemAccess_flags flags = descriptors[i].flags;
      const CUresult code = fake::check_location(world, descriptors[i].location);
      if (code != CUDA_SUCCESS) return code;
      if (flags != CU_MEM_ACCESS_FLAGS_PROT_NONE && flags != CU_MEM_ACCESS_FLAGS_PROT_READ &&
          flags != CU_MEM_ACCESS_FLAGS_PROT_READWRITE) {
        return CUDA_ERROR_INVALID_VALUE;
      }
    }
    world.check_unused("cuMemSetAccess", start, size);
    CUresult code = CUDA_SUCCESS;
    for (std::size_t i = 0; i < count && code == CUDA_SUCCESS; ++i) {
      code = world.set_access(first, last, descriptors[i].location.id, descriptors[i].flags);
    }
    return code;
  });
}

CUresult CUDAAPI cuMemGetAccess(unsigned long long* flags, const CUmemLocation* location,
                                CUdeviceptr address) {
  return enter(Api::kMemGetAccess, kInit, [&](World& world, Lock&) {
    const auto it = world.mapping_at(address);
    if (!flags || !location || it == world.mappings.end() || it->first > address ||
        !fake::is_vmm(world, address, 1)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    const CUresult code = fake::check_location(world, *location);
    if (code == CUDA_SUCCESS) *flags = it->second.access[static_cast<std::size_t>(location->id)];
    return code;
  });
}
