// cuda.h with exported declarations, and the list of driver functions that the fake implements.
#pragma once

// The library is built with hidden visibility. Declaring cuda.h's functions as visible exports
// exactly those that are defined, under the names that the header's macros give them.
#pragma GCC visibility push(default)
#include <cuda.h>
#pragma GCC visibility pop

#include <array>
#include <cstddef>

namespace fake {

// Written with the names that users know; the exported symbol may carry a suffix (_v2). The header
// may define the name as a macro, so the list is stringized without being expanded.
// clang-format off
#define FAKE_CUDA_APIS(X)                                                                        \
  X(Init) X(DriverGetVersion) X(GetProcAddress) X(GetErrorName) X(GetErrorString)                \
  X(DeviceGetCount) X(DeviceGet) X(DeviceGetName) X(DeviceGetAttribute)                          \
  X(DevicePrimaryCtxRetain) X(DevicePrimaryCtxRelease) X(CtxSetCurrent) X(CtxGetCurrent)         \
  X(CtxSynchronize)                                                                              \
  X(MemGetAllocationGranularity) X(MemAddressReserve) X(MemAddressFree)                          \
  X(MemCreate) X(MemRelease) X(MemRetainAllocationHandle)                                        \
  X(MemGetAllocationPropertiesFromHandle) X(MemGetAddressRange)                                  \
  X(MemMap) X(MemUnmap) X(MemSetAccess) X(MemGetAccess)                                          \
  X(MemGetInfo) X(MemAlloc) X(MemFree) X(MemHostAlloc) X(MemFreeHost) X(PointerGetAttribute)     \
  X(MemcpyDtoDAsync) X(MemcpyHtoDAsync) X(MemcpyDtoHAsync) X(MemcpyAsync) X(MemsetD8Async)       \
  X(MemcpyHtoD) X(MemcpyDtoH) X(MemsetD8)                                                        \
  X(StreamCreate) X(StreamDestroy) X(StreamSynchronize) X(StreamQuery) X(StreamWaitEvent)        \
  X(StreamIsCapturing) X(ThreadExchangeStreamCaptureMode)                                        \
  X(EventCreate) X(EventDestroy) X(EventRecord) X(EventQuery) X(EventSynchronize)
// clang-format on

enum class Api : unsigned char {
#define X(name) k##name,
  FAKE_CUDA_APIS(X)
#undef X
      kCount
};

inline constexpr std::size_t kApis = static_cast<std::size_t>(Api::kCount);

inline constexpr std::array<const char*, kApis> kApiNames = {
#define X(name) "cu" #name,
    FAKE_CUDA_APIS(X)
#undef X
};

inline const char* api_name(Api api) { return kApiNames[static_cast<std::size_t>(api)]; }

}  // namespace fake
