// The entry points of the CUDA driver API that vattn calls, found at run time in libcuda.so.1.
//
// cuda.h gives types and names only: nothing links to libcuda, so that one build serves machines
// with a GPU and without. The header's macros give each function its versioned name (cuMemGetInfo
// is cuMemGetInfo_v2), here as everywhere that includes it.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>

#include "errors.h"

namespace vattn {

// Every function that vattn calls, and no other: a libcuda that lacks one is refused at load.
// clang-format off
#define VATTN_CUDA_CALLS(X)                                                                       \
  X(cuInit) X(cuGetErrorName) X(cuGetErrorString)                                                 \
  X(cuDeviceGetCount) X(cuDeviceGet) X(cuDeviceGetName) X(cuDeviceGetAttribute)                   \
  X(cuDevicePrimaryCtxRetain) X(cuDevicePrimaryCtxRelease) X(cuCtxGetCurrent) X(cuCtxSetCurrent)  \
  X(cuCtxSynchronize) X(cuThreadExchangeStreamCaptureMode)                                        \
  X(cuMemGetAllocationGranularity) X(cuMemAddressReserve) X(cuMemAddressFree) X(cuMemCreate)      \
  X(cuMemRelease) X(cuMemMap) X(cuMemUnmap) X(cuMemSetAccess) X(cuMemGetInfo)                     \
  X(cuMemcpyDtoDAsync) X(cuMemcpyDtoHAsync) X(cuMemcpyHtoDAsync) X(cuMemsetD8Async)               \
  X(cuStreamCreate) X(cuStreamDestroy) X(cuStreamSynchronize) X(cuStreamWaitEvent)                \
  X(cuEventCreate) X(cuEventDestroy) X(cuEventRecord) X(cuEventQuery) X(cuEventSynchronize)
// clang-format on

// True for the codes after which no call in this process can succeed: an earlier kernel faulted,
// the device failed, or the driver is shutting down.
bool is_fatal(CUresult code) noexcept;

// One argument of a failed call, for its message.
struct CallArg {
  const char* name;
  std::uint64_t value;
  bool is_address = false;
};

class CudaApi {
 public:
  // Opens `path`; if that is empty the file that the environment variable VATTN_LIBCUDA names; if
  // that is unset libcuda.so.1. Throws DriverError naming the file or symbol that is missing. The
  // library is never closed: libcuda does not survive it.
  static std::shared_ptr<const CudaApi> load(const std::string& path);

  const std::string& path() const noexcept { return path_; }

#define VATTN_CUDA_FIELD(call) decltype(&::call) call = nullptr;
  VATTN_CUDA_CALLS(VATTN_CUDA_FIELD)
#undef VATTN_CUDA_FIELD

  // Throws DriverError unless `code` is success.
  void check(CUresult code, const char* call, std::initializer_list<CallArg> args = {}) const {
    if (code != CUDA_SUCCESS) throw error(code, call, args);
  }
  // The same for calls that take memory: running out of it is OutOfPages.
  void check_memory(CUresult code, const char* call,
                    std::initializer_list<CallArg> args = {}) const {
    if (code == CUDA_ERROR_OUT_OF_MEMORY) throw out_of_memory(call, args);
    check(code, call, args);
  }

  DriverError error(CUresult code, const char* call, std::initializer_list<CallArg> args) const;
  OutOfPages out_of_memory(const char* call, std::initializer_list<CallArg> args) const;
  // "CUDA_ERROR_INVALID_VALUE (1): invalid argument"
  std::string describe(CUresult code) const;

 private:
  CudaApi() = default;
  std::string path_;
};

}  // namespace vattn
