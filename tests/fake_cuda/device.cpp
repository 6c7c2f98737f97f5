// Initialization, devices and primary contexts.
#include <algorithm>
#include <cstdio>

#include "entry.h"
#include "text.h"

namespace fake {
namespace {

constexpr std::uintptr_t kContextBase = 0xc0de0000;

CUcontext context_of(int device) {
  return reinterpret_cast<CUcontext>(kContextBase +
                                     0x100 * static_cast<std::uintptr_t>(device + 1));
}

// -1: no context of ours.
int device_of(CUcontext context) {
  for (int device = 0; device < kMaxDevices; ++device) {
    if (context_of(device) == context) return device;
  }
  return -1;
}

// The attributes of an H100, where the fake has an opinion; 0 stands for the rest, as real CUDA
// answers for features that a device lacks.
int attribute(CUdevice_attribute which) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING:
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY:
    case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED:
      return 1;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return 9;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      return 0;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      return 132;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      return 1024;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      return 32;
    case CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE:
      return 50 << 20;
    default:
      return 0;
  }
}

void check_last_release(World& world, int device) {
  const std::size_t streams = world.streams.created();
  const std::size_t events = world.streams.events();
  const bool last_context = std::all_of(world.devices.begin(), world.devices.end(),
                                        [](const Device& d) { return d.retains == 0; });
  if (last_context && streams + events > 0) {
    world.violate(text("context of device %d destroyed with %zu streams and %zu events alive",
                       device, streams, events));
  }
}

}  // namespace
}  // namespace fake

using fake::Api, fake::enter, fake::kInit, fake::kNothing, fake::Lock, fake::World;

CUresult CUDAAPI cuInit(unsigned int flags) {
  return enter(Api::kInit, kNothing, [&](World& world, Lock&) {
    if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
    if (world.config.devices == 0) return CUDA_ERROR_NO_DEVICE;
    world.initialized = true;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDriverGetVersion(int* version) {
  return enter(Api::kDriverGetVersion, kNothing, [&](World&, Lock&) {
    if (!version) return CUDA_ERROR_INVALID_VALUE;
    *version = CUDA_VERSION;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDeviceGetCount(int* count) {
  return enter(Api::kDeviceGetCount, kInit, [&](World& world, Lock&) {
    if (!count) return CUDA_ERROR_INVALID_VALUE;
    *count = world.config.devices;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDeviceGet(CUdevice* device, int ordinal) {
  return enter(Api::kDeviceGet, kInit, [&](World& world, Lock&) {
    if (!device) return CUDA_ERROR_INVALID_VALUE;
    if (!world.valid_device(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDeviceGetName(char* name, int length, CUdevice device) {
  return enter(Api::kDeviceGetName, kInit, [&](World& world, Lock&) {
    if (!name || length <= 0) return CUDA_ERROR_INVALID_VALUE;
    if (!world.valid_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    std::snprintf(name, static_cast<std::size_t>(length), "Fake CUDA device %d", device);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  return enter(Api::kDeviceGetAttribute, kInit, [&](World& world, Lock&) {
    if (!value || which <= 0 || which >= CU_DEVICE_ATTRIBUTE_MAX) return CUDA_ERROR_INVALID_VALUE;
    if (!world.valid_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    *value = fake::attribute(which);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return enter(Api::kDevicePrimaryCtxRetain, kInit, [&](World& world, Lock&) {
    if (!context) return CUDA_ERROR_INVALID_VALUE;
    if (!world.valid_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    ++world.devices[static_cast<std::size_t>(device)].retains;
    *context = fake::context_of(device);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuDevicePrimaryCtxRelease(CUdevice device) {
  return enter(Api::kDevicePrimaryCtxRelease, kInit, [&](World& world, Lock&) {
    if (!world.valid_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    int& retains = world.devices[static_cast<std::size_t>(device)].retains;
    if (retains == 0) return CUDA_ERROR_INVALID_CONTEXT;
    if (--retains == 0) fake::check_last_release(world, device);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuCtxSetCurrent(CUcontext context) {
  return enter(Api::kCtxSetCurrent, kInit, [&](World& world, Lock&) {
    const int device = fake::device_of(context);
    if (!context) {
      world.set_current_device(-1);
      return CUDA_SUCCESS;
    }
    if (device < 0 || world.devices[static_cast<std::size_t>(device)].retains == 0) {
      return CUDA_ERROR_INVALID_CONTEXT;
    }
    world.set_current_device(device);
    return CUDA_SUCCESS;
  });
}

CUresult CUDAAPI cuCtxGetCurrent(CUcontext* context) {
  return enter(Api::kCtxGetCurrent, kInit, [&](World& world, Lock&) {
    if (!context) return CUDA_ERROR_INVALID_VALUE;
    const int device = world.current_device();
    *context = device < 0 ? nullptr : fake::context_of(device);
    return CUDA_SUCCESS;
  });
}
